"""The report: one HTML file that needs no other, to be mailed, archived, opened anywhere."""

import base64
import html
import io
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from incubate_lib.pipeline.graph import Plan, closure
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live.curves import all_curves
from incubate_lib.report.live.phase_graph import draw
from incubate_lib.report.live.progress import Reader
from incubate_lib.report.tables import mat, plots
from incubate_lib.report.tables.comparison import comparison, hardware
from incubate_lib.report.tables.hardware import mixed_text, places
from incubate_lib.report.tables.records import Results
from incubate_lib.report.tables.verdict import lowered
from incubate_lib.report.words import flop_unit, label
from incubate_lib.training.runs import read_json, write_atomic

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
.wide { overflow-x: auto; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: normal; border-bottom: 1px solid #ddd !important; }
th { border-bottom: 2px solid #555; }
img { max-width: 100%; height: auto; }
.note { color: #555; font-size: .92rem; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .8rem; }
blockquote { border-left: 4px solid #0072B2; margin: 1rem 0; padding: .2rem 1rem; background: #f4f8fb; }
"""

_FIGURES = {
    "Accuracy against cost": (
        plots.accuracy_vs_cost,
        "Left: all training on one machine, the meta model included. Right: the longest chain of phases that must "
        "follow one another, when every module has a machine of its own. Small marks are seeds; large ones mean ± std. "
        "Equal costs are drawn side by side.",
    ),
    "Convergence": (
        plots.convergence,
        "Each strategy's way over the training cost it has spent. During incubation the curve is that of the hybrid: "
        "the frozen meta model with one module replaced. The star is the assembled network before any fine-tuning.",
    ),
}


def write_report(results: Results, path: Path, run: Plan | None = None) -> Path:
    """Write the report of what is finished and return its path; with the run itself also what widgets show of it."""
    title = f"Deep Incubation report: {results.name}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append("<blockquote>" + "<br>".join(html.escape(line) for line in results.verdict().splitlines()) + "</blockquote>")
    if run is not None and (text := lowered(run.finals.values())):
        parts.append("<p>" + html.escape(text).replace("\n", "<br>") + "</p>")
    parts.append("<h2>Strategies</h2>" + _table(comparison(results), index=True))
    parts.append(
        f'<p class="note">Measured on {html.escape(hardware(results))}. Mean ± standard deviation over seeds; in brackets '
        "relative to end to end. “Meta model” is the accuracy of the small shared network, “assembled” that of the "
        "assembled one before fine-tuning. FLOPs are counted exactly (multiply-add = 2), evaluation apart; seconds are "
        "update steps only, and phases side by side slow each other down.</p>"
    )
    for name, (figure, caption) in _FIGURES.items():
        parts.append(f"<h2>{name}</h2>{_image(figure(results), name)}<p class='note'>{caption}</p>")
    for strategy, phases in results.phases.groupby("strategy", sort=False):
        if (phases["phase"] == "incubate").any():
            name = f"Modules: {label(strategy)}"
            parts.append(f"<h2>{html.escape(name)}</h2>{_image(plots.module_bars(phases), name)}")
    if len(results.mntk):
        parts += _modular_adaptive_training(results)
    if run is not None:
        parts += _the_run(results, run)
    parts.append("<h2>Every phase</h2>" + _table(_phase_table(results)))
    settings = (read_json(path.parent / "experiment.json") or {}).get("settings")
    if settings:
        text = html.escape(json.dumps(settings, indent=1))
        parts.append(f"<h2>Settings</h2><details><summary>all of them</summary><pre>{text}</pre></details>")
    page = '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page += f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    write_atomic(path, page.encode())
    return path


def _the_run(results: Results, run: Plan) -> list[str]:
    """Return what the dashboard's and the planner's widgets show of a run, as pictures and tables.

    Their modules are imported here: they need torch, which takes seconds, and the rest of an analysis does not.
    """
    from incubate_lib.report.live.hybrids import hybrids_figure
    from incubate_lib.report.planner.forecast import forecast, speed_of
    from incubate_lib.report.planner.planner import gantt, strategies_table
    from incubate_lib.report.tables.phases import settings_difference

    names = list(results.strategies["strategy"].unique())
    settings, seed = run.experiment.settings, int(results.strategies["seed"].iloc[0])
    one = plan(settings, names, [seed], facts=run.experiment.facts)
    graph, _ = draw(one, Reader(one).phases())
    parts = [f"<h2>The phases of seed {seed}</h2>" + _image(graph.figure(), "the graph of phases, each with its state")]
    if len(results.curves):
        parts.append("<h2>Learning curves</h2>" + _image(all_curves(results), "learning curves of all phases"))
    machines = len(run.experiment.facts.target_depths)
    if machines > 1:
        spent = {node.key: summary["train_flops"] for node in one.nodes if (summary := node.summary())}
        costs = forecast(one, speed_of(results), machines=machines, spent=spent)
        parts.append("<h2>With a machine for every module</h2>" + _image(gantt(costs), "when each phase would run"))
        parts.append(_table(strategies_table(costs), index=True))
        parts.append(
            f'<p class="note">Seed {seed} on {machines} machines, each as fast as this run was; training only, without judging, '
            "reading and saving. Notebook 08 plans other machines and other budgets. "
            f"{html.escape(mixed_text(results.strategies))}</p>"
        )
    kinds: dict[bool, str] = {}  # strategies differ in how modules start; what trains is one of two things
    for (name, _), final in one.finals.items():
        for node in closure([final]):
            if node.settings.phase == "incubate":
                kinds.setdefault(node.settings.imitate, name)
    for name in kinds.values():
        title = f"What each worker trains: {label(name)}"
        parts.append(f"<h2>{html.escape(title)}</h2>{_image(hybrids_figure(one, name), title)}")
    difference = settings_difference(one, names)
    if len(names) > 1 and len(difference):
        parts.append("<h2>What the strategies differ in</h2>" + _table(difference, index=True))
    return parts


def _modular_adaptive_training(results: Results) -> list[str]:
    """Return the part about strategies with MAT: what full training's accuracy cost them, and what their kernels did."""
    text = "<br>".join(html.escape(line) for line in mat.verdict(results).splitlines())
    parts = ["<h2>Modular Adaptive Training</h2>", f"<p>{text}</p>", _table(mat.reach(results), index=True)]
    parts.append('<p class="note">Relative to all that full training spent; looking at the kernels is counted.</p>')
    parts.append(_image(mat.accuracy_against_costs(results), "Accuracy against FLOPs and against seconds"))
    for strategy in results.mntk["strategy"].unique():
        if strategy in mat.SHOWN:
            parts.append(
                _image(mat.eigenvalue_map(results.mntk, strategy), f"Largest eigenvalues of each unit: {label(strategy)}")
            )
            parts.append(_image(mat.rank_against_eigenvalue(results.mntk, strategy), f"Effective ranks: {label(strategy)}"))
    return [*parts, "<h3>What looking at the kernels cost</h3>", _table(mat.estimator_costs(results))]


def _phase_table(results: Results):
    table = results.phases.copy()
    table["module"] = (table["module_index"] + 1).astype("Int64").astype(object).where(table["module_index"].notna(), "")
    table["top-1 %"] = (100 * table["accuracy"]).map("{:.1f}".format)
    table["before %"] = (100 * table["start_accuracy"]).map("{:.1f}".format)
    unit, factor = flop_unit(table["flops"].max() if len(table) else 1)
    table[unit] = (table["flops"] / factor).map("{:.3f}".format)
    table["images seen"] = table["images_seen"]
    table["different an epoch"] = table["distinct_images_per_epoch"].astype("Int64").astype(object)
    table["waiting for images"] = table["data_share"].map(lambda v: "" if v != v else f"{v:.0%}")
    table["s"] = table["seconds"].map("{:.1f}".format)
    table["epochs"] = table["epochs"].map("{:.1f}".format)
    table["lr"] = table["lr"].map(lambda v: "" if v != v or v is None else f"{v:g}")
    shown = ["strategy", "seed", "phase", "module", "before %", "top-1 %", "epochs", "steps", "images seen", "different an epoch"]
    several = ["device", "threads"] if len(places(results.phases)) > 1 else []
    return table[[*shown, "lr", unit, "s", *several, "waiting for images"]].replace({pd.NA: ""})


def _table(table, index: bool = False) -> str:
    return f'<div class="wide">{table.to_html(index=index, border=0)}</div>'


def _image(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
