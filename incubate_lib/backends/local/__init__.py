"""Phases in processes of this machine, side by side where the graph allows; they end with the process that runs them."""

options = {"jobs": {"type": int, "metavar": "N", "help": "phases side by side (default: one a core, at most 4)"}}


def attempt() -> None:
    return None
