"""The planner counts what is known, schedules what can be, and says what memory a step takes."""

from pathlib import Path

import pandas as pd
import pytest
import sentences
import timm
import torch
from layouts import settings_file, write_folder, write_shards
from networks import cut, vit
from torch.nn import functional

from incubate_lib.cli import main
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.members import PHASES
from incubate_lib.data.sets import load_data
from incubate_lib.phases.networks import build_model
from incubate_lib.phases.recipes import networks_of
from incubate_lib.pipeline.graph import closure
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.planner import planner
from incubate_lib.report.planner.forecast import Speed, against_measured, forecast, measured_speed, open_plan, stated_speed
from incubate_lib.report.planner.memory import peak_bytes, step_memory_of
from incubate_lib.report.planner.planner import planner as sliders
from incubate_lib.report.planner.published import published_costs
from incubate_lib.report.tables import records
from incubate_lib.report.tables.records import Results, published
from incubate_lib.report.widgets import Sentence
from incubate_lib.training.memory import memory_by_part
from incubate_lib.training.stopwatch import LiveBytes

PAGE = Path(__file__).parents[1] / "incubate_lib" / "report" / "README.md"
IMAGENET = sentences.assumed(sentences.images_to_train_on(1_281_167, 1000))
# FLOPs of 100+100, 50+50 and 25+25 epochs with a meta model of 300, over those of 300 epochs end to end, as known
RELATIVE = {"vit-b": [1.17, 0.75, 0.55], "vit-l": [0.92, 0.54, 0.36], "vit-h": [0.86, 0.49, 0.31]}


def test_published_costs_come_out():
    table = published_costs()
    for network, shares in RELATIVE.items():
        assert [round(share, 2) for share in table.loc[network].iloc[:3]] == shares
    assert table.loc["vit-h", "… share of peak"] == pytest.approx(0.07, abs=0.005), "their baseline ran at 7 % of the peak"


def test_a_forecast_is_flops_over_speed_and_a_schedule_that_can_be():
    todo, speed = open_plan("smoke"), Speed("one for all", 1e9, {"meta": 5e8})
    for machines in (1, 2, 3, 8):
        costs = forecast(todo, speed, machines=machines)
        for (name, _), final in todo.finals.items():
            own = costs.phases[costs.phases["strategy"] == name]
            hours = own["flops"] / own["phase"].map({"meta": 5e8}).fillna(1e9) / 3600
            assert own["device_hours"].tolist() == pytest.approx(hours.tolist())
            assert (own["end"] - own["begin"]).tolist() == pytest.approx(hours.tolist())
            for _, side in own[own["flops"] > 0].groupby("machine"):  # one phase at a time on each
                side = side.sort_values("begin")
                assert (side["begin"].to_numpy()[1:] >= side["end"].to_numpy()[:-1] - 1e-12).all()
            assert own["machine"].max() <= machines
            if name != "end_to_end":
                meta, modules, last = (own[own["phase"] == p] for p in ("meta", "incubate", "finetune"))
                assert modules["begin"].min() >= meta["end"].max() and last["begin"].min() >= modules["end"].max()
            row = costs.strategies.set_index("strategy").loc[name]
            assert row["flops"] == own["flops"].sum() == sum(todo.flops[n.key] for n in closure([final]))
            if machines == 1:
                assert row["hours"] == pytest.approx(row["device_hours"])
            if machines >= 3:  # as many as modules
                chain = modules["device_hours"].max() if name != "end_to_end" else 0
                rest = own.loc[own["phase"] != "incubate", "device_hours"].sum()
                assert row["hours"] == pytest.approx(rest + chain)


@pytest.mark.parametrize("source", ["folder", "torch/image_folder", "wds/", "hfds"])
def test_a_folder_of_ones_own_is_counted_and_the_first_line_says_so(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = (write_shards if source == "wds/" else write_folder)(tmp_path / "set")
    text = settings_file(folder)
    if source == "hfds":
        (tmp_path / "cache").mkdir()
        text = settings_file(tmp_path / "cache", ", test_split: validation")
    name = f"hfds/{folder}" if source == "hfds" else source
    (file := tmp_path / "mine.yaml").write_text(text.replace("source: folder", f"source: '{name}'"))

    def first_line(*more):
        assert main(["plan", str(file), *more]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert first_line().startswith(f"{sentences.images_to_train_on(24, 3)}, counted in ")
    assert open_plan(str(file)).experiment.facts.num_images == plan(load_settings(str(file))).experiment.facts.num_images == 24
    assert first_line("--images", "50").startswith(f"{sentences.images_to_train_on(50, 3)} (images as given), counted in ")
    assert first_line("--images", "50", "--classes", "7") == f"{sentences.images_to_train_on(50, 7)}, as given."
    if source != "hfds":
        folder.rename(tmp_path / "moved")
        why = sentences.not_there(f"data.folder {folder}")
        assert first_line() == f"{IMAGENET}{why}; --images and --classes say others."
        assert first_line("--images", "50", "--classes", "7") == f"{sentences.images_to_train_on(50, 7)}, as given."


def test_a_data_set_that_is_not_in_the_cache_is_assumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (file := tmp_path / "mine.yaml").write_text(settings_file("x").replace("folder, folder: 'x'", "hfds//no/such"))
    assert main(["plan", str(file)]) == 0
    output = capsys.readouterr().out.splitlines()[0]
    assert output.startswith(IMAGENET) and sentences.DATASETS_CANNOT in output


def test_a_folder_that_is_there_and_wrong_is_told(tmp_path, capsys):
    write_folder(tmp_path / "set").joinpath("train").rename(tmp_path / "set" / "training")
    (file := tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    assert main(["plan", str(file)]) == 2
    assert sentences.no_train_folder("training, val") in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        "data={source: digits}", "data={source: digits, test_images: 597, eval_split: val, train_share: 0.3}",
        "data={source: digits, test_images: 500, eval_split: val, val_images: 200}", "data={source: synthetic, num_images: 300}",
        "data={source: synthetic, num_images: 301, num_classes: 7, eval_split: val, train_share: 0.5}",
    ],
)  # fmt: skip
def test_images_that_a_run_sets_apart_are_not_planned(data):
    planned = open_plan("smoke", [data]).experiment.facts
    settings = load_settings("smoke", [data])
    train, _ = load_data(settings.data)
    assert (planned.num_images, planned.outputs) == (len(train), train.num_classes)


def parts(shown) -> tuple:
    """Return the controls of the sliders, and the table and the picture that follow them."""
    beside, table = shown.widget.children
    controls, picture = beside.children
    return controls.children, table, picture


def test_sliders_say_what_is_assumed(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    (file := tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    assert f"{sentences.images_to_train_on(24, 3)}, counted in " in parts(sliders(str(file)))[1].value
    (tmp_path / "set").rename(tmp_path / "moved")
    controls, table, _ = parts(sliders(str(file)))
    assert "ASSUMED: 1,281,167 images" in table.value
    next(c for c in controls if c.description == "machines (1 to 16)").value = 2
    assert "ASSUMED: 1,281,167 images" in table.value


def test_a_timm_name_needs_no_settings_and_no_images():
    todo = open_plan("vit_small_patch16_224", ["phases.incubate.epochs=30"], images=5000, classes=7)
    facts = todo.experiment.facts
    assert (facts.num_images, facts.outputs, facts.target_depths) == (5000, 7, [3, 3, 3, 3])
    modules = [n for n in todo.nodes if n.settings.phase == "incubate"]
    assert {n.settings.training.epochs for n in modules} == {30}
    assert not todo.experiment.path.exists()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("images", [4, 32])
def test_memory_is_that_of_a_real_step(images, freeze):
    model = vit(depth=6).train()
    if freeze:  # the lower half, as in a hybrid's prefix
        for part in (model.patch_embed, model.blocks[:3]):
            part.requires_grad_(False)
        model.pos_embed.requires_grad_(False)
        model.cls_token.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    x, y = torch.randn(images, *shape), torch.zeros(images, dtype=torch.long)

    def step():
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()  # makes the optimiser's states
    optimizer.zero_grad(set_to_none=True)
    states = [v for s in optimizer.state.values() for v in s.values()]
    with LiveBytes([*model.parameters(), *states]) as counted:
        step()
    (memory,) = memory_by_part(model, shape)
    assert memory.gradients == sum(p.numel() * 4 for p in trained) and memory.optimizer == 2 * memory.gradients
    assert 0.85 < memory.peak(images) / counted.peak < 1.05


def test_devices_that_train_together_keep_their_gradients_through_the_forward_pass(data_folder):
    """In the buckets by which they are averaged: each image less on a device saves what it keeps, and no gradient."""
    alone, four = (
        plan(load_settings("smoke", [f"machine.devices={devices}", f"training.batch_size={16 * devices}"]), ["end_to_end"])
        for devices in (1, 4)
    )
    memory = step_memory_of(alone.nodes[0], {})
    assert memory.activations * 16 > memory.gradients, "or it would not show"
    assert peak_bytes(four.nodes[0], {}) - peak_bytes(alone.nodes[0], {}) == memory.gradients


def test_memory_of_a_hybrid_is_that_of_its_parts():
    todo = open_plan("smoke")
    node = next(n for n in todo.nodes if n.settings.phase == "incubate" and n.settings.module_index == 1)
    networks = networks_of(load_settings("smoke"), (node.facts.target_depths, node.facts.meta_depths), 4)
    hybrid, partition = PHASES["incubate"].trains(networks, 1)
    first, target, last = parts = memory_by_part(hybrid, (1, 8, 8), partition)
    assert first.activations == first.gradients == 0, "nothing waits for the backward pass before the target"
    assert target.gradients > 0 and last.gradients == 0 and last.activations > 0, "behind it the error passes through"
    assert sum(p.weights for p in parts) == sum(p.numel() * 4 for p in hybrid.parameters())


def test_memory_of_a_meta_model_is_its_own():
    """Not that of the network which its constructor makes when nobody says how deep it is."""
    todo, known = open_plan("smoke"), {}
    meta, whole = (next(n for n in todo.nodes if n.settings.phase == phase) for phase in ("meta", "end_to_end"))
    for node, depth in [(meta, 3), (whole, 6)]:
        network = build_model(node.settings.model, depth, 4)
        assert step_memory_of(node, known).weights == sum(4 * p.numel() for p in network.parameters())


def test_memory_of_a_network_whose_last_map_has_one_place():
    """Batch norm cannot train on a single number a channel."""
    with torch.device("meta"):
        model = timm.create_model("resnet10t")
    assert memory_by_part(model, (3, 32, 32))[0].activations > 0


def test_alike_blocks_are_counted_once_and_the_sum_is_exact():
    with torch.device("meta"):
        deep, mixed = vit(depth=7), vit(depth=7)
        mixed.blocks[3].requires_grad_(False)  # not alike: gone through block by block
    shape = (deep.patch_embed.proj.in_channels, *deep.patch_embed.img_size)
    by_two, (whole,) = memory_by_part(deep, shape, cut(deep, [7])), memory_by_part(deep, shape)
    with torch.device("meta"):
        mixed.blocks[3].requires_grad_(True)
        mixed.blocks[3].extra = torch.nn.Identity()  # another description, the same computation
    assert memory_by_part(mixed, shape, cut(mixed, [7])) == by_two == [whole]


@pytest.mark.parametrize(
    "arguments, output",
    [
        (["nonsense"], f"'nonsense' {sentences.NO_PRESET}"),
        (["smoke", "--machines", "0"], sentences.must_be("machines", 0, "at least 1")),
        (["smoke", "--share", "1.5"], "share of the peak is 1.5"),
        (["smoke", "--device", "H10"], sentences.did_you_mean("H100")),
        (["smoke", "--against", "digit"], f"no published run 'digit'; {sentences.did_you_mean('digits')}"),
        (["smoke", "--bench", "nothing"], "no measured speed 'nothing'"),
        (["smoke", "--bench", "x", "--share", "0.5"], "give one of them"),
        (["smoke", "--images", "0"], "images is 0"),
        (["imagenet-vit-b", "--classes", "1"], sentences.must_be("classes", 1, "at least 2")),
    ],
)
def test_bad_input_is_a_sentence(arguments, output, capsys):
    assert main(["plan", *arguments]) == 2
    assert output in capsys.readouterr().err


def test_the_command_says_what_the_tables_say(capsys, tmp_path):
    assert main(["plan", "smoke", "--machines", "3", "--figure", str(tmp_path / "plan.png")]) == 0
    out = capsys.readouterr().out
    for output in ("critical path", "module 3", "fine-tuning", "an assumption", "Not in it: evaluating"):
        assert output in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("columns", "lines"), [(80, 2), (200, 1)])
def test_tables_fit_the_terminal_and_use_a_wider_one(columns, lines, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["plan", "digits", "--machines", "3"]) == 0
    tables, matched, _ = capsys.readouterr().out.partition(sentences.is_matched("end_to_end", "deep_incubation"))
    assert matched and "…" not in tables and max(map(len, tables.splitlines())) <= columns
    row = tables.partition("\nend to end ")[0].splitlines()[-1] + tables.partition("\nend to end ")[2].partition("\n")[0]
    assert ("2.127 (1.00×)" in row) == (lines == 1) and "(1.00×)" in row, "a ratio goes on in a second line where it is narrow"


def test_sliders_count_anew_and_headless_there_are_none(monkeypatch):
    shown = sliders("smoke")
    controls, table, picture = parts(shown)
    modules = next(c for c in controls if c.description == "modules")
    before, drawn = table.value, picture.value
    modules.value = 6
    assert table.value != before and picture.value != drawn
    devices = next(c for c in controls if c.description == "devices of a machine (1 to 16)")
    devices.value = 3
    assert "alert" in table.value and "batch_size" in table.value, "16 images cannot be shared by three"
    devices.value = 1
    assert "alert" not in table.value
    assert shown._repr_mimebundle_().keys() >= {"image/png", "application/vnd.jupyter.widget-view+json"}
    monkeypatch.setenv("INCUBATE_HEADLESS", "1")
    assert hasattr(sliders("smoke"), "_repr_png_")
    assert isinstance(sliders("nonsense"), Sentence)


def test_measured_speeds_are_those_of_each_kind_of_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path)
    rows = pd.DataFrame({
        "variant": ["end_to_end", "meta", "incubate-0"], "flops_per_second": [4e9, 1e9, 2e9], "settings": "smoke",
        "device": "a machine", "threads": 1, "precision": "float32", "batch": 16, "date": "2026-01-01", "model": "vit_tiny",
    })  # fmt: skip
    rows.to_csv(tmp_path / "bench_mine.csv")
    speed = measured_speed("mine")
    took = [speed.seconds(phase, index, 8e9) for phase, index in
            (("end_to_end", None), ("finetune", None), ("meta", None), ("incubate", 0), ("incubate", 1))]  # fmt: skip
    assert took == [2, 2, 8, 4, 2], "what was not measured goes as end to end"
    costs = forecast(open_plan("smoke"), speed)
    assert "measured on another network (vit_tiny" in planner.in_words(costs)
    rows.assign(model=costs.network).to_csv(tmp_path / "bench_mine.csv")
    assert "another network" not in planner.in_words(forecast(open_plan("smoke"), measured_speed("mine")))


def test_adaptive_training_is_planned_in_full_until_its_cost_is_known():
    todo = open_plan("mat-digits", strategies=["end_to_end", "mat"])
    costs = forecast(todo, Speed("told", 1e12))
    assert costs.adaptive == ["mat"] and costs.strategies["flops"].nunique() == 1
    assert "as if nothing ever rested, because only training shows what does: MAT." in planner.in_words(costs)
    spent = {todo.finals["mat", 0].key: 10**12}
    costs = forecast(todo, Speed("told", 1e12), spent=spent)
    row = costs.strategies.set_index("strategy").loc["mat"]
    assert costs.adaptive == [] and row["flops"] == row["critical_flops"] == 1e12 and row["hours"] == pytest.approx(1 / 3600)


def test_predicted_times_stand_beside_measured_ones():
    phases = pd.DataFrame({
        "strategy": ["whole", "whole", "pieces", "pieces"], "seed": [0, 1, 0, 0],
        "phase": ["end_to_end", "end_to_end", "meta", "incubate"],
        "module_index": [None, None, None, 1], "flops": [8e9, 8e9, 2e9, 4e9], "seconds": [4.0, 6.0, 1.0, 3.0],
    })  # fmt: skip
    results = Results("a run", pd.DataFrame(), phases.astype({"module_index": "Int64"}), pd.DataFrame())
    table = against_measured(results, Speed("told", 2e9, {"incubate-1": 1e9}))
    assert table["measured"].tolist() == [5, 5, 1, 3, 4] and table["predicted"].tolist() == [4, 4, 1, 4, 5]
    assert table["ratio"].tolist() == pytest.approx([0.8, 0.8, 1, 4 / 3, 1.25])
    shown, output = planner.against_table(table), planner.against_in_words(table)
    assert shown.iloc[1].tolist()[1:] == ["all phases", "5.0 ± 1.4", "4.0", "0.80"] and shown.loc[3, "phase"] == "module 2"
    assert "at most 25.0 % for whole strategies and 33.3 % for single phases" in output


def test_our_own_runs_are_predicted_within_fifteen_percent():
    """What the tracked tables say, and the page with them."""
    table = against_measured(published("digits"), measured_speed("digits-cpu"))
    whole = table[table["phase"] == "all phases"]
    assert len(whole) == 3 and whole["ratio"].between(0.85, 1.15).all(), table
    assert planner.against_in_words(table).rstrip(".") in " ".join(PAGE.read_text().split())


def test_stated_speeds_are_shares_of_the_peak():
    assert stated_speed("A100", 0.5).flops_per_second == pytest.approx(156e12)
    with pytest.raises(SettingsError, match="T4"):
        stated_speed("T4")  # has no bfloat16
