"""What a strategy spends its budget on: shares, and each phase's rate and warm-up, recommended or its own."""

import pytest

from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.study import load_study
from incubate_lib.pipeline.graph import closure
from incubate_lib.pipeline.strategies import plan
from incubate_lib.pipeline.view import few_updates
from incubate_lib.report.tables.studies import published


def test_shares_of_a_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    change = ["phases.end_to_end.epochs=40", "strategies.deep_incubation.match=end_to_end"]
    change += ["strategies.deep_incubation.shares={meta: 0.3, incubate: 0.5}"]
    todo = plan(load_settings("smoke", change), ["end_to_end", "deep_incubation"])
    by = {"meta": 0, "incubate": 0, "finetune": 0, "end_to_end": 0, "assemble": 0}
    for node in todo.nodes:
        by[node.settings.phase] += todo.flops[node.key]
    whole = by["end_to_end"]
    assert by["meta"] / whole == pytest.approx(0.3, abs=0.02) and by["incubate"] / whole == pytest.approx(0.5, abs=0.02)
    assert sum(by.values()) == pytest.approx(2 * whole, rel=0.02)


def test_a_budget_may_be_spent_before_fine_tuning(tmp_path, monkeypatch):
    """With the identity start that is the meta model's network alone: the assembled network computes what it does."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    change = ["phases.end_to_end.epochs=2", "strategies.growing.match=end_to_end", "strategies.growing.shares={meta: 1}"]
    todo = plan(load_settings("smoke", change), ["end_to_end", "growing"])
    meta, _, finetune = closure([todo.finals["growing", 0]])
    assert todo.flops[meta.key] == pytest.approx(todo.flops[todo.finals["end_to_end", 0].key], rel=0.02)
    meta, finetune = (node.run() for node in (meta, finetune))
    assert (finetune["steps"], finetune["train_flops"]) == (0, 0) and meta["steps"] > 0
    assert not any("finetune" in line for line in few_updates(todo))  # of which none are asked
    assert finetune["score"] == meta["score"] and finetune["loss"] == pytest.approx(meta["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["deep_incubation_recommended", "recommended", "end_to_end_longer", "mat"])
def test_a_budget_is_a_share_of_what_is_matched(name):
    change = ["training.warmup_epochs=0.1", "mat.warmup_epochs=0.1"]
    change.append("phases.incubate.epochs=9" if name == "mat" else "phases.end_to_end.epochs=16")
    whole, part = (
        plan(load_settings("smoke", [*change, f"strategies.{name}.budget={share}"]), [name]).flops.values()
        for share in (1, 0.375)
    )
    assert sum(part) / sum(whole) == pytest.approx(0.375, rel=0.03)  # to whole updates


def test_a_part_that_is_shorter_than_its_warm_up_is_refused_by_name():
    short = "strategies.short={kind: end_to_end, match: end_to_end, budget: 0.25}"
    with pytest.raises(SettingsError, match=r"strategies\.short .* 0\.5 epochs, .* set phases\.end_to_end\.warmup_epochs"):
        plan(
            load_settings("smoke", [short, "strategies.end_to_end.phases.end_to_end.epochs=2", "training.warmup_epochs=1"]),
            ["short"],
        )


RECIPES = [
    ("recommended", "digits-strategies", {}, "growing", ["training.eval_every=2"]),  # that study evaluates at the end
    ("deep_incubation_recommended", "digits-budget", {"budget": "1/4"}, "deep_incubation_identity", []),
]


@pytest.mark.parametrize(("name", "source", "place", "there", "but"), RECIPES, ids=[recipe[0] for recipe in RECIPES])
def test_a_recommended_recipe_is_what_the_studies_ran(name, source, place, there, but):
    """In the preset: a cell at a quarter of end to end's budget, with the rates that its table has."""
    study, table = load_study(source), published(source).results
    cell = next(cell for cell in study.cells() if cell.place == place)
    row = table[(table["strategy"] == there) & table[[*place]].eq(place).all(axis=1)].iloc[0]
    rates = {phase: row[f"lr_{phase}"] for phase in ("meta", "incubate", "finetune") if row[f"lr_{phase}"] > 0}
    chosen = [f"strategies.{there}.phases.{phase}.lr={float(rate)!r}" for phase, rate in rates.items()]
    studied = study.settings(cell, [*chosen, *but])
    for ours, theirs in zip(plan(load_settings("digits"), [name]).nodes, plan(studied, [there]).nodes, strict=True):
        assert ours.settings.phase == theirs.settings.phase
        if ours.settings.training:
            ours, theirs = (node.settings.training.model_dump() for node in (ours, theirs))
            assert abs(ours.pop("epochs") / theirs.pop("epochs") - 1) < 0.01  # end to end is 25.03 epochs in the preset
            assert ours == theirs


def training_of(phase, *changes, strategy="deep_incubation_recommended", epochs=None):
    return load_settings("smoke", ["phases={}", *changes]).training_of(strategy, phase, epochs)


@pytest.mark.parametrize(("phase", "scale", "warm_up"), [("meta", 1, 0.1), ("incubate", 0.5, 0.2), ("finetune", 0.5, 0)])
def test_who_says_nothing_has_the_recommended_rates_and_warm_ups(phase, scale, warm_up):
    """Relative to the user's own rate and to the phase's own length, whatever that is."""
    for lr, epochs in ((2e-3, 0.4), (1e-4, 30.0)):
        said = [f"training.lr={lr}", "training.warmup_epochs=2", "training.epochs=20"]
        found, plain = training_of(phase, *said, epochs=epochs), training_of(phase, *said, strategy="deep_incubation_identity")
        assert (found.lr, found.warmup_epochs) == (pytest.approx(scale * lr), pytest.approx(warm_up * epochs))
        changed = {"lr", "warmup_epochs", "epochs"}
        assert found.model_dump(exclude=changed) == plain.model_dump(exclude=changed)
        assert (plain.lr, plain.warmup_epochs) == (lr, 2)


@pytest.mark.parametrize("where", ["phases", "strategies.deep_incubation_recommended.phases"])
def test_what_is_said_for_a_phase_counts_more_than_what_is_recommended(where):
    found = training_of("finetune", f"{where}.finetune.lr=3e-3", f"{where}.finetune.warmup_epochs=0.3", epochs=2)
    assert (found.lr, found.warmup_epochs) == (3e-3, 0.3)
    found = training_of("incubate", f"{where}.incubate.lr=3e-3", epochs=2)
    assert (found.lr, found.warmup_epochs) == (3e-3, 0.4)


def test_a_scaled_rate_never_begins_below_its_end():
    found = training_of("finetune", "training.lr=1.5e-5")  # min_lr is 1e-5
    assert found.lr == found.min_lr == 0.75e-5
    found = training_of("finetune", "training.lr=1.5e-5", "training.lr_for_batch=8")  # of batches of 16
    assert (found.peak_lr, found.min_lr) == (1.5e-5, 1e-5)


def test_a_warm_up_that_is_longer_than_a_matched_phase_is_no_error_in_the_recommended_recipe(data_folder):
    said = ["phases={}", "phases.end_to_end.epochs=2", "training.warmup_epochs=1", "training.lr=1e-3"]
    todo = plan(load_settings("smoke", said), ["deep_incubation_recommended"])
    by_phase = {node.settings.phase: node.settings.training for node in todo.nodes}
    incubate, tuned = by_phase["incubate"], by_phase["finetune"]
    assert incubate.epochs < 1 and incubate.warmup_epochs == pytest.approx(0.2 * incubate.epochs, abs=1e-3)
    assert (incubate.lr, tuned.lr, tuned.warmup_epochs) == (5e-4, 5e-4, 0)


def test_a_meta_model_with_a_rate_of_its_own_is_not_shared(data_folder):
    facts = None
    for said in ("lr_scale: {meta: 2}", "warmup_share: {meta: 0.5}"):
        settings = load_settings("smoke", ["strategies.mine={kind: deep_incubation, " + said + "}"])
        todo = plan(settings, ["deep_incubation", "mine"], facts=facts)
        facts, metas = todo.experiment.facts, [node for node in todo.nodes if node.settings.phase == "meta"]
        assert len({node.digest for node in metas}) == len(metas) == 2


def test_what_was_trained_before_there_were_recommended_rates_stays_good(data_folder):
    """Digits say their rates themselves, and other strategies have none: settings and phases are what they were."""
    settings = load_settings("digits")
    assert settings.digest() == "195ecc0b79af"
    finals = {"end_to_end": "5323d599ea31", "deep_incubation": "30c8cfc0397e", "deep_incubation_recommended": "d97e732c09b1",
              "deep_incubation_stack": "6d9a4f2633cd", "growing": "4f25e1b1a88c"}  # fmt: skip
    todo = plan(settings, list(finals))
    assert {name: final.digest for (name, _), final in todo.finals.items()} == finals
    study = load_study("digits-budget")
    settings = study.settings(next(cell for cell in study.cells() if cell.place == {"budget": "1/4"}))
    assert settings.digest() == "2f6a4761482f"
    todo = plan(settings, ["deep_incubation_identity"], facts=todo.experiment.facts)
    assert todo.finals["deep_incubation_identity", 0].digest == "13245c3b666c"
