"""Which of timm's networks can be trained in pieces: `python tests/battery.py [NAMES] [--all] [--again]`.

Every network is built small in images, not in itself, and divided into two to four modules; one block of each stays in its meta
model. It *passes* if the meta model runs; if each hybrid trains the module's parameters, moves no other tensor, and enters the
frozen prefix at the cut; if the graft of all modules into the meta model is the target bit for bit, in logits and gradients, in
eval mode and in train mode; if the modules load strictly into a stock network with equal logits; and if the identity start
computes what the meta model computes, and the stack start copies, where the network has what they need. Where numbers differ by
at most 1e-6 of the largest, it passes *within 1e-6*: attention takes another kernel if its bias needs no gradient.

Without names these are the networks of the tracked table (data/results/networks.csv), and for model files that have none there
the smallest networks, until one passes. Each runs in a process of its own, two at a time, with a limit on its seconds of CPU.
What the table has from this version of timm stays as it is, unless --again is given.
"""

import argparse
import contextlib
import datetime
import functools
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from pieces import FAILS, FOUND, blank, check

from incubate_lib.training.team import device_name

TABLE = Path(__file__).resolve().parents[1] / "data" / "results" / "networks.csv"
COLUMNS = [*FOUND, "date", "device", "torch", "timm"]
VERSIONS = {"torch": torch.__version__, "timm": timm.__version__}
SECONDS = 120  # of CPU
TRIED = 4  # networks of a file of which none passes
AT_ONCE = 2


def rows(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Check networks in forks of this process, which has imported all; yield each one's row when it is there."""
    fork, waiting, running = multiprocessing.get_context("fork"), iter(names), {}
    while True:
        while len(running) < AT_ONCE and (name := next(waiting, None)):
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=in_a_process, args=(name, theirs))
            process.start()
            theirs.close()
            running[ours] = name, process
        if not running:
            return
        for ours in connection.wait([*running]):
            name, process = running.pop(ours)
            try:
                row = ours.recv()
            except EOFError:
                process.join()
                late = process.exitcode == -signal.SIGXCPU
                why = f"it takes more than {SECONDS} s of CPU" if late else f"its process ended with status {process.exitcode}"
                row = blank(name) | {"why": why, "seconds": float(SECONDS)}
            process.join()
            yield row | {"date": datetime.date.today().isoformat(), "device": device_name(torch.device("cpu"))} | VERSIONS


def in_a_process(name: str, answer: connection.Connection) -> None:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = check(name)
    answer.send(row | {"seconds": time.process_time()})


@functools.cache
def smallest(file: str) -> list[str]:
    """Return the networks of a model file, those of few weights first."""

    def weights(name: str) -> float:
        with contextlib.suppress(Exception), torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        return float("inf")

    return sorted(timm.list_models(module=file), key=weights)


def read() -> pd.DataFrame:
    return pd.read_csv(TABLE, dtype=str, keep_default_na=False) if TABLE.exists() else pd.DataFrame(columns=COLUMNS)


def write(row: dict[str, Any]) -> None:
    """Put a row in its place in the table."""
    table = read()
    row = {column: f"{row[column]:.1g}" if isinstance(row[column], float) else str(row[column]) for column in COLUMNS}
    table = pd.concat([table[table["network"] != row["network"]], pd.DataFrame([row])])
    table.sort_values(["file", "network"]).to_csv(TABLE, index=False)


def next_ones() -> list[str]:
    """Return another network of each model file of which none passes so far."""
    known, found = read(), []
    for file in timm.list_modules():
        rows = known[known["file"] == file]
        if len(rows) < TRIED and (rows["result"] == FAILS).all():
            found += [name for name in smallest(file) if name not in set(rows["network"])][:1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="networks of timm")
    parser.add_argument("--all", action="store_true", help="every network that timm has")
    parser.add_argument("--again", action="store_true", help="also those that the table has already")
    options = parser.parse_args()
    known = read()
    done = set() if options.again else set(known.loc[known["timm"] == timm.__version__, "network"])
    todo = options.names or (timm.list_models() if options.all else list(known["network"]))
    todo = [name for name in todo if name not in done] or ([] if options.names else next_ones())
    while todo:
        for row in rows(todo):
            write(row)
            print(f"{row['network']}: {row['result']}; {row['starts']}; {row['seconds']:.1f} s; {row['why']}", flush=True)
        todo = [] if options.names else next_ones()
    table = read()
    passing = table[table["result"] != FAILS]
    print(
        f"{len(passing)} of {len(table)} networks pass, of {passing['file'].nunique()} of {table['file'].nunique()} model files"
    )


if __name__ == "__main__":
    main()
