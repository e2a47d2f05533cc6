"""Modules that learn at once, locally or on small images: what does not go together."""

from bad.case import Bad

DI, LOCAL = "kind: deep_incubation", "kind: local_learning"
WRONG = {  # what is wrong → the strategy, further overrides, what the message must name
    "MAT in a joint phase": (f"{DI}, together: true, mat: {{}}", [], "mat"),
    "MAT named for a joint phase": (f"{DI}, together: true, mat: {{}}, mat_phases: [incubate]", [], "mat_phases"),
    "imitation together": (f"{DI}, together: true, incubate: features", [], "together"),
    "nothing learns together": (f"{DI}, together: true, incubate: none", [], "together"),
    "imitation shares draws": (f"{DI}, share_draws: true, incubate: features", [], "share_draws"),
    "together and shared draws": (f"{DI}, together: true, share_draws: true", [], "share_draws"),
    "together is a word": (f"{DI}, together: maybe", [], "together"),
    "shared draws are a number": (f"{DI}, share_draws: 1", [], "share_draws"),
    "end to end together": ("kind: end_to_end, together: true", [], "together"),
    "another recipe for one module": (f"{DI}, together: true, phases: {{incubate-1: {{lr: 1e-4}}}}", [], "one recipe"),
    "another recipe for one module, in general": (f"{DI}, together: true", ["phases.incubate-0.lr=1e-4"], "one recipe"),
    "settings of a joint phase": (f"{DI}, together: true, phases: {{incubate_together: {{lr: 1e-4}}}}", [], "incubate"),
    "small images and MAT": (f"{DI}, low_resolution: {{}}, mat: {{}}", [], "low_resolution"),
    "small images without a phase for them": (f"{DI}, incubate: none, low_resolution: {{}}", [], "low_resolution"),
    "small images as large as all": (f"{DI}, low_resolution: {{img_size: 8}}", [], "smaller than the network's"),
    "small images that patches do not divide": (f"{DI}, low_resolution: {{img_size: 3}}", [], "patches"),
    "small images of no size": (f"{DI}, low_resolution: {{img_size: 0}}", [], "img_size"),
    "a share of small images": (f"{DI}, low_resolution: {{share: 0.5}}", [], "share"),
    "local learning by no method": (LOCAL, [], "method"),
    "local learning by another method": (f"{LOCAL}, method: dni", [], "method"),
    "contrast with mixup": (f"{LOCAL}, method: infopro, contrast: true", ["training.mixup=0.8"], "mixup"),
    "contrast with cutmix": (f"{LOCAL}, method: infopro, contrast: true", ["training.cutmix=1.0"], "cutmix"),
    "contrast with too few for pairs": (f"{LOCAL}, method: infopro, contrast: true", ["training.batch_size=4"], "pairs"),
    "contrast with too few at once": (f"{LOCAL}, method: infopro, contrast: true", ["training.micro_batch=2"], "pairs"),
    "contrast in DGL": (f"{LOCAL}, method: dgl, contrast: true", [], "contrast"),
    "reconstruction in DGL": (f"{LOCAL}, method: dgl, reconstruction: [1, 0]", [], "reconstruction"),
    "one weight": (f"{LOCAL}, method: infopro, reconstruction: [1]", [], "reconstruction"),
    "a negative weight": (f"{LOCAL}, method: infopro, supervision: [-1, 1]", [], "supervision"),
    "a module that learns nothing": (f"{LOCAL}, method: infopro, reconstruction: [0, 1], supervision: [0, 1]", [], "both 0"),
    "MAT in local learning": (f"{LOCAL}, method: dgl, mat: {{}}", [], "mat"),
    "local learning of one module": (f"{LOCAL}, method: dgl", ["partition.num_modules=1"], "at least 2 modules"),
    "local learning without modules": (f"{LOCAL}, method: dgl", ["partition=null"], "partition"),
    "a budget of local learning without match": (f"{LOCAL}, method: dgl, budget: 0.5", [], "match"),
    "cuts by memory beside depths": (f"{LOCAL}, method: dgl", ["partition={target_depths: [4, 2], balance: memory}"], "balance"),
    "cuts by something else": (f"{LOCAL}, method: dgl", ["partition={num_modules: 2, balance: flops}"], "balance"),
}


def catalogue() -> list[Bad]:
    found = []
    for name, (strategy, overrides, says) in WRONG.items():
        command = ["run", "smoke", "--strategies", "mine", "--set", f"strategies.mine={{{strategy}}}"]
        command += [word for override in overrides for word in ("--set", override)]
        found.append(Bad("modules at once", name, tuple(command), says=says))
    return found
