"""`incubate presets`, `check`, `import`, `export`, `figures`, `completion`: what reads and writes files."""

import argparse
from pathlib import Path

from incubate_lib.cli.parser import COMPLETED, Commands, preset_arguments

COMPLETE = {  # a shell's function: a preset's name or a file
    "bash": COMPLETED + """() { compgen -W "%s" -- "$1"; compgen -f -- "$1"; }""",
    "zsh": COMPLETED + """() { compadd %s; _files; }""",
}


def presets(options: argparse.Namespace) -> int:
    """List the presets."""
    from incubate_lib.config import load_settings, presets

    width = max(map(len, presets()))
    for name in presets():
        print(f"{name:<{width}}  {load_settings(name).description}")
    return 0


def check(options: argparse.Namespace) -> int:
    """Open every image of a preset's data and name those that cannot be read."""
    from incubate_lib.config import load_settings
    from incubate_lib.phases.networks import model_shape
    from incubate_lib.training.data import labels_of, load_data, unused_classes, unused_in_words
    from incubate_lib.training.stream import Checked, StreamedSet

    settings = load_settings(options.preset, options.set)
    how = {"shape": model_shape(settings.model), "machine": settings.machine}
    parts = files = load_data(settings.data, **how)
    if settings.data.in_memory:  # the same images once more, one by one: pixels in memory have no tags
        files = load_data(settings.data.model_copy(update={"in_memory": False}), **how)
    bad = 0
    for what, part, file in zip(("train", settings.data.eval_split), parts, files, strict=True):
        opened, broken, turned = file.check() if isinstance(file, StreamedSet) else Checked(len(part), {}, 0)
        print(f"{what}: {len(part)} images in {part.num_classes} classes; {opened} opened, {len(broken)} cannot be read")
        if what == "train" and (unused := unused_classes(labels_of(part), part.num_classes)):
            print(f"  {unused_in_words(unused, part.num_classes)}")
        if turned:
            print(f"  {turned} have a camera's orientation tag (EXIF), which is not followed: they are used as they are stored")
        for name, reason in broken.items():
            print(f"  {name}: {reason}")
        bad += len(broken)
    return 1 if bad else 0


def import_(options: argparse.Namespace) -> int:
    """Turn a released checkpoint, or K with one target module each, into a folder that timm loads."""
    from incubate_lib.phases.released import import_released

    settings, depths = import_released(options.files, options.folder, name=options.model, num_heads=options.num_heads)
    model = settings.model_dump(exclude_unset=True, exclude={"depth"} | ({"options"} if not settings.options else set()))
    print(f"wrote {options.folder}: {settings.depth} blocks, {' + '.join(map(str, depths))} in {len(depths)} module(s)")
    print("To use it as a trained meta model, a settings file needs:")
    print(f"  model: {model}\n  strategies: {{deep_incubation: {{weights: {Path(options.folder).absolute()}}}}}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a finished network as a folder that timm loads, with a model card."""
    from incubate_lib.config import load_settings
    from incubate_lib.report.export import export

    settings = load_settings(options.preset, options.set)
    name = export(settings, options.folder, strategy=options.strategy, seed=options.seed, log=print)
    print(f"wrote strategy {name}, seed {options.seed}: timm.create_model('local-dir:{options.folder}', pretrained=True)")
    print(f"Before you publish it, read {options.folder}/README.md and fill in the licence.")
    return 0


def figures(options: argparse.Namespace) -> int:
    """Draw all figures, and write README's numbers, again from the tracked tables in data/results."""
    from incubate_lib.report import readme
    from incubate_lib.report.publish import redraw

    for path in [*redraw(), *readme.write()]:
        print(f"wrote {path}")
    return 0


def completion(options: argparse.Namespace) -> int:
    """Print what makes a shell complete commands, options and presets on TAB."""
    import shtab

    from incubate_lib.cli import parser
    from incubate_lib.config import presets

    preamble = {shell: function % " ".join(presets()) for shell, function in COMPLETE.items()}
    print(shtab.complete(parser(), options.shell, preamble=preamble))
    return 0


def add(commands: Commands) -> None:
    commands.add(presets)

    preset_arguments(commands.add(check, "imagenet-vit-b --set machine.data_folder=/data/imagenet"))

    command = commands.add(import_, "checkpoint.pth meta-vit-b", "PT_0.pth PT_1.pth vit-b --num-heads 12")
    command.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint, or one for each target module, in order")
    command.add_argument("folder", metavar="DIR", help="new folder for config.json and model.safetensors")
    command.add_argument("--model", metavar="NAME", help="timm architecture (default: inferred from shapes)")
    command.add_argument("--num-heads", type=int, metavar="N", help="attention heads, which shapes do not show")

    command = commands.add(export, "digits my-network --strategy recommended")
    preset_arguments(command, nargs=None, help="a preset, or a YAML file of yours")
    command.add_argument("folder", metavar="DIR", help="new folder for config.json, model.safetensors and README.md")
    command.add_argument("--strategy", metavar="NAME", help="default: the first finished one of Deep Incubation")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    commands.add(figures)

    command = commands.add(completion, "bash > ~/.local/share/bash-completion/completions/incubate")
    command.add_argument("shell", choices=["bash", "zsh"])
