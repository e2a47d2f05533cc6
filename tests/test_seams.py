"""The seams: a task, a kind of phase and a network are one file each, in a package of somebody else's, and nothing else."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import sentences
import torch
import yaml
from torch import nn

from incubate_lib.cli import main
from incubate_lib.config import MATSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.config.members import PHASES
from incubate_lib.data.order import Order
from incubate_lib.data.sets import ImageSet
from incubate_lib.networks import register_all
from incubate_lib.phases import bench
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.report.html import write_report
from incubate_lib.report.live.representations import disagreements, similarity
from incubate_lib.report.planner.bench import bench_table, ratios_in_words
from incubate_lib.report.planner.forecast import forecast, open_plan, stated_speed
from incubate_lib.report.planner.memory import step_memory_of
from incubate_lib.report.planner.planner import phases_table
from incubate_lib.report.style import style
from incubate_lib.report.tables.comparison import comparison
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.words import phase_name
from incubate_lib.tasks import Metric, Task, get
from incubate_lib.training import adaptive, stopwatch
from incubate_lib.training.loop import evaluate
from incubate_lib.training.trainer import Trainer

TOYS = Path(__file__).parent / "toys"
SMALL = {
    "data": {"source": "digits", "test_images": 300, "val_images": 100, "train_share": 0.3},
    "model": {
        "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "in_chans": 1,
        "options": {"global_pool": "avg"},
    },
    "partition": {"num_modules": 3},
    "training": {"epochs": 2, "batch_size": 32, "lr": 3e-3, "warmup_epochs": 0.5, "label_smoothing": 0.0, "clip_grad": 1.0},
}  # fmt: skip
DENSE = {"name": "densenet121", "img_size": 32, "in_chans": 1, "options": {"growth_rate": 4, "block_config": [1, 1, 1]}}
NETWORK = {"name": "tiny_resnet", "img_size": 8, "in_chans": 1, "options": {"width": 4}}


@pytest.fixture
def write(tmp_path):
    """Write a settings file of somebody's own and return its path."""

    def write(**settings) -> str:
        file = tmp_path / "toy.yaml"
        file.write_text(yaml.safe_dump(SMALL | settings))
        return str(file)

    return write


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """The members of somebody else's package, as in a process on whose path that is."""
    for package in ("incubate_lib.tasks", "incubate_lib.networks", "incubate_lib.phases.kinds", "incubate_lib.strategies"):
        module = importlib.import_module(package)
        folder = TOYS.joinpath(*package.split("."))
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
    register_all.cache_clear()
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))


def trained(file, *strategies):
    """Train strategies in this process; return their last phases."""
    made = plan(load_settings(file), strategies)
    made.run()
    return list(made.finals.values())


def test_a_task_without_classes_goes_from_images_to_a_verdict(write, tmp_path):
    """By notebooks and in processes of their own, to which the package on the path is known."""
    file = write(task="digit_value", run=["deep_incubation", "end_to_end"])
    root = str(TOYS.parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(TOYS)]), "INCUBATE_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-m", "incubate_lib.cli", "run", file]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "data" / "runs" / "toy"
    tuned, meta = (json.loads((run / f"seed-0/{key}/summary.json").read_text()) for key in ("deep_incubation/finetune", "meta"))
    assert "classes" not in tuned
    assert tuned["metric"] == "mean_error" and tuned["score"] < meta["start_score"]
    assert "mean error" in result.stdout and "top-1" not in result.stdout and "%" not in result.stdout
    page = (run / "report.html").read_text()
    assert "mean error" in page and "top-1" not in page
    export = [*command[:-2], "export", file, "out", "--strategy", "end_to_end"]
    result = subprocess.run(export, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It has 1 output(s) a sample, of the task `digit_value`." in card and "class" not in card.partition("## Use")[2]


def test_a_phase_with_two_losses_is_run_and_counted(write, toys):
    strategies = {"mirrored": {"kind": "end_to_end", "phase": "two_losses", "phases": {"two_losses": {"lr": 2e-3}}}}
    mirrored, plain = trained(write(strategies=strategies, run=["mirrored"]), "mirrored", "end_to_end")
    twice, once = (node.summary()["train_flops"] / node.summary()["images_seen"] for node in (mirrored, plain))
    executed = [node.summary()["train_flops_executed"] / node.summary()["images_seen"] for node in (mirrored, plain)]
    assert twice == 2 * once and executed[0] == 2 * executed[1] and mirrored.settings.training.lr == 2e-3
    assert set(mirrored.summary()["results_sha256"]) == {"head"}
    head, model = mirrored.folder.load_weights("head"), mirrored.folder.load_weights()
    assert head.keys() == {"head.weight", "head.bias"} and all(torch.equal(head[name], model[name]) for name in head)
    (mirrored.folder.path / "head.safetensors").unlink()
    assert mirrored.finished() is None, "a phase has all of its results, or is trained again"
    assert phase_name("two_losses", None) == "two losses"


def dicts(monkeypatch):
    """Have images in memory yield dicts instead of pairs, as data of another package may."""
    some, batches = ImageSet.some, ImageSet.batches
    named = lambda pair: dict(zip(("image", "digit"), pair, strict=True))  # noqa: E731
    monkeypatch.setattr(ImageSet, "some", lambda self, index: named(some(self, index)))
    monkeypatch.setattr(ImageSet, "batches", lambda self, order: map(named, batches(self, order)))


def test_a_task_whose_batch_is_no_pair_and_whose_output_is_a_row_a_token_goes_all_the_way(write, toys, monkeypatch):
    dicts(monkeypatch)
    model = SMALL["model"] | {"options": {"global_pool": "", "class_token": False}}
    strategies = {"mat": {"mat": {"probe": 4, "warmup_epochs": 0.5, "every_epochs": 0.5, "outputs": "all"}, "match": None}}
    file = write(task="digit_bits", model=model, strategies=strategies, run=["deep_incubation", "end_to_end", "mat"])
    made = plan(load_settings(file))
    made.run()
    final, whole, adaptive = made.finals.values()
    for node in (*final.upstream("meta"), *final.upstream("incubate"), whole, adaptive):
        assert node.summary()["loss"] < node.folder.metrics()[0]["loss"], node.title
    assert final.summary()["score"] > 0.7  # whoever says of each bit what it mostly is has 0.63
    table = comparison(results := from_plan(made))
    assert table.shape[1] == 3 and "bits right %" in table.index and f" {sentences.THAN_END_TO_END} (" in results.verdict()
    assert similarity(made, "deep_incubation", images=32)["cka"].between(-0.5, 1 + 1e-6).all()
    found = disagreements(made, "deep_incubation")
    assert found.counts().sum(axis=1).eq(300).all() and 0 < found.mistakes["meta"].isna().sum() < 300
    costs = forecast(open_plan(file), stated_speed())
    assert (costs.strategies["flops"] == results.strategies["flops"])[:2].all()
    monkeypatch.setattr(stopwatch, "PIECE_SECONDS", 1e-3)
    monkeypatch.setattr(stopwatch, "MATMUL_SIZE", {"cpu": 64, "cuda": 64})
    measured = pd.DataFrame(bench.bench(load_settings(file), batch=4, rounds=1))
    names = ("end to end", "meta model", "two losses")  # a kind of phase that has a speed of its own has its lines, too
    lines = [f"{name}{loop}" for name in names for loop in ("", ", bare loop")]
    assert list(bench_table(measured).columns[0].cells)[:6] == lines
    flops = measured.set_index("variant")["step_flops"]
    assert flops["two_losses"] == flops["two_losses-bare"] == 2 * flops["end_to_end"]
    probed, task = whole.data()[0].some(torch.arange(6)), get("digit_bits")
    assert task.inputs(probed)[task.side_by_side(probed)].shape == (6, 1, 8, 8)


def test_a_task_over_text_is_told_of_in_its_own_words(write, toys, tmp_path, capsys, monkeypatch):
    (folder := tmp_path / "data" / "datasets" / "letters").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"dear {chr(97 + i)}, " + "it rains here. " * 9)
    model = {"name": "text_causal", "context": 8, "embed_dim": 8, "depth": 4, "num_heads": 2}
    file = write(task="copied_text", data={"source": "text", "folder": "letters"}, model=model, partition={"num_modules": 2},
                 strategies={"dgl": {"match": "end_to_end"}}, run=["end_to_end", "dgl"])  # fmt: skip
    made = plan(load_settings(file))
    made.run()
    assert all(node.summary()["score"] > 2 * node.summary()["start_score"] for node in made.finals.values())
    page = write_report(from_plan(made), tmp_path / "report.html", made).read_text()
    assert all(f" lines {words}" in page for words in ("to train on, ", "that no phase trains on"))
    assert "lines at once" in phases_table(forecast(made, stated_speed()))
    assert main(["check", file]) == 0 and " lines of 8 tokens, " in capsys.readouterr().out
    monkeypatch.setattr(stopwatch, "PIECE_SECONDS", 1e-3)
    monkeypatch.setattr(stopwatch, "MATMUL_SIZE", {"cpu": 64, "cuda": 64})
    measured = pd.DataFrame(bench.bench(load_settings(file), batch=2, rounds=1))
    assert {"lines/s", "tokens/s", "GFLOP/line"} <= {column.header for column in bench_table(measured).columns}
    assert "In pieces: a line costs" in "\n".join(ratios_in_words(measured))
    monkeypatch.setattr(adaptive, "free_memory", lambda device: 1000)
    node, mat = made.nodes[0], MATSettings(units="sublayers", probe=4)
    model = load_trained(node.settings, node.folder, node.facts.outputs)
    with pytest.raises(SettingsError, match=r"kernels of so many lines need .*, and so do those of two lines"):
        Trainer(model, node.data()[0], TrainingSettings(epochs=1), seed=0, mat=mat, task=get("copied_text"))


def test_a_task_with_several_outputs_is_trained_end_to_end(write, toys):
    model = {"name": "two_heads", "img_size": 8, "in_chans": 1}
    [final] = trained(write(task="two_answers", model=model, partition=None, run=["end_to_end"]), "end_to_end")
    first, *_, last = final.folder.metrics()
    assert last["loss"] < first["loss"] and final.summary()["metric"] == "right"
    assert final.summary()["train_flops"] == final.summary()["train_flops_executed"] > 0
    assert step_memory_of(final, {}).peak(32) > 0


def test_a_kind_of_strategy_has_its_row_its_label_and_its_look(write, toys):
    file = write(strategies={"tuned": {"kind": "tuned"}}, run=["tuned", "end_to_end"])
    made = plan(load_settings(file))
    made.run()
    assert list(comparison(from_plan(made)).columns) == ["end to end, then tuned", "end to end"]
    assert style("tuned")["marker"] == "p" and open_phase("finetune", file).strategy == "tuned"


def test_a_network_that_timm_lacks_is_cut_by_names_and_incubated(write, toys):
    file = write(model=NETWORK, partition={"cuts": ["blocks.2", "blocks.5"]}, run=["deep_incubation"])
    [final] = trained(file, "deep_incubation")
    assert final.summary()["score"] > 0.3  # chance is 0.1
    modules = [node.summary()["parameters"] for node in final.upstream("incubate")]
    assert sum(modules) == final.summary()["parameters"] > final.upstream("meta")[0].summary()["parameters"]
    assert load_trained(final.settings, final.folder, 10).num_classes == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digit_vale"}, sentences.unknown("task", "digit_vale", "digit_value")),
        ({"strategies": {"mine": {"kind": "end_to_end", "phase": "two_loses"}}}, sentences.did_you_mean("two_losses")),
        ({"strategies": {"mine": {"kind": "end_to_and"}}}, sentences.did_you_mean("end_to_end")),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.2.conv1"]}}, f"{sentences.no_cut('blocks.2.conv1')}; cuts with"),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.5", "blocks.2"]}}, "are not in the network's order"),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.2"], "num_modules": 3}}, "they must be equal"),
        ({"partition": {"cuts": ["blocks.0", "blocks.0.mlp"]}}, "partition.cuts"),
        ({"partition": {"cuts": ["patch_embed", "blocks.0"]}}, "leave module 1 without a block"),
        ({"model": DENSE, "data": {"source": "synthetic", "image_size": 32}}, "without partition it can be trained end to end"),
        (
            {"data": {"source": "synthetic", "image_size": 8}, "task": "picky"},
            "task 'picky' cannot learn data.source",
        ),
    ],
)
def test_what_is_no_member_or_no_cut_is_refused_with_the_nearest_names(write, toys, capsys, tmp_path, changes, message):
    assert main(["run", write(**changes)]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert message in output and not list((tmp_path / "data").glob("runs/*/seed-*")), output


class Pairs(Task):
    """Learns a number from a batch that is no pair."""

    metrics = (Metric("error", "error", higher_is_better=False),)
    num_sums = 3

    def ready(self, batch, data, recipe, extra):
        return batch

    def inputs(self, batch):
        return batch["x"]

    def loss(self, output, batch, recipe=None):
        return (output - batch["wanted"]).square().mean()

    def sums(self, output, batch):
        error = (output - batch["wanted"]).double()
        return torch.stack([torch.ones_like(error).sum(), error.square().sum(), error.abs().sum()])

    def divided(self, sums):
        return {"loss": sums[1] / sums[0], "error": sums[2] / sums[0]}


class Numbers:
    """40 vectors and what is wanted of each: y = sum of x, a real number."""

    def __init__(self):
        self.x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        self.y, self.shape, self.num_classes = self.x.sum(1, keepdim=True), (3,), 0

    def __len__(self):
        return len(self.x)

    def batch(self, index):
        return {"x": self.x[index], "wanted": self.y[index]}

    def batches(self, order: Order):
        return (self.batch(index) for _, _, index in order)

    def eval_batches(self, rank=0, devices=1):
        return (self.batch(index) for index in torch.arange(rank, 40, devices).split(7))


class Pair(nn.Module):
    """Two networks that learn from losses of their own."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x):
        return [part(x) for part in self.parts]


def steps(losses, groups=None, clip_grad=None, model=None):
    torch.manual_seed(0)
    model, data = model or nn.Linear(3, 1), Numbers()
    settings = TrainingSettings(epochs=1, batch_size=8, lr=0.1, warmup_epochs=0, clip_grad=clip_grad)
    trainer = Trainer(model, data, settings, seed=0, task=Pairs(), losses=losses, groups=groups and groups(model))
    trainer.begin(0)
    return trainer, trainer.step(0)


def test_loop_and_trainer_open_no_batch_and_labels_may_be_numbers():
    trainer, _ = steps(PHASES["end_to_end"].losses)
    before = evaluate(trainer.model, Numbers(), task=Pairs())
    for step in range(1, 5):
        trainer.step(step)
    after = evaluate(trainer.model, Numbers(), task=Pairs())
    wanted = (trainer.model(Numbers().x) - Numbers().y).detach()
    assert after["loss"] == pytest.approx(wanted.square().mean().item()) and after["loss"] < before["loss"]
    assert after["score"] == pytest.approx(wanted.abs().mean().item())


def test_losses_add_up_and_each_is_gone_through_backward_before_the_next():
    seen = []

    def twice(run, x, loss):
        for _ in range(2):
            seen.append(None if model.weight.grad is None else model.weight.grad.clone())
            yield loss(run(x))

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    settings = TrainingSettings(epochs=1, batch_size=8, lr=0.1, warmup_epochs=0)
    trainer = Trainer(model, Numbers(), settings, seed=0, task=Pairs(), losses=twice)
    trainer.begin(0)
    seen.clear()  # what an update costs has been counted
    loss = trainer.step(0)
    one, single = steps(PHASES["end_to_end"].losses)
    assert seen[0] is None and torch.equal(seen[1], one.model.weight.grad)
    assert torch.equal(model.weight.grad, 2 * seen[1]) and loss.sum().item() == pytest.approx(2 * single.item())


def test_gradients_are_clipped_by_the_norm_of_those_that_learn_together():
    """Read off the moments: after one update a tenth of the gradients."""
    each = lambda run, x, loss: (loss(output) for output in run(x))  # noqa: E731
    groups = lambda model: [list(part.parameters()) for part in model.parts]  # noqa: E731
    trainer, losses = steps(each, groups, clip_grad=1e-3, model=Pair())
    moments = [torch.cat([trainer.optimizer.state[p]["exp_avg"].flatten() for p in group]) for group in trainer.groups]
    assert [10 * moment.norm().item() for moment in moments] == pytest.approx([1e-3, 1e-3], rel=1e-2) and len(losses) == 2


def test_a_score_of_which_less_is_better_is_written_as_its_task_has_it():
    metric = get("classification").score
    assert (metric.heading, metric.written(0.9341), metric.sign) == ("top-1 %", "93.4%", 1)
    assert Pairs().score.sign == -1 and Pairs().score.worst == float("inf")
