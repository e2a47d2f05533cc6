"""Modular Adaptive Training in the loop: updates to the last bit, who trains, what it costs, a VGG as a whole."""

import math

import pytest
import torch
from networks import NETWORKS, gradients, images_for, made_of, masks, vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from incubate_lib.config import DataSettings, MATSettings, SettingsError, TrainingSettings
from incubate_lib.data.sets import load_data
from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.mat import PartialUpdates
from incubate_lib.method.units import find_units
from incubate_lib.training import adaptive
from incubate_lib.training.costs import all_products, executed_flops_per_image, train_flops_per_image
from incubate_lib.training.trainer import Trainer, make_optimizer

# -- updates --------------------------------------------------------------------------------------------------------------


def data_of(size: int):
    source = DataSettings(source="synthetic", num_images=96, num_classes=4, image_size=size, channels=1, test_images=32)
    return load_data(source)[0]


def trainer_of(kind: str, mat: dict | None = None, **recipe) -> Trainer:
    build, size = NETWORKS[kind]
    settings = TrainingSettings(**({"epochs": 6, "batch_size": 8, "warmup_epochs": 0, "clip_grad": 1.0} | recipe))
    how = None if mat is None else MATSettings(**({"units": kind, "probe": 4, "warmup_epochs": 0} | mat))
    trainer = Trainer(
        build(), data_of(size), settings, seed=0, mat=how, flops_per_image=train_flops_per_image(build(), (1, size, size))
    )
    trainer.model.train()
    trainer.begin(0)
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimiser's state, by parameter and rows."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for piece in trainer.mat.updates.pieces:
        for key, value in trainer.optimizer.state[piece.leaf].items():
            state[f"{piece.name} {piece.rows} {key}"] = value.clone()
    return state


@pytest.mark.parametrize("kind", ["heads", "sublayers", "conv_layers", "filters"])
def test_what_rests_does_not_change_by_a_bit(kind):
    trainer = trainer_of(kind, {"alpha": 0.0})
    trainer.adapt(0)
    trainer.step(0)
    updates = trainer.mat.updates
    trainer.mat.active = masks(len(updates.units))[0]
    before = state_of(trainer)
    for step in (1, 2):
        trainer.step(step)
    after = state_of(trainer)
    for piece in updates.pieces:
        rests = piece.unit is not None and not trainer.mat.active[piece.unit]
        rows = piece.rows or slice(None)
        same = torch.equal(before[piece.name][rows], after[piece.name][rows])
        assert same == rests or (not rests and piece.leaf.grad is None) or not piece.leaf.grad.any(), piece.name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            name = f"{piece.name} {piece.rows} {key}"
            assert torch.equal(before[name], after[name]) == same, name


@pytest.mark.parametrize("kind", ["heads", "sublayers", "filters"])
def test_with_all_units_active_it_is_full_training_to_the_last_bit(kind):
    plain, mat = trainer_of(kind), trainer_of(kind, {"alpha": 0.0, "every_epochs": 0.25})
    for step in range(6):
        if mat.mat.is_due(step):
            mat.adapt(step)
        losses = [trainer.step(step).item() for trainer in (plain, mat)]
        assert losses[0] == losses[1]
    assert len(mat.mat.history) == 3
    for (name, a), b in zip(plain.model.state_dict().items(), mat.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert mat.counts.flops == plain.counts.flops + 3 * mat.mat.probe_flops


def test_rows_are_stepped_as_adamw_steps_whole_parameters():
    """One optimiser over views of rows, one over the parameters: same bits, decay and its exemptions included."""
    models = [vit(), vit()]
    updates = PartialUpdates(models[1], find_units(models[1], "heads"), images_for(8)[:1])
    recipe = TrainingSettings(weight_decay=0.3)
    optimizers = [make_optimizer(models[0], recipe), make_optimizer(models[1], recipe, updates.pieces)]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, images_for(8))
            if model is models[1]:
                updates.hand_over()
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_units_come_back_with_the_momentum_they_had():
    trainer = trainer_of("sublayers", {"alpha": 0.0})
    trainer.step(0)
    rests = torch.ones(6).bool()
    rests[2] = False
    trainer.mat.active = rests
    trainer.step(1)
    weight = trainer.model.blocks[1].attn.qkv.weight
    momentum = trainer.optimizer.state[weight]["exp_avg"].clone()
    trainer.mat.active = torch.ones(6).bool()
    trainer.step(2)
    gradient, state = weight.grad, trainer.optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], 0.9 * momentum + 0.1 * gradient)
    assert state["step"] == 2


def test_multirate_drifts_with_its_momentum_between_fresh_gradients():
    trainer = trainer_of("sublayers", {"alpha": 0.0, "slow_every": 3}, weight_decay=0.1, lr=1e-2, epochs=1)
    trainer.mat.active = torch.arange(6) != 2
    weight = trainer.model.blocks[1].attn.qkv.weight
    trainer.step(0)  # every third update is fresh for all
    for step in (1, 2):
        before, state = weight.detach().clone(), {k: v.clone() for k, v in trainer.optimizer.state[weight].items()}
        trainer.step(step)
        lr = trainer.optimizer.param_groups[0]["lr"]
        moved = state["exp_avg"] / (1 - 0.9) / ((state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), before * (1 - lr * 0.1) - lr * moved, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(v, trainer.optimizer.state[weight][k]) for k, v in state.items())
    before = trainer.optimizer.state[weight]["exp_avg"].clone()
    trainer.step(3)
    assert not torch.equal(before, trainer.optimizer.state[weight]["exp_avg"])


# -- who trains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["mntk", "random", "gradient_norm", "inverted"])
def test_rankings(rank):
    trainer = trainer_of("sublayers", {"threshold": "quantile", "alpha": 0.5, "rank": rank, "warmup_epochs": 0})
    record = trainer.adapt(0)
    values = torch.tensor(record["eigenvalues"])
    chosen = torch.tensor(record["active"]).bool()
    assert chosen.sum() == 3 and torch.equal(chosen, trainer.mat.updates.active)
    order = values.argsort(descending=True).tolist()
    if rank == "mntk":
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:3])
    elif rank == "inverted":
        assert set(chosen.nonzero().flatten().tolist()) == set(order[3:])
    elif rank == "random":
        draws = {tuple(trainer.mat.ranked(chosen, values, step).tolist()) for step in range(20)}
        assert len(draws) > 5 and all(sum(draw) == 3 for draw in draws)
    assert len(record["effective_ranks"]) == 6 and all(1 <= r <= 4 for r in record["effective_ranks"])


def test_everything_trains_during_warm_up_and_is_looked_at_as_often_as_asked():
    trainer = trainer_of("sublayers", {"alpha": 1.0, "warmup_epochs": 1.0, "every_epochs": 0.5})
    per_epoch = 8
    active = []
    for step in range(2 * per_epoch + 1):
        if trainer.mat.is_due(step):
            trainer.adapt(step)
            active.append((step, int(trainer.mat.updates.active.sum())))
        trainer.step(step)
    assert active == [(0, 6), (4, 6), (8, 1), (12, 1), (16, 1)]


def test_the_probe_is_the_same_throughout_and_follows_from_the_seed():
    one, two = (trainer_of("sublayers", {}) for _ in range(2))
    assert torch.equal(one.mat.images, two.mat.images) and len(one.mat.images) == 4
    first = one.adapt(0)["eigenvalues"]
    one.mat.history.clear()
    assert one.adapt(0)["eigenvalues"] == first == two.adapt(0)["eigenvalues"]


def test_inside_a_hybrid_only_units_of_the_target_module_take_part():
    hybrid = Hybrid(*made_of(vit(2), [1, 1], vit(4), [2, 2]), 0)
    frozen = hybrid.state_dict().keys() - {f"network.{name}" for name in hybrid.module_state()}
    before = {name: hybrid.state_dict()[name].clone() for name in frozen}
    how = MATSettings(units="blocks", probe=4, threshold="quantile", alpha=1.0, warmup_epochs=0)
    trainer = Trainer(hybrid, data_of(8), TrainingSettings(epochs=1, batch_size=8), seed=0, mat=how)
    trainer.begin(0)
    record = trainer.adapt(0)
    trainer.step(0)
    assert [unit.name for unit in trainer.mat.units] == ["network.blocks.0", "network.blocks.1"] and sum(record["active"]) == 1
    assert all(torch.equal(value, hybrid.state_dict()[name]) for name, value in before.items())


def without_recomputation():
    """Attention that does not compute its products again in the backward pass: that is no part of what is counted."""
    return sdpa_kernel(SDPBackend.MATH)


# -- what it costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stop_error"), [(k, s) for k in NETWORKS for s in (False, True) if (k, s) != ("conv_layers", True)]
)
def test_counted_flops_are_those_of_the_real_step(kind, stop_error):
    trainer = trainer_of(kind, {"stop_error": stop_error}, clip_grad=None)
    full = trainer.flops_now()
    for step, active in enumerate(masks(len(trainer.mat.units))):
        trainer.mat.active = active
        trainer.apply(step)
        trainer.executed_now(), trainer.flops_now()  # counted now, not within the step
        with without_recomputation(), FlopCounterMode(display=False) as counter:
            trainer.step(step)
        assert counter.get_total_flops() == 8 * trainer.flops_now()
        assert trainer.flops_now() == full if active.all() else trainer.flops_now() < full
    assert trainer.counts.flops < 4 * 8 * full


def test_a_resting_head_saves_its_rows_of_the_weight_gradient_and_nothing_else():
    trainer = trainer_of("heads", {"cut": False})
    full, tokens, width, head = trainer.flops_now(), 5, 24, 8
    active = torch.ones(9).bool()
    active[4] = False
    trainer.mat.active = active
    trainer.step(0)
    assert full - trainer.flops_now() == 2 * tokens * width * 3 * head


def test_heads_alone_can_save_no_more_than_their_rows():
    """What updates cost while all units rest: without `cut` the weight gradients of all heads are saved, and nothing else."""
    mat = trainer_of("heads", {"cut": False}).mat
    before, numbers, tokens, width, head = mat.updates.active.clone(), mat.summary([], 10), 5, 24, 8
    assert numbers["full_flops"] - numbers["least_flops"] == 10 * len(mat.units) * 2 * tokens * width * 3 * head
    assert numbers["full_flops"] == 10 * mat.flops_per_image(before) and torch.equal(mat.updates.active, before)


@pytest.mark.parametrize(("kind", "outputs"), [*((kind, "sum") for kind in NETWORKS), ("sublayers", "all")])
def test_the_evaluations_own_cost_is_counted(kind, outputs, monkeypatch):
    """Products in place, too, which torch's counter passes over: here they are made anew, so that it sees them."""
    trainer = trainer_of(kind, {"probe": 4, "outputs": outputs, "rank": "gradient_norm"})
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda kernel, a, b: kernel.copy_(torch.addmm(kernel, a, b)))
    with without_recomputation(), FlopCounterMode(display=False) as counter:
        record = trainer.mat.probe(0)
    assert counter.get_total_flops() == trainer.mat.probe_flops + trainer.mat.rank_flops == record["flops"]


def test_products_in_place_and_with_vectors_are_counted():
    a, b, c, v = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5), torch.randn(4)
    batch = [torch.randn(2, *shape) for shape in ((3, 5), (3, 4), (4, 5))]
    with all_products() as counter:
        c.addmm_(a, b), torch.addmm(c, a, b), torch.addmm(c, a, b, out=torch.empty(3, 5)), a @ b  # 2·3·4·5 each
        batch[0].baddbmm_(batch[1], batch[2]), c.addbmm_(batch[1], batch[2]), batch[1] @ batch[2]  # twice that
        a @ v, torch.zeros(3).addmv_(a, v), torch.dot(v, v)
    assert counter.get_total_flops() == 4 * 120 + 3 * 240 + 2 * 24 + 8


def test_counting_what_a_look_executes_changes_none_of_its_numbers():
    """Products round otherwise under a counter, and a phase that goes on counts once more."""
    trainer = trainer_of("sublayers", {"rank": "gradient_norm"})
    first = trainer.adapt(0)
    trainer.mat.history.clear()
    trainer.mat.count_executed()
    again = trainer.adapt(0)
    assert first["eigenvalues"] == again["eigenvalues"] and first["active"] == again["active"]
    assert again["flops_executed"] >= again["flops"] > 0


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("heads", "float32"), ("sublayers", "float32"), ("sublayers", "bfloat16"), ("filters", "float32")],
)
def test_what_the_device_executes_is_counted_beside_it(kind, precision):
    """Fused attention computes queries times keys once more in the backward pass of each block that has one."""
    trainer = trainer_of(kind, {}, clip_grad=None)
    trainer.precision, trainer.executed_of = precision, {}
    for step, active in enumerate(masks(len(trainer.mat.units))[:2]):
        trainer.mat.active = active
        trainer.apply(step)
        trainer.executed_now(), trainer.flops_now()  # counted now, not within the step
        with all_products() as counter:
            trainer.step(step)
        assert counter.get_total_flops() == 8 * trainer.executed_now()
    executed, flops = trainer.executed_now(), trainer.flops_now()
    assert executed == flops if kind == "filters" else executed > flops
    assert trainer.counts.flops_executed == 8 * sum(trainer.executed_of.values())


def test_fused_attention_computes_one_product_more():
    plain = trainer_of("sublayers")
    heads, tokens, size, blocks = 3, 5, 8, 3
    assert plain.executed_now() - plain.flops_now() == blocks * heads * 2 * tokens * tokens * size


def test_counting_what_is_executed_leaves_everything_as_it_is():
    model = NETWORKS["filters"][0]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = executed_flops_per_image(model, (1, 32, 32))
    assert counted == train_flops_per_image(model, (1, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


# -- bad input ------------------------------------------------------------------------------------------------------------


def test_a_probe_that_does_not_fit_is_told_with_the_size_that_does(monkeypatch):
    monkeypatch.setattr(adaptive, "free_memory", lambda device: 150_000)
    with pytest.raises(SettingsError, match=r"mat.probe is 60; .*than is free \(0.0 GiB\); it may be \d+ at most") as error:
        trainer_of("sublayers", {"probe": 60})
    most = int(str(error.value).split("it may be ")[1].split()[0])
    trainer_of("sublayers", {"probe": most})
    with pytest.raises(SettingsError, match="at most"):
        trainer_of("sublayers", {"probe": most + 1})
    monkeypatch.setattr(adaptive, "free_memory", lambda device: 1000)
    with pytest.raises(SettingsError, match="so do those of two images"):
        trainer_of("sublayers", {"probe": 60})


def test_an_eigenvalue_that_is_not_finite_ends_the_phase():
    trainer = trainer_of("sublayers", {})
    with torch.no_grad():
        trainer.model.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite before update 0"):
        trainer.adapt(0)
