"""Whether a change of the code leaves every number as it was: `python tests/oracle.py COMMIT`.

Trains the same list with that commit and with the working tree, one after the other on this machine, and compares weights,
curves and summaries bit by bit. Nothing is tracked that another machine would have to reproduce, because processors of one
name do not round alike; only `make test` has small recorded tensors, of two strategies of smoke, and skips them where this
machine rounds otherwise than the one that recorded them (`--record` writes them again).

Each side is a command line and what that leaves on the disk. Names that changed in between stand in renamed.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from alike import curves, differences, found, tensors, unlike
from PIL import Image
from renamed import CHANGES, Change, flat, nested, renamed, renamed_keys
from rounding import rounding
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
INCUBATE = [sys.executable, "-m", "incubate_lib.cli"]
RECORDING = ROOT / "tests" / "oracle.safetensors"
BAD_INPUT = 2  # exit status of `incubate` where it does not know a name
TOLD = 20  # phases that differ, in full


@dataclass(frozen=True)
class Case:
    """What one run trains."""

    strategies: tuple[str, ...] = ()  # none: those of the preset
    settings: dict[str, Any] | None = None  # a settings file, in the names before all CHANGES; none: the preset named as the case
    write_images: Callable[[Path], None] | None = None  # given data/datasets


def write_pngs(datasets: Path) -> None:
    """Write 48 small colour images whose mean brightness tells their class, as a folder of folders."""
    rng = np.random.default_rng(0)
    for split, number in {"train": 12, "val": 4}.items():
        for label in range(3):
            folder = datasets / "pngs" / split / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = rng.integers(0, 40, (20, 24, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


SMALL = {
    "data": {"source": "synthetic", "num_images": 192, "test_images": 64, "val_images": 32},
    "model": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 6, "num_heads": 2, "in_chans": 1},
    "partition": {"num_modules": 3},
    "training": {"epochs": 2, "batch_size": 16, "lr": 2e-3, "warmup_epochs": 0.5, "clip_grad": 1.0, "drop_path": 0.1},
}
CASES = {
    "smoke": Case((
        "end_to_end", "deep_incubation", "deep_incubation_stack", "deep_incubation_identity", "stacking",
        "deep_incubation_recommended", "recommended",
        "growing", "random_modules", "imitation", "end_to_end_longer", "end_to_end_low_resolution", "mat", "mat_random",
        "mat_gradient_norm", "mat_inverted", "mat_multirate", "deep_incubation_mat",
    )),
    "digits": Case(),
    # the preset mat-digits, shorter and narrower, and one strategy whose units are rows of tensors
    "mat": Case(("mat", "mat_heads", "deep_incubation_mat"), {
        "data": {"source": "digits", "test_images": 597, "val_images": 200, "train_share": 0.2},
        "model": SMALL["model"] | {"patch_size": 2, "options": {"global_pool": "avg"}},
        "partition": {"num_modules": 3},
        "training": {"epochs": 3, "batch_size": 32, "lr": 2e-3, "warmup_epochs": 0.5, "clip_grad": 1.0},
        "mat": {"units": "sublayers", "threshold": "quantile", "alpha": 0.75, "stop_error": True, "probe": 8,
                "warmup_epochs": 0.5, "every_epochs": 0.5},
        "strategies": {"mat_heads": {"kind": "end_to_end", "match": "end_to_end",
                                     "mat": {"units": "heads", "threshold": "mass", "alpha": 0.5, "outputs": "all"}}},
    }),
    "mix": Case(("end_to_end", "deep_incubation"), SMALL | {
        "precision": "bfloat16",
        "training": SMALL["training"] | {"mixup": 0.8, "cutmix": 1.0, "ema": 0.9, "shift": 1, "micro_batch": 8},
    }),
    "stream": Case(("end_to_end", "deep_incubation"), SMALL | {
        "data": {"source": "folder", "folder": "pngs"},
        "model": SMALL["model"] | {"img_size": 16, "patch_size": 8, "in_chans": 3, "depth": 4},
        "partition": {"num_modules": 2},
        "training": {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "hflip": True, "randaugment": "rand-m9-mstd0.5-inc1",
                     "erase": 0.5, "repeats": 2},
        "machine": {"workers": 1},
    }, write_pngs),
    "gloo": Case(("end_to_end", "mat"), SMALL | {
        "phases": {"end_to_end": {"epochs": 2}},
        "mat": {"threshold": "quantile", "alpha": 0.6, "probe": 4},
        "machine": {"devices": 2},
    }),
    "vgg": Case(("end_to_end", "mat"), {  # the preset mat-fashion-vgg11 with generated images
        "data": {"source": "synthetic", "num_images": 60, "test_images": 20, "val_images": 10, "image_size": 32},
        "model": {"name": "vgg11_bn", "img_size": 32, "in_chans": 1, "options": {"mlp_ratio": 0.0625}},
        "training": {"epochs": 3, "batch_size": 10, "lr": 2.5e-4, "warmup_epochs": 1, "clip_grad": 1.0},
        "mat": {"units": "conv_layers", "threshold": "quantile", "alpha": 0.7, "probe": 8},
    }),
}  # fmt: skip
RECORDED = Case(("deep_incubation", "mat"))  # of smoke


class Failed(Exception):
    """A side could not train a case: what its command line said last."""


def train(root: Path, name: str, case: Case, data: Path, changes: Sequence[Change] = CHANGES) -> None:
    """Have the command line in a checkout train a case into a data folder; Failed if it does not.

    How many of the changes of names it knows shows in that it refuses names that it does not know.
    """
    if case.write_images:
        case.write_images(data / "datasets")
    data.mkdir(parents=True, exist_ok=True)
    refused = []
    for known in range(len(changes), -1, -1):
        result = _incubate(root, data, _arguments(name, case, data, changes[:known]))
        if result.returncode != BAD_INPUT:
            break
        refused.append(result.stderr.strip())
    if result.returncode:
        told = "\n".join(dict.fromkeys(refused)) if result.returncode == BAD_INPUT else result.stdout + result.stderr
        raise Failed(f"{name} in {root}: exit status {result.returncode}\n{told[-3000:]}")


def _arguments(name: str, case: Case, data: Path, changes: Sequence[Change]) -> list[str]:
    """Return the arguments of `incubate run` in the names after some changes; writes the settings file that they name."""
    strategies = [renamed(strategy, "strategies", changes) for strategy in case.strategies]
    if case.settings is not None:
        fields = flat(case.settings | {"run": strategies})
        file = data / f"{name}.yaml"
        file.write_text(yaml.safe_dump(nested(renamed_keys(fields, "settings", changes)), sort_keys=False))
        name = str(file)
    return [name, *(["--strategies", *strategies] if strategies else []), "--seeds", "0"]


def _incubate(root: Path, data: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run `incubate run` of a checkout on the CPU, one thread a phase, with a data folder of its own."""
    jobs = len(os.sched_getaffinity(0))
    own = {name: value for name, value in os.environ.items() if not name.startswith("INCUBATE_")}
    env = own | {
        "PYTHONPATH": str(root), "INCUBATE_DATA": str(data), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200",
    }  # fmt: skip
    command = [*INCUBATE, "run", *arguments, "--jobs", str(jobs)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, errors="replace")


def check_package(root: Path) -> None:
    """Make sure that a checkout runs its own code, not an installed copy; Failed otherwise."""
    code = "import incubate_lib; print(incubate_lib.__file__)"
    env = os.environ | {"PYTHONPATH": str(root)}
    told = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True).stdout.strip()
    if root not in Path(told).parents:
        raise Failed(f"in {root} python imports {told or 'no incubate_lib'}")


def checkout(commit: str, folder: Path) -> None:
    """Check a commit out into a worktree of its own; Failed if there is no such commit."""
    command = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(folder), commit]
    if (result := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise Failed(f"{commit}: {result.stderr.strip()}")


def compare(commit: str, names: Sequence[str], kept: Path | None = None) -> int:
    """Train cases on both sides and say whether they are alike, a line each, and what differs first; return an exit status."""
    differ = False
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        old, home = Path(folder) / "commit", kept or Path(folder) / "data"
        try:
            checkout(commit, old)
            sides = {"before": old, "after": ROOT}
            for root in sides.values():
                check_package(root)
            for name in names:
                data, seconds = {side: home / name / side for side in sides}, []
                for side, root in sides.items():
                    shutil.rmtree(data[side], ignore_errors=True)
                    began = time.monotonic()
                    train(root, name, CASES[name], data[side])
                    seconds.append(time.monotonic() - began)
                told = list(differences(data["before"], data["after"]))
                differ = differ or bool(told)
                verdict = f"{len(told)} phases differ" if told else f"{len(found(data['after']))} phases alike"
                print(f"{name}: {verdict} ({seconds[0]:.0f} s + {seconds[1]:.0f} s)", flush=True)
                for line in told[:TOLD]:
                    print(f"  {line}", flush=True)
        finally:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(old)]
            subprocess.run(remove, capture_output=True)
    return int(differ)


# -- small recorded tensors ---------------------------------------------------------------------------------------------------


def little_of(data: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Return a little of each phase in a data folder, by strategy and phase: first values of each tensor, and its losses."""
    file, column = renamed("metrics.jsonl", "files", CHANGES), renamed("loss", "columns", CHANGES)
    little = {}
    for phase, folder in found(data).items():
        values = {name: tensor.flatten()[:4].clone() for name, tensor in tensors(folder).items()}
        curve = [value for name, value in curves(folder).items() if name.startswith(f"{file}:") and name.endswith(f" {column}")]
        little[phase.strategy, phase.phase] = values | {"loss": torch.tensor(curve, dtype=torch.float64)}
    return little


def record(file: Path = RECORDING) -> None:
    """Train smoke with the working tree and write a little of it, with how this machine rounds, into a file."""
    values = {f"rounding|{name}": value for name, value in rounding().items()}
    with tempfile.TemporaryDirectory(prefix="oracle-") as data:
        train(ROOT, "smoke", RECORDED, Path(data))
        for (strategy, phase), little in little_of(Path(data)).items():
            kept = [*sorted(little.keys() - {"loss"})[::10], "loss"]
            values |= {f"{strategy}|{phase}|{name}": little[name] for name in kept}
    save_file(values, file, versions())


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "timm": timm.__version__}


def recorded(file: Path = RECORDING) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return what was recorded, and why this machine cannot be expected to repeat it; None if it can."""
    with safe_open(file, "pt") as stored:
        values, made_with = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    own = {name.removeprefix("rounding|"): values.pop(name) for name in [*values] if name.startswith("rounding|")}
    if made_with != versions():
        return values, f"recorded with {made_with}, here is {versions()}"
    here = rounding()
    other = [name for name, value in own.items() if not torch.equal(value, here[name])]
    return values, f"this machine rounds otherwise than the one that recorded ({', '.join(other)})" if other else None


def unlike_recorded(values: dict[str, torch.Tensor], data: Path) -> Iterator[str]:
    """Say in a line each where a data folder differs from what was recorded."""
    little = little_of(data)
    for key, value in values.items():
        strategy, phase, name = key.split("|")
        place = renamed(strategy, "strategies", CHANGES), renamed(phase, "phases", CHANGES)
        here = little.get(place, {}).get(name if name == "loss" else renamed(name, "tensors", CHANGES))
        if told := "is missing" if here is None else unlike(value, here):
            yield f"{'/'.join(filter(None, place))}: {name} {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a list with a commit and with the working tree, and compare every bit.")
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="to compare the working tree with")
    parser.add_argument("--only", metavar="CASE,…", help=f"of {', '.join(CASES)}", default=",".join(CASES))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what was trained there, to look at")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDING.name} again, for `make test`, and end")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"there is no case {', '.join(unknown)}; there are: {', '.join(CASES)}")
    if not options.record and not options.commit:
        parser.error("name a commit, or --record")
    try:
        return record() or 0 if options.record else compare(options.commit, names, options.keep and options.keep.absolute())
    except Failed as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
