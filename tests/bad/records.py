"""Damaged records in the data folder, where a run of the preset smoke has been trained to its end."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Bad, both, file

RUN = "data/runs/smoke/run.json"
SHAPES: dict[str, bytes | None] = {  # what stands in a record; none: half of it
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a word": b'"a"',
    "an empty mapping": b"{}",
    "binary": b"\x00\xff\xfe\x80" * 50,
    "cut short": None,
    "deep lists": b"[" * 100000,
    "in UTF-16": '{"a": 1}'.encode("utf-16"),
    "infinite": b'{"state": Infinity, "hash": NaN}',
    "10,000 digits": b'{"a": 1' + b"0" * 10000 + b"}",
}
INSTEAD: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def phase(here: Path) -> Path:
    """Return the folder of the phase end_to_end."""
    return (here / "data/runs/smoke/seed-0/end_to_end").resolve()


def damaged(content: bytes | None, place: Callable[[Path], Path]) -> Callable[[Path], object]:
    def make(here: Path) -> None:
        path = place(here)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b"{ }"
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)

    return make


def instead(make: Callable[[Path], object], place: Callable[[Path], Path]) -> Callable[[Path], object]:
    def replace(here: Path) -> None:
        place(here).unlink()
        make(place(here))

    return replace


def changed(place: Callable[[Path], Path], change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Return what changes a record, as `change` does."""

    def make(here: Path) -> None:
        record = json.loads(place(here).read_text())
        change(record)
        place(here).write_text(json.dumps(record))

    return make


def run(here: Path) -> Path:
    return here / RUN


def of_phase(name: str) -> Callable[[Path], Path]:
    return lambda here: phase(here) / name


def first(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's record says of its first phase."""
    return next(iter(record["phases"].values()))


FIELDS: dict[str, Callable[[dict[str, Any]], Any]] = {  # of run.json
    "phases of numbers": lambda r: r.update(phases=dict.fromkeys(r["phases"], 5)),
    "no phases": lambda r: r.update(phases={}),
    "phases of a list": lambda r: r.update(phases=[]),
    "a phase without settings": lambda r: first(r).pop("settings"),
    "a phase with other settings": lambda r: first(r).update(settings={"fish": 1}),
    "a phase with settings of a list": lambda r: first(r).update(settings=[]),
    "a phase without inputs": lambda r: first(r).pop("inputs"),
    "a phase with inputs of a number": lambda r: first(r).update(inputs=5),
    "a phase from one that is not there": lambda r: first(r).update(inputs={"meta": "nowhere"}),
    "a phase from itself": lambda r: first(r).update(inputs={"meta": next(iter(r["phases"]))}),
    "a phase without a digest": lambda r: first(r).pop("digest"),
    "a digest of another folder": lambda r: first(r).update(digest="../../.."),
    "a digest of a number": lambda r: first(r).update(digest=5),
    "a key of another folder": lambda r: r["phases"].update({"../../../x": first(r)}),
    "facts of a word": lambda r: r.update(facts="a"),
    "no facts": lambda r: r.update(facts={}),
    "facts of other numbers": lambda r: r["facts"].update(num_images="many"),
    "facts below 0": lambda r: r["facts"].update(num_images=-5),
    "ends of numbers": lambda r: r.update(finals=[1, 2]),
    "ends that are too short": lambda r: r.update(finals=[["end_to_end"]]),
    "an end in no phase": lambda r: r.update(finals=[["end_to_end", 0, "nowhere"]]),
    "an end of lists": lambda r: r.update(finals=[[["a"], 0, next(iter(r["phases"]))]]),
    "no ends": lambda r: r.update(finals=[]),
    "an end of an unknown strategy": lambda r: r.update(finals=[["fish", 0, next(iter(r["phases"]))]]),
    "a seed of a word": lambda r: r.update(finals=[["end_to_end", "x", next(iter(r["phases"]))]]),
    "a hash of a number": lambda r: r.update(hash=5),
    "settings of a number": lambda r: r.update(settings=5),
    "a version of a list": lambda r: r.update(version=[]),
}
SUMMARY: dict[str, Callable[[dict[str, Any]], Any]] = {  # of summary.json
    "numbers of words": lambda s: s.update(train_seconds="a", train_flops="b"),
    "a score of a list": lambda s: s.update(score=[1]),
    "provenance of a word": lambda s: s.update(provenance="cpu"),
    "weights of a number": lambda s: s.update(weights_sha256=5),
    "inputs of a list": lambda s: s.update(inputs_sha256=[]),
    "a hash of another": lambda s: s.update(hash="another"),
    "no time": lambda s: s.pop("train_seconds"),
    "a loss of null": lambda s: s.update(loss=None),
    "results of a number": lambda s: s.update(results_sha256=5),
    "results elsewhere": lambda s: s.update(results_sha256={"../../x": "a"}),
}
LINES = {  # of metrics.jsonl
    "numbers": "5\n6\n",
    "lists": "[]\n[1]\n",
    "empty mappings": "{}\n{}\n",
    "words for numbers": '{"step": "a", "epoch": "b", "score": "c"}\n',
    "lists for numbers": '{"step": [], "epoch": {}, "score": null}\n',
    "null": "null\n",
    "deep lists": "[" * 100000 + "\n",
    "NaN": '{"step": NaN, "score": NaN}\n',
}
LEASES = {  # of a lease's record, of a phase that says that it is trained
    "a list": "[]",
    "a number": "5",
    "no fields": "{}",
    "a host of a number": '{"host": 5, "pid": 1, "born": "x", "ended": false}',
    "a process of a word": '{"host": "HERE", "pid": "a", "born": "x", "ended": false}',
    "a process below 0": '{"host": "HERE", "pid": -1, "born": "x", "ended": false}',
    "a huge process": '{"host": "HERE", "pid": 1e300, "born": "x", "ended": false}',
    "a process in another folder": '{"host": "HERE", "pid": "../../etc", "born": "x", "ended": false}',
    "born of a list": '{"host": "HERE", "pid": 1, "born": [], "ended": false}',
    "ended of a word": '{"host": "HERE", "pid": 1, "born": "x", "ended": "no"}',
    "binary": "\x00\x01",
}


def trained_now(content: str) -> Callable[[Path], object]:
    """Return what makes the phase look as if it was trained at present, with this record of its lease."""

    def make(here: Path) -> None:
        folder = phase(here)
        (folder / "summary.json").unlink()
        (folder / "status.json").write_text('{"state": "running", "step": 1, "steps": 5}')
        shutil.rmtree(folder / "lease", ignore_errors=True)
        (folder / "lease").mkdir()
        (folder / "lease" / "000001.json").write_text(content.replace("HERE", os.uname().nodename))

    return make


def catalogue() -> list[Bad]:
    found: list[Bad] = []

    def add(name: str, command: str, make: Callable[[Path], object], says: str = "", told: bool = False) -> None:
        found.append(Bad("damaged records", f"{name}, {command.split()[0]}", tuple(command.split()), make, says, {}, True, told))

    for name, content in SHAPES.items():
        add(f"run.json: {name}", "status smoke", damaged(content, run), "run.json")
        add(f"summary.json: {name}", "status smoke", damaged(content, of_phase("summary.json")), "summary.json", True)
        add(f"status.json: {name}", "status smoke", damaged(content, of_phase("status.json")), told=True)
        add(f"phase.json: {name}", "clean", both(_unnamed, damaged(content, of_phase("phase.json"))), told=True)
        if name != "an empty mapping":  # which means that there are no jobs
            jobs = damaged(content, lambda here: run(here).with_name("slurm.json"))
            add(f"slurm.json: {name}", "status smoke", jobs, "slurm.json", True)
        add(f"experiment.json: {name}", "migrate", damaged(content, _before), "old", True)
    for name, command in itertools.product(
        ("empty", "a list", "cut short", "deep lists"),
        ("report smoke", "run smoke", "logs smoke end_to_end", "export smoke new", "stop smoke", "mirror smoke", "clean"),
    ):
        add(f"run.json: {name}", command, damaged(SHAPES[name], run), "run.json")
    for name, make in INSTEAD.items():
        for record in ("run.json", "summary.json", "status.json"):
            place = run if record == "run.json" else of_phase(record)
            add(f"{record} is {name}", "status smoke", instead(make, place), record)
        add(f"metrics.jsonl is {name}", "report smoke", instead(make, of_phase("metrics.jsonl")), "metrics.jsonl")
    for (name, change), command in zip(FIELDS.items(), itertools.cycle(("status smoke", "report smoke"))):
        add(f"run.json: {name}", command, changed(run, change), "run.json")
    for (name, change), command in zip(
        SUMMARY.items(), itertools.cycle(("report smoke", "status smoke", "export smoke new --strategy end_to_end"))
    ):
        add(f"summary.json: {name}", command, changed(of_phase("summary.json"), change), "summary.json", True)
    for name, text in LINES.items():
        add(f"metrics.jsonl: {name}", "report smoke", damaged(text.encode(), of_phase("metrics.jsonl")), "metrics.jsonl")
    for name in ("empty", "a word", "binary", "cut short"):
        command = "export smoke new --strategy end_to_end"
        add(f"weights: {name}", command, damaged(SHAPES[name], of_phase("model.safetensors")), "model.safetensors")
    for name, text in LEASES.items():
        add(f"lease: {name}", "status smoke", trained_now(text), told=True)
    add(
        "a seed's folder of a word",
        "migrate",
        both(
            file("data/runs/old/experiment.json", '{"hash": "a", "settings": {}, "facts": {}}'),
            file("data/runs/old/seed-x/end_to_end/config.json", "{}"),
        ),
        "old",
        True,
    )
    for name, place in {"the runs": "data/runs", "the run": "data/runs/smoke", "the phases": "data/phases"}.items():
        for command in ("status smoke", "clean"):
            add(f"{name} in a file", command, _file_for(place))
    for name in ("null", "a list", "deep lists"):
        add(f"a study's run.json: {name}", "clean", file("data/studies/mine/run.json", SHAPES[name]), "run.json")
    return found


def _before(here: Path) -> Path:
    return here / "data/runs/old/experiment.json"


def _unnamed(here: Path) -> None:
    """Have no run name the phase."""
    target = phase(here)
    shutil.rmtree(here / "data/runs")
    (here / "data/runs/smoke/seed-0").mkdir(parents=True)
    (here / "data/runs/smoke/seed-0/end_to_end").symlink_to(target)


def _file_for(place: str) -> Callable[[Path], object]:
    def make(here: Path) -> None:
        shutil.rmtree(here / place)
        (here / place).write_text("x")

    return make
