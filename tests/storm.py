"""Whether faults change anything: `python tests/storm.py --rounds 100`, or some of the rounds with `--first 40`.

Each round two runs of smoke that share phases are started side by side in a data folder of their own, meet faults at random
moments, and are started again until both are done: a process is killed, or a whole run; the disk is full for a while; the clock
is set back an hour, which shows in the stamps of the files; another host takes a phase over and falls silent. Then every phase
must hold the bits of a run in peace, nothing temporary may be left, and no run may have met a fault of ours (exit status 70).
"""

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = {"one": ["end_to_end", "deep_incubation"], "other": ["deep_incubation", "deep_incubation_stack"]}
DONE, OUR_FAULT = 0, 70
GIVE_UP = 60  # restarts of a round
ROOM = "200M"  # of a round's disk; a round needs a tenth of it
HOUR = 3600.0  # seconds
SILENT = (100.0, 118.0)  # seconds since the other host's last sign of life; after 120 it is taken for dead


def start(name: str, data: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "incubate_lib.cli", "run", "smoke", "--set", f"name={name}", "--jobs", "2"]
    command += ["--set", "machine.checkpoint_seconds=0", "--strategies", *STRATEGIES[name]]
    env = os.environ | {"INCUBATE_DATA": str(data), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with open(data.with_name(f"{data.name}-{name}.log"), "ab") as log:  # beside the disk that fills
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def weights(data: Path) -> dict[str, str]:
    """Return the SHA-256 of the weights of each finished phase by its digest."""
    summaries = (json.loads(file.read_text()) for file in data.glob("phases/*/summary.json"))
    return {summary["hash"]: summary["weights_sha256"] for summary in summaries}


# -- faults: each does its harm, waits if it lasts, and mends what a person would mend -----------------------------------------


def kill_a_process(data: Path, run: subprocess.Popen, chance: random.Random) -> None:
    whole = psutil.Process(run.pid)
    chance.choice([whole, *whole.children(recursive=True)]).send_signal(signal.SIGKILL)


def kill_the_run(data: Path, run: subprocess.Popen, chance: random.Random) -> None:
    os.killpg(run.pid, signal.SIGKILL)


def fill_the_disk(data: Path, run: subprocess.Popen, chance: random.Random) -> None:
    ballast = data / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    time.sleep(chance.uniform(1.0, 8.0))
    ballast.unlink()


def set_the_clock_back(data: Path, run: subprocess.Popen, chance: random.Random) -> None:
    """All that was written is an hour younger than now."""
    for path in data.rglob("*"):
        with_stamp(path, time.time() + HOUR)


def take_over_elsewhere(data: Path, run: subprocess.Popen, chance: random.Random) -> None:
    """Another host, which takes this one for dead, makes the next record of a phase, and is never heard of again."""
    if leases := list(data.glob("phases/*/lease")):
        lease = chance.choice(leases)
        number = max((int(path.stem) for path in lease.glob("*.json")), default=0) + 1
        record = {"host": "elsewhere", "pid": 1, "born": "there 1", "ended": False, "job": "", "restart": "0", "since": "then"}
        (lease / f"{number:06}.json").write_text(json.dumps(record))
        with_stamp(lease / f"{number:06}.json", time.time() - chance.uniform(*SILENT))


def with_stamp(path: Path, moment: float) -> None:
    with contextlib.suppress(FileNotFoundError):  # gone by now
        os.utime(path, (moment, moment), follow_symlinks=False)


FAULTS = {kill_a_process: 4, kill_the_run: 3, fill_the_disk: 2, set_the_clock_back: 1, take_over_elsewhere: 2}  # how often


# -- a round -------------------------------------------------------------------------------------------------------------------


def storm(data: Path, chance: random.Random, faults: int) -> Iterator[str]:
    """Bring both runs to their end through faults; yield the name of each, and every exit status that is no success."""
    running = {name: start(name, data) for name in STRATEGIES}
    starts = 0
    while running:
        time.sleep(chance.uniform(0.5, 8.0))
        for name, run in list(running.items()):
            if (code := run.poll()) is not None:
                del running[name]
                if code != DONE:
                    starts += 1
                    if starts > GIVE_UP:
                        raise SystemExit(f"{name} does not end: {data.with_name(f'{data.name}-{name}.log').read_text()[-3000:]}")
                    yield f"status {code}"
                    running[name] = start(name, data)
        if running and faults > 0:
            (fault,) = chance.choices(list(FAULTS), list(FAULTS.values()))
            faults -= 1
            try:
                fault(data, running[chance.choice(list(running))], chance)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue  # the run has just ended
            yield fault.__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first round: each has its own chance")
    parser.add_argument("--faults", type=int, default=6, help="of a round")
    options = parser.parse_args()
    wrong, met = 0, Counter()
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        peace = disk(Path(folder) / "peace")
        for name in STRATEGIES:
            if start(name, peace).wait() != DONE:
                raise SystemExit(peace.with_name(f"peace-{name}.log").read_text())
        expected = weights(peace)
        for number in range(options.first, options.first + options.rounds):
            data, begin = disk(Path(folder) / str(number)), time.monotonic()
            faults = Counter(storm(data, random.Random(number), options.faults))
            met += faults
            left = [str(path.relative_to(data)) for kind in ("checkpoint*", "*.tmp") for path in data.glob(f"phases/*/{kind}")]
            same = weights(data) == expected
            is_wrong = not same or bool(left) or f"status {OUR_FAULT}" in faults
            wrong += is_wrong
            print(
                f"round {number}: {'the same bits' if same else 'OTHER BITS'}, {time.monotonic() - begin:.0f} s, {dict(faults)}"
            )
            if is_wrong:
                print("left:", *left, *(log.read_text()[-3000:] for log in Path(folder).glob(f"{number}-*.log")), sep="\n")
            sys.stdout.flush()
            subprocess.run(["umount", "--lazy", data], check=True)
        subprocess.run(["umount", "--lazy", peace], check=True)
    print(f"{options.rounds} rounds, {wrong} wrong, {len(expected)} phases each; {dict(met)}")
    return 1 if wrong else 0


def disk(folder: Path) -> Path:
    """Make a folder that is a small disk of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], check=True)
    return folder


if __name__ == "__main__":
    if os.environ.get("STORM") != "inside":  # where disks may be mounted without harm, by anybody
        if not shutil.which("unshare"):
            raise SystemExit("unshare is needed (util-linux): each round has a small disk of its own")
        command = ["unshare", "--map-root-user", "--mount", sys.executable, __file__, *sys.argv[1:]]
        os.execvpe(command[0], command, os.environ | {"STORM": "inside"})
    sys.exit(main())
