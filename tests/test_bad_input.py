"""What bad input gets: a line or two, exit status 2, nothing written."""

import itertools

import pytest
import sentences

from incubate_lib.cli import main

RUN = ["run", "digits"]
END_TO_END = sentences.phase_of("end_to_end", "end_to_end")
MAT = ["run", "mat-digits", "--strategies", "mat"]
SHORT = [part for phase in ("meta", "incubate", "finetune") for part in ("--set", f"phases.{phase}.epochs=1")]
SHORT += [part for phase in ("meta", "incubate") for part in ("--set", f"phases.{phase}.warmup_epochs=0")]
BAD = [  # command line → what the message must name
    (["run", "digit"], sentences.unknown("preset", "digit", "digits")),
    ([*RUN, "--set", "training.epoch=3"], sentences.unknown("field", "training.epoch", "epochs")),
    ([*RUN, "--set", "trainin.epochs=3"], sentences.unknown("field", "trainin", "training")),
    ([*RUN, "--set", "training.epochs=many"], "training.epochs is 'many'"),
    ([*RUN, "--set", "training.epochs=true"], "training.epochs is True"),
    ([*RUN, "--set", "training.batch_size=3.5"], "training.batch_size is 3.5"),
    ([*RUN, "--set", "training.epochs"], "write it as field=value"),
    ([*RUN, "--set", "training.epochs=-1"], "training.epochs is -1"),
    ([*RUN, "--set", "phases.meta.epochs=-1"], "phases.meta.epochs is -1"),
    ([*RUN, "--set", "model.depth=25"], f"partition.num_modules is 4, by which {sentences.undivided(25)}"),
    ([*RUN, "--set", "partition.num_modules=48"], "partition.num_modules is 48, but the network has only 24"),
    ([*RUN, "--set", "partition.target_depths=[6,6,6,7]"], "add up to 25, but the network has 24 blocks"),
    ([*RUN, "--set", "partition.meta_depths=[1,1]"], "num_modules is 4, len(meta_depths) is 2"),
    ([*RUN, "--set", "model.img_size=9"], f"img_size 9 {sentences.not_divisible('patch_size 2')}"),
    ([*RUN, "--set", "model.img_size=16"], sentences.source_has("digits", (1, 8, 8))),
    ([*RUN, "--set", "model.in_chans=3"], sentences.source_has("digits", (1, 8, 8))),
    ([*RUN, "--set", "model.name=vit_tiny_patch16_244"], f"timm has no 'vit_tiny_patch16_244'; {sentences.did_you_mean('')}"),
    ([*RUN, "--set", "model.options={fish: 1}"], "fish"),
    ([*RUN, "--set", "training.batch_size=5000"], "training.batch_size is 5000"),
    ([*RUN, "--set", "training.lr=1e-9"], sentences.larger_rate("1e-05", "1e-09")),
    ([*RUN, "--set", "strategies.mine.start=stack"], "strategies.mine.kind is missing"),
    ([*RUN, "--strategies", "deep_incubaton"], sentences.unknown("strategy", "deep_incubaton", "deep_incubation")),
    ([*RUN, "--strategies", "end_to_end", "end_to_end"], f"strategy end_to_end {sentences.GIVEN_TWICE}"),
    ([*RUN, "--seeds", "0", "1", "0"], f"seed 0 {sentences.GIVEN_TWICE}"),
    ([*RUN, "--seeds", "-1"], sentences.NEGATIVE_SEED),
    ([*RUN, "--jobs", "0"], "--jobs is 0"),
    ([*MAT, "--set", "mat.alpha=1.5"], "mat.alpha is 1.5: Input should be less than or equal to 1"),
    ([*MAT, "--set", "mat.alpha=-0.1"], "mat.alpha is -0.1: Input should be greater than or equal to 0"),
    ([*MAT, "--set", "mat.aplha=0.1"], sentences.unknown("field", "mat.aplha", "alpha")),
    (
        [*MAT, "--set", "mat.units=filter"],
        "mat.units is 'filter': Input should be 'heads', 'experts', 'sublayers', 'blocks'",
    ),
    ([*MAT, "--set", "mat.units=conv_layers"], "stop_error needs a way around resting units"),
    ([*MAT, "--set", "strategies.mat.mat.alpha=2"], "strategies.mat.mat.alpha is 2"),
    ([*MAT, "--set", "mat.probe=5000"], "mat.probe is 5000, but there are only 1200 training images"),
    ([*MAT, "--set", "mat.probe=1"], "mat.probe is 1"),
    (
        [*MAT, "--set", "mat.warmup_epochs=30"],
        f"mat.warmup_epochs is 30, but {sentences.phase_of('end_to_end', 'mat')} lasts 25.045 epochs",
    ),
    (
        ["run", "digits", "--strategies", "deep_incubation_mat", "--set", "mat.units=conv_layers"],
        "mat.units is 'conv_layers' in strategy deep_incubation_mat, but only module 1 has a convolution",
    ),
    ([*MAT, "--devices", "2", "--set", "mat.units=heads"], "mat.stop_error of strategy mat with units 'heads' is for one device"),
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
    ([*RUN, "--devices", "3"], f"batch_size 32 in {END_TO_END} {sentences.not_divisible('machine.devices 3')}"),
    ([*RUN, "--set", "training.micro_batch=5"], f"batch_size 32 {sentences.not_divisible('micro_batch 5')}"),
    ([*RUN, "--set", "training.micro_batch=16", "--devices", "4"], "machine.devices 4 times micro_batch 16"),
    ([*RUN, "--set", "training.mixup=0.5", "--set", "training.micro_batch=1"], "micro_batch 1 is odd"),
    ([*RUN, "--set", "training.mixup=0.5", "--devices", "32"], "gives each device an odd number"),
    (
        [*RUN, "--set", "training.lr_for_batch=64", "--set", "training.min_lr=9e-4", "--set", "training.lr=1e-3"],
        sentences.larger_rate("0.0009", "0.0005"),
    ),
    ([*RUN, "--set", "training.ema=1.0"], "training.ema is 1.0"),
    ([*RUN, "--set", "phases.end_to_end.batch_size=5000"], "training.batch_size is 5000 in phase end_to_end"),
    ([*RUN, "--set", "training.micro_batch=8", "--set", "machine.compile=reduce-overhead"], "captures CUDA graphs"),
    ([*RUN, *SHORT, "--set", "phases.end_to_end.warmup_epochs=9"], "epochs, but its warmup_epochs is 9; set phases.end_to_end.w"),
    (
        [*RUN, "--set", "training.randaugment=rand-m9"],
        sentences.not_for_images("randaugment", END_TO_END, "held"),
    ),
    ([*RUN, "--set", "precision=float16"], "precision is 'float16'"),
    ([*RUN, "--set", "machine.compile=fast"], "machine.compile is 'fast'"),
    (
        [*RUN, "--set", "machine.download=true"],
        "machine.download is for torchvision's and Hugging Face's sets, not for data.source 'digits'",
    ),
    ([*RUN, "--set", "data.source=cifar"], sentences.unknown("source", "cifar", "cifar10 or cifar100")),
    ([*RUN, "--set", "data.folder=x"], sentences.no_meaning("folder", "source 'digits'")),
    ([*RUN, "--set", "data.source=cifar10", "--set", "data.test_images=null"], sentences.not_there("/datasets/cifar10")),
    ([*RUN, "--set", "data={source: folder, folder: ~no_such_user/x}"], sentences.not_there("/datasets/~no_such_user/x")),
    ([*RUN, "--set", "data.train_share=0"], "data.train_share is 0"),
    ([*RUN, "--set", "data.train_share=0.001"], "data.train_share is 0.001; of 1200 images in 10 classes"),
    ([*RUN, "--set", "strategies.tune={kind: finetune}"], "kind 'finetune' needs weights"),
    ([*RUN, "--set", "strategies.tune={kind: finetune, weights: nowhere}"], f"/nowhere; {sentences.GIVE_WEIGHTS}"),
    ([*RUN, "--set", "strategies.end_to_end.weights=x"], sentences.no_meaning("weights", "kind 'end_to_end'")),
    ([*RUN, "--set", "training.epochs=.inf"], "training.epochs is inf"),
    ([*RUN, "--set", "run=[]"], "run is []"),
    ([*RUN, "--set", "name=2024-99-99"], "is not a plain value"),
    ([*RUN, "--set", "phases.meta.lr=null"], "lr is None"),
    ([*RUN, "--set", "data.num_classes=3"], sentences.no_meaning("num_classes", "source 'digits'")),
    ([*RUN, "--set", "model.options={depth: 3}"], sentences.own_field("options.depth")),
    ([*RUN, "--set", "training.mixup=0.5", "--set", "training.batch_size=33"], "batch_size 33 is odd"),
    ([*RUN, "--set", "strategies.end_to_end.start=stack"], sentences.no_meaning("start", "kind 'end_to_end'")),
    ([*RUN, "--set", "strategies.deep_incubation.match=x"], "strategies.deep_incubation.match is 'x'"),
    ([*RUN, "--set", "strategies.deep_incubation.match_on=flops"], sentences.no_meaning("match_on", "kind 'deep_incubation'")),
    ([*RUN, "--set", "strategies.meta={kind: end_to_end}"], "that name is taken"),
    ([*RUN, "--set", "strategies.a/b={kind: end_to_end}"], f"strategies.a/b is 'a/b': {sentences.NAME}"),
    ([*RUN, "--set", f"strategies.{'a' * 101}={{kind: end_to_end}}"], f"{sentences.NAME}dashes"),
    ([*RUN, "--set", 'strategies={"a\\nb": {kind: end_to_end}}'], rf"'strategies.a\nb' is 'a\nb': {sentences.NAME}"),
    ([*RUN, "--set", "strategies.Recommended={kind: end_to_end}"], f"Recommended and recommended {sentences.CASE_ONLY}"),
    (
        [*RUN, "--set", "strategies={My: {kind: end_to_end}, my: {kind: end_to_end}}"],
        f"strategies.my and My {sentences.CASE_ONLY}",
    ),
    ([*RUN, "--set", "strategies.META={kind: end_to_end}"], "strategies.META and the folder of the shared meta model, meta,"),
    ([*RUN, "--set", "name=.."], f"name is '..': {sentences.NAME}dots, dashes and underscores"),
    ([*RUN, "--set", "name=a/b"], "name is 'a/b'"),
    ([*RUN, "--set", 'name="a\\nb"'], r"name is 'a\nb'"),
    ([*RUN, "--set", "name=grün"], "name is 'grün'"),
    ([*RUN, "--set", f"name={'a' * 300}"], sentences.NAME),
    ([*RUN, "--strategies", "a" * 300], "unknown strategy 'aaa"),
    ([*RUN, "--seeds", str(2**63)], "a seed is larger than 9223372036854775807"),
    (["run", "a" * 9000], "unknown preset 'aaa"),
    (["plan", "a" * 9000], sentences.NO_PRESET),
    (["bench", "digits", "--save", "a" * 101], sentences.NAME),
    (["bench", "digits", "--save", "../a"], f"--save '../a': {sentences.NAME}"),
    (["study", "a" * 9000], "unknown study 'aaa"),
    ([*RUN, "--set", f"strategies.tune={{kind: finetune, weights: {'a' * 9000}}}"], sentences.GIVE_WEIGHTS),
    (
        [*RUN, "--set", "model.options={num_classes: 0}"],
        f"options.num_classes {sentences.NOT_SET_HERE}: it follows from the images",
    ),
    (
        [*RUN, "--set", "model.options={drop_path_rate: 0.1}"],
        f"options.drop_path_rate {sentences.NOT_SET_HERE}: set training.drop_path",
    ),
    ([*RUN, "--set", "model.options={weight_init: skip}"], "options.weight_init 'skip' leaves weights as the memory happens"),
    ([*RUN, "--set", "model.name=resnet18.a1_in1k"], "names weights, and every network begins with random ones: write resnet18"),
    ([*RUN, "--set", "model.name=hf-hub:timm/resnet18"], sentences.NO_PLACE),
    ([*RUN, "--set", "model.options={global_pool: ''}"], "with model.options {'global_pool': ''} gives (2, 17, 10)"),
    (["plan", "digits", "--set", "model.options={global_pool: ''}"], sentences.task_needs((2, 10))),
    ([*RUN, "--set", "strategies={mine: 5}"], "strategies.mine is 5"),
    (["stop", "digits"], "nothing to stop"),
    (["report", "digits"], sentences.NO_RUN),
    (["status", "digits"], sentences.NO_RUN),
    (["run", "no/such/file.yaml"], sentences.unreadable_settings("no/such/file.yaml")),
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
        ("- a list", f"{sentences.MAPPING}, not a list"),
        ("just words", f"{sentences.MAPPING}, not a str"),
        ("", sentences.MAPPING),
        ("a: !!python/object/apply:os.system ['true']", sentences.NOT_YAML),
        ("a: [1", sentences.NOT_YAML),
        ("model: {depth: 4}", "partition is missing, which deep_incubation needs: give num_modules or target_depths"),
        ("model: {name: vgg11}\nrun: [deep_incubation_mat]", "partition is missing"),
        (
            "model: {name: vgg11, img_size: 8, in_chans: 1}\npartition: {num_modules: 2}",
            sentences.fails_with((1, 8, 8)),
        ),
        ("strategies: {a: {kind: end_to_end, mat_phases: [end_to_end]}}\nrun: [a]", "mat_phases has no meaning without mat"),
        (
            "strategies: {a: {kind: end_to_end, mat: {}, mat_phases: [meta]}}\nrun: [a]",
            "mat_phases names meta, but kind",
        ),
        (
            "strategies: {a: {kind: end_to_end, mat: {alpa: 1}}}\nrun: [a]",
            sentences.unknown("field", "strategies.a.mat.alpa", "alpha"),
        ),
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
        ("data: {source: folder, pad: 2}\npartition: {num_modules: 4}", sentences.no_meaning("pad", "streamed images")),
        ("training: {epochs: 2}\ntraining: {lr: 1e-3}", f"{sentences.NOT_YAML}: line 2, column 1: 'training' is there twice"),
        ("training:\n  lr: 1e-3\n  lr: 2e-3", "line 3, column 3: 'lr' is there twice"),
        ("model: &a [*a]", "an alias refers to what contains it"),
        (BOMB, sentences.TOO_MANY_VALUES),
        (f"{BOMB}? *h\n: 1", sentences.TOO_MANY_VALUES),
        (MERGED, sentences.TOO_MANY_VALUES),
        ("#" * 100_001, "it has more than 100000 characters"),
        (f"a: {'[' * 40}{']' * 40}", "maximum depth of data structure exceeded"),
        ("[" * 2000, "maximum depth of data structure exceeded"),
        ("a: *nothing", "line 1, column 4: found undefined alias 'nothing'"),
        ("a: !!bool x", "a value is not what its tag says"),
        ("--- {}\n--- {}", f"{sentences.NOT_YAML}: line 2, column 1: but found another document"),
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
