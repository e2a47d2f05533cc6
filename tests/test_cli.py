"""The command line: what it is told, what it completes, and data folders that it cannot use."""

import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sentences

from incubate_lib.cli import main, parser
from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.pipeline.view import few_updates


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --seeds one", "argument --seeds: invalid int value: 'one'"),
        ("run --set", "argument --set: expected one argument"),
        ("rnu digits", f"argument COMMAND: {sentences.unknown('choice', 'rnu', 'run?')}"),
        ("run digits --strategeis end_to_end", f"unknown option --strategeis; {sentences.did_you_mean('--strategies')}"),
        ("run --sed=1", f"unknown option --sed; {sentences.did_you_mean('--seeds')}"),
        ("mirror digits --to tensorbord", f"argument --to: {sentences.unknown('choice', 'tensorbord', 'tensorboard?')}"),
        ("presets digits", "unrecognized arguments: digits"),
        ("logs digits", "the following arguments are required: phase"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_a_command_line_that_is_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    output = capsys.readouterr().err
    assert caught.value.code == 2 and output.startswith(f"incubate: {message}") and output.count("\n") == 1


def test_what_is_misspelt_or_occupied_is_told_before_torch_is_imported(tmp_path):
    """It takes seconds; all of these in one process, which has it not imported at the end."""
    (tmp_path / "mine.yaml").write_text("training: {lr_rate: 3}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    commands = [f"{name} {what}" for name in ("run", "plan", "check", "report", "mirror", "bench", "stop", "status")
                for what in ("smokee", "mine.yaml")]  # fmt: skip
    commands += ["logs smokee meta", "study digits-budgett", "export smoke full", "import mine.yaml full", "import none.pt new"]
    code = (
        f"import sys\nfrom incubate_lib.cli import main\nfor command in {commands}:\n"
        "    assert main(command.split()) == 2 and 'torch' not in sys.modules, command"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == len(commands) and all(line.startswith("incubate: ") for line in lines)
    assert sum("did you mean smoke?" in line for line in lines) == 9 and sum("did you mean lr?" in line for line in lines) == 8


def test_lists_and_repeated_options():
    options = parser().parse_args(shlex.split("run mine.yaml --set a.b=1 --seeds 0 1 --set 'c=[1, 2]' --strat end_to_end mat"))
    assert options.preset == "mine.yaml" and options.set == ["a.b=1", "c=[1, 2]"]
    assert options.seeds == [0, 1] and options.strategies == ["end_to_end", "mat"]


def test_every_commands_help_has_examples_that_can_be_given(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)(?:  |$)", capsys.readouterr().out.partition("COMMAND\n")[2], re.M)
    assert len(commands) >= 14
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        examples = re.findall(r"^  incubate (.*)", capsys.readouterr().out.partition("for example:")[2], re.M)
        assert examples and all(example.split()[0] == command for example in examples)
        for example in examples:
            parser().parse_args(shlex.split(example.partition(" >")[0]))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["sta"], "status"),
        (["run", "--strat"], "--strategies"),
        (["run", "imagenet-vit-"], "imagenet-vit-b-released imagenet-vit-b imagenet-vit-h imagenet-vit-l"),
        (["run", "digits", "--backend", ""], "local slurm"),
    ],
)
def test_a_shell_completes(words, completed, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    script += (
        f"\nCOMP_WORDS=({shlex.join(['incubate', *words])}); COMP_CWORD={len(words)}; _shtab_incubate; echo ${{COMPREPLY[*]}}"
    )
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip() == completed


def test_a_script_for_zsh_names_the_presets(capsys):
    assert main(["completion", "zsh"]) == 0
    assert "mat-fashion-vgg11" in (script := capsys.readouterr().out) and "#compdef incubate" in script


@pytest.mark.parametrize("parts", [["a" * 300], ["a" * 200] * 18])
def test_a_data_folder_with_a_name_that_is_too_long(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path.joinpath(*parts)))
    assert main(["run", "smoke"]) == 2
    output = capsys.readouterr().err
    assert "is too long: 3000 bytes are possible" in output and output.count("\n") == 1


@pytest.mark.parametrize("place", ["a_file", "/proc/nothing"])
def test_a_data_folder_that_cannot_be_used(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / place))
    assert main(["run", "smoke"]) == 2
    assert {"a_file": "is no folder", "/proc/nothing": "cannot read and write"}[place] in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o500, 0o000], ids=["read-only", "unreadable"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_a_data_folder_that_is_not_ours(mode, used):
    """As an ordinary user, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        data = Path(place) / "data"
        (data / "runs" / "smoke").mkdir(parents=True)
        if used:
            (data / "runs" / "smoke" / "run.json").write_text('{"hash": "0"}')
        before = sorted(data.rglob("*"))
        for folder in (data / "runs" / "smoke", data / "runs", data):
            os.chmod(folder, mode)
        process = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(data, Path(place) / "told"))
        (Path(place) / "told").touch()
        os.chmod(Path(place) / "told", 0o666)
        process.start()
        process.join()
        output = (Path(place) / "told").read_text()
        assert process.exitcode == 2, output
        assert ("cannot read" in output or "permission denied" in output) and output.count("\n") <= 2
        for folder in (data, data / "runs", data / "runs" / "smoke"):
            os.chmod(folder, 0o755)
        assert sorted(data.rglob("*")) == before


def _as_nobody(data: Path, output: Path) -> None:
    from incubate_lib.backends.local import pool  # noqa: F401
    from incubate_lib.pipeline import warm  # noqa: F401  (now: an ordinary user may not see root's python)

    if os.geteuid() == 0:
        os.seteuid(65534)
    os.environ["INCUBATE_DATA"] = str(data)
    with open(output, "w") as file:
        sys.stderr = file
        code = main(["run", "smoke"])
    os._exit(code)


def test_status_lists_all_runs_and_takes_the_name_of_one(data_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["status"]) == 2 and "there is no run in" in capsys.readouterr().err
    plan(load_settings("smoke", ["name=mine", "phases.end_to_end.epochs=1"]), ["deep_incubation_stack"]).write()
    assert main(["status"]) == 0
    output = capsys.readouterr().out
    assert "mine  unfinished" in output and max(map(len, output.splitlines())) <= 80
    assert main(["status", "mine"]) == 0
    output = capsys.readouterr().out
    assert all(f"seed 0 module {i} of 3, deep_incubation_stack  waiting" in output for i in (1, 2, 3)), "a line each"
    assert max(map(len, output.splitlines()[:-1])) <= 80, "the last names the folder"
    assert main(["status", "mine", "--seeds", "7"]) == 2 and "seed 7 was not run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epochs", "words"),
    [(2, ["Few updates: meta 24, incubate 24, finetune 24. More epochs or a smaller batch_size teach more."]), (5, [])],
)
def test_phases_that_are_too_short_to_say_anything_are_named(epochs, words, data_folder):
    todo = plan(load_settings("smoke", [f"training.epochs={epochs}"]), ["deep_incubation"])
    assert few_updates(todo) == words
