"""A phase that is stopped on the way."""

import math

import pytest

from incubate_lib.phases import train as phases
from incubate_lib.training.runs import PhaseFolder, Stopped


def stop_after_checkpoints(node, monkeypatch, number: int) -> PhaseFolder:
    """Run a phase until it has saved `number` checkpoints, then stop it."""
    saved, original = [], PhaseFolder.save_checkpoint

    def save(self, state):
        original(self, state)
        saved.append(state["counts"]["step"])

    monkeypatch.setattr(PhaseFolder, "save_checkpoint", save)
    monkeypatch.setattr("incubate_lib.training.loop.STATUS_SECONDS", 0.0)
    monkeypatch.setattr("incubate_lib.training.loop.SAVING_SHARE", math.inf)  # after every step
    monkeypatch.setattr(phases, "_stop_asked", lambda *_: lambda: len(saved) >= number)
    with pytest.raises(Stopped, match="the next run goes on from here"):
        node.run()
    monkeypatch.undo()
    assert len(saved) >= number
    return node.folder
