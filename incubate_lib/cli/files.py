"""Commands that read and write files: `incubate presets`, `check`, `clean`, `import`, `export`, `figures`, `notebooks` …"""

import argparse
import os
from pathlib import Path

from incubate_lib import config
from incubate_lib.cli.parser import COMPLETED, parser
from incubate_lib.config import load_settings, refuse
from incubate_lib.training.files import check_free

COMPLETE = {  # a shell's function: a preset's name or a file
    "bash": COMPLETED + """() { compgen -W "%s" -- "$1"; compgen -f -- "$1"; }""",
    "zsh": COMPLETED + """() { compadd %s; _files; }""",
}


def presets(options: argparse.Namespace) -> None:
    width = max(map(len, config.presets()))
    for name in config.presets():
        print(f"{name:<{width}}  {load_settings(name).description}")


def check(options: argparse.Namespace) -> int:
    settings = load_settings(options.preset, options.set)  # first: what is misspelt is reported before torch is imported
    from incubate_lib.config.members import TASKS
    from incubate_lib.data.folders import links_out, place_of
    from incubate_lib.data.sets import SHOWN, load_data, unused_in_words
    from incubate_lib.data.stream import StreamedSet
    from incubate_lib.phases.networks import model_shape

    place = place_of(settings.data, settings.machine)
    links = links_out(place) if settings.data.source not in config.MADE and place.is_dir() else []
    how = {"shape": model_shape(settings.model), "machine": settings.machine}
    one_by_one = settings.data.model_copy(update={"in_memory": False, "skip_broken": True})  # so that all are opened
    parts, task, bad = load_data(one_by_one, **how), TASKS[settings.task], 0
    for what, part in zip(("train", settings.data.eval_split), parts, strict=True):
        opened, broken, turned = part.check() if isinstance(part, StreamedSet) else (len(part), {}, 0)
        read = f"{opened - len(broken)} can be read, {len(broken)} cannot"
        counted = f"{len(part)} {task.samples} in {part.num_classes} classes; {read}"
        if settings.data.is_text:
            counted = f"{len(part)} {task.samples} of {part.context} tokens, {part.num_classes} different ones"
        print(f"{what}: {counted}")
        if what == "train" and (unused := task.unlearned(part)):
            print(f"  {unused_in_words(unused, part.num_classes)}")
        if turned:
            print(f"  {turned} have a camera's orientation tag (EXIF), which is not followed: they are used as they are stored")
        for name, reason in broken.items():
            print(f"  {name}: {reason}")
        bad += len(broken)
    if links:
        some = ", ".join(links[:SHOWN]) + (", …" if len(links) > SHOWN else "")
        print(f"{len(links)} link(s) lead out of {place}, and what they lead to counts as if it lay there: {some}")
    if settings.data.in_memory and not bad:
        load_data(settings.data, **how)  # they must be of one size, too
    return 1 if bad else 0


def clean(options: argparse.Namespace) -> None:
    from incubate_lib.pipeline import store

    phases = store.unused()
    for phase in phases:
        print(phase)
    size = sum(phase.size for phase in phases) / 2**20
    if options.delete:
        store.delete(phases)
    what = "deleted" if options.delete else "no run names them; `incubate clean --delete` deletes them"
    print(f"{len(phases)} phase(s), {size:.1f} MiB: {what}" if phases else "nothing to clean: every phase is named by a run")


def migrate(options: argparse.Namespace) -> None:
    from incubate_lib.pipeline import store

    folders = store.migrate(print)
    there = "their old phases are in the folders seed-* beside run.json; you may delete them"
    print(f"{len(folders)} run(s) taken over; {there}" if folders else "there is no run of an earlier version to take over")


def import_(options: argparse.Namespace) -> None:
    check_free(options.folder)  # first: importing torch takes seconds
    for file in options.files:
        refuse(not os.path.exists(os.path.expanduser(file)), f"cannot read {file}: there is no such file")
    from incubate_lib.phases.released import import_released

    how = {"name": options.model, "num_heads": options.num_heads, "ema": options.ema, "log": print}
    settings, depths = import_released(options.files, options.folder, **how)
    model = settings.model_dump(exclude_unset=True, exclude={"depth"} | ({"options"} if not settings.options else set()))
    print(f"wrote {options.folder}: {settings.depth} blocks, {' + '.join(map(str, depths))} in {len(depths)} module(s)")
    is_meta = len(options.files) == 1 and len(depths) > 1 and max(depths) == 1
    print(f"To {'use it as a trained meta model' if is_meta else 'fine-tune it'}, a settings file needs:")
    weights = f"weights: {Path(options.folder).absolute()}"
    strategies = f"{{deep_incubation: {{{weights}}}}}" if is_meta else f"{{tuned: {{kind: finetune, {weights}}}}}\n  run: [tuned]"
    print(f"  model: {model}\n  strategies: {strategies}")


def export(options: argparse.Namespace) -> None:
    settings = load_settings(options.preset, options.set)
    check_free(options.folder)
    from incubate_lib.report.export import export

    name = export(settings, options.folder, strategy=options.strategy, seed=options.seed, log=print)
    is_text, folder = settings.data.is_text, options.folder
    how = f"transformers' from_pretrained({folder!r})" if is_text else f"timm.create_model('local-dir:{folder}', pretrained=True)"
    print(f"wrote strategy {name}, seed {options.seed}: {how}")
    if not is_text:
        print(f"Before you publish it, read {folder}/README.md and fill in the licence.")


def figures(options: argparse.Namespace) -> None:
    _needs_checkout("figures")
    from incubate_lib.cli.pages import commands
    from incubate_lib.pipeline.shown import thumbnails
    from incubate_lib.report import readme
    from incubate_lib.report.publish import redraw

    for path in [*redraw(), *thumbnails(), *readme.write({"commands": commands})]:
        print(f"wrote {path}")


def notebooks(options: argparse.Namespace) -> None:
    _needs_checkout("notebooks")
    from incubate_lib.pipeline.shown import show, thumbnails

    os.environ["INCUBATE_HEADLESS"] = "1"
    for name in options.names or sorted(path.stem for path in config.notebooks_folder().glob("*.ipynb")):
        print(f"wrote {show(name)}", flush=True)
    thumbnails()


def _needs_checkout(command: str) -> None:
    """Raise SettingsError where there are no pages and tracked notebooks to write: in a plain installation."""
    config.refuse(config.checkout() is None, f"`incubate {command}` writes files of the project; call it in a clone of that")


def completion(options: argparse.Namespace) -> None:
    import shtab

    preamble = {shell: function % " ".join(config.presets()) for shell, function in COMPLETE.items()}
    print(shtab.complete(parser(), options.shell, preamble=preamble))
