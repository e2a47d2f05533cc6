"""The phases: what each builds, what of it trains, what it leaves behind. One recipe each, one way to run them all."""

import contextlib
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from incubate_lib.config import DEFAULT_MACHINE, MachineSettings, ModelSettings, PhaseSettings, SettingsError, in_a_line, nearest
from incubate_lib.data.schedule import derive_seed
from incubate_lib.data.scratch import stage
from incubate_lib.data.sets import load_data
from incubate_lib.data.stream import check_shared_memory
from incubate_lib.method.incubation import assemble, make_hybrid, make_imitation, start_module
from incubate_lib.method.partition import ViTModule, split
from incubate_lib.training.launch import train_on_devices
from incubate_lib.training.lease import Lease
from incubate_lib.training.loop import evaluate, fit
from incubate_lib.training.runs import PhaseFolder, whose
from incubate_lib.training.team import Team
from incubate_lib.training.trainer import Trainer
from incubate_lib.training.weights import load_into

Inputs = dict[str, Path]  # folders of the phases that a phase starts from; "weights": a folder or file of weights


def build_model(
    settings: ModelSettings, depth: int | None, num_classes: int, drop_path: float = 0.0, *, any_kind: bool = False
) -> nn.Module:
    """Return a randomly initialised timm ViT of `depth` blocks (None: timm's own), or with `any_kind` any timm model.

    SettingsError names what does not fit, and weights that nothing initialised.
    """
    if not timm.is_model(settings.name):
        raise SettingsError(f"model.name: timm has no {settings.name!r}; {nearest(settings.name, timm.list_models())}")
    arguments = timm_arguments(settings) | ({} if depth is None else {"depth": depth})
    try:
        model = _create(settings.name, num_classes=num_classes, drop_path_rate=drop_path or None, **arguments)
    except Exception as error:  # timm checks its arguments by asserts and by failing somewhere inside
        message = f"timm cannot build model.name {settings.name!r} with {arguments}: {in_a_line(error)}"
        raise SettingsError(message if any_kind else f"{message} (only plain Vision Transformers can be taken apart)") from None
    if type(model) is not VisionTransformer and not any_kind:
        raise SettingsError(
            f"model.name {settings.name!r} is a {type(model).__name__}, not a plain timm VisionTransformer, and cannot be taken "
            "apart; without partition it can be trained end to end"
        )
    if unset := [name for name, tensor in model.state_dict().items() if not tensor.is_meta and tensor.isnan().any()]:
        raise SettingsError(
            f"timm leaves {len(unset)} tensor(s) of model.name {settings.name!r} with {arguments} without a start, first "
            f"{unset[0]}; change model.options"
        )
    return model


def _create(name: str, **arguments: Any) -> nn.Module:
    if torch.get_default_device().type == "meta":  # nothing to initialise, and pretending to takes half of planning's time
        with contextlib.suppress(TypeError):  # not all networks know how to skip it
            return timm.create_model(name, weight_init="skip", **arguments)
    with _unset_memory_is_nan():
        return timm.create_model(name, **arguments)


@contextlib.contextmanager
def _unset_memory_is_nan() -> Iterator[None]:
    """Have torch fill new tensors with NaN where it would leave what the memory held, so that nobody trains from that."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    exactly, only_warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(exactly, warn_only=only_warned)


def timm_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return the arguments of a timm model that were set; those that take images of any size are not told which."""
    arguments = settings.timm_arguments()
    if not timm.get_pretrained_cfg(settings.name).fixed_input_size:
        arguments.pop("img_size", None)
    return arguments


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


def build_target(s: PhaseSettings, num_classes: int) -> nn.Module:
    """Return the whole target network, freshly initialised; of any kind if it is not to be taken apart."""
    if s.target_depths:
        return assemble(build_parts(s, "target", num_classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "init", "target"))
        drop_path = s.training.drop_path if s.training else 0.0
        return build_model(s.model, s.model.depth, num_classes, drop_path, any_kind=True)


# Each recipe returns the model to train and the part of it that is the phase's result.


def _meta(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = assemble(build_parts(s, "meta", classes))
    if "weights" in inputs:
        load_into(model, inputs["weights"], s.inputs["weights"])
    return model, model


def _end_to_end(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = build_target(s, classes)
    return model, model


def _incubate(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    meta = build_parts(s, "meta", classes)
    if inputs:  # none when only costs are counted
        assemble(meta).load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
    target = build_parts(s, "target", classes)[s.module_index]
    start_module(target, meta[s.module_index], s.start, s.inherit_stem, s.inherit_head)
    return (make_imitation if s.imitate else make_hybrid)(meta, target, s.module_index), target


def _assemble(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    """Put incubated modules together; where nothing was incubated, modules as they start."""
    modules = build_parts(s, "target", classes)
    if "meta" in inputs:
        meta = build_parts(s, "meta", classes)
        assemble(meta).load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
        for module, small in zip(modules, meta, strict=True):
            start_module(module, small, s.start, s.inherit_stem, s.inherit_head)
    elif inputs:
        for module in modules:
            module.load_state_dict(PhaseFolder(inputs[f"module-{module.index}"]).load_weights())
    model = assemble(modules)
    return model, model


def _finetune(s: PhaseSettings, inputs: Inputs, classes: int) -> tuple[nn.Module, nn.Module]:
    model = build_target(s, classes)
    if "weights" in inputs:
        load_into(model, inputs["weights"], s.inputs["weights"])
    elif "small_images" in inputs:
        model.load_state_dict(at_size(PhaseFolder(inputs["small_images"]).load_weights(), model))
    elif inputs:  # none when only costs are counted
        model.load_state_dict(PhaseFolder(inputs["assemble"]).load_weights())
    return model, model


def at_size(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights of the same network for images of another size: the position embedding is resampled, as timm does."""
    own = getattr(model, "pos_embed", None)
    if own is None or own.shape == weights["pos_embed"].shape:
        return weights
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    resampled = resample_abs_pos_embed(weights["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
    return weights | {"pos_embed": resampled}


RECIPES = {"meta": _meta, "incubate": _incubate, "assemble": _assemble, "finetune": _finetune, "end_to_end": _end_to_end}


def prepare(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the model that the phase trains (ready: frozen parts are frozen) and the part of it that is the result."""
    return RECIPES[s.phase](s, inputs, num_classes)


def run_phase(
    s: PhaseSettings,
    folder: PhaseFolder,
    inputs: dict[str, Path],
    *,
    title: str,
    about: dict[str, Any],
    flops_per_image: int,
    expected: tuple[int, int],
    machine: MachineSettings = DEFAULT_MACHINE,
    stop_file: Path | None = None,
) -> dict[str, Any]:
    """Train one phase to its end, or go on from its checkpoint, and return its summary; a finished one is only read.

    `inputs` are the folders of the phases it starts from, or a file of weights; `about` is added to the summary
    (strategy, names of the inputs' folders, SHA-256 of their weights); `flops_per_image` is the counted training cost,
    `expected` the number of training images and classes that was planned with. The phase stops when
    `stop_file` is touched after this call; in a batch job also when that is there already, or the job's own ($INCUBATE_STOP)
    is. On several devices it trains in a subprocess.
    """
    own = os.environ.get("INCUBATE_STOP")
    stop_files = {str(path): None if own else _touched(path) for path in (stop_file, own) if path}
    used = about["inputs_sha256"]
    if done := folder.finished(s.digest(), used):
        return done
    if pick_device().type == "cuda" and machine.devices > torch.cuda.device_count():
        raise SettingsError(f"machine.devices is {machine.devices}, but this machine has {torch.cuda.device_count()} GPU(s)")
    with folder.claim(s, used):
        if done := folder.finished(s.digest(), used):  # finished by another process while this one waited
            return done
        job = {
            "settings": s.model_dump(mode="json", exclude_unset=True), "folder": str(folder.path), "title": title, "about": about,
            "inputs": {name: str(path) for name, path in inputs.items()}, "flops_per_image": flops_per_image,
            "expected": list(expected), "machine": machine.model_dump(mode="json"),
            "stop_files": stop_files, "lease": folder.lease.number,
        }  # fmt: skip
        if machine.team_size > 1 and s.training is not None:
            return train_on_devices(job, folder, machine, title)
        if threads := os.environ.get("INCUBATE_THREADS"):  # this phase's share of the cores, when several run side by side
            torch.set_num_threads(int(threads))
        return train_phase(**job, team=Team(device=pick_device()))


def train_phase(
    settings: dict[str, Any],
    folder: str,
    title: str,
    about: dict[str, Any],
    inputs: dict[str, str],
    flops_per_image: int,
    expected: list[int],
    machine: dict[str, Any],
    stop_files: dict[str, int | None],
    lease: int,
    team: Team,
) -> dict[str, Any] | None:
    """Be one device of a phase, or its only one: load, train, and if it is the first, write the result.

    Arguments are JSON values, so that a job file can hold them. Returns the summary, None for other devices.
    """
    s = PhaseSettings.model_validate_json(json.dumps(settings))
    home = PhaseFolder(Path(folder), Lease(Path(folder) / "lease", lease), whose(s, about["inputs_sha256"]))
    how = MachineSettings.model_validate_json(json.dumps(machine))
    repeat_exactly(team.device, how.deterministic, strictly=s.phase != "end_to_end" or bool(s.target_depths))
    how = stage(s.data, how)
    train, eval_set = load_data(s.data, team.device, model_shape(s.model), how)
    if [len(train), train.num_classes] != expected:
        raise SettingsError(
            f"there are {len(train)} training images in {train.num_classes} classes, but {expected[0]} in {expected[1]} when "
            "this experiment began; look at data.folder (machine.data_folder), or give the experiment another name"
        )
    if s.data.is_streamed:
        check_shared_memory(eval_set, train, s.training, team.devices)
    model, result = prepare(s, {name: Path(path) for name, path in inputs.items()}, train.num_classes)
    model.to(team.device)
    kept, numbers = model, UNTRAINED
    if s.training is None:
        numbers = UNTRAINED | evaluate(model, eval_set, s.precision, team)
        numbers |= {"start_accuracy": numbers["accuracy"]}
        if s.phase == "meta" and team.is_first:  # read from a file: a single point, where others have a curve
            home.start_metrics(-1)
            row = {"step": 0, "epoch": 0.0, "images": 0, "train_flops": 0, "train_seconds": 0.0, "train_loss": None, "lr": None}
            home.add_metrics(row | {name: numbers[name] for name in ("loss", "accuracy")})
    else:
        seed = derive_seed(s.seed, s.phase, s.module_index or 0)
        trainer = Trainer(
            model, train, s.training, seed=seed, precision=s.precision, machine=how, team=team, mat=s.mat,
            flops_per_image=flops_per_image,
        )  # fmt: skip
        kept, numbers = fit(trainer, eval_set, folder=home, title=title, should_stop=_stop_asked(stop_files))
    if not team.is_first:
        return None
    numbers = numbers | {
        "flops_per_image": flops_per_image if s.training else 0,
        "parameters": sum(p.numel() for p in result.parameters()),
        "train_images": len(train),
        "judge_images": len(eval_set),
    }
    identity = {"phase": s.phase, "module_index": s.module_index, "seed": s.seed, "hash": s.digest()}
    tensors = kept.target.state_dict() if s.phase == "incubate" else kept.state_dict()
    return home.finish(identity | about | numbers | {"provenance": provenance(team.device)}, tensors)


UNTRAINED = {
    "steps": 0, "images_seen": 0, "epochs": 0.0, "distinct_images_per_epoch": 0, "train_seconds": 0.0, "eval_seconds": 0.0,
    "data_share": 0.0, "broken_images": 0, "devices": 1, "train_loss": None, "train_flops": 0, "train_flops_executed": 0,
}  # fmt: skip


def _stop_asked(stop_files: dict[str, int | None]) -> Callable[[], bool]:
    """Return a function that tells whether one of the files was touched since (by its own time stamps: clocks differ)."""
    return lambda: any(_touched(path) not in (None, before) for path, before in stop_files.items())


def _touched(path: Path | str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def model_shape(settings: ModelSettings) -> tuple[int, int, int]:
    """Return the images that a model takes: C, H, W. One that takes any size gets model.img_size, or timm's usual."""
    try:
        with torch.device("meta"):
            model = build_model(settings, 1, 2)
        return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    except SettingsError:  # no plain Vision Transformer
        if not timm.is_model(settings.name):
            raise
    channels, height, width = timm.get_pretrained_cfg(settings.name).input_size
    return (settings.in_chans or channels, settings.img_size or height, settings.img_size or width)


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU; says so if a GPU is there and torch cannot use it."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        print(
            "warning: this machine has a GPU that torch cannot use (is the driver too old for it?); on the CPU then", flush=True
        )
    return torch.device("cpu")


def repeat_exactly(device: torch.device, wanted: bool = True, strictly: bool = True) -> None:
    """Have a GPU give the same bits again for the same work; a CPU does so anyway.

    Strictly: told only to warn, torch's attention takes the faster backward pass, which does not repeat itself. Networks of
    any kind are only warned: a VGG's pooling for small images has no backward pass that repeats itself.
    """
    if device.type == "cuda" and wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=not strictly)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor once more


def load_trained(s: PhaseSettings, folder: PhaseFolder, num_classes: int) -> nn.Module:
    """Return the finished network of a meta, assemble, finetune or end_to_end phase as an ordinary timm model."""
    model = assemble(build_parts(s, "meta", num_classes)) if s.phase == "meta" else build_target(s, num_classes)
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
