"""The report: one HTML file that needs no other, to be mailed, archived, opened anywhere."""

import base64
import re
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError
from incubate_lib.config.members import TASKS
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import of_ends
from incubate_lib.report.about import about, settings_file
from incubate_lib.report.live.curves import all_curves
from incubate_lib.report.live.phase_graph import draw
from incubate_lib.report.live.progress import Reader
from incubate_lib.report.pages import page
from incubate_lib.report.style import Figure
from incubate_lib.report.tables import mat, plots
from incubate_lib.report.tables.comparison import by_class, comparison, hardware
from incubate_lib.report.tables.downstream import carried_over
from incubate_lib.report.tables.hardware import mixed_text, places
from incubate_lib.report.tables.phases import settings_difference
from incubate_lib.report.tables.records import COLUMNS, Results, as_csv, table_file
from incubate_lib.report.tables.verdict import doubts
from incubate_lib.report.words import flop_unit, label, phase_name
from incubate_lib.training.files import write_atomic

MOST_LISTED = 200_000  # images of a folder that a report looks through, to show some
SHOWN = 12  # of them


def write_report(results: Results, path: Path, run: Plan | None = None) -> Path:
    """Write the report of what is finished and return its path; with the run itself also what widgets show of it."""
    functions = (comparison, encoded, flop_unit, hardware, label, mixed_text, pd.isna, phase_name, places)
    tables = {part: getattr(results, part) for part in COLUMNS}
    text = page(
        "report.html",
        results=results,
        run=run and _the_run(results, run),
        plots=plots,
        mat=mat,
        tables={table_file(results.name, part).name: as_csv(table) for part, table in tables.items() if len(table)},
        **{function.__name__: function for function in functions},
    )
    write_atomic(path, f"{with_contents(text)}\n".encode())
    return path


def with_contents(text: str) -> str:
    """Return a page whose headings have anchors, with links to them in place of its comment `contents`."""
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    for number, heading in enumerate(headings):
        text = text.replace(f"<h2>{heading}</h2>", f'<h2 id="part-{number}">{heading}</h2>', 1)
    links = (f'<a href="#part-{number}">{heading}</a>' for number, heading in enumerate(headings))
    return text.replace("<!--contents-->", f"<nav>{' · '.join(links)}</nav>")


def encoded(data: bytes) -> str:
    """Return data as the page itself holds it."""
    return base64.b64encode(data).decode()


def _the_run(results: Results, run: Plan) -> dict[str, Any]:
    """Return what the dashboard's and the planner's widgets show of a run, as figures and tables.

    Their modules are imported here: they need torch, which takes seconds, and the rest of an analysis does not.
    """
    from incubate_lib.report.live.hybrids import Hybrids
    from incubate_lib.report.planner.forecast import forecast, speed_of
    from incubate_lib.report.planner.planner import gantt, strategies_table

    names = list(results.strategies["strategy"].unique())
    facts, seed = run.experiment.facts, int(results.strategies["seed"].iloc[0])
    one = of_ends(run, names, [seed])
    kinds: dict[str, str] = {}  # strategies differ in how modules start; what trains is one of two things
    for (name, _), final in one.finals.items():
        for node in final.upstream("incubate"):
            kinds.setdefault(node.settings.phase, name)
    difference = settings_difference(one, names)
    shown: dict[str, Any] = {
        "about": about(run, results),
        "settings": settings_file(run.experiment.settings),
        "seed": seed,
        "machines": len(facts.target_depths),
        "doubts": doubts(run.finals.values()),
        "samples": _samples(run),
        "called": TASKS[run.experiment.settings.task].samples,
        "classes": by_class(run, _class_names(run)),
        "carried": carried_over(run),
        "graph": draw(one, Reader(one).phases())[0].figure(),
        "curves": all_curves(results) if len(results.curves) else None,
        "hybrids": {name: Hybrids(one, name).figure() for name in kinds.values()},
        "difference": difference.rename(columns=label).reset_index() if len(names) > 1 and len(difference) else None,
    }
    if shown["machines"] > 1:
        done = {node.key: summary for node in one.nodes if (summary := node.summary())}
        spent = {key: summary["train_flops"] for key, summary in done.items()}
        took = {key: summary["train_seconds"] * summary.get("devices", 1) for key, summary in done.items()}
        costs = forecast(one, speed_of(results), machines=shown["machines"], spent=spent, took=took)
        shown |= {"gantt": gantt(costs), "costs": strategies_table(costs)}
    return shown


def _class_names(run: Plan) -> list[str]:
    """Return the names of the classes; nothing where the images are too many to be listed, or elsewhere by now."""
    if run.experiment.facts.num_images > MOST_LISTED:
        return []
    from incubate_lib.data.sources import open_source

    settings = run.experiment.settings
    try:
        return TASKS[settings.task].output_names(open_source(settings.data, settings.machine)[0].classes)
    except SettingsError:
        return []


def _samples(run: Plan) -> Figure | None:
    """Return some images to train on as a figure; None where they are too many to be listed, or elsewhere by now."""
    if run.experiment.facts.num_images > MOST_LISTED:
        return None
    import torch

    try:
        train, _ = next(iter(run.finals.values())).data()
        if run.experiment.settings.data.is_text:
            return plots.image_rows({"": train.preview(SHOWN).numpy()}, SHOWN)
        x, _ = train.some(torch.linspace(0, len(train) - 1, SHOWN).long())  # of all classes, where they follow one another
    except SettingsError:
        return None
    images = (255 * (x * train.std + train.mean)).round().clamp(0, 255).to(torch.uint8)
    return plots.image_rows({"": images.cpu().numpy()}, SHOWN)
