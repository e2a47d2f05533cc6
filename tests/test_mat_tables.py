"""What tables, sentences and pictures say of Modular Adaptive Training, of numbers that are made up."""

import math
from dataclasses import replace

import pandas as pd

from incubate_lib.report.tables import mat
from incubate_lib.report.tables.records import Results


def mat_results(curves: dict[str, list[list[float]]]) -> Results:
    """Strategies of one phase: for each seed its accuracies, at equal distances; MAT's steps cost half of full training's."""
    rows, finals = [], []
    for name, seeds in curves.items():
        step = 0.5 if name == "mat" else 1.0
        for seed, values in enumerate(seeds):
            rows += [
                {"strategy": name, "seed": seed, "phase": "end_to_end", "step": i, "flops": i * step * 1e12,
                 "train_seconds": i * step * 10, "score": value}
                for i, value in enumerate(values)
            ]  # fmt: skip
            finals.append({"strategy": name, "seed": seed, "score": values[-1]})
    phases = pd.DataFrame({"strategy": list(curves), "phase": "end_to_end"})
    return Results("t", pd.DataFrame(finals), phases, pd.DataFrame(rows))


def test_what_full_trainings_accuracy_cost_is_read_off_the_mean_curves():
    made = mat_results({
        "end_to_end": [[0.1, 0.5, 0.8, 0.9], [0.1, 0.5, 0.6, 0.7]],  # 80 % at the end
        "mat": [[0.1, 0.4, 0.8, 0.9], [0.1, 0.6, 0.8, 0.9]],  # 80 % at its second evaluation, for a third
        "mat_random": [[0.1, 0.3, 0.5, 0.7], [0.1, 0.3, 0.5, 0.7]],
    })  # fmt: skip
    table = mat.reach(made)
    unfinished = made.curves[made.curves["strategy"] == "mat"].assign(strategy="deep_incubation_mat", phase="meta")
    shared = replace(made, curves=pd.concat([made.curves, unfinished]))
    assert mat.reach(shared).equals(table), "a phase that another run has trained makes no strategy"
    assert list(table.columns) == [
        "top-1 %", "training FLOPs, all", "training FLOPs to 80.0 %", "training seconds, all", "training seconds to 80.0 %",
    ]  # fmt: skip
    assert table.loc["MAT"].tolist() == ["90.0 ± 0.0", "0.500", "0.333", "0.500", "0.333"]
    assert table.loc["end to end"].tolist()[1:] == ["1.000"] * 4
    assert table.loc["random units, as many"].tolist()[2::2] == ["never", "never"]
    output = mat.verdict(made)
    assert "it takes 0.500 of the FLOPs" in output and "reached for 0.333 of its FLOPs" in output
    assert "Against random units, as many (1.000 of the FLOPs): 20.0 points better, clear at 95 %, 2 of 2 seeds better." in output


def test_a_mat_that_loses_is_told_so():
    made = mat_results({"end_to_end": [[0.1, 0.9]], "mat": [[0.1, 0.8]], "end_to_end_short": [[0.1, 0.85]]})
    output = mat.verdict(made)
    assert "never reaches full training's best accuracy" in output and "5.0 points worse, one seed only" in output
    assert "Corrected" not in output, "with one seed nothing is tested"
    assert "takes end_to_end and mat" in mat.verdict(mat_results({"mat": [[0.1, 0.8]]}))


def test_pictures_of_kernels_are_those_of_one_phase_and_module_which_they_name():
    rows = [
        {"strategy": "mat", "phase": phase, "module_index": module, "seed": 0, "epoch": epoch, "unit": unit}
        for phase, module in (("incubate", 0), ("incubate", 1), ("finetune", math.nan)) for epoch in (0.0, 1.0) for unit in "ab"
    ]  # fmt: skip
    table = pd.DataFrame(rows).assign(eigenvalue=1.0, effective_rank=2.0, active=1, cut=0.5)
    panels = mat.rank_against_eigenvalue(table).axes
    assert [axis.get_title() for axis in panels] == ["epoch 0 (module 1)", "epoch 1 (module 1)"]
    assert {len(line.get_xdata()) for axis in panels for line in axis.lines} == {2, 0}
    assert "(module 1)" in mat.eigenvalue_map(table).axes[0].get_title()
    assert "(" not in mat.eigenvalue_map(table[table["phase"] == "finetune"]).axes[0].get_title()


def test_kernels_that_nobody_recorded_draw_a_sentence():
    empty = mat_results({"end_to_end": [[0.5]]}).mntk
    assert "No kernels" in mat.eigenvalue_map(empty).texts[0].get_text() == mat.rank_against_eigenvalue(empty).texts[0].get_text()
