"""A sample of the catalogue of bad inputs; `python tests/bad_inputs.py` asks them all, and looks at time and memory, too."""

import sys

import pytest
from bad.case import NOTEBOOK
from bad_inputs import CATALOGUE, Answer, prepare, sample, tree
from command_line import incubate

CHEAP = [case for case in CATALOGUE if not case.needs_run and not case.is_notebook]
COMMANDS = sample(24, CHEAP)
NOTEBOOKS = sample(4, [case for case in CATALOGUE if case.is_notebook])


def test_the_catalogue_has_many_different_inputs():
    names = {(case.kind, case.name) for case in CATALOGUE}
    assert len(names) == len(CATALOGUE) >= 400
    alone = [(case.command, tuple(case.env.items())) for case in CATALOGUE if case.make.__name__ == "nothing"]
    assert len(set(alone)) == len(alone), "of those that are a command line and nothing else"


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: f"{case.kind}: {case.name}"[:100])
def test_a_bad_input_is_refused(case, tmp_path):
    arguments, env = prepare(case, tmp_path / "here", None)
    before = tree(tmp_path / "here")
    done = incubate(*arguments, env=env, cwd=tmp_path / "here")
    after = tree(tmp_path / "here")
    written = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    answer = Answer(case, done.returncode, done.stderr, seconds=0.0, torch=True, memory=0, written=written)
    assert not answer.faults(), done.stderr


@pytest.mark.parametrize("case", NOTEBOOKS, ids=lambda case: case.name)
def test_a_bad_parameter_is_refused(case, data_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-", *case.command])
    with pytest.raises(SystemExit) as ended:
        exec(NOTEBOOK, {})
    said = capsys.readouterr().out
    assert ended.value.code == 2 and said.count("\n") <= 2 and case.says in said
    assert not data_folder.exists()
