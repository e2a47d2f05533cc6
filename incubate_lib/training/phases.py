"""The phases: what each builds, what of it trains, what it leaves behind. One recipe each, one way to run them all."""

import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from incubate_lib.config import ModelSettings, PhaseSettings, SettingsError, nearest
from incubate_lib.method.incubation import assemble, make_hybrid, start_module
from incubate_lib.method.partition import ViTModule, split
from incubate_lib.training.costs import train_flops_per_image
from incubate_lib.training.data import load_data
from incubate_lib.training.loop import evaluate, fit
from incubate_lib.training.runs import PhaseFolder
from incubate_lib.training.schedule import derive_seed

Inputs = dict[str, PhaseFolder]


def build_model(settings: ModelSettings, depth: int | None, num_classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """Return a randomly initialised timm ViT of `depth` blocks (None: timm's own); SettingsError names what does not fit."""
    if not timm.is_model(settings.name):
        raise SettingsError(f"model.name: timm has no {settings.name!r}; {nearest(settings.name, timm.list_models('*vit*'))}")
    arguments = settings.timm_arguments() | ({} if depth is None else {"depth": depth})
    try:
        model = timm.create_model(settings.name, num_classes=num_classes, drop_path_rate=drop_path, **arguments)
    except Exception as error:  # timm checks its arguments by asserts and by failing somewhere inside
        told = f"timm cannot build model.name {settings.name!r} with {arguments}: {error}"
        raise SettingsError(f"{told} (only plain Vision Transformers can be taken apart)") from None
    if type(model) is not VisionTransformer:
        raise SettingsError(f"model.name {settings.name!r} is a {type(model).__name__}, not a plain timm VisionTransformer")
    return model


def build_parts(s: PhaseSettings, which: str, num_classes: int) -> list[ViTModule]:
    """Return the freshly initialised modules of the `meta` or the `target` network.

    The whole network is built from the run's seed and then cut, so a module's start does not depend on which modules
    are trained, in what order or in what process, and all of them together are the start of end-to-end training.
    """
    depths = {"meta": s.meta_depths, "target": s.target_depths}[which]
    drop_path = s.training.drop_path if s.training else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "init", which))
        return split(build_model(s.model, sum(depths), num_classes, drop_path), depths)


# Each recipe returns the model to train and the part of it that is the phase's result.


def _meta(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = assemble(build_parts(s, "meta", classes))
    return model, model


def _end_to_end(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = assemble(build_parts(s, "target", classes))
    return model, model


def _incubate(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    meta = build_parts(s, "meta", classes)
    if inputs:  # none when only costs are counted
        assemble(meta).load_state_dict(inputs["meta"].load_weights())
    target = build_parts(s, "target", classes)[s.module_index]
    start_module(target, meta[s.module_index], s.start, s.inherit_stem, s.inherit_head)
    return make_hybrid(meta, target, s.module_index), target


def _assemble(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    modules = build_parts(s, "target", classes)
    for module in modules:
        module.load_state_dict(inputs[f"module-{module.index}"].load_weights())
    model = assemble(modules)
    return model, model


def _finetune(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = assemble(build_parts(s, "target", classes))
    if inputs:
        model.load_state_dict(inputs["assemble"].load_weights())
    return model, model


RECIPES = {"meta": _meta, "incubate": _incubate, "assemble": _assemble, "finetune": _finetune, "end_to_end": _end_to_end}


def prepare(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the model that the phase trains (ready: frozen parts are frozen) and the part of it that is the result."""
    return RECIPES[s.phase](s, inputs, num_classes)


def phase_flops_per_image(s: PhaseSettings, num_classes: int, image_shape: tuple[int, int, int]) -> int:
    """Return the exact training FLOPs of one image in this phase, counted on the meta device; 0 for assembly."""
    if s.phase == "assemble":
        return 0
    with torch.device("meta"):
        model, _ = prepare(s, {}, num_classes)
        return train_flops_per_image(model, image_shape)


def run_phase(
    s: PhaseSettings,
    folder: PhaseFolder,
    inputs: Inputs,
    *,
    title: str,
    about: dict[str, Any],
    flops_per_image: int,
    checkpoint_seconds: float = 20.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train one phase to its end, or go on from its checkpoint, and return its summary; a finished one is only read.

    `about` is added to the summary (strategy, names of the inputs' folders); `flops_per_image` is the counted training
    cost of this phase.
    """
    if done := folder.summary(s.digest()):
        return done
    with folder.claim(s):
        if done := folder.summary(s.digest()):  # finished by another process while this one waited
            return done
        if threads := os.environ.get("INCUBATE_THREADS"):  # this phase's share of the cores, when several run side by side
            torch.set_num_threads(int(threads))
        device = pick_device()
        train, judge = load_data(s.data, device)
        model, result = prepare(s, inputs, train.num_classes)
        model.to(device)
        if s.training is None:
            numbers = evaluate(model, judge) | {"steps": 0, "images_seen": 0, "epochs": 0.0, "train_seconds": 0.0}
            numbers |= {"eval_seconds": 0.0, "start_accuracy": numbers["accuracy"], "train_loss": None}
        else:
            numbers = fit(
                model, train, judge, s.training, seed=derive_seed(s.seed, s.phase, s.module_index or 0), folder=folder,
                title=title, checkpoint_seconds=checkpoint_seconds, should_stop=should_stop,
            )  # fmt: skip
        numbers |= {"flops_per_image": flops_per_image, "train_flops": flops_per_image * numbers["images_seen"]}
        numbers |= {
            "parameters": sum(p.numel() for p in result.parameters()),
            "train_images": len(train),
            "judge_images": len(judge),
        }
        identity = {"phase": s.phase, "module_index": s.module_index, "seed": s.seed, "hash": s.digest()}
        return folder.finish(identity | about | numbers | {"provenance": provenance(device)}, result.state_dict())


def pick_device() -> torch.device:
    """Return the GPU if there is one, told to repeat itself bit for bit; else the CPU, which does so anyway."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")


def load_trained(s: PhaseSettings, folder: PhaseFolder, num_classes: int) -> VisionTransformer:
    """Return the finished network of a meta, assemble, finetune or end_to_end phase as an ordinary timm ViT."""
    which = "meta" if s.phase == "meta" else "target"
    model = assemble(build_parts(s, which, num_classes))
    model.load_state_dict(folder.load_weights())
    return model.eval()


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a number must carry: date, code, versions, hardware."""
    root = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here: the number is still good
            return ""

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "-uno")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
