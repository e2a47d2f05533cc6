"""Everything that can be wrong with the folder of a run."""

import json
import shutil
from dataclasses import replace

from incubate_lib.config import data_folder
from incubate_lib.phases.job import Job
from incubate_lib.pipeline.graph import Plan
from incubate_lib.training.files import read_json, write_json

OF_PHASES = ["half-summary", "no-accuracy", "begun"]  # runs of which phases are damaged, or gone


def write(done: Plan) -> None:
    """Write a copy of a finished run, `sound`, and damaged ones beside it, into another data folder."""
    data, sound = data_folder(), done.experiment.path
    runs = data / "runs"
    (runs / "nothing").mkdir(parents=True)
    (runs / "a file").write_text("not a run")
    (runs / "foreign").mkdir()
    (runs / "foreign" / "notes.txt").write_text("not a run either")
    (runs / "before").mkdir()
    (runs / "before" / "experiment.json").write_text("{}")
    shutil.copytree(sound.parents[1] / "phases", data / "phases")
    records = ["sound", "half", "a-list", "no-facts", "no-hash", "no-inputs", "other-phase", "other-settings"]
    for name in records:
        shutil.copytree(sound, runs / name, symlinks=True)
    # their phases are damaged, and therefore those of no other run
    phases = {name: with_other_seed(done, name, seed) for seed, name in enumerate(OF_PHASES, 1)}

    def rewrite(files, change):
        for file in files:
            file.write_text(change(file.read_text()))

    def index(name, change):
        rewrite([runs / name / "run.json"], change)

    def without(field):
        return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != field})

    def each_phase(name, change):
        record = json.loads((runs / name / "run.json").read_text())
        phases = {key: json.loads(change(json.dumps(about))) for key, about in record["phases"].items()}
        write_json(runs / name / "run.json", record | {"phases": phases})

    index("half", lambda text: text[:200])
    index("a-list", lambda text: "[1, 2]")
    index("no-facts", without("facts"))
    index("no-hash", without("hash"))
    each_phase("no-inputs", without("inputs"))
    each_phase("other-phase", lambda text: text.replace('"phase"', '"stage"'))
    index("other-settings", lambda text: text.replace('"num_modules"', '"modules"'))
    rewrite([phases["half-summary"]["end_to_end"].path / "summary.json"], lambda text: text[:100])
    rewrite([folder.path / "summary.json" for folder in phases["no-accuracy"].values()], without("score"))
    for folder in phases["begun"].values():
        shutil.rmtree(folder.path)


def with_other_seed(made, name, seed):
    """Write a run whose phases, with a seed of their own, are those of another run; return their folders."""
    digests, nodes = {}, {}
    for node in made.nodes:
        inputs = {which: digests[digest] for which, digest in node.settings.inputs.items()}
        settings = node.settings.model_copy(update={"seed": seed, "inputs": inputs})
        job = Job(**{name: getattr(node.job, name) for name in Job.model_fields} | {"settings": settings})
        digests[node.digest] = job.digest
        shutil.copytree(data_folder() / "phases" / node.digest, job.folder.path)
        for file in ("summary.json", "status.json"):
            write_json(job.folder.path / file, read_json(job.folder.path / file) | {"hash": job.digest})
        key = node.key.replace("seed-0", f"seed-{seed}")
        before = {which: nodes[other.key] for which, other in node.inputs.items()}
        nodes[node.key] = replace(node, key=key, job=job, inputs=before)
    experiment = replace(made.experiment, path=data_folder() / "runs" / name)
    finals = {(strategy, seed): nodes[node.key] for (strategy, _), node in made.finals.items()}
    Plan(experiment, list(nodes.values()), finals).write()
    return {key.removeprefix("seed-0/"): node.folder for key, node in nodes.items()}
