"""What numbers were measured on: seconds of different devices are never compared without saying so."""

import pandas as pd

from incubate_lib.report.words import metric_of

SEVERAL = " + "  # joins the devices of a sum over phases, and in the same order their threads
MIXED = "†"  # marks seconds of several devices


def hardware_of(table: pd.DataFrame) -> str:
    """Return where and when the numbers of a table with a row a strategy and seed were measured, in one line."""
    if table.empty:
        return "nothing measured yet"

    def one(column: str) -> str:
        return ", ".join(sorted({str(v) for v in table[column]}))

    where = [f"{device}, {threads} thread(s) a phase" for device, threads in places(table)]
    text = where[0] if len(where) == 1 else f"{len(where)} devices ({'; '.join(where)})"
    days = sorted({str(date)[:10] for date in table["date"]})
    when, score = " to ".join(dict.fromkeys((days[0], days[-1]))), metric_of(table).label
    return f"{text}, torch {one('torch')}, {when}, {score} on the {one('split')} split"


def places(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the hardware on which a table's seconds were measured, as (device, threads), each once.

    Two machines whose processors have one name are told apart only by their threads.
    """
    known = table.reindex(columns=["device", "threads"]).dropna().drop_duplicates()
    found = [
        pair
        for device, threads in known.itertuples(index=False)
        for pair in zip(str(device).split(SEVERAL), str(threads).split(SEVERAL), strict=True)
    ]
    return list(dict.fromkeys(found))


def mixes(rows: pd.DataFrame, others: pd.DataFrame | None = None) -> str:
    """Return the mark of seconds that are of several devices, or that are compared with those of other devices; else nothing."""
    mine, theirs = set(places(rows)), set(places(rows if others is None else others))
    return MIXED if len(mine) > 1 or (theirs and theirs != mine) else ""


def mixed_text(table: pd.DataFrame) -> str:
    """Say which devices a table's seconds are of, if they are several; nothing if it is one."""
    where = [f"{device}, {threads} thread(s)" for device, threads in places(table)]
    if len(where) < 2:
        return ""
    return (
        f"Seconds of {len(where)} devices: {'; '.join(where)}. {MIXED} marks sums over several of them and ratios between "
        "different ones, which say nothing about any machine: compare FLOPs."
    )


def hardware_row(summaries: list[dict]) -> dict:
    """Return device and threads of what was trained; of phases from several machines all of them, in one order."""
    where = list(dict.fromkeys((s["provenance"]["device"], s["provenance"]["threads"]) for s in summaries))
    return {"device": SEVERAL.join(d for d, _ in where), "threads": SEVERAL.join(str(t) for _, t in where)}
