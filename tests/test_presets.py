"""The presets with the paper's numbers: recipes, networks, and every cost that their comments state.

Nothing is trained and no image is read: networks live on the meta device, and the sizes of the sets are given here.
"""

import itertools
import re
import shlex

import pytest
import torch
import yaml
from networks import made_of
from planned import IMAGENET, VITS, critical, facts_of, networks, planned, total
from timm.models.vision_transformer import VisionTransformer

from incubate_lib.cli import parser
from incubate_lib.config import TrainingSettings, load_settings, presets
from incubate_lib.method.incubation import Hybrid, Imitation, start_module
from incubate_lib.phases.recipes import prepare
from incubate_lib.training.costs import FlopCounts, train_flops_per_image

pytestmark = pytest.mark.xdist_group("presets")  # one process, so that each network is counted once

PRESETS = [*VITS, "cifar100-resnet-110", "cifar10-resnet-110", "imagenet-swin-t"]
H200, SECONDS, PREFIX = 790e12, {"hours": 3600, "minutes": 60}, {"E": 1e18, "P": 1e15}  # FLOP/s, dense bf16

# What the paper or its released code states (arXiv 2212.04129); drop-path for ViT-B, -L, -H.
EVERY_PHASE = {
    "batch_size": 2048, "lr": 5e-4, "lr_for_batch": 512, "peak_lr": 2e-3, "min_lr": 1e-5, "weight_decay": 0.05,
    "betas": (0.9, 0.999), "label_smoothing": 0.1, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8,
    "cutmix": 1.0, "hflip": True, "repeats": 3, "shift": 0, "ema": None, "warmup_lr": 1e-6, "warmup": "inside", "lr_by": "epoch",
    "drop_path_over": "hybrid", "stride_repeats": True,
}  # fmt: skip
PHASES = {
    "meta": ({"epochs": 300, "warmup_epochs": 20, "clip_grad": None, "mixup_draws": 8}, (0, 0, 0)),
    "incubate": ({"epochs": 100, "warmup_epochs": 20, "clip_grad": None, "mixup_draws": 16}, (0.1, 0.1, 0.1)),
    "finetune": ({"epochs": 100, "warmup_epochs": 0, "clip_grad": 1.0, "mixup_draws": 32}, (0.1, 0.5, 0.6)),
}
SCHEDULE = ("warmup_lr", "warmup", "lr_by", "drop_path_over", "stride_repeats")
FAULTS = ("frozen", "decay_tokens", "clip_when", "token_std")  # of the released code, but for the last; by default ours
RELATIVE = {  # FLOPs at 100+100, 50+50, 25+25 with a meta model of 300 epochs; 300 epochs of end-to-end training are 1
    "imagenet-vit-b": (1.17, 0.75, 0.55), "imagenet-vit-l": (0.92, 0.54, 0.36), "imagenet-vit-h": (0.86, 0.49, 0.31),
}  # fmt: skip
VIT_B = {"target": 105.15, "meta": 35.36, "incubate-0": 44.44, "incubate-1": 41.18, "incubate-2": 38.16, "incubate-3": 35.13}
NETWORKS = {  # blocks, width, heads, tokens; parameters as published, in millions
    "imagenet-vit-b": (12, 768, 12, 197, 87), "imagenet-vit-l": (24, 1024, 16, 197, 304),
    "imagenet-vit-h": (32, 1280, 16, 257, 632), "cifar100-deit-t-32": (32, 192, 3, 65, None),
    "cifar100-deit-t-128": (128, 192, 3, 65, None), "fashion-deit-t-32": (32, 192, 3, 50, None),
}  # fmt: skip
STATED = {  # beginning of presets' names → settings that paper or released code state; all others are our own choice
    "imagenet-vit": {
        "paper": r"model\.(name|depth)|partition\..*|(strategies\.\w+\.)?phases\.\w+\.epochs",
        "code": r"model\.options\..*|phases\.(meta|incubate|finetune)\.(warmup_epochs|drop_path|clip_grad|mixup_draws)|training\."
        r"(warmup_epochs|warmup_lr|warmup|lr_by|batch_size|lr|lr_for_batch|min_lr|weight_decay|label_smoothing|drop_path_over"
        r"|randaugment|erase|mixup|cutmix|hflip|repeats|stride_repeats)",
    },
    "imagenet-vit-b": {"code": r"phases\.end_to_end\.drop_path"},
    "imagenet-vit-b-released": {"code": r"precision|training\.recipe"},
    "cifar100-deit": {
        "paper": r"model\..*",
        "code": r"training\.(lr|lr_for_batch|weight_decay|label_smoothing|shift|hflip|mixup|cutmix|repeats|stride_repeats)",
    },
    **{name: {"paper": r"model\.name"} for name in ("imagenet-swin-t", "cifar100-resnet-110", "cifar10-resnet-110")},
}
STRUCTURE = r"description|run\b.*|data\.(source|folder)|strategies\.\w+\.(kind|start|match)"  # no numbers


# -- counting -------------------------------------------------------------------------------------------------------------


def expected_table(preset, strategies, unit, label_of_time, reference, share):
    """Return the table of a preset's comment: label → for each strategy a number, a text, or None where there is nothing."""
    todo, phases = planned(preset)
    time, scale = share * H200 * SECONDS[label_of_time], PREFIX[unit[0]]
    modules = len(facts_of(preset).target_depths)
    renewed = ["assembly"] if "renewal" in facts_of(preset).flops_per_image else []  # batch norm's statistics
    labels = ["epochs", "meta model", *(f"module {i + 1}" for i in range(modules)), *renewed, "fine-tuning", "end to end"]
    table = {label: [] for label in labels}
    sums = {"in all": [], "critical path": []}
    for name in strategies:
        own = phases[name]

        def epochs(phase, own=own):
            return own[phase][0].settings.training.epochs

        whole = "end_to_end" in own
        joined = own["assemble"] if renewed and not whole else []
        cut = [] if whole else [*own["meta"], *own["incubate"], *joined, *own["finetune"], None]
        nodes = cut or [None] * (len(labels) - 2) + own["end_to_end"]
        table["epochs"].append(epochs("end_to_end") if whole else f"{epochs('incubate'):g}+{epochs('finetune'):g}")
        for label, node in zip(labels[1:], nodes, strict=True):
            table[label].append(node and todo.flops[node.key] / scale)
        sums["in all"].append(total(preset, name))
        sums["critical path"].append(critical(todo, todo.finals[name, 0]))
    for label, values in sums.items():
        table[label] = [value / scale for value in values]
        table[f"{label}, of {reference}"] = [value / total(preset, reference) for value in values]
        table[f"{label}, GPU-{label_of_time}"] = [value / time for value in values]
    return table


# -- what the comments say ------------------------------------------------------------------------------------------------


def comment(preset):
    """Return the comment at the head of a preset, a line with a backslash at its end joined to the next."""
    head = re.match(r"(#.*\n)+", presets()[preset].read_text()).group()
    return re.sub(r" \\\n#\s*", " ", head)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cost_in_the_comment_is_the_counted_one(preset):
    head = comment(preset)
    share = int(re.search(r"at (\d+) % of its 790 TFLOP/s", head).group(1)) / 100
    lines = head.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"#\s+[EP]FLOP of training", line))
    rows = {}
    for line in lines[start:]:
        if line == "#":
            break
        label, *cells = re.split(r"\s{2,}", line.removeprefix("#").strip())
        assert label not in rows
        rows[label] = cells
    (unit, strategies), *_ = rows.items()
    del rows[unit]
    reference = re.search(r"in all, of (\w+)", head).group(1)
    expected = expected_table(preset, strategies, unit, re.search(r"GPU-(hours|minutes)", head).group(1), reference, share)
    assert list(rows) == list(expected)
    for label, values in expected.items():
        assert len(rows[label]) == len(values) == len(strategies), label
        for strategy, output, value in zip(strategies, rows[label], values, strict=True):
            where = f"{label} of {strategy}: {output}, counted {value}"
            if value is None or isinstance(value, str):
                assert output == (value or "–"), where
                continue
            digits = len(output.partition(".")[2])
            assert output == f"{value:,.{digits}f}", where
            assert label == "epochs" or len(output.replace(".", "").replace(",", "").lstrip("0")) >= 3, f"{where}; too few digits"
    kinds = {name: strategy.kind for name, strategy in load_settings(preset).strategies.items()}
    assert kinds[reference] == "end_to_end" and not load_settings(preset).is_matched(reference)
    flops = facts_of(preset).flops_per_image
    hybrid = sum(flops[name] for name in flops if name.startswith("incubate-")) / len(facts_of(preset).target_depths)
    if speeds := re.findall(r"([\d,]+) images a second", head):
        assert speeds == [f"{share * H200 / cost:,.0f}" for cost in (hybrid, flops["target"])]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_in_the_comment_is_good(preset):
    commands = re.findall(r"(incubate run .*?)(?=  |$)", comment(preset), re.M)
    assert commands and f"incubate run {preset}" in commands[0]
    for command in commands:
        options = parser().parse_args(shlex.split(command)[1:])
        assert options.preset == preset
        todo, phases = planned(preset, tuple(options.set))
        assert set(options.strategies or load_settings(preset).run) <= set(phases) and sum(todo.flops.values())


def test_the_cost_of_the_subset_for_a_cpu():
    head = comment("fashion-deit-t-32")
    command = next(c for c in re.findall(r"incubate run .*", head) if "train_share" in c)
    options = parser().parse_args(shlex.split(command)[1:])
    output = re.search(r"(\d+) TFLOP for each strategy, about (\d+) minutes each on two cores that do (\d+) GFLOP/s", head)
    for strategy in load_settings("fashion-deit-t-32").run:
        flops = total("fashion-deit-t-32", strategy, tuple(options.set))
        assert output.groups()[:2] == (f"{flops / 1e12:.0f}", f"{flops / (float(output.group(3)) * 1e9) / 60:.0f}")


def stated_by(preset, path):
    """Return who has a setting so: paper, code, or own choice."""
    tables = [table for name, table in STATED.items() if preset.startswith(name)]
    return next((who for table in tables for who in table if re.fullmatch(table[who], path)), "own choice")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_line_says_whether_paper_or_code_state_its_settings_or_it_is_our_own_choice(preset):
    lines, on_line = presets()[preset].read_text().splitlines(), {}
    for path, number in _leaves(yaml.compose("\n".join(lines))):
        if not re.fullmatch(STRUCTURE, path):
            on_line.setdefault(number, set()).add(stated_by(preset, path))
    said = {i: re.search(r"  # ((?:paper|code|own choice)(?:, (?:code|own choice))*)", line) for i, line in enumerate(lines)}
    assert {i: set(found[1].split(", ")) for i, found in said.items() if found} == on_line


def _leaves(node, path=""):
    """Yield (dotted path, line) of every value in a YAML document."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        yield path, node.start_mark.line
        return
    for key, value in node.value:
        yield from _leaves(value, f"{path}.{key.value}".removeprefix("."))


# -- recipes and networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", IMAGENET)
@pytest.mark.parametrize("phase", PHASES)
def test_the_recipe_on_imagenet_is_the_papers(preset, phase):
    settings = load_settings(preset)
    recipe = settings.training_of("deep_incubation", phase)
    own, drop_path = PHASES[phase]
    expected = EVERY_PHASE | own | {"drop_path": drop_path[IMAGENET.index(preset)]}
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert all(getattr(recipe, name) == TrainingSettings().model_dump()[name] for name in FAULTS)
    whole = settings.training_of("end_to_end", "end_to_end")
    assert all(getattr(recipe, name) == getattr(whole, name) for name in SCHEDULE)
    assert settings.strategies["deep_incubation"].start == "random"
    assert not settings.strategies["deep_incubation"].inherit_stem and not settings.strategies["deep_incubation"].inherit_head


@pytest.mark.parametrize("preset", IMAGENET)
def test_shorter_budgets_change_the_epochs_alone_and_share_the_meta_model(preset):
    settings, (_, phases) = load_settings(preset), planned(preset)
    known = settings.strategies.items()
    papers = [name for name, own in known if own.kind == "deep_incubation" and own.needs_meta and not own.match]
    assert len({phases[name]["meta"][0].key for name in papers}) == 1
    for epochs in (50, 25):
        short = f"deep_incubation_{epochs}"
        assert phases[short]["meta"] == phases["deep_incubation"]["meta"]
        for phase in ("incubate", "finetune"):
            long = settings.training_of("deep_incubation", phase)
            changed = {"epochs": epochs, "warmup_epochs": long.warmup_epochs * epochs / 100}
            assert settings.training_of(short, phase) == long.model_copy(update=changed)


def test_flops_are_the_known_ones():
    counted = facts_of("imagenet-vit-b").flops_per_image
    assert {name: round(flops / 1e9, 2) for name, flops in counted.items()} == VIT_B
    _, phases = planned("imagenet-vit-b")
    own = phases["deep_incubation"]
    nodes = {"meta": own["meta"][0], "target": own["finetune"][0]} | {f"incubate-{i}": n for i, n in enumerate(own["incubate"])}
    for name, node in nodes.items():  # as planning counts them, all blocks
        with torch.device("meta"):
            assert train_flops_per_image(prepare(node.settings, {}, 1000), (3, 224, 224)) == counted[name]
    for preset, shares in RELATIVE.items():
        budgets = ("deep_incubation", "deep_incubation_50", "deep_incubation_25")
        baseline = total(preset, "end_to_end_300")
        assert tuple(round(total(preset, name) / baseline, 2) for name in budgets) == shares


@pytest.mark.parametrize("more", [{"reg_tokens": 2}, {"qk_norm": True, "class_token": False, "global_pool": "avg"}])
def test_counts_by_parts_are_those_of_the_whole(more):
    """Blocks that are alike gone through once or twice, modules shared by hybrids: the sum is exact."""
    with torch.device("meta"):
        target, meta = (
            VisionTransformer(img_size=8, patch_size=4, embed_dim=16, num_heads=2, num_classes=3, depth=n, **more) for n in (8, 4)
        )
    meta, target, partition = made_of(meta, [1, 1, 2], target, [3, 1, 4])
    counts, shape = FlopCounts((3, 8, 8)), (3, 8, 8)
    for network in (meta, target):
        network.requires_grad_(True)
        assert counts.per_image(network, partition) == train_flops_per_image(network, shape)
    for i, (imitates, kind) in itertools.product(range(3), enumerate((Hybrid, Imitation))):
        counted = counts.hybrid(meta, target, partition, i, bool(imitates))
        assert sum(counted) == train_flops_per_image(kind(meta, target, partition, i), shape)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_matched_baseline_costs_what_deep_incubation_costs(preset):
    assert load_settings(preset).is_matched("end_to_end") and {"end_to_end", "deep_incubation"} <= set(load_settings(preset).run)
    assert total(preset, "end_to_end") == pytest.approx(total(preset, "deep_incubation"), rel=2e-3)  # to a whole step


@pytest.mark.parametrize("preset", VITS)
def test_the_network_is_the_published_one_and_comes_apart(preset):
    settings = load_settings(preset)
    target, meta, target_depths, meta_depths = networks(preset)
    blocks, width, heads, tokens, millions = NETWORKS[preset.removesuffix("-released")]
    assert (len(target.blocks), target.embed_dim, target.blocks[0].attn.num_heads) == (blocks, width, heads)
    assert target.pos_embed.shape == meta.pos_embed.shape == (1, tokens, width)
    assert (target_depths, meta_depths) == ([blocks // 4] * 4, [1] * 4)
    parameters = sum(p.numel() for p in target.parameters())
    assert millions is None or round(parameters / 1e6) == millions
    is_huge = preset == "imagenet-vit-h"
    assert {block.attn.qkv.bias is None for block in target.blocks} == {is_huge}
    norms = [target.norm, *(norm for block in target.blocks for norm in (block.norm1, block.norm2))]
    assert {norm.eps for norm in norms} == {1e-5 if is_huge else 1e-6}
    assert isinstance(target.norm_pre, torch.nn.Identity) and target.patch_embed.proj.bias is not None
    for name in (n for n, s in settings.strategies.items() if s.kind == "deep_incubation"):
        strategy = settings.strategies[name]
        parts, trained = made_of(meta, meta_depths, target, target_depths), 0
        for i in range(len(target_depths)):
            stem, head = strategy.inherit_stem, strategy.inherit_head
            start_module(target, parts[0], parts[2], i, strategy.start, inherit_stem=stem, inherit_head=head)
            trained += sum(p.numel() for p in Hybrid(*parts, i).parameters() if p.requires_grad)
        assert trained == parameters
