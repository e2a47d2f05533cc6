"""What `incubate bench` counts, builds and tells. No time is asserted here."""

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import sentences
import torch
from torch import nn

from incubate_lib import cli
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.peaks import peak_flops
from incubate_lib.phases import bench
from incubate_lib.report import publish
from incubate_lib.report.planner import bench as text
from incubate_lib.report.tables import records
from incubate_lib.training import stopwatch
from incubate_lib.training.costs import train_flops_per_image
from incubate_lib.training.stopwatch import LiveBytes, step_memory

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = """
data: {source: synthetic}
model: {name: vit_tiny_patch16_224, img_size: 16, patch_size: 4, embed_dim: 32, depth: 6, num_heads: 2, in_chans: 1}
partition: {num_modules: 3}
training: {epochs: 1, warmup_epochs: 0, batch_size: 8}
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(stopwatch, "PIECE_SECONDS", 1e-3)
    monkeypatch.setattr(stopwatch, "WARMUP_STEPS", 1)
    monkeypatch.setattr(stopwatch, "MATMUL_SIZE", {"cpu": 64, "cuda": 64})


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def made(tiny):
    return bench.Bench(load_settings(tiny), batch=8, outputs=4, device=CPU)


def test_released_freezing_costs_what_method_says_at_vit_b():
    """In GFLOP an image; its suffix has weight gradients, its last module has no suffix."""
    vit_b = ["model={name: vit_base_patch16_224, img_size: 224, patch_size: 16, depth: 12}", "partition={num_modules: 4}"]
    made = bench.Bench(load_settings("digits", vit_b), batch=1, outputs=1000, device=META)
    ours, released = [], []
    with META:
        for i in range(4):
            hybrid = made.build("incubate", i)
            ours.append(train_flops_per_image(hybrid, made.shape) / 1e9)
            released.append(train_flops_per_image(bench.released_freezing(hybrid), made.shape) / 1e9)
    assert ours == pytest.approx([44.44, 41.18, 38.16, 35.13], abs=0.005)
    assert (sum(ours), sum(released)) == pytest.approx((158.9, 175.6), abs=0.05)
    assert released[3] == pytest.approx(ours[3])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_released_twin_computes_the_same_and_trains_the_target_alone(made, index):
    ours = made.ours("incubate", index)
    twin = made.released(ours)
    owner, model = ours.model.partition.owner, twin.model
    parts = {name: (owner(name) > index) - (owner(name) < index) for name, _ in model.named_parameters()}  # behind it: 1
    assert twin.against is ours and all(layer.training for layer in model.modules())
    assert all(p.requires_grad == (parts[name] >= 0) for name, p in model.named_parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    for seen in (1, 2):
        torch.testing.assert_close(twin.step(), ours.step())
        gradients = [p.grad.clone() for name, p in model.named_parameters() if parts[name] > 0]
        if seen == 1:
            first = gradients
    moved = {parts[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {0}
    assert len(first) == sum(part > 0 for part in parts.values()), "computed"
    assert all(torch.linalg.norm(b) > 1.5 * torch.linalg.norm(a) for a, b in zip(first, gradients) if a.any()), "never cleared"
    assert all(p.grad is None for name, p in ours.model.network.named_parameters() if parts[name] != 0)


def test_the_bare_loop_trains_the_same_network(made):
    for phase in ("end_to_end", "meta"):
        ours = made.ours(phase)
        bare = made.bare(ours)
        assert ours.against is bare and bare.flops == ours.flops
        for _ in range(2):
            torch.testing.assert_close(bare.step(), ours.step())


def test_together_and_one_by_one_are_the_same_updates(made):
    together = made.ours("incubate_together")
    apart = made.apart(together)
    assert together.against is apart
    for _ in range(2):
        torch.testing.assert_close(together.step()[-1], apart.step())


def test_live_bytes_are_counted():
    kilobyte = 1000
    with LiveBytes() as counted:
        x = torch.ones(kilobyte // 4, requires_grad=True)
        y = (x * 2).exp()  # the product is gone, the result is saved for the gradient
        z = y.sin()  # and so is y once more
        view = z.view(2, -1)
        del y
        assert counted.live == 3 * kilobyte
        view.sum().backward()
        del z, view
    assert counted.live == 2 * kilobyte, "x and its gradient"
    assert counted.peak >= 5 * kilobyte


def test_right_freezing_needs_less_memory(made):
    for index in (0, 1):
        ours = made.ours("incubate", index)
        twin = made.released(ours)
        for variant in (ours, twin):
            variant.step()  # its optimiser has states from here on
        hybrid = ours.model
        behind = [p for name, p in hybrid.network.named_parameters() if hybrid.partition.owner(name) > index]
        suffix = sum(p.numel() * 4 for p in behind)
        assert step_memory(twin, CPU) > step_memory(ours, CPU) + suffix


def test_memory_of_a_step_is_that_of_its_parts():
    """One linear layer: weights, gradient, two moments, steps, and what AdamW needs no more of."""
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.ones(1, 100)

    def step():
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    variant = stopwatch.Variant("linear", step, 0, model, optimizer)
    step()
    assert step_memory(variant, CPU) == pytest.approx(4 * 100 * 100 * 4, rel=0.02)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A10", 125),
     ("NVIDIA A10G", None), ("Tesla V100-SXM2-32GB", None), ("some CPU", None)],
)  # fmt: skip
def test_peaks_are_found_by_name(name, expected):
    assert peak_flops(name, "bfloat16") == (expected and expected * 1e12)


def test_the_command_measures_every_variant(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path / "data" / "results")
    assert cli.main(["bench", tiny, "--set", "partition.num_modules=2", "--rounds", "2", "--save", "t"]) == 0
    output = capsys.readouterr().out
    rows = ["end to end", "meta model", *(f"hybrid, module {i}" for i in (1, 2))]
    ends = [", bare loop"] * 2 + [", released freezing"] * 2
    for row, end in zip(rows, ends):
        assert any(line.startswith(f"{row}  ") for line in output.splitlines()), row
        assert any(line.startswith(row + end) for line in output.splitlines()), row + end
    assert "at most 1.03 is allowed" in output and "Speed: end to end goes through " in output and "images a second" in output
    assert "Right freezing: " in output and "In pieces: " in output
    table = pd.read_csv(tmp_path / "data" / "results" / "bench_t.csv")
    assert "Together: an update of all modules" in output and "hybrids together, one by one" in output
    pair = table.set_index("variant").loc[["incubate_together", "incubate_together-apart"], "step_flops"]
    ours = table.loc[table["variant"].str.fullmatch(text.OURS), "step_flops"].sum()
    assert pair.tolist() == [ours, ours]  # of two modules only the second has a prefix, so there is none to share
    assert len(table) == 10 and (table["batch"] == 8).all() and (table["rounds"] == 2).all()
    assert (table[["step_seconds", "step_flops", "share_of_matmul", "peak_memory_bytes"]] > 0).all(axis=None)
    twins = table[table["variant"].str.fullmatch(text.TWIN)]
    assert twins["against"].tolist() == ["incubate-0", "incubate-1"]
    assert (twins["flops_ratio"] > 1).tolist() == [True, False]
    assert table["date"].notna().all() and table["torch"].eq(torch.__version__).all()


def test_what_is_gone_through_in_a_second_is_named_as_the_task_names_it(monkeypatch):
    """Of Austen's text a token is a character; of tables from before, which name no task, samples are images."""
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [{"variant": "end_to_end", "step_seconds": 0.5}])
    table = pd.DataFrame(bench.bench(load_settings("austen"), batch=4, rounds=1))
    found = {name: speed.unique().tolist() for name, speed in text.a_second(table).items()}
    assert found == {"contexts": [8], "tokens": [512], "characters": [512]}
    tables = [pd.read_csv(path) for path in records.results_folder().glob("bench_*.csv")]
    assert [list(text.a_second(table)) for table in tables if "task" not in table] == 5 * [["images"]]


def test_growth_has_every_size_and_a_finite_exponent(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path / "data" / "results")
    table = pd.DataFrame(bench.growth(batch=1, rounds=1, depths=(4, 8), sizes=(16, 32)))
    for series, sizes in {"depth": [4, 4, 8, 8], "image_size": [16, 16, 32, 32]}.items():
        assert table.loc[table["series"] == series, "size"].tolist() == sizes
    assert set(table["variant"]) == {"end_to_end", "incubate-1"}
    output = "\n".join(text.growth_in_words(table))
    assert "hybrid, module 2, 16 to 32 px: time grows as FLOPs^" in output and "nan" not in output
    assert math.isfinite(text.exponent(table[(table["series"] == "depth") & (table["variant"] == "end_to_end")]))
    assert text.growth_table(table).row_count == 8
    files = publish.publish_bench(table, "t")
    assert [f.name for f in files] == ["bench_t.csv", "bench_t.png"] and files[1].stat().st_size > 10_000


@pytest.mark.parametrize(
    ("seconds", "fastest", "output"),
    [
        ([1, 2, 4, 8], None, sentences.grows(1, "no faster")),
        ([3, 4, 6, 10], None, "no faster"),
        ([1, 4, 16, 64], None, sentences.grows(2, "FASTER")),
        ([5, 5.1, 6, 30], None, "FASTER"),  # small sizes must not hide it
        ([1, 2, 4, 12], [1, 2, 4, 8], "may be noise"),
        ([1], None, "one size says nothing"),
    ],
)
def test_growth_faster_than_flops_is_told(seconds, fastest, output):
    table = pd.DataFrame({"series": "depth", "size": range(len(seconds)), "variant": "end_to_end"})
    table["step_flops"] = [1e9, 2e9, 4e9, 8e9][: len(seconds)]
    table["step_seconds"], table["step_seconds_min"] = seconds, fastest or seconds
    assert output in text.growth_in_words(table)[0]


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--rounds", "0"], sentences.must_be("--rounds", 0, "at least 1")),
        (["--batch", "-1"], sentences.must_be("--batch", -1, "at least 1")),
        (["--classes", "1"], sentences.must_be("--classes", 1, "at least 2")),
        (["--save", "a/b"], "--save 'a/b'"),
        (["digits", "--growth"], sentences.OWN_NETWORK),
        (["--growth", "--set", "model.depth=8"], sentences.OWN_NETWORK),
        (["nosuch"], "unknown preset 'nosuch'"),
    ],
)
def test_bad_input_ends_in_a_line(arguments, output, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert output in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_told(tiny, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "measure", full)
    with pytest.raises(SettingsError, match=r"a batch of 8 does not fit .* --batch"):
        bench.bench(load_settings(tiny), rounds=1)


def test_no_images_are_needed(monkeypatch):
    """Presets of large sets are measured on machines that do not have them: FLOPs of the default batch and its size."""
    measured = []
    monkeypatch.setattr(bench, "measure", lambda *_, **how: measured.append(how) or [])
    monkeypatch.setattr(bench, "yardstick", lambda *_: None)
    bench.bench(load_settings("imagenet-vit-b", ["data.folder=/nowhere"]))
    assert len(measured) == 7


def test_a_folder_without_images_to_judge_by_is_measured_too(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    said, measured = [], []
    monkeypatch.setattr(bench, "measure", lambda *_, **how: measured.append(how) or [])
    monkeypatch.setattr(bench, "yardstick", lambda *_: None)
    bench.bench(load_settings("imagenet-vit-b", [f"data.folder={tmp_path}"]), batch=1, log=said.append)
    assert len(measured) == 7 and said[0].startswith(sentences.assumed("1,000 classes"))
    assert said[0].endswith("; --classes says another number.")


def test_help_needs_no_torch():
    code = "import sys, incubate_lib.cli as c; c.parser().parse_args(['bench', '--growth']); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert output.stdout.strip() == "False"
