"""Settings, and what bad input gets: a line or two, exit status 2, nothing written."""

import inspect
import itertools
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
import timm
import torch
import yaml
from pydantic import ValidationError
from timm.models import build_model_with_cfg

from incubate_lib.cli import main, parser
from incubate_lib.config import (
    DataSettings,
    MATSettings,
    ModelSettings,
    PhaseSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    load_settings,
    presets,
)
from incubate_lib.config.files import read_yaml, yaml_value
from incubate_lib.config.study import load_study
from incubate_lib.phases.facts import count
from incubate_lib.phases.networks import build_model

RUN = ["run", "digits"]
MAT = ["run", "mat-digits", "--strategies", "mat"]
SHORT = [part for phase in ("meta", "incubate", "finetune") for part in ("--set", f"phases.{phase}.epochs=1")]
SHORT += [part for phase in ("meta", "incubate") for part in ("--set", f"phases.{phase}.warmup_epochs=0")]
BAD = [  # command line → what the message must name
    (["run", "digit"], "unknown preset 'digit'; did you mean digits"),
    ([*RUN, "--set", "training.epoch=3"], "unknown field 'training.epoch'; did you mean epochs"),
    ([*RUN, "--set", "trainin.epochs=3"], "unknown field 'trainin'; did you mean training"),
    ([*RUN, "--set", "training.epochs=many"], "training.epochs is 'many'"),
    ([*RUN, "--set", "training.epochs=true"], "training.epochs is True"),
    ([*RUN, "--set", "training.batch_size=3.5"], "training.batch_size is 3.5"),
    ([*RUN, "--set", "training.epochs"], "write it as field=value"),
    ([*RUN, "--set", "training.epochs=-1"], "training.epochs is -1"),
    ([*RUN, "--set", "phases.meta.epochs=-1"], "phases.meta.epochs is -1"),
    ([*RUN, "--set", "model.depth=25"], "model.depth 25 is not divisible by partition.num_modules 4"),
    ([*RUN, "--set", "partition.num_modules=48"], "partition.num_modules is 48, but the network has only 24"),
    ([*RUN, "--set", "partition.target_depths=[6,6,6,7]"], "add up to 25, but model.depth is 24"),
    ([*RUN, "--set", "partition.meta_depths=[1,1]"], "num_modules is 4, len(meta_depths) is 2"),
    ([*RUN, "--set", "model.img_size=9"], "img_size 9 is not divisible by patch_size 2"),
    ([*RUN, "--set", "model.img_size=16"], "'digits' has (1, 8, 8)"),
    ([*RUN, "--set", "model.in_chans=3"], "'digits' has (1, 8, 8)"),
    ([*RUN, "--set", "model.name=vit_tiny_patch16_244"], "timm has no 'vit_tiny_patch16_244'; did you mean"),
    (
        [*RUN, "--set", "model.name=deit_tiny_distilled_patch16_224", "--set", "model.options={}"],
        "not a plain timm VisionTransformer",
    ),
    ([*RUN, "--set", "model.options={fish: 1}"], "fish"),
    ([*RUN, "--set", "training.batch_size=5000"], "training.batch_size is 5000"),
    ([*RUN, "--set", "training.lr=1e-9"], "min_lr 1e-05 is larger than lr 1e-09"),
    ([*RUN, "--set", "strategies.mine.start=stack"], "strategies.mine.kind is missing"),
    ([*RUN, "--strategies", "deep_incubaton"], "unknown strategy 'deep_incubaton'; did you mean deep_incubation"),
    ([*RUN, "--strategies", "end_to_end", "end_to_end"], "strategy end_to_end is given twice"),
    ([*RUN, "--seeds", "0", "1", "0"], "seed 0 is given twice"),
    ([*RUN, "--seeds", "-1"], "seed -1 is negative"),
    ([*RUN, "--jobs", "0"], "--jobs is 0"),
    ([*MAT, "--set", "mat.alpha=1.5"], "mat.alpha is 1.5: Input should be less than or equal to 1"),
    ([*MAT, "--set", "mat.alpha=-0.1"], "mat.alpha is -0.1: Input should be greater than or equal to 0"),
    ([*MAT, "--set", "mat.aplha=0.1"], "unknown field 'mat.aplha'; did you mean alpha"),
    (
        [*MAT, "--set", "mat.units=filter"],
        "mat.units is 'filter': Input should be 'heads', 'sublayers', 'blocks'",
    ),
    ([*MAT, "--set", "mat.units=conv_layers"], "stop_error needs a way around resting units"),
    ([*MAT, "--set", "strategies.mat.mat.alpha=2"], "strategies.mat.mat.alpha is 2"),
    ([*MAT, "--set", "mat.probe=5000"], "mat.probe is 5000, but there are only 1200 training images"),
    ([*MAT, "--set", "mat.probe=1"], "mat.probe is 1"),
    (
        [*MAT, "--set", "mat.warmup_epochs=30"],
        "mat.warmup_epochs is 30, but phase end_to_end of strategy mat lasts 25.045 epochs",
    ),
    (
        ["run", "digits", "--strategies", "deep_incubation_mat", "--set", "mat.units=conv_layers"],
        "mat.units is 'conv_layers' in strategy deep_incubation_mat, but only module 1 has a convolution",
    ),
    (["run", "mat-digits", "--devices", "2"], "mat.slow_every of strategy mat_multirate is a control for one device"),
    (
        [
            *MAT,
            *("--set", "run=[mat]"),
            *("--set", "partition=null"),
            *("--set", "model.name=vgg11"),
            *("--set", "model.options={}"),
        ],
        "timm cannot build model.name 'vgg11'",
    ),
    ([*RUN, "--devices", "0"], "machine.devices is 0"),
    ([*RUN, "--devices", "3"], "batch_size 32 in phase end_to_end of strategy end_to_end is not divisible by machine.devices 3"),
    ([*RUN, "--set", "training.micro_batch=5"], "batch_size 32 is not divisible by micro_batch 5"),
    ([*RUN, "--set", "training.micro_batch=16", "--devices", "4"], "machine.devices 4 times micro_batch 16"),
    ([*RUN, "--set", "training.mixup=0.5", "--set", "training.micro_batch=1"], "micro_batch 1 is odd"),
    ([*RUN, "--set", "training.mixup=0.5", "--devices", "32"], "gives each device an odd number"),
    (
        [*RUN, "--set", "training.lr_for_batch=64", "--set", "training.min_lr=9e-4", "--set", "training.lr=1e-3"],
        "min_lr 0.0009 is larger than lr 0.0005",
    ),
    ([*RUN, "--set", "training.ema=1.0"], "training.ema is 1.0"),
    ([*RUN, "--set", "phases.end_to_end.batch_size=5000"], "training.batch_size is 5000 in phase end_to_end"),
    ([*RUN, "--set", "training.micro_batch=8", "--set", "machine.compile=reduce-overhead"], "captures CUDA graphs"),
    ([*RUN, *SHORT, "--set", "phases.end_to_end.warmup_epochs=9"], "epochs, but its warmup_epochs is 9; set phases.end_to_end.w"),
    (
        [*RUN, "--set", "training.randaugment=rand-m9"],
        "randaugment in phase end_to_end of strategy end_to_end: not for images that are held",
    ),
    ([*RUN, "--set", "precision=float16"], "precision is 'float16'"),
    ([*RUN, "--set", "machine.compile=fast"], "machine.compile is 'fast'"),
    (
        [*RUN, "--set", "machine.download=true"],
        "machine.download is for torchvision's and Hugging Face's sets, not for data.source 'digits'",
    ),
    ([*RUN, "--set", "data.source=cifar"], "unknown source 'cifar'; did you mean cifar10 or cifar100"),
    ([*RUN, "--set", "data.folder=x"], "folder has no meaning for source 'digits'"),
    ([*RUN, "--set", "data.source=cifar10", "--set", "data.test_images=null"], "/datasets/cifar10 is not there"),
    ([*RUN, "--set", "data={source: folder, folder: ~no_such_user/x}"], "/datasets/~no_such_user/x is not there"),
    ([*RUN, "--set", "data.train_share=0"], "data.train_share is 0"),
    ([*RUN, "--set", "data.train_share=0.001"], "data.train_share is 0.001; of 1200 images in 10 classes"),
    ([*RUN, "--set", "strategies.tune={kind: finetune}"], "kind 'finetune' needs weights"),
    ([*RUN, "--set", "strategies.tune={kind: finetune, weights: nowhere}"], "/nowhere; give a .safetensors file or a folder"),
    ([*RUN, "--set", "strategies.end_to_end.weights=x"], "weights has no meaning for kind 'end_to_end'"),
    ([*RUN, "--set", "training.epochs=.inf"], "training.epochs is inf"),
    ([*RUN, "--set", "run=[]"], "run is []"),
    ([*RUN, "--set", "name=2024-99-99"], "is not a plain value"),
    ([*RUN, "--set", "phases.meta.lr=null"], "lr is None"),
    ([*RUN, "--set", "data.num_classes=3"], "num_classes has no meaning for source 'digits'"),
    ([*RUN, "--set", "model.options={depth: 3}"], "options.depth is a field of its own"),
    ([*RUN, "--set", "training.mixup=0.5", "--set", "training.batch_size=33"], "batch_size 33 is odd"),
    ([*RUN, "--set", "strategies.end_to_end.start=stack"], "start has no meaning for kind 'end_to_end'"),
    ([*RUN, "--set", "strategies.deep_incubation.match=x"], "strategies.deep_incubation.match is 'x'"),
    ([*RUN, "--set", "strategies.deep_incubation.match_on=flops"], "match_on has no meaning for kind 'deep_incubation'"),
    ([*RUN, "--set", "strategies.meta={kind: end_to_end}"], "that name is taken"),
    ([*RUN, "--set", "strategies.a/b={kind: end_to_end}"], "strategies.a/b is 'a/b': a name has at most 100 letters"),
    ([*RUN, "--set", f"strategies.{'a' * 101}={{kind: end_to_end}}"], "a name has at most 100 letters (a to z), digits, dashes"),
    ([*RUN, "--set", 'strategies={"a\\nb": {kind: end_to_end}}'], r"'strategies.a\nb' is 'a\nb': a name has"),
    ([*RUN, "--set", "strategies.Recommended={kind: end_to_end}"], "Recommended and recommended differ in case only"),
    ([*RUN, "--set", "strategies={My: {kind: end_to_end}, my: {kind: end_to_end}}"], "strategies.my and My differ in case only"),
    ([*RUN, "--set", "strategies.META={kind: end_to_end}"], "strategies.META and the folder of the shared meta model, meta,"),
    ([*RUN, "--set", "name=.."], "name is '..': a name has at most 100 letters (a to z), digits, dots, dashes and underscores"),
    ([*RUN, "--set", "name=a/b"], "name is 'a/b'"),
    ([*RUN, "--set", 'name="a\\nb"'], r"name is 'a\nb'"),
    ([*RUN, "--set", "name=grün"], "name is 'grün'"),
    ([*RUN, "--set", f"name={'a' * 300}"], "a name has at most 100 letters"),
    ([*RUN, "--strategies", "a" * 300], "unknown strategy 'aaa"),
    ([*RUN, "--seeds", str(2**63)], "a seed is larger than 9223372036854775807"),
    (["run", "a" * 9000], "unknown preset 'aaa"),
    (["plan", "a" * 9000], "is no preset, no .yaml file and no timm model"),
    (["bench", "digits", "--save", "a" * 101], "a name has at most 100 letters"),
    (["bench", "digits", "--save", "../a"], "--save '../a': a name has"),
    (["study", "a" * 9000], "unknown study 'aaa"),
    ([*RUN, "--set", f"strategies.tune={{kind: finetune, weights: {'a' * 9000}}}"], "give a .safetensors file or a folder"),
    ([*RUN, "--set", "model.options={num_classes: 0}"], "options.num_classes is not set here: it follows from the images"),
    ([*RUN, "--set", "model.options={drop_path_rate: 0.1}"], "options.drop_path_rate is not set here: set training.drop_path"),
    ([*RUN, "--set", "model.options={weight_init: skip}"], "options.weight_init 'skip' leaves weights as the memory happens"),
    ([*RUN, "--set", "model.name=resnet18.a1_in1k"], "names weights, and every network begins with random ones: write resnet18"),
    ([*RUN, "--set", "model.name=hf-hub:timm/resnet18"], "a plain name of timm is needed, not a place to load from"),
    ([*RUN, "--set", "model.options={global_pool: ''}"], "with model.options {'global_pool': ''} gives (2, 17, 10)"),
    (["plan", "digits", "--set", "model.options={global_pool: ''}"], "where logits are (2, 10): a row for each image"),
    ([*RUN, "--set", "strategies={mine: 5}"], "strategies.mine is 5"),
    (["stop", "digits"], "nothing to stop"),
    (["report", "digits"], "there is no run of these settings"),
    (["status", "digits"], "there is no run of these settings"),
    (["run", "no/such/file.yaml"], "cannot read settings file no/such/file.yaml"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: " ".join(v[1:])[:120] if isinstance(v, list) else "")
def test_bad_input(arguments, message, data_folder, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") <= 2 and "Traceback" not in output
    assert not data_folder.exists()


# Each name stands for eight times as much as the one before it.
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{inner}'] * 8)}]\n" for inner, name in itertools.pairwise("abcdefgh")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{inner}'] * 8)}]}}\n" for inner, name in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must be a mapping of settings, not a list"),
        ("just words", "must be a mapping of settings, not a str"),
        ("", "must be a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("a: [1", "not plain YAML"),
        ("model: {depth: 4}", "partition is missing, which deep_incubation needs: give num_modules or target_depths"),
        ("model: {name: vgg11}\nrun: [deep_incubation_mat]", "partition is missing"),
        (
            "model: {name: vgg11, img_size: 8, in_chans: 1}\npartition: {num_modules: 2}",
            "is a VGG, not a plain timm VisionTransformer",
        ),
        ("strategies: {a: {kind: end_to_end, mat_phases: [end_to_end]}}\nrun: [a]", "mat_phases has no meaning without mat"),
        (
            "strategies: {a: {kind: end_to_end, mat: {}, mat_phases: [meta]}}\nrun: [a]",
            "mat_phases names meta, but kind",
        ),
        ("strategies: {a: {kind: end_to_end, mat: {alpa: 1}}}\nrun: [a]", "'strategies.a.mat.alpa'; did you mean alpha"),
        ("strategies: {a: {kind: end_to_end, match: mat}}\nrun: [a]", "strategies.a.match is 'mat'; name a deep_incubation"),
        (
            "partition: {num_modules: 4}\nstrategies: {a: {kind: end_to_end, match: end_to_end}, end_to_end: {match: a}}",
            "end_to_end",
        ),
        (
            "strategies: {a: {kind: end_to_end, mat: {}, mat_phases: []}}\nrun: [a]",
            "mat_phases is []: List should have at least 1",
        ),
        ("strategies: {a: {kind: end_to_end, match: b}}\nrun: [a]", "strategies.a.match is 'b'"),
        ("data: {source: folder, pad: 2}\npartition: {num_modules: 4}", "pad has no meaning for streamed images"),
        ("training: {epochs: 2}\ntraining: {lr: 1e-3}", "not plain YAML: line 2, column 1: 'training' stands there twice"),
        ("training:\n  lr: 1e-3\n  lr: 2e-3", "line 3, column 3: 'lr' stands there twice"),
        ("model: &a [*a]", "an alias stands within what it stands for"),
        (BOMB, "it has more than 10000 values"),
        (f"{BOMB}? *h\n: 1", "it has more than 10000 values"),
        (MERGED, "it has more than 10000 values"),
        ("#" * 100_001, "it has more than 100000 characters"),
        (f"a: {'[' * 40}{']' * 40}", "maximum depth of data structure exceeded"),
        ("[" * 2000, "maximum depth of data structure exceeded"),
        ("a: *nothing", "line 1, column 4: found undefined alias 'nothing'"),
        ("a: !!bool x", "a value is not what its tag says"),
        ("--- {}\n--- {}", "not plain YAML: line 2, column 1: but found another document"),
        ("strategies: {end_to_end: deep_incubation}", "strategies.end_to_end is 'deep_incubation'"),
    ],
    ids=lambda value: value[:60],
)
def test_bad_files(text, message, tmp_path, data_folder, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    output = capsys.readouterr().err
    assert message in output and output.startswith("incubate: ") and output.count("\n") <= 2
    assert not data_folder.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name": "resnet10t", "img_size": 64, "options": {"global_pool": ""}},
            "{'global_pool': ''} fails with images of (3, 64, 64)",
        ),
        (
            {"name": "resnet10t", "img_size": 64, "options": {"features_only": True}},
            "{'features_only': True} gives a list for two",
        ),
        ({"name": "inception_v3", "options": {"aux_logits": True}}, "{'aux_logits': True} gives a tuple for two images"),
        ({"name": "vgg11", "img_size": 8}, "model.name 'vgg11' with model.options {} fails with images of (3, 8, 8)"),
        ({"name": "vit_tiny_patch16_224", "options": {"global_pool": ""}}, "where logits are (2, 4): a row for each image"),
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
        return build_model(ModelSettings(name=name), None, 4, any_kind=True).state_dict()

    assert all(torch.equal(one, other) for one, other in zip(built().values(), built().values(), strict=True))
    assert not torch.are_deterministic_algorithms_enabled() or torch.cuda.is_available()


def test_weights_that_timm_leaves_unset_are_refused(monkeypatch):
    create = timm.create_model

    def forgetful(name, **arguments):
        model = create(name, **arguments)
        model.head.weight = torch.nn.Parameter(torch.empty_like(model.head.weight))
        return model

    monkeypatch.setattr(timm, "create_model", forgetful)
    with pytest.raises(SettingsError, match=r"leaves 1 tensor\(s\) of model.name 'vit_tiny.* without a start, first head.weight"):
        build_model(ModelSettings(options={"qkv_bias": False}), 1, 4)


@pytest.mark.parametrize("parts", [["a" * 300], ["a" * 200] * 18])
def test_a_data_folder_with_a_name_that_is_too_long(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path.joinpath(*parts)))
    assert main(["run", "smoke"]) == 2
    output = capsys.readouterr().err
    assert "is too long: 3000 bytes are possible" in output and output.count("\n") == 1


@pytest.mark.parametrize("file", ["my file.yaml", "a" * 120 + ".yaml"])
def test_a_file_whose_name_is_no_name_for_a_run(file, tmp_path, data_folder, capsys):
    (tmp_path / file).write_text("run: [end_to_end]")
    assert main(["run", str(tmp_path / file)]) == 2
    assert "name is" in (output := capsys.readouterr().err) and "a name has at most 100" in output and not data_folder.exists()
    (tmp_path / file).write_text("name: mine\nrun: [end_to_end]")
    assert load_settings(str(tmp_path / file)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a/b", "name is 'a/b': a name has"),
        (f"name: {'a' * 101}", "a name has at most 100"),
        ('axes: {"depth\\n": {a: {model.depth: 24}}}', "printable characters in one line"),
        ('axes: {depth: {"a\\tb": {model.depth: 24}}}', "printable characters in one line"),
        (f"axes: {{depth: {{{'a' * 101}: {{model.depth: 24}}}}}}", "it must be 1 to 100 printable"),
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
    with pytest.raises(SettingsError, match="growing and Growing differ in case only"):
        load_settings("digits", ["strategies.Growing={kind: end_to_end}", "run=[Growing, growing]"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --seeds one", "argument --seeds: invalid int value: 'one'"),
        ("run --set", "argument --set: expected one argument"),
        ("rnu digits", "argument COMMAND: unknown choice 'rnu'; did you mean run?"),
        ("run digits --strategeis end_to_end", "unknown option --strategeis; did you mean --strategies"),
        ("run --sed=1", "unknown option --sed; did you mean --seeds"),
        ("mirror digits --to tensorbord", "argument --to: unknown choice 'tensorbord'; did you mean tensorboard?"),
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
        (["run", "imagenet-vit-"], "imagenet-vit-b imagenet-vit-h imagenet-vit-l"),
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


@pytest.mark.parametrize("place", ["a_file", "/proc/nothing"])
def test_a_data_folder_that_cannot_be_used(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / place))
    assert main(["run", "smoke"]) == 2
    assert "cannot read and write" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o500, 0o000], ids=["read-only", "unreadable"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_a_data_folder_that_is_not_ours(mode, used):
    """As an ordinary user, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        data = Path(place) / "data"
        (data / "runs" / "smoke").mkdir(parents=True)
        if used:
            (data / "runs" / "smoke" / "experiment.json").write_text('{"hash": "0"}')
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
    raw["phases"] = {phase: {"lr": 1e-3} for phase in ("meta", "incubate", "finetune", "end_to_end")}
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
        module_index=0, start="random", training=TrainingSettings(), inputs={"meta": "abc"},
    )  # fmt: skip
    other = {
        "phase": "meta", "seed": 1, "data": DataSettings(test_images=500), "model": ModelSettings(depth=4),
        "target_depths": [1, 3], "meta_depths": [2, 1], "module_index": 1,
        "start": "stack", "inherit_stem": True, "inherit_head": True,
        "training": TrainingSettings(lr=2e-3), "mat": MATSettings(), "inputs": {"meta": "abd"}, "format": 99,
        "precision": "bfloat16", "imitate": True, "small_images": True,
    }  # fmt: skip
    assert set(other) == set(PhaseSettings.model_fields), "a new field must be part of the hash"
    changed = {plain.model_copy(update={name: value}).digest() for name, value in other.items()}
    assert len(changed | {plain.digest()}) == len(other) + 1


def test_an_explicit_null_switches_clipping_off():
    settings = load_settings("digits", ["phases.meta.clip_grad=null"])
    assert settings.training_of("deep_incubation", "meta").clip_grad is None
    assert settings.training_of("deep_incubation", "finetune").clip_grad == 1.0
