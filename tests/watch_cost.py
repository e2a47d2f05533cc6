"""What watching a run costs the training: `python tests/watch_cost.py [MINUTES]`.

A process trains the preset digits end to end, another has the watch widget in a kernel-like process beside it. The second
is halted and let go by turns, and the training's steps are timed all the while: the ratio of both medians is the cost, and
that of halves of the halted time among themselves says how much of it is noise.
"""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

WINDOW = 10.0  # seconds
OVERRIDES = ["phases.end_to_end.epochs=100000", "phases.end_to_end.eval_every=1000", "machine.checkpoint_seconds=1e9"]
TRAIN = f"""
import sys, time, torch
from incubate_lib.pipeline.strategies import open_phase
from incubate_lib.training.trainer import Trainer
torch.set_num_threads(1)
step, times = Trainer.step, open(sys.argv[1], "w", buffering=1)
def timed(self, number):
    print(time.time(), file=times)
    return step(self, number)
Trainer.step = timed
open_phase("end_to_end", "digits", {OVERRIDES}).run()
"""
WATCH = f"""
import time
from incubate_lib.report.live.watch import Live
live = Live("digits", {OVERRIDES}, ["end_to_end"], [0], every=2.0)
while True:
    time.sleep(3600)
"""


def main(minutes: float) -> None:
    folder = Path(tempfile.mkdtemp())
    env = os.environ | {"INCUBATE_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    times = folder / "times"
    quiet = {"stdout": subprocess.DEVNULL, "env": env}
    training = subprocess.Popen([sys.executable, "-c", TRAIN, str(times)], **quiet)
    watching = None
    try:
        while not times.exists() or times.stat().st_size < 2000:
            assert training.poll() is None
            time.sleep(0.5)
        watching = subprocess.Popen([sys.executable, "-c", WATCH], **quiet)
        time.sleep(15)
        used, windows = psutil.Process(watching.pid).cpu_times(), []
        end = time.time() + 60 * minutes
        while time.time() < end:
            watched = len(windows) % 2 == 0
            watching.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
            began = time.time()
            time.sleep(WINDOW)
            windows.append((watched, began, time.time()))
            assert training.poll() is None and watching.poll() is None
        now = psutil.Process(watching.pid).cpu_times()
    finally:
        for process in filter(None, (training, watching)):
            process.kill()
    stamps = [float(line) for line in times.read_text().split("\n")[:-1]]
    steps = list(itertools.pairwise(stamps))
    took = [(w, [b - a for a, b in steps if begin <= a and b <= until]) for w, begin, until in windows]
    flat, halted = itertools.chain.from_iterable, [durations for watched, durations in took if not watched]
    pooled = {
        "watched": [*flat(durations for watched, durations in took if watched)], "halted": [*flat(halted)],
        "halted, one half": [*flat(halted[::2])], "halted, other half": [*flat(halted[1::2])],
    }  # fmt: skip
    median = {name: statistics.median(values) for name, values in pooled.items()}
    mean = {name: statistics.fmean(values) for name, values in pooled.items()}
    share = (now.user + now.system - used.user - used.system) / sum(until - begin for w, begin, until in windows if w)
    print(f"{len(stamps)} steps; ms a step, median (mean): watched {1e3 * median['watched']:.3f} ({1e3 * mean['watched']:.3f}), "
          f"not watched {1e3 * median['halted']:.3f} ({1e3 * mean['halted']:.3f})")  # fmt: skip
    for output, a, b in (("watched / not watched", "watched", "halted"), ("noise", "halted, one half", "halted, other half")):
        print(f"{output}: {median[a] / median[b]:.4f} by medians, {mean[a] / mean[b]:.4f} by means")
    print(f"the watching process used {share:.2%} of a core while it was let go")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
