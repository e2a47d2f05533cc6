"""Files of studies: bad ones are told before anything is made."""

import json

import pytest
import sentences

from incubate_lib.config import SettingsError
from incubate_lib.config.study import load_study
from incubate_lib.report.tables.studies import published

# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "smok"}, "unknown preset"),
        ({"axes": {"depth": {"6": {"model.dept": 6}}}}, sentences.unknown("field", "model.dept", "")),
        ({"axes": {"depth": {"7": {"model.depth": 7}}}}, f"study bad, depth 7: .*{sentences.undivided(7)}"),
        ({"axes": {"depth": {}}}, "axes.depth has no values"),
        ({"axes": {"seed": {"1": {}}}}, f"axes.seed: {sentences.COLUMN}"),
        ({"strategies": ["end_to_end", "growin"]}, sentences.did_you_mean("growing")),
        ({"strategies": ["growing", "growing"]}, f"one {sentences.GIVEN_TWICE}"),
        ({"strategies": []}, "strategies"),
        ({"seeds": [0, 0]}, f"one {sentences.GIVEN_TWICE}"),
        ({"seeds": [-1]}, "seeds"),
        ({"rates": {"values": [1e-3, 1e-3], "seeds": [7]}}, f"one {sentences.GIVEN_TWICE}"),
        ({"rates": {"values": [1e-3], "seeds": [0]}}, "what a rate was chosen with must not evaluate it"),
        ({"rates": {"values": [1e-3], "seeds": [7], "at": {"depht": "6"}}}, sentences.did_you_mean("depth")),
        ({"rates": {"values": [1e-3], "seeds": [7], "at": {"depth": "8"}}}, "rates.at.depth is '8'"),
        ({"rates": {"values": [], "seeds": [7]}}, "rates.values"),
        ({"set": {"data.eval_split": "val"}}, "data.eval_split is what a study sets itself"),
        ({"grid": {}}, "unknown field 'grid'"),
        ({"name": "x_rates"}, "that ends in _rates"),
        ({"axes": {"lr": {"1": {}}}}, f"axes.lr: {sentences.COLUMN}"),
        (
            {
                "axes": {"s": {"1": {}, "2": {"strategies.stacking.incubate": "labels"}}},
                "strategies": ["stacking"],
                "rates": {"values": [1e-3], "seeds": [7], "at": {"s": "1"}},
            },
            "strategy stacking trains other phases in other cells",
        ),
        ({"preset": None}, "preset"),
    ],
)
def test_bad_studies(change, message, tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    study = {"preset": "smoke", "strategies": ["end_to_end"], "seeds": [0], "axes": {"depth": {"6": {"model.depth": 6}}}}
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps(study | change))
    with pytest.raises(SettingsError, match="(?s)" + message):
        load_study(str(file))
    assert not (tmp_path / "data").exists()


def test_only_the_machine_is_set_from_outside():
    study = load_study("digits-depth-data", ["machine.checkpoint_seconds=7", "machine.data_folder=/a/copy"])
    settings = study.settings(study.cells()[0])
    assert settings.machine.checkpoint_seconds == 7 and settings.machine.data_folder == "/a/copy"
    assert settings.digest() == load_study("digits-depth-data").settings(study.cells()[0]).digest()
    with pytest.raises(SettingsError, match="depend on the study's file alone"):
        load_study("digits-depth-data", ["training.lr=1"])


def test_an_unknown_study_is_told(tmp_path):
    with pytest.raises(SettingsError, match=sentences.did_you_mean("digits-budget")):
        load_study("digit-budget")
    with pytest.raises(SettingsError, match="cannot read"):
        load_study(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(SettingsError, match="no tracked table of a study 'nothing'"):
        published("nothing")
