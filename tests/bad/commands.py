"""Bad command lines: options, names and places, of every command."""

import os
from pathlib import Path

from bad.case import Bad, both, file, png

LONG = "a" * 9000
UNKNOWN = {  # command → an option that is nearly one of its own
    "run": "--sed",
    "study": "--drry-run",
    "status": "--stratgies",
    "stop": "--seeds",
    "logs": "--folow",
    "report": "--publsh",
    "mirror": "--into",
    "plan": "--machine-s",
    "bench": "--batches",
    "presets": "--all",
    "check": "--fix",
    "clean": "--all",
    "migrate": "--dry-run",
    "import": "--heads",
    "export": "--strat",
    "figures": "--only",
    "completion": "--shell",
}
NEEDED = {"logs": "digits incubate-2", "import": "a.pth b", "export": "digits new", "completion": "bash"}
NUMBERS = {  # of a command: option → what it cannot be
    "run smoke": {
        "--seeds": ["x", "1.5", "-3", "", "99999999999999999999", "1e3", "0x1"],
        "--jobs": ["x", "0", "-1", "1.5", "1000000000000"],
        "--devices": ["x", "0", "-1", "5", "1000000000", "2.0"],
    },
    "plan smoke": {
        "--share": ["0", "-0.5", "1.5", "nan", "inf", "half"],
        "--machines": ["0", "-2", "1000000000", "many"],
        "--images": ["0", "-5", "1000000000000000000000", "1e6"],
        "--classes": ["0", "-1", "1", "1000000000000", "ten"],
        "--devices": ["0", "7", "-8"],
    },
    "bench smoke": {
        "--batch": ["0", "-4", "1000000000000", "x"],
        "--rounds": ["0", "-1", "x"],
        "--classes": ["0", "-1", "1000000000000"],
    },
    "export smoke new": {"--seed": ["-1", "x", "99999999999999999999"]},
}
WORDS = {  # a command and what is wrong with it; what its message must name
    "no such command": ("runn", "run"),
    "a command of git": ("commit -m x", ""),
    "no such preset": ("run digit", "digits"),
    "no such preset, status": ("status smokee", "smoke"),
    "no such preset, check": ("check smokee", "smoke"),
    "no such preset, export": ("export smokee new", "smoke"),
    "no such preset, logs": ("logs smokee meta", "smoke"),
    "no such preset, bench": ("bench smokee", "smoke"),
    "a second preset": ("run digits smoke", ""),
    "no such backend": ("run smoke --backend pbs", "slurm"),
    "a preview of this machine": ("run smoke --dry-run", "--dry-run"),
    "anew on a cluster": ("run smoke --anew --backend slurm", "--anew"),
    "options of Slurm without it": ("run smoke --partition gpu", "slurm"),
    "jobs of this machine on a cluster": ("run smoke --backend slurm --dry-run --jobs 3", "--jobs"),
    "strategies without names": ("run smoke --strategies", "--strategies"),
    "no such strategy": ("run smoke --strategies end_to_ends", "end_to_end"),
    "a strategy twice": ("run smoke --strategies end_to_end end_to_end", "twice"),
    "a strategy with an empty name": ("run smoke --strategies=", ""),
    "a seed twice": ("run smoke --seeds 1 1", "twice"),
    "set without a value": ("run smoke --set", "--set"),
    "status of nothing": ("status smoke", "no run"),
    "status of a seed below 0": ("status smoke --seeds -1", ""),
    "report of nothing": ("report smoke", "no run"),
    "report of a strategy that there is not": ("report smoke --strategies fish", "fish"),
    "stop of nothing": ("stop smoke", "nothing to stop"),
    "logs of nothing": ("logs smoke meta", "no run"),
    "logs without a phase": ("logs smoke", "phase"),
    "logs without anything": ("logs", ""),
    "mirror of nothing": ("mirror smoke", "no run"),
    "mirror into something else": ("mirror smoke --to mlflow", "tensorboard"),
    "export of nothing": ("export smoke new", ""),
    "export without a folder": ("export smoke", "DIR"),
    "export of no such strategy": ("export smoke new --strategy fish", ""),
    "import without a folder": ("import a.pth", "DIR"),
    "import without anything": ("import", ""),
    "completion of another shell": ("completion fish", "bash"),
    "completion of no shell": ("completion", "shell"),
    "clean with an argument": ("clean all", ""),
    "figures with an argument": ("figures digits", ""),
    "no such study": ("study digits-budgets", "digits-budget"),
    "a study with settings of a preset": ("study digits-budget --set training.epochs=1", "machine"),
    "a study with a machine of words": ("study digits-budget --dry-run --set machine.devices=many", "machine.devices"),
    "a study with no field of the machine": ("study digits-budget --dry-run --set machine.device=1", "devices"),
    "a study that is a preset": ("study smoke", ""),
    "plan of no such model": ("plan vit_tinny_patch16_224", "vit_tiny_patch16_224"),
    "plan of a model that is no chain": ("plan efficientnet_b0", ""),
    "plan of a place to load from": ("plan hf-hub:timm/resnet18", ""),
    "plan with no such device": ("plan smoke --device H1000", "H100"),
    "plan with an empty device": ("plan smoke --device=", ""),
    "plan with no such bench": ("plan smoke --bench nowhere", "nowhere"),
    "plan with a bench in another folder": ("plan smoke --bench ../x", ""),
    "plan with two speeds": ("plan smoke --bench a --device H100", "--bench"),
    "plan against no such run": ("plan smoke --against nowhere", "nowhere"),
    "plan against a run in another folder": ("plan smoke --against ../../x", ""),
    "plan with no such strategy": ("plan smoke --strategies fish", "fish"),
    "figure into a folder that is not there": ("plan smoke --figure no/such/a.png", "no/such"),
    "figure into a folder": ("plan smoke --figure .", ""),
    "figure of an unknown kind": ("plan smoke --figure a.xyz", "xyz"),
    "figure below a file": ("plan smoke --figure file/a.png", ""),
    "growth of a preset": ("bench smoke --growth", "--growth"),
    "growth with classes": ("bench --growth --classes 3", "--growth"),
    "bench with an empty name": ("bench smoke --save=", "--save"),
    "bench with a name in another folder": ("bench smoke --save ../a", "--save"),
    "bench with a name of dots": ("bench smoke --save ..", "--save"),
    "bench with a long name": (f"bench smoke --save {'a' * 101}", "100"),
    "bench with a name of other letters": ("bench smoke --save größe", "größe"),
    "a preset with a very long name": (f"run {LONG}", "unknown preset"),
    "a study with a very long name": (f"study {LONG}", "unknown study"),
    "a phase with a very long name": (f"logs smoke {LONG}", ""),
    "a model with a very long name": (f"plan {LONG}", ""),
    "a strategy with a very long name": (f"run smoke --strategies {LONG}", "unknown strategy"),
    "a device with a very long name": (f"plan smoke --device {LONG}", ""),
    "an export into a long path": (f"export smoke {LONG}", ""),
    "a setting that is very long": (f"run smoke --set training.epochs={'9' * 5000}", "training.epochs"),
    "a command with a very long name": (LONG, ""),
}
PLACES = {  # what lies at a path where settings should lie
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere.yaml"),
    "a pipe": os.mkfifo,
    "a picture": lambda path: path.write_bytes(png()),
    "UTF-16": lambda path: path.write_bytes("name: a".encode("utf-16")),
    "Latin-1": lambda path: path.write_bytes("description: größe".encode("latin-1")),
    "zeros": lambda path: path.write_bytes(bytes(3000)),
}
FOLDERS = {  # what $INCUBATE_DATA can wrongly be
    "a file": "{here}/file",
    "below a file": "{here}/file/data",
    "a link to nothing": "{here}/dangling",
    "a link to itself": "{here}/circle",
    "in /proc": "/proc/incubate",
    "in /sys": "/sys/incubate",
    "a device": "/dev/null",
    "too long": "/tmp/" + "a/" * 2500,
    "a name too long": "/tmp/" + "a" * 300,
    "a line end in it, below a file": "{here}/file/a\nb",
}


def _place(make):
    return lambda here: make(here / "mine.yaml")


def _environment(here: Path) -> None:
    (here / "dangling").symlink_to("nowhere/at/all")
    (here / "circle").symlink_to("circle")


def catalogue() -> list[Bad]:
    found = [Bad("options", "nothing at all", ()), Bad("options", "an empty command", ("",))]
    for command, option in UNKNOWN.items():
        found.append(Bad("options", f"unknown option of {command}", (command, *NEEDED.get(command, "").split(), option)))
    for line, options in NUMBERS.items():
        for option, values in options.items():
            for value in values:
                found.append(Bad("options", f"{option} of {line.split()[0]} is {value!r}", (*line.split(), f"{option}={value}")))
    for name, (line, says) in WORDS.items():
        found.append(Bad("commands", name, tuple(line.split(" ")), file("file", "x"), says))
    taken = both(file("new/here.txt", "mine"))
    found.append(Bad("commands", "a device is given as settings", ("run", "/dev/zero")))
    found.append(Bad("commands", "a preset without a name", ("run", "")))
    found.append(Bad("commands", "export into a folder with files", ("export", "smoke", "new"), taken))
    found.append(Bad("commands", "export into nowhere", ("export", "smoke", "")))
    for command in (("run",), ("study",), ("check",), ("plan",)):
        for what, make in PLACES.items():
            if command == ("run",) or what in ("a folder", "a pipe"):
                made = Bad("settings files", f"{what} for {command[0]}", (*command, "mine.yaml"), _place(make), "mine.yaml")
                found.append(made)
    for what, folder in FOLDERS.items():
        made = both(file("file", "x"), _environment)
        for command in (("run", "smoke"), ("status", "smoke")):
            env = {"INCUBATE_DATA": folder}
            found.append(Bad("data folder", f"{what}, {command[0]}", command, made, env=env))
    for command in (("clean",), ("migrate",), ("export", "smoke", "new"), ("stop", "smoke")):
        found.append(Bad("data folder", f"a file, {command[0]}", command, made, env={"INCUBATE_DATA": "{here}/file"}))
    return found
