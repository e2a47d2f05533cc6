"""Reports say where fine-tuning made a network worse, and what to try; and nothing where it did not."""

from types import SimpleNamespace

import pytest

from incubate_lib import tasks
from incubate_lib.cli import main
from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables.verdict import doubts, is_worse, lowered


@pytest.mark.parametrize(
    ("before", "after", "images", "lower"),
    [
        ([0.95], [0.90], 600, True),  # one seed: two standard errors of judging are 3.0 points
        ([0.95], [0.93], 600, False),
        ([0.95], [0.90], 100, False),
        ([0.90], [0.95], 600, False),
        ([0.90, 0.91, 0.92], [0.80, 0.79, 0.82], 600, True),
        ([0.90, 0.90, 0.90], [0.95, 0.93, 0.30], 600, False),  # one of three seeds fell apart
    ],
)
def test_lower_means_by_more_than_chance_explains(before, after, images, lower):
    assert is_worse(tasks.get().score, before, after, images) is lower


def test_the_report_says_where_fine_tuning_lowers_the_accuracy_and_what_to_try(data_folder, capsys):
    grown = "{kind: deep_incubation, start: identity, inherit_stem: true, inherit_head: true, incubate: none, "
    given = ["phases.meta.epochs=12", "phases.finetune.epochs=2", "run=[gentle, wild]"]
    given += [f"strategies.gentle={grown} phases: {{finetune: {{lr: 1e-4}}}}}}"]
    given += [f"strategies.wild={grown} phases: {{finetune: {{lr: 0.5}}}}}}"]
    todo = plan(load_settings("smoke", given), ["gentle", "wild"])
    todo.run()
    (output,) = lowered(todo.finals.values()).splitlines()
    wild = todo.finals["wild", 0].summary()
    assert output == (
        f"Fine-tuning lowered wild from {100 * wild['start_score']:.1f} to {100 * wild['score']:.1f} % (one seed; more "
        "than chance explains). Try a lower strategies.wild.phases.finetune.lr (it was 0.5), or fewer "
        "strategies.wild.phases.finetune.epochs."
    )
    assert lowered([todo.finals["gentle", 0]]) == ""

    overrides = [part for override in given for part in ("--set", override)]
    assert main(["report", "smoke", *overrides]) == 0
    assert output in capsys.readouterr().out
    assert output in (todo.experiment.path / "report.html").read_text()


def ended(module=None, before=0.5, after=0.9, images=10_000, modules=()) -> SimpleNamespace:
    """A finished phase: of a module, or of a whole network with its modules."""
    summary = {"start_score": before, "score": after, "eval_images": images, "metric": "accuracy", "module_index": module}
    settings = SimpleNamespace(phase="finetune" if module is None else "incubate", module_index=module)
    upstream = lambda phase: list(modules)  # noqa: E731
    return SimpleNamespace(
        summary=lambda: summary,
        settings=settings,
        strategy="deep_incubation_recommended",
        upstream=upstream,
        digest=str((module, before, after)),
    )


def test_a_report_says_which_modules_incubation_made_worse():
    modules = ended(0, 0.6, 0.8), ended(1, 0.7, 0.6), ended(2, 0.7, 0.699)
    assert doubts([ended(modules=modules)]) == (
        "Incubation made modules of Deep Incubation, recommended recipe worse: 2 (70.0 % → 60.0 %). More updates, or a lower "
        "phases.incubate.lr, may help."
    )
    assert doubts([ended(modules=modules[::2])]) == ""
    unfinished = ended(3)
    unfinished.summary = lambda: None  # the run goes on while it is reported
    assert doubts([ended(modules=(unfinished, modules[0]))]) == ""
    together = ended()  # the same modules, in one phase
    together.summary().update(modules=[module.summary() for module in modules], module_index=None)
    together.settings.phase, together.settings.module_index = "incubate_together", None
    assert doubts([ended(modules=(together,))]) == doubts([ended(modules=modules)])


def test_a_report_says_what_a_small_test_set_cannot_tell():
    assert (
        doubts([ended(after=0.8, images=128)])
        == "Of 128 samples to evaluate on, chance alone makes differences of up to 10 points."
    )
    assert doubts([ended(after=0.8, images=10_000)]) == ""
