"""What starts from a phase that is trained again: made again only if the bits differ."""

import io
import json
import re

import pytest
from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends.local import pool
from incubate_lib.backends.slurm.settings import SlurmSettings
from incubate_lib.config import load_settings
from incubate_lib.config.study import load_study
from incubate_lib.pipeline import study
from incubate_lib.pipeline.strategies import plan

SHORT = {"partition.num_modules": 2, "training.epochs": 1, "machine.checkpoint_seconds": 100}
SHORT_OVERRIDES = [f"{name}={value}" for name, value in SHORT.items()]


def attempts(todo) -> set[tuple[str, int]]:
    return {(node.settings.phase, node.folder.status()["attempt"]) for node in todo.nodes}


def lose_meta(todo, as_elsewhere: bool) -> None:
    """Train a chain and delete its meta model, which was this machine's, or one with the last bits of another machine."""
    meta = todo.nodes[0]
    meta.run()
    if as_elsewhere:
        tensors = {name: tensor + 1e-3 for name, tensor in meta.folder.load_weights().items()}
        meta.folder.finish(meta.summary(), {"model": tensors})
    todo.run()
    assert attempts(todo) == {(phase, 1) for phase in ("meta", "incubate", "assemble", "finetune")}
    meta.folder.weights.unlink()


@pytest.mark.parametrize("as_elsewhere", [False, True], ids=["same bits", "other bits"])
def test_what_starts_from_a_phase_trained_again_is_made_again_only_if_the_bits_differ(as_elsewhere, data_folder, monkeypatch):
    monkeypatch.setattr(pool, "fair_threads", lambda jobs: 1)  # as here: the same bits
    todo = plan(load_settings("smoke", SHORT_OVERRIDES), ["deep_incubation"])
    lose_meta(todo, as_elsewhere)
    old = {node: node.folder.summary()["weights_sha256"] for node in todo.nodes}
    output = io.StringIO()
    assert backends.get().submit(todo, 2, Console(file=output)) == 0
    assert all(node.finished() for node in todo.nodes)
    rest = 2 if as_elsewhere else 1
    assert attempts(todo) == {("meta", 2), ("incubate", rest), ("assemble", rest), ("finetune", rest)}
    assert all((node.summary()["weights_sha256"] != sha) == as_elsewhere for node, sha in old.items())
    assert "seed 0 meta: its weights are missing or damaged; it is trained again; what starts from it" in output.getvalue()


def test_a_study_makes_again_what_starts_from_a_phase_trained_again(data_folder, tmp_path, monkeypatch):
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps({"preset": "smoke", "strategies": ["deep_incubation"], "seeds": [0], "set": SHORT}))
    (trial,) = study.Walk(load_study(str(file))).last()
    lose_meta(trial.plan, as_elsewhere=True)
    _, status = study.run(load_study(str(file)), backends.get(), 2, Console(file=io.StringIO()))
    assert status == 0 and all(node.finished() for node in trial.plan.nodes)
    assert {number for _, number in attempts(trial.plan)} == {2}


def test_jobs_are_submitted_for_what_starts_from_a_phase_trained_again(data_folder, capsys, monkeypatch):
    """Whether the bits differ is seen when the input is there: a job that finds its phase complete ends at once."""
    todo = plan(load_settings("smoke", SHORT_OVERRIDES), ["deep_incubation"])
    todo.run()
    for node in todo.nodes:
        (node.folder.path / "notebook.ipynb").touch()
    module = todo.nodes[1]
    module.folder.weights.unlink()
    analysis = {"preset": "smoke", "overrides": SHORT_OVERRIDES} | todo.arguments
    monkeypatch.setenv("PATH", "")  # scripts are made without a cluster
    capsys.readouterr()
    backends.get("slurm").preview(todo, SlurmSettings(), analysis=analysis)
    names = re.findall(r"^# sbatch .*--job-name=(\S+)", capsys.readouterr().out, re.M)
    final = todo.finals["deep_incubation", 0]
    keys = [module.key, final.inputs["assemble"].key, final.key, "06_analysis"]
    assert names == [f"{todo.experiment.path.name}/{key}" for key in keys]
