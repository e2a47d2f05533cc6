"""Bad inputs for every command, each in a process and a data folder of its own: how each is refused, as a table.

    python tests/bad_inputs.py [--kind KIND] [--name WORDS] [--sample N] [--warm]

A bad input is refused well if the exit status is 2, within 2 seconds, or 20 where torch is imported, in at most two lines, with
less than 1 GB of memory, and nothing is written. `check` may have looked and found faults, too: status 1. With --warm processes
are forks of one that has imported everything: many times faster, and their seconds and memory do not tell what users see.
"""

import argparse
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

from bad import cluster, commands, downstream, images, networks, notebooks, records, settings, studies, texts, together, weights
from bad.case import NOTEBOOK, Bad

CATALOGUE = [
    case
    for room in (commands, settings, together, networks, images, texts, downstream, weights, cluster, studies, notebooks, records)
    for case in room.catalogue()
]
TIMEOUT, SECONDS, SECONDS_TORCH, MEMORY = 60.0, 2.0, 20.0, 1e9
PATIENCE = 3.0  # seconds from the first file that is written to the end of a process that seems to train
LINES, CHARACTERS = 2, 1000  # of a message
FAULTS = ("crash", "late", "accepted", "status", "unclear", "long", "written", "slow", "memory")
# What a process does besides: it is stopped before it has all memory, and says at its end whether it imported torch.
BEGIN = """
import atexit, os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
note, code = sys.argv.pop(1), sys.argv.pop(1)
atexit.register(lambda: open(note, "w").write("torch" if "torch" in sys.modules else ""))
exec(code)
"""
COMMAND = "import runpy; runpy.run_module('incubate_lib.cli', run_name='__main__', alter_sys=True)"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Answer:
    """What became of a bad input."""

    case: Bad
    status: int | None  # none: no answer in time
    said: str
    seconds: float
    torch: bool
    memory: int  # bytes
    written: list[str]

    def faults(self) -> list[str]:
        """Return what is wrong with the answer; nothing if the input was refused well."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        told = self.case.may_be_told and self.status == 0
        allowed = (1, 2) if self.case.command[:1] == ("check",) else (2,)
        limit = SECONDS_TORCH if self.torch else SECONDS
        wrong = {
            "crash": "Traceback" in self.said or self.status == 70 or (self.status or 0) < 0,
            "late": self.status is None,
            "accepted": self.status == 0 and not told,
            "status": self.status not in (None, 0, 70, *allowed),
            "unclear": self.status in (0, *allowed) and self.case.says not in self.said,
            "long": not told and self.status != 1 and (len(lines) > LINES or len(self.said) > CHARACTERS),
            "written": bool(self.written),
            "slow": self.seconds > limit,
            "memory": self.memory > MEMORY,
        }
        return [fault for fault in FAULTS if wrong[fault]]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time stamp of each file, but for those of the process's own temporary folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name) != folder / "tmp"]
        for name in files:
            about = os.lstat(os.path.join(root, name))
            found[os.path.relpath(os.path.join(root, name), folder)] = about.st_size, about.st_mtime_ns
    return found


def prepare(case: Bad, here: Path, trained: Path | None) -> tuple[list[str], dict[str, str]]:
    """Make the input in a folder; return the arguments and the environment of what is given it."""
    (here / "tmp").mkdir(parents=True)
    if case.needs_run:
        shutil.copytree(trained, here / "data", symlinks=True)
    case.make(here)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("INCUBATE", "SLURM"))}
    env |= {
        "INCUBATE_DATA": "{here}/data",
        "TMPDIR": str(here / "tmp"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }
    env = {name: value.replace("{here}", str(here)) for name, value in (env | case.env).items()}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return [word.replace("{here}", str(here)) for word in case.command], env


class Asked:
    """A process that was given a bad input. It ends by itself, or is ended: after TIMEOUT, or when it has begun to train."""

    def __init__(self, case: Bad, trained: Path | None = None, warm: bool = False) -> None:
        self.case, self.place, self.reason = case, Path(tempfile.mkdtemp(prefix="bad-")), ""
        self.here = self.place / "here"
        arguments, env = prepare(case, self.here, trained)
        self.before, self.began, self.wrote = tree(self.here), time.monotonic(), None
        code = NOTEBOOK if case.is_notebook else COMMAND
        files = {name: self.place / name for name in ("printed", "said")}
        if case.is_notebook or case.may_be_told:
            files["printed"] = files["said"]
        self.pid = os.fork() if warm else self._begin(code, arguments, env, files)
        if self.pid == 0:
            _answer(code, arguments, env, self.here, files)

    def _begin(self, code: str, arguments: list[str], env: dict[str, str], files: dict[str, Path]) -> int:
        python = [sys.executable, "-c", BEGIN, str(self.place / "note"), code]
        with open(files["printed"], "ab") as printed, open(files["said"], "ab") as said:
            how = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": said, "start_new_session": True}
            self.process = subprocess.Popen([*python, *arguments], cwd=self.here, env=env, **how)
        return self.process.pid

    def poll(self) -> Answer | None:
        """Return the answer, once there is one."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.began
        if not pid:
            self.wrote = self.wrote or (seconds if tree(self.here / "data") != self._data else None)
            if not self.reason and (seconds > TIMEOUT or (self.wrote and seconds > self.wrote + PATIENCE)):
                self.reason = "began" if self.wrote else "late"
                self._kill()
            return None
        if hasattr(self, "process"):
            self.process.returncode = status
        self._kill()  # what it left behind
        status = {"": os.waitstatus_to_exitcode(status), "began": 0, "late": None}[self.reason]
        words = (self.place / "said").read_text(errors="replace")
        if self.case.command[:1] == ("check",) and status == 1:  # it names on standard output what it found
            words += (self.place / "printed").read_text(errors="replace")
        after, note = tree(self.here), self.place / "note"
        written = sorted(path for path in self.before.keys() | after.keys() if self.before.get(path) != after.get(path))
        torch = not hasattr(self, "process") or (note.exists() and note.read_text() == "torch")
        shutil.rmtree(self.place, ignore_errors=True)
        return Answer(self.case, status, words, seconds, torch, used.ru_maxrss * 1024, written)

    @cached_property
    def _data(self) -> dict[str, tuple[int, int]]:
        return {os.path.relpath(path, "data"): about for path, about in self.before.items() if path.startswith("data/")}

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _answer(code: str, arguments: list[str], env: dict[str, str], here: Path, files: dict[str, Path]) -> NoReturn:
    """Do in a fork of this process what a process of its own does."""
    status = 70
    try:
        os.setsid()
        for number, name in enumerate(("printed", "said"), 1):
            os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(here)
        sys.argv, tempfile.tempdir = ["incubate", *arguments], None
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # it is there already
        exec(code, {"__name__": "bad_input"})
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ask(cases: list[Bad], trained: Path | None = None, warm: bool = False) -> Iterator[Answer]:
    """Give bad inputs to processes, two at a time; yield the answers as they come."""
    waiting, busy = list(reversed(cases)), []
    while waiting or busy:
        while waiting and len(busy) < 2:
            busy.append(Asked(waiting.pop(), trained, warm))
        for asked in list(busy):
            if answer := asked.poll():
                busy.remove(asked)
                yield answer
        time.sleep(0.05)


def train(data: Path) -> Path:
    """Train the preset smoke, without its notebooks, in a process of its own; return the data folder."""
    code = "from incubate_lib.config import load_settings; from incubate_lib.pipeline.strategies import plan; "
    code += "plan(load_settings('smoke'), ['end_to_end', 'deep_incubation'], [0]).run()"
    env = os.environ | {"INCUBATE_DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)
    return data


def sample(number: int, cases: list[Bad], seed: int = 0) -> list[Bad]:
    """Return so many inputs, of every kind about as many."""
    draw = random.Random(seed)
    kinds: dict[str, list[Bad]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    for of_kind in kinds.values():
        draw.shuffle(of_kind)
    turns = [
        case for turn in range(max(map(len, kinds.values()))) for of_kind in kinds.values() for case in of_kind[turn : turn + 1]
    ]
    return turns[:number]


def table(answers: list[Answer]) -> str:
    """Return how many inputs of each kind were refused well, and how many were not, by what was wrong."""
    columns = ("inputs", "refused well", *FAULTS)
    rows = {kind: Counter() for kind in dict.fromkeys(answer.case.kind for answer in answers)}
    for answer in answers:
        faults = answer.faults()
        for row in (rows[answer.case.kind], rows.setdefault("all", Counter())):
            row.update(["inputs", *(faults or ["refused well"])])
    rows["all"] = rows.pop("all")
    lines = [f"{'kind':<22}" + "".join(f"{column:>14}" for column in columns)]
    lines += [f"{kind:<22}" + "".join(f"{row[column]:>14}" for column in columns) for kind, row in rows.items()]
    return "\n".join(lines)


def in_words(answer: Answer) -> str:
    """Say what a bad input was answered, and what is wrong with that."""
    how = f"status {answer.status}, {answer.seconds:.1f} s, {answer.memory / 1e6:.0f} MB"
    written = f"  written: {', '.join(answer.written[:5])}\n" if answer.written else ""
    said = " ".join(answer.said[:100000].split())[:300]
    return f"{answer.case.kind}, {answer.case}\n  {', '.join(answer.faults())} ({how})\n{written}  {said}"


def _warm() -> None:
    """Import all that commands need, and begin the process that theirs are forks of."""
    from incubate_lib.pipeline import warm

    for name in (*warm.PRELOAD, "incubate_lib.cli", "papermill", "datasets"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    warm.prepare()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", help="only this kind, for example 'study files'")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many, of every kind")
    parser.add_argument("--warm", action="store_true", help="in forks of a process that has imported everything")
    parser.add_argument("--name", default="", metavar="WORDS", help="only those of which the name has these words")
    options = parser.parse_args()
    cases = [case for case in CATALOGUE if options.kind in (None, case.kind) and options.name in case.name]
    cases = sample(options.sample, cases) if options.sample else cases
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="bad-run-") as folder:
        trained = train(Path(folder) / "data") if any(case.needs_run for case in cases) else None
        if options.warm:
            _warm()
        try:
            for answer in ask(cases, trained, options.warm):
                answers.append(answer)
                how = " ".join(answer.faults()) or "well"
                print(f"{len(answers):4} {answer.seconds:5.1f} s  {how:<16} {answer.case}", flush=True)
        finally:
            print(f"\n{table(answers)}\n\n" + "\n\n".join(in_words(answer) for answer in answers if answer.faults()))
    return int(any(answer.faults() for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
