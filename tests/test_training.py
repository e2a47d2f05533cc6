"""The loop, the data, the costs."""

import copy
import itertools
import math
import shutil

import pytest
import timm
import torch
from networks import image_set, made_of
from torch import nn

from incubate_lib.config import MachineSettings, TrainingSettings, load_settings
from incubate_lib.data.schedule import derive_seed, lr_at, steps_per_epoch, total_steps
from incubate_lib.method.incubation import Hybrid
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.training.costs import train_flops_per_image
from incubate_lib.training.loop import evaluate, fit
from incubate_lib.training.runs import PhaseFolder, Stopped
from incubate_lib.training.team import provenance
from incubate_lib.training.trainer import Trainer, compiled, make_optimizer


@pytest.mark.parametrize(
    ("step", "steps", "warmup", "expected"),
    [
        (0, 100, 10, 0.1),  # the first update already moves
        (9, 100, 10, 1.0),
        (10, 100, 10, 1.0),  # warm-up ends where the cosine begins
        (99, 100, 10, 0.01),  # the last update has min_lr
        (0, 100, 0, 1.0),
        (50, 101, 0, 0.505),  # half way
        (0, 1, 0, 1.0),
        (0, 1, 1, 1.0),
        (4, 5, 5, 1.0),  # all warm-up
    ],
)
def test_lr_at(step, steps, warmup, expected):
    recipe = TrainingSettings(lr=1.0, min_lr=0.01, epochs=steps, warmup_epochs=warmup)
    assert lr_at(recipe, step, steps, 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "expected"),
    [(1, 100, 10, 10), (1, 109, 10, 10), (2.5, 100, 10, 25), (0.01, 100, 10, 1), (3, 10, 10, 3), (1.25, 109, 10, 12)],
)
def test_total_steps(epochs, images, batch, expected):
    assert total_steps(epochs, images, batch) == expected
    assert steps_per_epoch(images, batch) == images // batch


def test_seeds_differ_by_purpose_and_are_stable():
    seeds = {derive_seed(s, what, i) for s in range(3) for what in ("order", "init") for i in range(3)}
    assert len(seeds) == 18 and max(seeds) < 2**32
    assert derive_seed(0, "order", 1) == 620307874


def vit(depth=2, **options):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        in_chans=1,
        num_classes=4,
        **options,
    )


@pytest.mark.parametrize("phase", ["whole", "hybrid"])
def test_weight_decay_spares_biases_norms_and_embeddings_in_every_phase(phase):
    model = vit(reg_tokens=1)
    if phase == "hybrid":
        model = Hybrid(*made_of(model, [1, 1], vit(4, reg_tokens=1), [2, 2]), 0)
    names = {id(p): name.removeprefix("network.") for name, p in model.named_parameters()}
    groups = make_optimizer(model, TrainingSettings(weight_decay=0.05)).param_groups
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {"pos_embed", "cls_token", "reg_token"} <= spared
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert all(name.endswith(".bias") or "norm" in name or name in ("pos_embed", "cls_token", "reg_token") for name in spared)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("n", [1, 50, 256, 257, 515])
def test_evaluation_counts_every_sample_once(n):
    data, model = image_set(n), vit(drop_path_rate=0.5).train()
    result = evaluate(model, data)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(data.normalise(data.images))
    assert result["score"] == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, data.labels).item(), rel=1e-5)


def run_fit(folder, settings, model=None, **more):
    model = model or vit(drop_path_rate=settings.drop_path)
    made = Trainer(model, image_set(), settings, seed=3, machine=MachineSettings(checkpoint_seconds=1e9))
    return fit(made, image_set(), folder=PhaseFolder(folder), title="t", **more)


def test_evaluations_are_a_fraction_of_an_epoch_apart(tmp_path):
    """image_set() has five updates of ten an epoch; between two evaluations lies at least one update."""
    for every, steps in {0.4: [0, 2, 4, 6, 8, 10], 1.0: [0, 5, 10], 0.01: list(range(11))}.items():
        (folder := tmp_path / str(every)).mkdir()
        run_fit(folder, TrainingSettings(epochs=2.0, batch_size=10, eval_every=every))
        assert [row["step"] for row in PhaseFolder(folder).metrics()] == steps


def test_clipping_clips(tmp_path, monkeypatch):
    norms, original = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for name, clip in {"free": None, "clipped": 1e-3}.items():
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        run_fit(tmp_path / name, TrainingSettings(epochs=1.0, batch_size=10, clip_grad=clip))
    free, clipped = norms[:5], norms[5:]
    assert min(free) > 0.01
    assert all(n == pytest.approx(1e-3, rel=1e-3) for n in clipped)


def test_a_loss_that_is_not_finite_stops_with_step_and_settings(tmp_path):
    model = vit()
    calls = []

    def poison(_, inputs):
        calls.append(1)
        if model.training and len(calls) > 5:  # one of them counts what the device executes
            return (inputs[0] * math.nan,)

    model.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3 of 10 .*lr 0\.001"):
        run_fit(tmp_path, TrainingSettings(epochs=2.0, batch_size=10), model)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_weights_that_break_in_the_last_step_are_noticed(tmp_path):
    with pytest.raises(FloatingPointError, match=r"evaluated loss is (nan|inf) at step 1 of 1"):
        run_fit(tmp_path, TrainingSettings(epochs=0.2, batch_size=10, lr=1e38, warmup_epochs=0.0))


def test_a_machine_without_git_still_finishes(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(torch.device("cpu"))["commit"] is None


def test_mixup_and_cutmix_train_on_soft_targets(tmp_path):
    _, result = run_fit(tmp_path, TrainingSettings(epochs=2.0, batch_size=10, mixup=0.8, cutmix=1.0))
    assert math.isfinite(result["train_loss"]) and result["images_seen"] == 100


def test_training_learns(data_folder):
    node = open_phase("end_to_end", "smoke", ["training.epochs=45", "training.drop_path=0.0", "strategies.end_to_end.match=null"])
    summary = node.run()
    assert summary["score"] > 0.75  # chance is 0.25
    assert summary["start_score"] < 0.4
    rows = node.folder.metrics()
    assert rows[-1]["train_loss"] < 0.7 * rows[1]["train_loss"]


def test_flops_of_vit_b_are_the_known_ones():
    """In GFLOP per image: end to end, meta model, four hybrids (the released code would make them 43.9 on average)."""
    with torch.device("meta"):
        target, meta = timm.create_model("vit_base_patch16_224"), timm.create_model("vit_base_patch16_224", depth=4)
    shape = (3, 224, 224)
    assert train_flops_per_image(target, shape) / 1e9 == pytest.approx(105.15, abs=0.005)
    assert train_flops_per_image(meta, shape) / 1e9 == pytest.approx(35.36, abs=0.005)
    parts = made_of(meta, [1] * 4, target, [3] * 4)
    for index, expected in enumerate([44.44, 41.18, 38.16, 35.13]):
        hybrid = Hybrid(*parts, index)
        assert train_flops_per_image(hybrid, shape) / 1e9 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("preset", ["digits", "smoke"])
def test_strategies_have_the_flops_of_their_budget_the_meta_model_counted(preset, data_folder):
    settings = load_settings(preset)
    todo = plan(settings)
    from incubate_lib.pipeline.graph import closure

    totals = {name: sum(todo.flops[n.key] for n in closure([node])) for (name, _), node in todo.finals.items()}
    assert set(totals) == set(settings.run) and len(totals) == 3
    for name, flops in totals.items():
        assert flops / settings.strategies[name].budget == pytest.approx(totals["end_to_end"], rel=0.03), name
    assert any(key.endswith("/meta") and flops for key, flops in todo.flops.items())


# -- numerics ---------------------------------------------------------------------------------------------------------------


def trainer(settings, model=None, **more):
    torch.manual_seed(0)
    made = Trainer(model or vit(drop_path_rate=settings.drop_path), image_set(48), settings, seed=3, **more)
    made.model.train()
    made.begin(0)
    return made


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Without anything random in it, the size of micro-batches changes nothing but rounding."""
    found = []
    for micro in (None, 4, 6, 12):
        one = trainer(TrainingSettings(batch_size=12, micro_batch=micro, lr_for_batch=None))
        losses = torch.stack([one.step(k) for k in range(3)])
        found.append((losses, gradients(one.model)))
    for losses, grads in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-5, atol=1e-6)
        for name, value in grads.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-3, atol=1e-6)


def test_everything_random_follows_from_seed_and_step():
    """A trainer that begins in the middle draws what one from the start would have drawn there."""
    settings = TrainingSettings(
        batch_size=12, micro_batch=6, mixup=0.5, cutmix=0.5, drop_path=0.5, shift=2, hflip=True, lr=1e-9, min_lr=0
    )
    whole, late = trainer(settings), trainer(settings)
    torch.rand(5)  # whoever draws in between changes nothing
    losses = [whole.step(k).item() for k in range(6)]
    late.begin(4)
    assert [late.step(k).item() for k in (4, 5)] == pytest.approx(losses[4:], rel=1e-5)
    other = Trainer(vit(), image_set(48), settings, seed=4)
    other.begin(0)
    assert other.step(0).item() != losses[0]


def test_the_linear_rule_scales_the_learning_rate():
    settings = TrainingSettings(batch_size=2048, lr=5e-4, lr_for_batch=512)
    assert settings.peak_lr == 2e-3 and TrainingSettings(lr=3e-4).peak_lr == 3e-4
    scaled = trainer(TrainingSettings(batch_size=24, lr=1e-3, lr_for_batch=12, epochs=4, warmup_epochs=1))
    for step in range(2):
        scaled.step(step)
    assert scaled.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


def test_bfloat16_is_close_and_weights_stay_float32():
    settings = TrainingSettings(batch_size=12)
    plain, half = trainer(settings), trainer(settings, precision="bfloat16")
    kinds = []
    half.model.blocks[0].mlp.fc1.register_forward_hook(lambda *a: kinds.append(a[2].dtype))
    a, b = (torch.stack([t.step(k) for k in range(4)]) for t in (plain, half))
    assert set(kinds) == {torch.bfloat16}
    assert not torch.equal(a, b)
    torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
    tensors = [*half.model.parameters(), *(v for s in half.optimizer.state.values() for v in s.values())]
    assert {t.dtype for t in tensors} == {torch.float32}
    output = evaluate(half.model, image_set(), "bfloat16")
    assert output["loss"] == pytest.approx(evaluate(half.model, image_set())["loss"], rel=2e-2)


def test_the_moving_average_is_the_one_of_its_definition_and_is_what_counts(tmp_path):
    settings = TrainingSettings(batch_size=10, ema=0.9, epochs=2.0)
    averaged = Trainer(vit(), image_set(), settings, seed=3)
    averaged.model.train()
    averaged.begin(0)
    expected = {n: p.detach().clone() for n, p in averaged.model.named_parameters()}
    for step in range(10):
        averaged.step(step)
        decay = 0.0 if step < 2 else min(0.9, 1 - step ** (-2 / 3))  # timm's warm-up: early weights are soon forgotten
        for name, p in averaged.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, p in averaged.eval_model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6)
    torch.manual_seed(7)
    model = vit()
    kept, result = run_fit(tmp_path, settings, model)
    assert kept is not model and result["score"] == evaluate(kept, image_set())["score"]
    assert result["loss"] == pytest.approx(evaluate(kept, image_set())["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))


def test_compiled_gradients_equal_eager_ones_after_every_change_of_phase(monkeypatch):
    """The trap of pytorch issue 139476: one network, other parameters trainable; each phase gets a callable of its own.

    aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    """
    monkeypatch.setattr("incubate_lib.training.trainer.compiled", lambda model, mode: compiled(model, mode, "aot_eager"))
    meta, target, partition = made_of(vit(2), [1, 1], vit(4), [2, 2])
    phases = {
        "meta": lambda: meta,
        "module 1": lambda: Hybrid(meta, target, partition, 0),
        "module 2": lambda: Hybrid(meta, target, partition, 1),
        "module 1 again": lambda: Hybrid(meta, target, partition, 0),
        "finetune": lambda: target.requires_grad_(True),
    }
    for name, make in phases.items():
        model = make()
        if name == "meta":
            model.requires_grad_(True)
        found = []
        for mode in ("off", "default"):
            tried = trainer(TrainingSettings(batch_size=12), copy.deepcopy(model), machine=MachineSettings(compile=mode))
            loss = tried.step(0)
            found.append((loss, gradients(tried.model), tried))
        (loss, eager, _), (same, grads, tried) = found
        torch.testing.assert_close(same, loss)
        assert set(grads) == set(eager) == {n for n, p in model.named_parameters() if p.requires_grad}, name
        for parameter, value in eager.items():
            torch.testing.assert_close(grads[parameter], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {parameter}")
        assert not any("_orig_mod" in key for part in ("model", "optimizer") for key in map(str, tried.state_dict()[part]))
    compiled(torch.nn.Identity(), "default")  # forgets what was compiled here


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
def test_a_compiled_phase_leaves_ordinary_files(data_folder):
    node = open_phase("meta", "smoke", ["machine.compile=default", "training.ema=0.9", "training.epochs=1"])
    node.run()
    plain = open_phase("meta", "smoke", ["training.ema=0.9", "training.epochs=1"])
    assert node.digest == plain.digest, "how it was computed is no part of what it is"
    arguments = load_settings("smoke").model.timm_arguments() | {"depth": 3}
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
    stock.load_state_dict(node.folder.load_weights(), strict=True)


def test_resumed_with_average_and_accumulation_equals_uninterrupted(tmp_path):
    settings = TrainingSettings(batch_size=12, micro_batch=6, mixup=0.5, ema=0.9, drop_path=0.3, epochs=6, clip_grad=1.0)
    results = []
    for name, stops in {"whole": [], "stopped": [3, 11]}.items():
        (tmp_path / name).mkdir()
        for stop in [*stops, None]:
            seen = itertools.count(1)
            asked = lambda stop=stop, seen=seen: stop is not None and next(seen) >= stop  # noqa: E731
            torch.manual_seed(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("incubate_lib.training.loop.STATUS_SECONDS", 0.0)
                try:
                    kept, result = run_fit(tmp_path / name, settings, should_stop=asked)
                except Stopped:
                    continue
        rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in PhaseFolder(tmp_path / name).metrics()]
        results.append((kept.state_dict(), rows, {k: v for k, v in result.items() if "seconds" not in k and k != "data_share"}))
    (weights, rows, numbers), (again, same_rows, same_numbers) = results
    assert rows == same_rows and numbers == same_numbers and numbers["steps"] == 24
    assert all(torch.equal(weights[name], again[name]) for name in weights)
