"""Settings: how they are read, layered and named, and the networks that they may ask for."""

import inspect
import json
import re

import pytest
import sentences
import timm
import torch
import yaml
from pydantic import ValidationError
from timm.models import build_model_with_cfg

from incubate_lib.cli import main
from incubate_lib.config import (
    DataSettings,
    MATSettings,
    ModelSettings,
    PhaseSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    load_settings,
    nearest,
    presets,
)
from incubate_lib.config.files import read_yaml, yaml_value
from incubate_lib.config.phase import identity, of_identity
from incubate_lib.config.study import load_study
from incubate_lib.phases.facts import count
from incubate_lib.phases.networks import build_model
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.about import settings_file


@pytest.mark.parametrize("preset", presets())
def test_presets_load_and_say_what_they_are(preset):
    settings = load_settings(preset)
    assert settings.name == preset and settings.description and set(settings.run) <= set(settings.strategies)


def test_a_users_file_is_the_same_as_a_preset(tmp_path):
    copy = tmp_path / "smoke.yaml"
    copy.write_text(presets()["smoke"].read_text())
    assert load_settings(str(copy)) == load_settings("smoke")


def test_layers_and_overrides(tmp_path):
    settings = load_settings(
        "digits", ["training.epochs=20", "strategies.deep_incubation.phases.finetune.lr=7e-4", "training.betas=[0.9, 0.95]"]
    )
    assert settings.training_of("deep_incubation", "finetune").epochs == 20
    assert settings.training_of("deep_incubation", "finetune").lr == 7e-4
    assert settings.training_of("deep_incubation", "meta").betas == (0.9, 0.95)
    assert (
        settings.training_of("deep_incubation", "meta").epochs
        == load_settings("digits").training_of("deep_incubation", "meta").epochs
    )
    with pytest.raises(Exception, match="frozen"):
        settings.training.lr = 1.0


def test_a_setting_that_could_have_no_effect_is_refused(tmp_path):
    raw = yaml.safe_load(presets()["smoke"].read_text())
    raw["phases"] = {phase: {"lr": 1e-3} for phase in ("meta", "incubate", "finetune", "end_to_end", "local_learning")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SettingsError, match=r"training.lr has no effect: .*phases.<phase>.lr"):
        load_settings(str(tmp_path / "mine.yaml"), ["training.lr=5e-3"])


def test_the_experiments_hash_knows_what_changes_a_result():
    plain = load_settings("smoke")
    same = ["machine.checkpoint_seconds=9", "run=[end_to_end]", "description=x", "training.lr=0.002"]
    assert plain.digest() == load_settings("smoke", same).digest()
    changes = ["training.lr=3e-3", "phases.meta.clip_grad=null", "partition.meta_depths=[1,1,2]", "data.num_images=300"]
    changes += ["strategies.end_to_end.match=deep_incubation_stack", "strategies.deep_incubation.inherit_stem=true"]
    changes += ["strategies.end_to_end.phases.end_to_end.clip_grad=null", "data.resize=4"]
    assert len({plain.digest(), *(load_settings("smoke", [change]).digest() for change in changes)}) == len(changes) + 1


def test_a_phases_hash_knows_everything_in_it():
    plain = PhaseSettings(
        phase="incubate", seed=0, data=DataSettings(), model=ModelSettings(), target_depths=[2, 2], meta_depths=[1, 1],
        options={"module_index": 0, "start": "random"}, training=TrainingSettings(), inputs={"meta": "abc"},
    )  # fmt: skip
    other = {
        "phase": "meta", "seed": 1, "data": DataSettings(test_images=500), "model": ModelSettings(depth=4),
        "target_depths": [1, 3], "meta_depths": [2, 1], "group": "finetune", "task": "regression", "cuts": ["norm"],
        "training": TrainingSettings(lr=2e-3), "mat": MATSettings(), "inputs": {"meta": "abd"}, "format": 99,
        "precision": "bfloat16", "options": {"start": "random", "module_index": 1},
    }  # fmt: skip
    assert set(other) == set(PhaseSettings.model_fields), "a new field must be part of the hash"
    changed = {plain.model_copy(update={name: value}).digest() for name, value in other.items()}
    for name, value in {"start": "stack", "inherit_stem": True, "imitate": True, "small_images": True}.items():
        changed.add(plain.model_copy(update={"options": plain.options | {name: value}}).digest())
    assert len(changed | {plain.digest()}) == len(other) + 4 + 1


RECORDED = {
    "meta": "c6eb25bdb892",
    "imitation/incubate-1": "65fb6b8fd1d9",
    "end_to_end_low_resolution/end_to_end": "ed1af6915ee1",
    "mat": "b1ad4e703940",
    "deep_incubation_recommended/finetune": "b6be95b75a29",
    "deep_incubation_mat/incubate-2": "6acac6d20634",
}


def test_identities_stay_what_they_were_and_can_be_read_again():
    """Hashes that were recorded before settings had task, mat, pad, resize, imitate and small_images."""
    settings = load_settings("smoke")
    nodes = {node.key: node for node in plan(settings, [*settings.strategies], facts=count(settings, 1000, 4)).nodes}
    for key, digest in RECORDED.items():
        assert nodes[f"seed-0/{key}"].digest == digest
    for node in nodes.values():
        assert of_identity(json.loads(json.dumps(identity(node.settings)))).digest() == node.digest
    again = of_identity(identity(nodes["seed-0/imitation/incubate-1"].settings))
    assert (again.phase, again.seeded_as, again.module_index) == ("imitate", "incubate", 1)
    other = again.model_copy(update={"phase": "another", "options": {"module_index": 1}})  # of a new kind, set as incubation is
    assert other.digest() not in {node.digest for node in nodes.values()}, "and so not taken for that"


def test_other_scenes_make_other_phases(monkeypatch):
    """The generator's version is in the identity of what is trained on its scenes alone, and the first one in none."""
    scenes, digits = (PhaseSettings(phase="end_to_end", seed=0, data=DataSettings(**data), model=ModelSettings(depth=2),
                      target_depths=[], meta_depths=[]) for data in ({"source": "digit_maps", "image_size": 64}, {}))  # fmt: skip
    before = scenes.digest(), digits.digest()
    assert before[0] == "3a5b7242594b"
    monkeypatch.setattr("incubate_lib.config.phase.SCENES_FORMAT", 2)
    assert (scenes.digest() != before[0], digits.digest()) == (True, before[1])
    assert of_identity(identity(scenes)).digest() == scenes.digest()


def test_an_explicit_null_switches_clipping_off():
    settings = load_settings("digits", ["phases.meta.clip_grad=null"])
    assert settings.training_of("deep_incubation", "meta").clip_grad is None
    assert settings.training_of("deep_incubation", "finetune").clip_grad == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1e3", 1000.0), ("-2.5E+2", -250.0), (".inf", float("inf")), ("0x1f", 31), ("0o17", 15), ("+7", 7),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"), ("true", True), ("False", False),
        ("1:30:00", "1:30:00"), ("12:30", "12:30"), ("", None), ("~", None), ("null", None), ("~x/y", "~x/y"), ("a b", "a b"),
        ("[1, {a: off}]", [1, {"a": "off"}]), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}), ("'1'", "1"),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_values_are_yaml_1_2_on_the_command_line_as_in_a_file(text, value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"value: {text}")
    for read in (yaml_value(f"value={text}", text), read_yaml(tmp_path / "mine.yaml")["value"]):
        assert read == value and type(read) is type(value)


@pytest.mark.parametrize("file", ["my file.yaml", "a" * 120 + ".yaml"])
def test_a_file_whose_name_is_no_name_for_a_run(file, tmp_path, data_folder, capsys):
    (tmp_path / file).write_text("run: [end_to_end]")
    assert main(["run", str(tmp_path / file)]) == 2
    assert "name is" in (output := capsys.readouterr().err) and sentences.NAME in output and not data_folder.exists()
    (tmp_path / file).write_text("name: mine\nrun: [end_to_end]")
    assert load_settings(str(tmp_path / file)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a/b", f"name is 'a/b': {sentences.NAME}"),
        (f"name: {'a' * 101}", sentences.NAME),
        ('axes: {"depth\\n": {a: {model.depth: 24}}}', sentences.LABEL),
        ('axes: {depth: {"a\\tb": {model.depth: 24}}}', sentences.LABEL),
        (f"axes: {{depth: {{{'a' * 101}: {{model.depth: 24}}}}}}", f"it must be 1 to 100 {sentences.LABEL}"),
        (f"seeds: [{2**63}]", "less than or equal to 9223372036854775807"),
    ],
)
def test_names_in_a_study(text, message, tmp_path):
    rest = "" if text.startswith("seeds") else "\nseeds: [0]"
    (tmp_path / "mine.yaml").write_text(f"preset: digits\nstrategies: [end_to_end]\n{text}{rest}")
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_study(str(tmp_path / "mine.yaml"))


def test_a_name_that_only_an_unused_strategy_has_in_other_letters():
    settings = load_settings("digits", ["strategies.Growing={kind: end_to_end}", "run=[Growing]"])
    assert settings.run == ["Growing"] and settings.strategies["growing"].kind == "deep_incubation"
    with pytest.raises(SettingsError, match=f"growing and Growing {sentences.CASE_ONLY}"):
        load_settings("digits", ["strategies.Growing={kind: end_to_end}", "run=[Growing, growing]"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name": "resnet10t", "img_size": 64, "options": {"global_pool": ""}},
            f"{{'global_pool': ''}} {sentences.fails_with((3, 64, 64))}",
        ),
        (
            {"name": "resnet10t", "img_size": 64, "options": {"features_only": True}},
            "{'features_only': True} gives a list for 2 samples",
        ),
        ({"name": "inception_v3", "options": {"aux_logits": True}}, "{'aux_logits': True} gives a tuple for 2 samples"),
        ({"name": "vgg11", "img_size": 8}, f"model.name 'vgg11' with model.options {{}} {sentences.fails_with((3, 8, 8))}"),
        ({"name": "vit_tiny_patch16_224", "options": {"global_pool": ""}}, sentences.task_needs((2, 4))),
    ],
)
def test_a_network_that_gives_no_row_of_logits_is_refused_while_planning(model, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        count(Settings(name="mine", model=model, run=["end_to_end"]), 100, 4)


# What of `create_model` and of what it hands its arguments to has nothing to do with weights.
HARMLESS = {
    "model_name", "scriptable", "exportable", "no_jit", "kwargs", "model_cls", "variant", "model_cfg", "feature_cfg",
    "kwargs_filter",
}  # fmt: skip


def test_every_argument_of_timm_that_loads_weights_is_refused():
    given = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    assert {"pretrained", "checkpoint_path", "pretrained_cfg_overlay", "cache_dir"} <= given - HARMLESS
    for argument in given - HARMLESS:
        for options in ({argument: True}, {"block_args": {argument: "x"}}, {"layers": [{argument: {"file": "x"}}]}):
            with pytest.raises(ValidationError, match=rf"options\..*{argument}.*strategies.<name>.weights"):
                ModelSettings(options=options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "resnet10t", "swin_tiny_patch4_window7_224"])
def test_two_builds_of_a_seed_have_the_same_weights_whatever_the_memory_holds(name):
    def built():
        junk = [torch.full((1000,), torch.rand(()).item()) for _ in range(100)]
        del junk  # what is freed is what `torch.empty` gives next
        torch.manual_seed(0)
        return build_model(ModelSettings(name=name), None, 4).state_dict()

    assert all(torch.equal(one, other) for one, other in zip(built().values(), built().values(), strict=True))
    assert not torch.are_deterministic_algorithms_enabled() or torch.cuda.is_available()


def test_weights_that_timm_leaves_unset_are_refused(monkeypatch):
    create = timm.create_model

    def forgetful(name, **arguments):
        model = create(name, **arguments)
        model.head.weight = torch.nn.Parameter(torch.empty_like(model.head.weight))
        return model

    monkeypatch.setattr(timm, "create_model", forgetful)
    with pytest.raises(
        SettingsError, match=r"leaves 1 tensor\(s\) of model.name 'vit_tiny.* without initial values, the first: head.weight"
    ):
        build_model(ModelSettings(options={"qkv_bias": False}), 1, 4)


@pytest.mark.parametrize("preset", presets())
def test_the_settings_file_of_a_report_gives_the_same_settings(preset, tmp_path):
    """Of what the command line was told, too; nothing that has its default is in it."""
    for overrides in ([], ["training.min_lr=1e-6", "strategies.mine={kind: end_to_end}"]):
        given = load_settings(preset, overrides)
        (tmp_path / "mine.yaml").write_text(text := settings_file(given))
        again = load_settings(str(tmp_path / "mine.yaml"))
        assert again.model_dump(exclude={"overrides"}) == given.model_dump(exclude={"overrides"})
        assert again.digest() == given.digest()
        assert "null" not in text and "label_smoothing: 0.1" not in text


def test_images_beside_a_settings_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    (file := tmp_path / "mine.yaml").write_text("data: {source: folder, folder: flowers}\npartition: {num_modules: 2}\n")
    assert load_settings(str(file)).data.folder == "flowers", "nowhere"
    (tmp_path / "flowers").mkdir()
    assert load_settings(str(file)).data.folder == str(tmp_path / "flowers")
    (tmp_path / "data" / "datasets" / "flowers").mkdir(parents=True)
    assert load_settings(str(file)).data.folder == "flowers", "where they usually lie"


@pytest.mark.parametrize(
    ("given", "known", "output"),
    [
        ("lr_rate", ["lr", "lr_for_batch", "color_jitter", "erase"], sentences.did_you_mean("lr?")),
        ("epoch", ["epochs", "lr"], sentences.did_you_mean("epochs?")), ("qqq", ["epochs", "lr"], "there are: epochs, lr"),
    ],
)  # fmt: skip
def test_the_nearest_name_is_named_alone(given, known, output):
    assert nearest(given, known) == output
