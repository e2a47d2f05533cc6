"""The seams: a task, a kind of phase and a network are one file each, in a package of somebody else's, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from incubate_lib.config import TrainingSettings
from incubate_lib.config.members import PHASES
from incubate_lib.data.order import Order
from incubate_lib.tasks import Metric, Task, get
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
NETWORK = {"name": "tiny_resnet", "img_size": 8, "in_chans": 1, "options": {"width": 4}}


@pytest.fixture
def incubate(tmp_path):
    """The command line of somebody whose package with members is on the path: `incubate run` of these settings."""

    def run(command: str = "run", **settings) -> subprocess.CompletedProcess:
        file = tmp_path / "toy.yaml"
        file.write_text(yaml.safe_dump(SMALL | settings))
        root = str(TOYS.parents[1])
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(TOYS)]), "INCUBATE_DATA": str(tmp_path / "data")}
        arguments = [sys.executable, "-m", "incubate_lib.cli", command, str(file)]
        return subprocess.run(arguments, capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


def phase(tmp_path, key):
    folder = tmp_path / "data" / "runs" / "toy" / "seed-0" / key
    return json.loads((folder / "summary.json").read_text()), folder


def test_a_task_without_classes_goes_from_images_to_a_verdict(incubate, tmp_path):
    result = incubate(task="digit_value", run=["deep_incubation", "end_to_end"])
    assert result.returncode == 0, result.stdout + result.stderr
    tuned, _ = phase(tmp_path, "deep_incubation/finetune")
    start, _ = phase(tmp_path, "meta")
    assert tuned["metric"] == "mean_error" and tuned["score"] < start["start_score"]
    assert "mean error" in result.stdout and "top-1" not in result.stdout and "%" not in result.stdout
    page = (tmp_path / "data" / "runs" / "toy" / "report.html").read_text()
    assert "mean error" in page and "top-1" not in page


def test_a_phase_with_two_losses_is_run_and_counted(incubate, tmp_path):
    strategies = {"mirrored": {"kind": "end_to_end", "phase": "two_losses", "phases": {"two_losses": {"lr": 2e-3}}}}
    result = incubate(strategies=strategies, run=["mirrored"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary, folder = phase(tmp_path, "mirrored")
    plain = incubate(strategies=strategies, run=["end_to_end"], name="plain", partition={"num_modules": 1})
    assert plain.returncode == 0, plain.stdout + plain.stderr
    once = json.loads((tmp_path / "data/runs/plain/seed-0/end_to_end/summary.json").read_text())
    assert summary["train_flops"] / summary["images_seen"] == 2 * once["train_flops"] / once["images_seen"]
    assert set(summary["results_sha256"]) == {"head"} and (folder / "head.safetensors").exists()
    assert "two losses" in (tmp_path / "data" / "runs" / "toy" / "report.html").read_text()


def test_a_network_that_timm_lacks_is_cut_by_names_and_incubated(incubate, tmp_path):
    result = incubate(model=NETWORK, partition={"cuts": ["blocks.2", "blocks.5"]}, run=["deep_incubation"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert phase(tmp_path, "deep_incubation/finetune")[0]["score"] > 0.3  # chance is 0.1
    module = phase(tmp_path, "deep_incubation/incubate-1")[0]
    whole, meta = (phase(tmp_path, key)[0]["parameters"] for key in ("deep_incubation/finetune", "meta"))
    assert module["parameters"] < whole and meta < whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digit_vale"}, "unknown task 'digit_vale'; did you mean digit_value?"),
        ({"strategies": {"mine": {"kind": "end_to_end", "phase": "two_loses"}}}, "did you mean two_losses"),
        ({"strategies": {"mine": {"kind": "end_to_and"}}}, "did you mean end_to_end"),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.2.conv1"]}}, "cannot be cut behind 'blocks.2.conv1'; cuts with similar"),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.5", "blocks.2"]}}, "are not in the network's order"),
        ({"model": NETWORK, "partition": {"cuts": ["blocks.2"], "num_modules": 3}}, "they must be equal"),
        ({"partition": {"cuts": ["blocks.0", "blocks.0.mlp"]}}, "partition.cuts"),
        ({"partition": {"cuts": ["patch_embed", "blocks.0"]}}, "leave module 1 without a block"),
        ({"model": {"name": "densenet121", "img_size": 8, "in_chans": 1}}, "cannot be taken apart"),
    ],
)  # fmt: skip
def test_what_is_no_member_or_no_cut_is_refused_with_the_nearest_names(incubate, tmp_path, changes, message):
    result = incubate(**changes)
    assert result.returncode == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.stderr and not list((tmp_path / "data").glob("runs/*/seed-*"))


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


def steps(losses, groups=None, clip_grad=None):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), Numbers()
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
            grad = trainer_grad()
            seen.append(None if grad is None else grad.clone())
            yield loss(run(x))

    made = {}

    def trainer_grad():
        return made["model"].weight.grad

    torch.manual_seed(0)
    model = made["model"] = nn.Linear(3, 1)
    settings = TrainingSettings(epochs=1, batch_size=8, lr=0.1, warmup_epochs=0)
    trainer = Trainer(model, Numbers(), settings, seed=0, task=Pairs(), losses=twice)
    trainer.begin(0)
    loss = trainer.step(0)
    one, single = steps(PHASES["end_to_end"].losses)
    assert seen[0] is None and torch.equal(seen[1], one.model.weight.grad)
    assert torch.equal(model.weight.grad, 2 * seen[1]) and loss.item() == pytest.approx(2 * single.item())


def test_gradients_are_clipped_by_the_norm_of_those_that_learn_together():
    trainer, _ = steps(PHASES["end_to_end"].losses, lambda model: [[model.weight], [model.bias]], clip_grad=1e-3)
    norms = [parameter.grad.norm().item() for parameter in trainer.model.parameters()]
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_score_of_which_less_is_better_is_written_as_its_task_has_it():
    metric = get("classification").score
    assert (metric.heading, metric.written(0.9341), metric.sign) == ("top-1 %", "93.4%", 1)
    assert Pairs().score.sign == -1 and Pairs().score.worst == float("inf")
