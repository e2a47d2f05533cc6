"""Bad files of studies."""

from bad.case import Bad, both, file

SOUND = {
    "preset": "smoke",
    "axes": "{depth: {6: {model.depth: 6}, 12: {model.depth: 12}}}",
    "strategies": "[end_to_end]",
    "seeds": "[0, 1]",
}
MANY = (
    "{" + ", ".join(f"a{i}: {{" + ", ".join(f"v{j}: {{training.shift: {j}}}" for j in range(10)) + "}" for i in range(12)) + "}"
)
FIELDS = {  # what is wrong → fields in place of sound ones (none: left out), and what the message must name
    "no preset": ({"preset": None}, "preset"),
    "an unknown preset": ({"preset": "smokee"}, "smokee"),
    "a preset of a number": ({"preset": "5"}, "preset"),
    "itself as its preset": ({"preset": "mine.yaml"}, ""),
    "a preset that is a folder": ({"preset": "."}, ""),
    "an empty preset": ({"preset": "''"}, "preset"),
    "a preset far away": ({"preset": "/etc/passwd"}, "passwd"),
    "no strategies": ({"strategies": None}, "strategies"),
    "empty strategies": ({"strategies": "[]"}, "strategies"),
    "an unknown strategy": ({"strategies": "[end_to_ends]"}, "end_to_end"),
    "a strategy twice": ({"strategies": "[end_to_end, end_to_end]"}, "twice"),
    "a strategy of a number": ({"strategies": "[5]"}, "strategies"),
    "strategies of a word": ({"strategies": "end_to_end"}, "strategies"),
    "strategies that cost too much to match": ({"strategies": "[deep_incubation_fish]"}, "deep_incubation"),
    "no seeds": ({"seeds": None}, "seeds"),
    "empty seeds": ({"seeds": "[]"}, "seeds"),
    "a seed twice": ({"seeds": "[0, 0]"}, "twice"),
    "a seed below 0": ({"seeds": "[-1]"}, "seeds"),
    "a huge seed": ({"seeds": "[99999999999999999999]"}, "seed"),
    "a seed of a fraction": ({"seeds": "[0.5]"}, "seeds"),
    "seeds of a number": ({"seeds": "3"}, "seeds"),
    "seeds of true": ({"seeds": "[true]"}, "seeds"),
    "1,000,000 cells": ({"axes": MANY}, "combinations"),
    "axes of a list": ({"axes": "[depth]"}, "axes"),
    "an axis of a list": ({"axes": "{depth: [6, 12]}"}, "axes"),
    "an axis without values": ({"axes": "{depth: {}}"}, "axes.depth"),
    "an axis of null": ({"axes": "{depth: null}"}, "axes.depth"),
    "a value of a number": ({"axes": "{depth: {6: 6}}"}, "axes.depth"),
    "a value of null": ({"axes": "{depth: {6: null}}"}, "axes.depth"),
    "an axis of a column": ({"axes": "{strategy: {6: {model.depth: 6}}}"}, "strategy"),
    "an axis without a name": ({"axes": "{'': {6: {model.depth: 6}}}"}, "axes"),
    "an axis of two lines": ({"axes": '{"a\\nb": {6: {model.depth: 6}}}'}, "axes"),
    "an axis with a long name": ({"axes": f"{{{'a' * 101}: {{6: {{model.depth: 6}}}}}}"}, "100"),
    "values 1 and '1'": ({"axes": "{depth: {6: {model.depth: 6}, '6': {model.depth: 12}}}"}, "6"),
    "values 1 and 1.0": ({"axes": "{depth: {6: {model.depth: 6}, 6.0: {model.depth: 12}}}"}, ""),
    "axes of a field and a part of it": (
        {"axes": "{a: {x: {model: {depth: 6}}}, b: {y: {model.depth: 12}}}"},
        "axes a and b both set model.depth",
    ),
    "an axis of a column of comparisons": ({"axes": "{other: {6: {model.depth: 6}}}"}, "other"),
    "two axes of one field": ({"axes": "{a: {6: {model.depth: 6}}, b: {12: {model.depth: 12}}}"}, "model.depth"),
    "an axis that sets the name": ({"axes": "{a: {x: {name: other}}}"}, "name"),
    "an axis of an unknown field": ({"axes": "{depth: {6: {model.dept: 6}}}"}, "depth"),
    "a cell that cannot be divided": ({"axes": "{depth: {6: {model.depth: 6}, 7: {model.depth: 7}}}"}, "7"),
    "a cell out of range": ({"axes": "{lr: {a: {training.lr: -1}}}"}, "lr"),
    "a value that is a date": ({"axes": "{a: {x: {description: 2024-01-01}}}"}, ""),
    "a value that is NaN": ({"axes": "{a: {x: {training.lr: .nan}}}"}, "lr"),
    "a field without a name": ({"axes": "{a: {x: {'': 5}}}"}, ""),
    "a field of a number": ({"axes": "{a: {x: {5: 5}}}"}, ""),
    "a field with '='": ({"axes": "{a: {x: {training.lr=1: 5}}}"}, ""),
    "set of a list": ({"set": "[model.depth=6]"}, "set"),
    "set of an unknown field": ({"set": "{model.dept: 6}"}, "depth"),
    "set of binary": ({"set": "{description: !!binary AAAA}"}, ""),
    "set of a strategy that is none": ({"set": "{strategies.mine: {kind: fish}}"}, "fish"),
    "set of validation": ({"set": "{data.eval_split: val}"}, "eval_split"),
    "set of the name": ({"set": "{name: other}"}, "name"),
    "set of overrides": ({"set": "{overrides: [a]}"}, "overrides"),
    "set of 10^9 devices": ({"set": "{machine.devices: 1000000000}"}, ""),
    "set of a deep value": ({"set": "{model.options.a: " + "[" * 25 + "]" * 25 + "}"}, ""),
    "a set of images that is not there": ({"set": "{data: {source: folder, folder: no/such}}"}, "no/such"),
    "a name of rates": ({"name": "mine_rates"}, "_rates"),
    "a name with a path": ({"name": "a/b"}, "name"),
    "an empty name": ({"name": "''"}, "name"),
    "a name of a number": ({"name": "5"}, "name"),
    "a long name": ({"name": "a" * 101}, "100"),
    "a description of a list": ({"description": "[a]"}, "description"),
    "a question of null": ({"question": "null"}, "question"),
    "an unknown field": ({"axis": "{depth: {6: {}}}"}, "axes"),
    "rates of a list": ({"rates": "[1e-3]"}, "rates"),
    "rates without seeds": ({"rates": "{values: [1e-3]}"}, "seeds"),
    "rates without values": ({"rates": "{seeds: [7]}"}, "values"),
    "no rate": ({"rates": "{values: [], seeds: [7]}"}, "values"),
    "a rate below 0": ({"rates": "{values: [-1e-3], seeds: [7]}"}, "values"),
    "a rate of 0": ({"rates": "{values: [0], seeds: [7]}"}, "values"),
    "a rate of NaN": ({"rates": "{values: [.nan], seeds: [7]}"}, "values"),
    "a rate of 1e308": ({"rates": "{values: [1e308, 1e-3], seeds: [7]}"}, ""),
    "a rate twice": ({"rates": "{values: [1e-3, 0.001], seeds: [7]}"}, "twice"),
    "rates with the same seeds": ({"rates": "{values: [1e-3], seeds: [0]}"}, "seeds"),
    "rates at no such axis": ({"rates": "{values: [1e-3], seeds: [7], at: {width: 6}}"}, "depth"),
    "rates at no such value": ({"rates": "{values: [1e-3], seeds: [7], at: {depth: 7}}"}, "depth"),
    "rates at a list": ({"rates": "{values: [1e-3], seeds: [7], at: [depth]}"}, "at"),
    "rates below the lowest": ({"rates": "{values: [1e-9], seeds: [7]}"}, "min_lr"),
    "an axis with a value of 90,000 letters": ({"axes": "{a: {" + "x" * 90000 + ": {model.depth: 6}}}"}, ""),
    "10^6 seeds": ({"seeds": "[" + ", ".join(map(str, range(9990))) + "]"}, ""),
    "a depth of 10^6 in a cell": ({"axes": "{depth: {a: {model.depth: 999999}}}"}, "depth"),
}
TEXTS = {
    "empty": "",
    "a list": "- a",
    "a word": "smoke",
    "a preset": "model: {depth: 4}\npartition: {num_modules: 2}",
    "not YAML": "axes: {",
}


def catalogue() -> list[Bad]:
    found = []
    command = ("study", "mine.yaml", "--dry-run")
    for name, (changes, says) in FIELDS.items():
        fields = {field: value for field, value in (SOUND | changes).items() if value is not None}
        text = "".join(f"{field}: {value}\n" for field, value in fields.items())
        found.append(Bad("study files", name, command, file("mine.yaml", text), says))
    for name, text in TEXTS.items():
        found.append(Bad("study files", f"a file: {name}", command, file("mine.yaml", text), "mine.yaml"))
    sound = file("mine.yaml", "".join(f"{field}: {value}\n" for field, value in SOUND.items()))
    for name, value in {
        "a result": "training.epochs=1",
        "no value": "machine.devices",
        "the machine whole": "machine={}",
        "a word": "machine.devices=x",
    }.items():
        found.append(Bad("study files", f"set of {name}", ("study", "mine.yaml", "--dry-run", "--set", value), sound))
    for name, options in {
        "no such backend": ("--backend", "pbs"),
        "no jobs": ("--jobs", "0"),
        "a site not there": ("--backend", "slurm", "--site", "no.yaml"),
    }.items():
        found.append(Bad("study files", name, (*command, *options), sound))
    found.append(Bad("study files", "stop of nothing", ("study", "mine.yaml", "--stop"), both(sound), may_be_told=True))
    return found
