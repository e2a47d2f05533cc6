"""Whether kills change anything: `python tests/storm.py --rounds 20`.

Each round two runs of smoke that share phases are started side by side in a data folder of their own, and processes of theirs
are killed at random moments, and started again, until both are done. Then every phase must hold the bits of a run in peace.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("one", "other")
STRATEGIES = {"one": ["end_to_end", "deep_incubation"], "other": ["deep_incubation", "deep_incubation_stack"]}
DONE, STOPPED = 0, 130
GIVE_UP = 40  # restarts of a round


def start(name: str, data: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "incubate_lib.cli", "run", "smoke", "--set", f"name={name}", "--jobs", "2"]
    command += ["--set", "machine.checkpoint_seconds=0", "--strategies", *STRATEGIES[name]]
    env = os.environ | {"INCUBATE_DATA": str(data), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with open(data / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def weights(data: Path) -> dict[str, str]:
    """Return the SHA-256 of the weights of each finished phase by its digest."""
    summaries = (json.loads(file.read_text()) for file in data.glob("phases/*/summary.json"))
    return {summary["hash"]: summary["weights_sha256"] for summary in summaries}


def kill_one(process: subprocess.Popen, chance: random.Random) -> str:
    """Kill a process of a run, or all of it; say which."""
    try:
        whole = psutil.Process(process.pid)
        tree = [whole, *whole.children(recursive=True)]
        if chance.random() < 0.3:
            os.killpg(process.pid, signal.SIGKILL)
            return "the whole run"
        victim = chance.choice(tree)
        place = tree.index(victim)
        victim.send_signal(signal.SIGKILL)
        return f"process {place} of {len(tree)}"
    except (psutil.NoSuchProcess, ProcessLookupError):
        return "nobody: it was gone"


def storm(data: Path, chance: random.Random) -> int:
    """Run both runs to their end through kills; return how many there were."""
    running = {name: start(name, data) for name in NAMES}
    kills = starts = 0
    while running:
        time.sleep(chance.uniform(1.0, 15.0))
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[name]
                if code != DONE:
                    starts += 1
                    if starts > GIVE_UP:
                        raise SystemExit(f"{name} does not end: {(data / f'{name}.log').read_text()[-3000:]}")
                    running[name] = start(name, data)
        if running and kills < 12:
            print(f"  {kill_one(running[chance.choice(list(running))], chance)}", flush=True)
            kills += 1
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        peace = Path(folder) / "peace"
        peace.mkdir()
        for name in NAMES:
            if start(name, peace).wait() != DONE:
                raise SystemExit((peace / f"{name}.log").read_text())
        expected, wrong, kills = weights(peace), 0, 0
        for number in range(options.rounds):
            data = Path(folder) / str(number)
            data.mkdir()
            kills += storm(data, random.Random(options.seed + number))
            same = weights(data) == expected
            left = [
                str(path.relative_to(data)) for pattern in ("checkpoint*", "*.tmp") for path in data.glob(f"phases/*/{pattern}")
            ]
            wrong += not same or bool(left)
            print(
                f"round {number + 1}: {'the same bits' if same else 'OTHER BITS'}{', left: ' if left else ''}{' '.join(left)}",
                flush=True,
            )
    print(f"{options.rounds} rounds, {kills} kills, {wrong} wrong; {len(expected)} phases each")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
