"""Bad parameters of notebooks: as papermill or the command line hands them over, before a kernel starts."""

from bad.case import Bad, file, parameters

PHASES = ("01_meta_model", "02_incubate_module", "03_assemble", "04_finetune", "05_end_to_end")
OTHERS = (
    "00_quickstart",
    "06_analysis",
    "07_modular_adaptive_training",
    "08_planner",
    "09_studies",
    "10_dashboard",
    "11_language",
    "12_downstream",
)
UNKNOWN = {  # notebook → a parameter that is nearly one of its own
    "00_quickstart": "meta_epoch",
    "01_meta_model": "seeds",
    "02_incubate_module": "module",
    "03_assemble": "overide",
    "04_finetune": "strategies",
    "05_end_to_end": "presets",
    "06_analysis": "seed",
    "07_modular_adaptive_training": "probes",
    "08_planner": "machine",
    "09_studies": "name",
    "10_dashboard": "begin",
    "11_language": "epoch",
    "12_downstream": "presets",
}
WRONG = [  # notebook, parameter, value of another type
    ("00_quickstart", "depth", "12"),
    ("00_quickstart", "epochs", 1.5),
    ("00_quickstart", "seed", None),
    ("00_quickstart", "preset", 5),
    ("01_meta_model", "seed", "0"),
    ("01_meta_model", "overrides", "training.epochs=1"),
    ("01_meta_model", "overrides", [5]),
    ("02_incubate_module", "module_index", "0"),
    ("02_incubate_module", "module_index", 0.0),
    ("02_incubate_module", "module_index", True),
    ("03_assemble", "strategy", ["a"]),
    ("04_finetune", "phase", 5),
    ("05_end_to_end", "preset", None),
    ("06_analysis", "seeds", 0),
    ("06_analysis", "seeds", ["0"]),
    ("06_analysis", "strategies", "end_to_end"),
    ("07_modular_adaptive_training", "probe", "12"),
    ("08_planner", "share", "0.4"),
    ("08_planner", "images", 1e6),
    ("08_planner", "machines", [4]),
    ("09_studies", "names", "digits-budget"),
    ("09_studies", "names", {}),
    ("10_dashboard", "start", "yes"),
    ("10_dashboard", "start", 1),
    ("11_language", "epochs", "0.1"),
    ("12_downstream", "epochs", "5"),
]
VALUES = {  # what is wrong → notebook and parameters
    "an unknown preset": ("01_meta_model", {"preset": "smokee"}),
    "a preset that is a folder": ("01_meta_model", {"preset": "."}),
    "an empty preset": ("01_meta_model", {"preset": ""}),
    "a file that is not there": ("05_end_to_end", {"preset": "no.yaml"}),
    "a file that is no YAML": ("05_end_to_end", {"preset": "mine.yaml"}),
    "a seed below 0": ("01_meta_model", {"preset": "smoke", "seed": -1}),
    "a huge seed": ("01_meta_model", {"preset": "smoke", "seed": 10**30}),
    "an unknown strategy": ("01_meta_model", {"preset": "smoke", "strategy": "fish"}),
    "a strategy without a meta model": ("01_meta_model", {"preset": "smoke", "strategy": "end_to_end"}),
    "a strategy of modules": ("05_end_to_end", {"preset": "smoke", "strategy": "deep_incubation"}),
    "a module too many": ("02_incubate_module", {"preset": "smoke", "module_index": 3}),
    "a module below 0": ("02_incubate_module", {"preset": "smoke", "module_index": -1}),
    "a huge module": ("02_incubate_module", {"preset": "smoke", "module_index": 10**30}),
    "an override of no field": ("03_assemble", {"preset": "smoke", "overrides": ["fish=1"]}),
    "an override without a value": ("03_assemble", {"preset": "smoke", "overrides": ["training.epochs"]}),
    "an override out of range": ("04_finetune", {"preset": "smoke", "overrides": ["training.epochs=-1"]}),
    "an empty override": ("04_finetune", {"preset": "smoke", "overrides": [""]}),
    "a phase that is not there": ("05_end_to_end", {"phase": "phases/no/phase.json"}),
    "a phase that is a folder": ("05_end_to_end", {"phase": "."}),
    "a phase that is no record": ("05_end_to_end", {"phase": "{here}/mine.yaml"}),
    "a phase of a list": ("05_end_to_end", {"phase": "{here}/list.json"}),
    "a phase and settings": ("05_end_to_end", {"phase": "phases/no/phase.json", "overrides": ["training.epochs=1"]}),
    "depth 0": ("00_quickstart", {"depth": 0}),
    "epochs below 0": ("00_quickstart", {"epochs": -1}),
    "a depth of 10^6": ("00_quickstart", {"depth": 10**6}),
    "an analysis of no preset": ("06_analysis", {"preset": "smokee"}),
    "an analysis of no strategy": ("06_analysis", {"preset": "smoke", "strategies": ["fish"]}),
    "an analysis of no seeds": ("06_analysis", {"preset": "smoke", "seeds": []}),
    "an analysis of a seed below 0": ("06_analysis", {"preset": "smoke", "seeds": [-1]}),
    "a probe of no images": ("07_modular_adaptive_training", {"probe": 0}),
    "a share above 1": ("08_planner", {"share": 1.5}),
    "no machines": ("08_planner", {"machines": 0}),
    "an unknown device": ("08_planner", {"device": "H1000"}),
    "a plan of no model": ("08_planner", {"preset": "vit_tinny"}),
    "an unknown study": ("09_studies", {"names": ["digits-budgets"]}),
    "a dashboard of no preset": ("10_dashboard", {"preset": "smokee"}),
    "a dashboard of no strategy": ("10_dashboard", {"preset": "smoke", "strategy": "fish"}),
    "a dashboard of a seed below 0": ("10_dashboard", {"preset": "smoke", "seed": -1}),
}


def catalogue() -> list[Bad]:
    kind, found = "notebook parameters", []
    for notebook, name in UNKNOWN.items():
        found.append(Bad(kind, f"{notebook}: unknown", parameters(notebook, **{name: 1}), says=name))
    for notebook, name, value in WRONG:
        found.append(Bad(kind, f"{notebook}: {name} is {value!r}", parameters(notebook, **{name: value}), says=name))
    for name, (notebook, given) in VALUES.items():
        found.append(
            Bad(
                kind,
                name,
                parameters(notebook, **given),
                lambda here: [file("mine.yaml", "a: [")(here), file("list.json", "[]")(here)],
            )
        )
    found += [Bad(kind, f"no such notebook {name!r}", parameters(name)) for name in ("99_fish", "", "../README", "a" * 300)]
    return found
