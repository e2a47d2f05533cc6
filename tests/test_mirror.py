"""What TensorBoard and Weights & Biases show is what the records say, and the records stay as they are."""

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from project import ROOT

from incubate_lib import cli
from incubate_lib.config import SettingsError, data_folder, load_settings
from incubate_lib.config.phase import identity
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.mirror import mirror

pytestmark = pytest.mark.xdist_group("mirror")  # one process, so that the run of the fixture is made once
NAMES = {"epoch", "images", "loss", "score", "train_loss", "lr", "train_seconds", "train_flops"}
SET = ["training.epochs=0.5", "training.warmup_epochs=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder in which two strategies are finished."""
    data = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(data))
        plan(load_settings("smoke", SET), ["end_to_end", "deep_incubation"]).run()
    return data


@pytest.fixture
def run(trained, data_folder, monkeypatch):
    """A copy of it, as a plan."""
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    shutil.copytree(trained, data_folder, symlinks=True)
    return plan(load_settings("smoke", SET), ["end_to_end", "deep_incubation"])


@pytest.fixture(scope="module")
def wandb(tmp_path_factory):
    """W&B, if need be in a folder of its own: timm imports it wherever it is, and every process would start a second later."""
    if importlib.util.find_spec("wandb"):
        yield
        return
    folder = tmp_path_factory.mktemp("wandb")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(folder), "wandb"]
    command += ["--constraint", str(ROOT / "constraints.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        output = f"wandb cannot be installed: {result.stderr.strip()[-300:]}"
        pytest.fail(output) if os.environ.get("INCUBATE_REQUIRE_LAB") else pytest.skip(output)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def hashes(run):
    mirrored = run.experiment.path / "mirror"
    files = (p for p in data_folder().rglob("*") if p.is_file() and mirrored not in p.parents)
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def recorded(node):
    """Return {name: [(step, number), …]} of metrics.jsonl, read by hand."""
    rows = [json.loads(line) for line in (node.folder.path / "metrics.jsonl").read_text().splitlines()]
    return {name: [(row["step"], row[name]) for row in rows if row[name] is not None] for name in NAMES}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(folder.glob("events.*"))
    assert len(files) == 1
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert set(read.Tags()["tensors"]) == {"settings/text_summary", "summary/text_summary"}
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def float32(pairs):
    return [(step, float(np.float32(value))) for step, value in pairs]


def written_at(run):
    """Return {event file: when it was written}."""
    return {path: path.stat().st_mtime_ns for path in (run.experiment.path / "mirror").rglob("events.*")}


def wandb_records(folder):
    """Yield what a run's file holds: after seven bytes, LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    blob, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(blob):
        if (left := 32768 - at % 32768) < 7:  # a header never crosses blocks
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", blob, at)
        parts += blob[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_tensorboard_says_what_the_records_say(run):
    before = hashes(run)
    written, unchanged = mirror(run, "tensorboard")
    assert len(written) == len(run.nodes) == 7 and unchanged == 0
    assert hashes(run) == before
    for node in run.nodes:
        output, summary = events(run.experiment.path / "mirror" / "tensorboard" / node.key), node.summary()
        final = {name.removeprefix("final/"): output.pop(name) for name in list(output) if name.startswith("final/")}
        assert {"score", "loss", "train_flops", "train_seconds", "parameters"} <= set(final)
        assert all(pairs == float32([(summary["steps"], summary[name])]) for name, pairs in final.items())
        if node.settings.phase == "assemble":  # trains nothing
            assert output == {}
        else:
            assert output == {name: float32(pairs) for name, pairs in recorded(node).items()}
            assert len(output["loss"]) >= 2 and output["train_flops"][-1][1] > 0


def test_again_changes_what_has_changed_and_doubles_nothing(run):
    mirror(run, "tensorboard")
    first = written_at(run)
    assert mirror(run, "tensorboard") == ([], 7)
    node = next(n for n in run.nodes if n.key.endswith("end_to_end"))
    metrics, place = node.folder.path / "metrics.jsonl", run.experiment.path / "mirror" / "tensorboard" / node.key
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 99, "loss": 0.')  # a kill, or a writer at work
    assert mirror(run, "tensorboard") == ([], 7)
    row = json.loads(whole.splitlines()[-1]) | {"step": 100, "loss": 0.25}
    metrics.write_text(whole + json.dumps(row) + "\n" + '{"step": 101')
    assert mirror(run, "tensorboard") == ([place], 6)
    metrics.write_text(whole + json.dumps(row) + "\n")
    output = events(place)
    assert {name: output[name] for name in NAMES} == {name: float32(pairs) for name, pairs in recorded(node).items()}
    assert output["loss"][-1] == (100, 0.25)
    second = written_at(run)
    assert len(second) == len(first) and {file.parent for file, _ in set(first.items()) ^ set(second.items())} == {place}
    assert not (run.experiment.path / "mirror" / "fresh").exists()


def test_a_phase_that_has_begun_is_mirrored_without_a_summary(run):
    for name in ("summary.json", "model.safetensors"):
        (run.finals["end_to_end", 0].folder.path / name).unlink()
    shutil.rmtree(run.finals["deep_incubation", 0].folder.path)
    assert len(mirror(run, "tensorboard")[0]) == 6
    assert set(events(run.experiment.path / "mirror/tensorboard/seed-0/end_to_end")) == NAMES
    assert not (run.experiment.path / "mirror/tensorboard/seed-0/deep_incubation/finetune").exists()


def test_wandb_is_offline_and_says_what_the_records_say(run, wandb, capfd):
    before = hashes(run)
    assert len(mirror(run, "wandb")[0]) == 7
    assert mirror(run, "wandb") == ([], 7)
    assert hashes(run) == before
    assert capfd.readouterr() == ("", "")
    ids = set()
    for node in run.nodes:
        records = list(wandb_records(run.experiment.path / "mirror" / "wandb" / node.key))
        (about,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (about.project, about.run_group, about.job_type, about.display_name) == (
            "incubate", run.experiment.path.name, node.settings.phase, node.key,
        )  # fmt: skip
        ids.add(about.run_id)
        config = {item.key: json.loads(item.value_json) for item in about.config.update}
        del config["_wandb"]
        assert config == identity(node.settings) | {"hash": node.digest}
        output, final = {}, {}
        for record in records:
            values = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            for name in values.keys() & NAMES:
                output.setdefault(name, []).append((values["_step"], values[name]))
            final |= {i.key: json.loads(i.value_json) for i in record.summary.update if i.key}
        assert output == ({} if node.settings.phase == "assemble" else recorded(node))
        assert {name: value for name, value in final.items() if not name.startswith("_")} == node.summary()
    assert len(ids) == 7


def test_a_missing_package_is_a_sentence(run, monkeypatch, capsys):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SettingsError, match=rf"--to {name} needs .* pip install -e '\.\[{name}\]'"):
            mirror(run, name)
        sets = [word for field in SET for word in ("--set", field)]
        assert cli.main(["mirror", "smoke", *sets, "--to", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (run.experiment.path / "mirror").exists()


def test_wandb_never_asks_for_a_key(run, wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SettingsError, match=r"W&B has no key; `wandb login`, or unset WANDB_MODE"):
        mirror(run, "wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(SettingsError, match="WANDB_MODE is 'disabled'"):
        mirror(run, "wandb")


def test_the_command_follows_until_nothing_trains(run, capsys):
    sets = [word for field in SET for word in ("--set", field)]
    assert cli.main(["mirror", "smoke", *sets, "--follow"]) == 0
    assert "7 phase(s) mirrored, 0 unchanged\ntensorboard --logdir " in capsys.readouterr().out
