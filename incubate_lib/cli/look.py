"""`incubate status`, `logs`, `report`, `mirror`, `stop`: commands that inspect a run, or end it."""

import argparse
import os
import time

from rich.console import Console
from rich.table import Table

from incubate_lib import backends
from incubate_lib.cli.tables import fitted
from incubate_lib.config import data_folder, load_settings, nearest, refuse
from incubate_lib.pipeline.background import stop_run
from incubate_lib.pipeline.experiment import INDEX, Experiment
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import of_ends, recorded_plan, run_of
from incubate_lib.pipeline.view import node_line, render


def status(options: argparse.Namespace) -> None:
    if options.preset is None:
        return all_runs()
    folder = data_folder() / "runs" / options.preset
    by_name = os.sep not in options.preset and not options.set and (folder / INDEX).exists()
    todo = of_ends(recorded_plan(folder), options.strategies, options.seeds) if by_name else _started(options)
    lines, folders = [node_line(node) for node in todo.nodes], {node.key: node.folder.path for node in todo.nodes}
    backend = backends.of(todo.experiment)
    messages = backend.states(todo, lines)
    Console().print(render(lines, place=backend.title))
    for line in lines:
        if line.state in ("failed", "lost"):
            print(f"log of {line.key}: {folders[line.key] / 'log.txt'}")
    print(*messages, f"folder: {todo.experiment.path}", sep="\n")


def all_runs() -> None:
    """Print a row a run of the data folder, the newest first."""
    from incubate_lib.report.live.runs import runs_table

    table = runs_table()
    table = table[table["state"] != "published"]
    refuse(table.empty, f"there is no run in {data_folder() / 'runs'} yet; `incubate run` starts one")
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state", "finished", "strategies (seeds)"):
        shown.add_column(heading, overflow="fold")
    for row in table.to_dict("records"):
        shown.add_row(row["name"], row["state"], row["date"][:10], row["strategies"] or row["note"])
    Console().print(shown)


def stop(options: argparse.Namespace) -> None:
    print(stop_run(Experiment.of(load_settings(options.preset, options.set))))


def logs(options: argparse.Namespace) -> None:
    options.strategies = options.seeds = None
    todo = _started(options)
    folders = {node.key: node.folder.path for node in todo.nodes} | {"analysis": todo.experiment.path}
    log = folders[_one_phase(options.phase, list(folders))] / "log.txt"
    why = "the phase has not begun, or its node does not see this folder"
    refuse(not log.exists(), f"{log} is not there: {why}")
    with open(log, errors="replace") as file:
        print(file.read(), end="", flush=True)
        while options.follow:
            time.sleep(0.5)
            print(file.read(), end="", flush=True)


def _one_phase(wanted: str, keys: list[str]) -> str:
    """Return the folder of the phase that is meant; SettingsError unless it is exactly one."""
    found = [key for key in keys if key == wanted] or [key for key in keys if wanted in key]
    refuse(not found, f"{wanted!r} is no phase; {nearest(wanted, keys)}")
    refuse(len(found) > 1, f"{wanted!r} is {len(found)} phases: {', '.join(found)}")
    return found[0]


def report(options: argparse.Namespace) -> None:
    todo = _started(options)  # first: what is misspelt is reported before torch is imported
    from incubate_lib.report.html import write_report
    from incubate_lib.report.publish import publish
    from incubate_lib.report.tables.records import from_plan

    results = from_plan(todo)
    none = f"no strategy is finished yet in {todo.experiment.path}; `incubate status` shows how far it is"
    refuse(results.strategies.empty, none)
    write_report(results, todo.experiment.path / "report.html", todo)
    if options.strategies or options.seeds is not None:
        (todo.experiment.path / "analysed.json").unlink(missing_ok=True)  # the next run writes a whole report again
    for path in publish(results) if options.publish else []:
        print(f"wrote {path}")
    print_table(todo)


def mirror(options: argparse.Namespace) -> None:
    _started(options)
    from incubate_lib.report.mirror import is_at_work, mirror

    more = True
    while more:
        todo = _started(options)
        more = options.follow and is_at_work(todo)  # asked first: what is written last is mirrored, too
        written, unchanged = mirror(todo, options.to)
        if written or not more:
            print(f"{len(written)} phase(s) mirrored, {unchanged} unchanged", flush=True)
        if more:
            time.sleep(5)
    place = todo.experiment.path / "mirror" / options.to
    print(f"tensorboard --logdir {place}" if options.to == "tensorboard" else f"W&B runs, a folder a phase: {place}")


def _started(options: argparse.Namespace) -> Plan:
    """Return the plan of what was run with these settings."""
    return run_of(load_settings(options.preset, options.set), options.strategies, options.seeds)


def print_table(todo: Plan) -> None:
    """Print the table and the verdict of a run."""
    from incubate_lib.report.tables.comparison import comparison
    from incubate_lib.report.tables.records import from_plan
    from incubate_lib.report.tables.verdict import doubts

    results, console = from_plan(todo), Console(highlight=False)
    console.print("", fitted(comparison(results).reset_index(names=""), console), "")
    print(results.verdict())
    if message := doubts(todo.finals.values()):
        print(message)
    print(f"report: {todo.experiment.path / 'report.html'}")
