"""A network of timm for each mechanism that cutting meets passes the battery, as the tracked table says."""

from importlib.util import find_spec

import battery
import pytest
import timm
from pieces import FAILS, NEARLY, PASSES, check

MECHANISMS = {
    "distillation token": "deit_tiny_distilled_patch16_224",
    "rotary positions": "eva02_tiny_patch14_224",
    "positions relative to another": "test_vit_relpos",
    "class attention": "xcit_nano_12_p16_224",
    "windows": "coatnet_pico_rw_224",
    "pooling": "poolformer_s12",
    "mixer": "mixer_s32_224",
    "layer scale": "convnext_atto",
    "batch norm": "regnetx_002",
    "activations before the convolutions": "resnetv2_18",
    "drop-out that the network calls itself": "mobilenetv3_small_050",
    "depthwise convolutions": "efficientnet_b0",
    "squeeze and excite": "legacy_seresnet18",
    "no normalisation": "nf_regnet_b0",
    "biases kept in eval mode": "levit_128s",
    "activations in place": "ghostnet_050",
    "down-sampling attention": "pvt_v2_b0",
    "convolutions and attention": "mobilevit_xxs",
    "attention in channels": "edgenext_xx_small",
    "state spaces without states": "test_mambaout",
    "one stage after another": "pit_ti_224",
    "attributes asked of a layer": "test_vit",
}
NO_CHAINS = {"dense concatenation": "densenet121"}
TABLE = battery.read().set_index("network")


def agrees(name: str) -> dict:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    found, tracked = check(name), TABLE.loc[name]
    same = ["file", "pixels", "blocks", "cuts", "modules", "starts"]
    if tracked["timm"] == timm.__version__:
        assert {column: str(found[column]) for column in same} == tracked[same].to_dict()
    assert (found["result"] == FAILS) == (tracked["result"] == FAILS), found["why"]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MECHANISMS.values(), ids=MECHANISMS)
def test_networks_of_every_mechanism_can_be_trained_in_pieces(name):
    assert not agrees(name)["why"]


@pytest.mark.parametrize("name", NO_CHAINS.values(), ids=NO_CHAINS)
def test_networks_that_cannot_say_why(name):
    assert "can be left out" in agrees(name)["why"]


def test_the_tracked_table_has_every_file_of_this_timm_and_seventy_that_pass():
    version = TABLE["timm"].unique()
    assert len(version) == 1
    if version[0] != timm.__version__:
        pytest.skip(f"the table is of timm {version[0]}")
    theirs = {file for file in timm.list_modules() if find_spec(f"timm.models.{file}")}  # and not those registered here
    assert set(TABLE["file"]) == theirs
    assert TABLE.loc[TABLE["result"] != FAILS, "file"].nunique() >= 70
    assert (TABLE.loc[TABLE["result"] == FAILS, "why"] != "").all()
    assert set(TABLE["result"]) <= {PASSES, NEARLY, FAILS}
