"""Every preset trains through its notebooks: small, but with its images on disk, transforms and recipe as they are shipped."""

import re
from pathlib import Path

import pytest
import yaml
from patience import join
from shrunk import BATCH, EPOCHS, MICRO, shrunk, write_images

from incubate_lib.config import load_settings, presets
from incubate_lib.data.sets import load_data
from incubate_lib.phases.networks import model_shape
from incubate_lib.pipeline import warm
from incubate_lib.training.files import read_json

MAY_SHRINK = (
    r"model\.(embed_dim|num_heads|depth|options(\.(layers|channels))?)|partition\.(target_depths|cuts)"
    r"|(\w+\.)+((\w+_)?epochs|mixup_draws)|training\.(batch_size|micro_batch|lr_for_batch)"
    r"|data\.(train_share|test_images|num_images|source|folder)|machine\.compile|name"
)


def written(name: str, folder: Path) -> str:
    """Write a shrunk preset's file and return its path."""
    path = folder / f"{name}-small.yaml"
    path.write_text(yaml.safe_dump(shrunk(name)))
    return str(path)


def leaves(value, path=""):
    """Yield (dotted path, value) of everything in nested mappings."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{path}{key}.")
        else:
            yield path + key, inner


@pytest.mark.parametrize("name", presets())
def test_shrinking_changes_width_depth_batch_images_and_epochs_and_nothing_else(name, tmp_path):
    settings, small = load_settings(name), load_settings(written(name, tmp_path))
    before, after = (dict(leaves(s.model_dump(exclude={"overrides"}))) for s in (settings, small))
    changed = {path for path in before.keys() | after.keys() if before.get(path, path) != after.get(path, path)}
    assert {path for path in changed if not re.fullmatch(MAY_SHRINK, path)} == set()
    for strategy, how in settings.strategies.items():
        for phase in how.trains:
            recipe, short = settings.training_of(strategy, phase), small.training_of(strategy, phase)
            fields = {"epochs", "warmup_epochs", "batch_size", "micro_batch", "lr", "lr_for_batch", "mixup_draws"}
            assert recipe.model_dump(exclude=fields) == short.model_dump(exclude=fields)
            assert short.peak_lr == pytest.approx(recipe.peak_lr)
            assert (short.epochs, short.batch_size) == (EPOCHS, BATCH)
            assert short.micro_batch == (MICRO if recipe.micro_batch else None)
            assert bool(short.warmup_epochs) == bool(recipe.warmup_epochs) and short.warmup_epochs <= 1


def ways(name: str) -> list[tuple[str, str]]:
    """Return the notebooks that end a preset's kinds of training, each with a strategy; a notebook trains what it starts from."""
    strategies = load_settings(name).strategies
    plain = [key for key, how in strategies.items() if how.kind == "end_to_end" and "end_to_end" in how.phases]
    found = [("05_end_to_end", [*plain, "end_to_end"][0])]
    if "deep_incubation" in strategies:
        found.append(("04_finetune", "deep_incubation"))
    if name.startswith("mat-"):
        found.append(("05_end_to_end", "mat"))
    return found


def executed(notebook: str, parameters: dict[str, str], folder: Path) -> None:
    """Execute a notebook as `incubate run` does."""
    job = warm.start(notebook, parameters, folder, f"{parameters['strategy']}.ipynb", threads=1)
    assert join(job, notebook) == 0, (folder / "log.txt").read_text()[-3000:]


# those of large scenes do an update in test_downstream.py
@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith(("coco", "ade20k"))])
def test_every_preset_trains_two_epochs_through_its_notebooks(name, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("INCUBATE_DATA", str(data))
    for variable, value in write_images(name, data).items():
        monkeypatch.setenv(variable, value)
    preset = written(name, tmp_path)
    for notebook, strategy in ways(name):
        executed(notebook, {"preset": preset, "strategy": strategy}, tmp_path)
    small = load_settings(preset)
    summaries = [read_json(path) for path in data.glob("phases/*/summary.json")]
    phases = {(summary["strategy"], summary["phase"]): summary for summary in summaries}
    for _, strategy in ways(name):
        how = small.strategies[strategy]
        trained = [phases[key] for key in phases if key[0] in (strategy, None) and key[1] in how.trains]
        assert {summary["phase"] for summary in trained} == set(how.trains)
        for summary in trained:
            epochs = summary["epochs"]
            least = 0 if how.get("shares") else EPOCHS  # of a budget each phase has a part
            assert epochs > least or epochs == EPOCHS if small.is_matched(strategy) else epochs == EPOCHS
            assert summary["broken_images"] == 0 and summary["steps"] >= 2


def test_the_images_on_disk_are_laid_out_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    write_images("imagenet-vit-b", tmp_path)
    settings = load_settings(written("imagenet-vit-b", tmp_path))
    train, eval_set = load_data(settings.data, shape=model_shape(settings.model))
    assert (len(train), len(eval_set), train.num_classes) == (8, 4, 4)


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith(("imagenet", "cifar"))])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_node_of_up_to_eight_devices_can_share_a_phase(preset, devices):
    assert load_settings(preset, [f"machine.devices={devices}"]).machine.devices == devices
