"""Modules that learn together end in the bits in which they end alone, and cost what the formula says."""

from pathlib import Path

import pytest
import timm
import torch
from stopping import stop_after_checkpoints
from test_devices import train_on

from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.members import PHASES
from incubate_lib.method.chain import find_chain
from incubate_lib.method.network import divide, in_names_of
from incubate_lib.method.together import Together
from incubate_lib.phases.bench import Bench
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live.hybrids import Hybrids
from incubate_lib.report.live.phase_graph import draw
from incubate_lib.report.live.progress import Reader
from incubate_lib.report.live.representations import similarity
from incubate_lib.report.planner.memory import step_memory_of
from incubate_lib.report.tables.records import from_plan
from incubate_lib.training.costs import Counted, FlopCounts
from incubate_lib.training.stopwatch import Variant, step_memory

# everything at once: drop-path (preset), mixup, cutmix, shift (preset), moving average, micro-batches, clipping that clips
EVERYTHING = [
    "strategies.joint={kind: deep_incubation, together: true}",
    "strategies.apart={kind: deep_incubation, share_draws: true}",
    "training.epochs=2", "training.mixup=0.4", "training.cutmix=0.5", "training.ema=0.9", "training.micro_batch=8",
    "training.clip_grad=0.3", "phases.meta.epochs=1", "machine.checkpoint_seconds=0",
]  # fmt: skip


def made(*overrides: str) -> tuple[Plan, Plan]:
    settings = load_settings("smoke", [*EVERYTHING, *overrides])
    return plan(settings, ["joint"]), plan(settings, ["apart"])


def modules_of(joint: Plan, apart: Plan):
    """Yield what each module ended as: together, alone."""
    [together] = [node for node in joint.nodes if node.settings.phase == "incubate_together"]
    weights, rows = together.folder.load_weights(), together.folder.metrics()
    alone = [node for node in apart.nodes if node.settings.phase == "incubate"]
    assert len(alone) > 1 and len(rows) == len(alone) * len(alone[0].folder.metrics())
    for i, node in enumerate(alone):
        own = node.folder.load_weights()
        yield {name: weights.pop(name) for name in own}, own, [row for row in rows if row["module_index"] == i], node
    assert not weights


def check_equal(joint: Plan, apart: Plan) -> None:
    for together, alone, rows, node in modules_of(joint, apart):
        assert all(torch.equal(together[name], value) for name, value in alone.items()), node.title
        for row, other in zip(rows, node.folder.metrics(), strict=True):
            assert {name: row[name] for name in ("step", "loss", "score", "train_loss", "lr")} == {
                name: other[name] for name in ("step", "loss", "score", "train_loss", "lr")
            }


def test_together_and_apart_are_the_same_bits_and_the_same_numbers(data_folder):
    joint, apart = made()
    joint.run()
    apart.run()
    check_equal(joint, apart)
    ends = [next(iter(one.finals.values())) for one in (joint, apart)]
    assert ends[0].summary()["weights_sha256"] == ends[1].summary()["weights_sha256"]
    tables = [from_plan(one) for one in (joint, apart)]
    columns = ["phase", "module_index", "score", "loss", "train_loss", "start_score", "parameters", "steps", "images_seen"]
    phases, others = (table.phases[table.phases["phase"] == "incubate"] for table in tables)
    assert (phases[columns].reset_index(drop=True) == others[columns].reset_index(drop=True)).all(axis=None)
    flops = tables[0].strategies["flops"].item(), tables[0].phases["flops"].sum(), tables[0].curves["flops"].max()
    assert flops[0] == pytest.approx(flops[1]) and flops[0] < tables[1].strategies["flops"].item()
    alike = [similarity(one, name, images=32)["cka"].tolist() for one, name in ((joint, "joint"), (apart, "apart"))]
    assert alike[0] == alike[1] and Hybrids(joint, "joint").costs(1) == Hybrids(apart, "apart").costs(1)
    _, curves = draw(joint, Reader(joint).phases())
    drawn = "".join(map(str, curves.marks))
    assert all(f"module {i + 1}" in drawn for i in range(len(phases))), "a panel each"


def test_stopped_and_resumed_it_ends_in_the_same_bits(data_folder):
    joint, apart = made("training.epochs=1", "training.drop_path=0.3", "training.drop_path_over=hybrid")
    apart.run()
    [together] = [node for node in joint.nodes if node.settings.phase == "incubate_together"]
    for checkpoints in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INCUBATE_DATA", str(data_folder))
            stop_after_checkpoints(together, patch, checkpoints)
            patch.setenv("INCUBATE_DATA", str(data_folder))
    together.run()
    assert together.folder.status()["resumed_at"] > 2
    check_equal(joint, apart)


@pytest.mark.parametrize(
    ("change", "message"), [("training.frozen=train", "frozen: train"), ("training.layer_decay=0.9", "layer_decay")]
)
def test_what_modules_together_cannot_heed_is_refused(change, message):
    with pytest.raises(SettingsError, match=f"strategies.joint: phases.incubate has no use for {message}"):
        made(change)


def test_on_two_devices_they_are_the_same_bits_too(tmp_path, data_folder):
    joint, apart = made("training.epochs=1")
    for name, whole in (("joint", joint), ("apart", apart)):
        for node in whole.nodes:
            if node.settings.seeded_as == "meta":
                node.run()
            elif node.settings.seeded_as == "incubate":
                train_on(2, Path(tmp_path / f"{name}-{node.digest}"), node)
    check_equal(joint, apart)
    [together] = [node for node in joint.nodes if node.settings.phase == "incubate_together"]
    assert together.summary()["devices"] == 2


def counted(name: str, depth: int, modules: int, **arguments) -> Counted:
    """Return a Vision Transformer and its meta model of a block a module, on the meta device."""
    with torch.device("meta"):
        target, meta = (timm.create_model(name, depth=d, **arguments) for d in (depth, modules))
        chain, small = (find_chain(model, (3, 224, 224)) for model in (target, meta))
    cut, meta_cut = divide(chain, [depth // modules] * modules), divide(small, [1] * modules)
    return Counted(FlopCounts((3, 224, 224)), target, cut, meta_cut, meta, in_names_of(meta, meta_cut, target, cut))


def test_vit_b_costs_what_the_formula_says_and_what_the_counter_sees():
    networks = counted("vit_base_patch16_224", 12, 4)
    [together] = PHASES["incubate_together"].count(networks).values()
    apart = sum(PHASES["incubate"].count(networks).values())
    assert (round(together / 1e9, 1), round(apart / 1e9, 1)) == (149.7, 158.9)
    model = Together(networks.hybrids_of, networks.target, networks.partition)
    x, seen = torch.empty(2, 3, 224, 224, device="meta"), 0
    model.draws = torch.get_rng_state()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        for loss in PHASES["incubate_together"].losses(model, x, lambda output: output.sum()):
            loss.backward()
            seen += 1
    assert seen == 4 and counter.get_total_flops() == 2 * together


def test_memory_is_that_of_one_hybrid_and_the_states_of_all(data_folder):
    joint, apart = made("training.ema=null")
    known: dict = {}
    [together] = [step_memory_of(node, known) for node in joint.nodes if node.settings.phase == "incubate_together"]
    alone = [step_memory_of(node, known) for node in apart.nodes if node.settings.phase == "incubate"]
    states = sum(part.gradients + part.optimizer for part in alone)  # weights are as large as their gradients
    for images in (8, 512):
        assert max(one.peak(images) for one in alone) < together.peak(images)
        assert together.peak(images) <= max(one.peak(images) for one in alone) + states
        waiting = together.peak(images, adds_up=True) - together.peak(images)
        assert 0 < waiting <= sum(part.gradients for part in alone)


def test_a_real_step_keeps_the_gradients_of_one_module_at_a_time():
    """Its peak over live tensors: a hybrid's, weights and moments of all modules, and at most 5 % more."""
    made = Bench(load_settings("digits"), batch=8, outputs=10, device=torch.device("cpu"))

    def peak(variant: Variant) -> int:
        variant.step()  # makes the optimiser's states
        variant.optimizer.zero_grad(set_to_none=True)
        return step_memory(variant, made.device)

    alone = [made.ours("incubate", index) for index in range(len(made.target_depths))]
    trained = sum(p.numel() for variant in alone for p in variant.model.parameters() if p.requires_grad)
    assert peak(made.ours("incubate_together")) <= 1.05 * (max(map(peak, alone)) + 4 * 3 * trained)


def test_images_that_do_not_fit_are_said_with_how_many_would(data_folder, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    joint, _ = made("machine.checkpoint_seconds=20")  # in micro-batches of 8
    [together] = [node for node in joint.nodes if node.settings.phase == "incubate_together"]
    for node in together.upstream("meta"):
        node.run()
    with monkeypatch.context() as patch:
        patch.setattr("incubate_lib.phases.kinds.incubate_together.IncubateTogether.evaluated", full)
        with pytest.raises(SettingsError, match=r"a batch of evaluation needs more than the [\d.]+ GiB of "):
            together.run()
    monkeypatch.setattr("incubate_lib.training.trainer.Trainer.step", full)
    with pytest.raises(SettingsError, match=r"8 images at once need more than the [\d.]+ GiB of .*; try training.micro_batch=4 "):
        together.run()
    assert together.folder.status()["state"] == "failed"
