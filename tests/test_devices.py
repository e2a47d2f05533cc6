"""Several devices for one phase: gloo on two processes of this machine, and the real torch.distributed.run."""

import multiprocessing
import os
import signal
import textwrap
from pathlib import Path

import command_line
import pytest
import torch
from families import settings_file
from patience import Hooks, join, wait_for
from torch import distributed as dist

from incubate_lib.config import MachineSettings, SettingsError, TrainingSettings, data_folder, load_settings
from incubate_lib.phases import launch
from incubate_lib.phases.job import Job
from incubate_lib.phases.launch import RankFailed
from incubate_lib.phases.recipes import load_trained
from incubate_lib.phases.train import train_phase
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.training.files import read_json
from incubate_lib.training.lease import Lease
from incubate_lib.training.loop import by_class, evaluate
from incubate_lib.training.runs import MNTK, PhaseFolder
from incubate_lib.training.team import ALONE, Team

context = multiprocessing.get_context("forkserver")
# everything at once: accumulation, moving average, mixup and cutmix, drop-path (preset), shift, clipping, odd evaluation
EVERYTHING = [
    "training.micro_batch=4", "training.ema=0.95", "training.mixup=0.4", "training.cutmix=0.5", "training.epochs=12",
    "training.warmup_epochs=1", "training.eval_every=10", "data.test_images=95", "machine.checkpoint_seconds=0.1",
]  # fmt: skip


def together(target, devices: int, *arguments) -> None:
    """Run `target(rank, devices, …)` in that many processes that know each other."""
    processes = [context.Process(target=target, args=(rank, devices, *arguments)) for rank in range(devices)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        join(process, f"rank {rank} of {devices}")
    assert [process.exitcode for process in processes] == [0] * devices


def join_team(rank: int, devices: int, meeting: str) -> Team:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=devices)
    return Team(rank, devices)


def train_on(devices: int, meeting: Path, node) -> None:
    """Train a phase as the ranks of a job."""
    node.job.write()
    job = node.job.model_copy(update={"lease": Lease.take(node.folder.path / "lease").number})
    together(rank_of_a_phase, devices, str(meeting), str(data_folder()), job)


def rank_of_a_phase(rank: int, devices: int, meeting: str, data: str, job: Job) -> None:
    os.environ["INCUBATE_DATA"] = data
    team = join_team(rank, devices, meeting) if devices > 1 else ALONE
    torch.set_num_threads(1)
    train_phase(job, team)


def losses(folder: PhaseFolder) -> list[tuple]:
    return [(row["step"], row["train_loss"], row["loss"], row["score"]) for row in folder.metrics()]


@pytest.mark.parametrize(("phase", "network"), [("meta", "vit"), ("incubate", "vit"), ("incubate", "swin")])
def test_two_devices_train_as_one(phase, network, tmp_path, monkeypatch):
    """Same batch, same data, everything random on: the loss curve of one process, within float32 rounding."""
    found, index = [], 1 if phase == "incubate" else None
    preset = "smoke" if network == "vit" else settings_file(tmp_path, network)
    overrides = [*EVERYTHING, "training.epochs=4", "training.eval_every=1"]
    overrides += ["phases.meta.epochs=1", "phases.meta.warmup_epochs=0"] if phase == "incubate" else []
    for devices in (1, 2):
        monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / str(devices)))
        node = open_phase(phase, preset, overrides, module_index=index)
        for before in node.inputs.values():
            before.run()
        train_on(devices, tmp_path / f"meeting-{devices}", node)
        found.append((losses(node.folder), node.folder.load_weights(), node.summary()))
    (one, weights, summary), (two, others, of_two) = found
    assert summary["inputs_sha256"] == of_two["inputs_sha256"], "the same bits, from one device"
    assert len(one) == 5 and one[-1][2] != one[0][2]
    for a, b in zip(one, two, strict=True):
        assert a[0] == b[0]
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=3e-4)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=2e-4)
    assert (summary["devices"], of_two["devices"]) == (1, 2)


@pytest.mark.parametrize("units", ["heads", "sublayers"])
def test_two_devices_rest_and_train_the_same_units_as_one(units, tmp_path, monkeypatch):
    """Whoever rests is decided once for all; the replicas are wrapped anew whenever that changes."""
    found = []
    how = [f"mat.units={units}", "mat.threshold=quantile", "mat.alpha=0.6", "mat.every_epochs=0.5", "mat.probe=4"]
    for devices in (1, 2):
        monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / str(devices)))
        settings = load_settings("smoke", [*how, "training.micro_batch=8", "training.drop_path=0", "phases.end_to_end.epochs=2"])
        node = plan(settings, ["mat"]).nodes[0]
        train_on(devices, tmp_path / f"meeting-{devices}", node)
        found.append((node.summary(), losses(node.folder), node.folder.metrics(MNTK)))
    (one, its_losses, _), (two, other_losses, _) = found
    probes = [rows for *_, rows in found]
    assert len(probes[0]) == 4 and len({tuple(row["active"]) for row in probes[0]}) > 1
    assert [row["active"] for row in probes[0]] == [row["active"] for row in probes[1]]
    assert two["mat"]["flops"] == 2 * one["mat"]["flops"]  # each device looks
    assert one["train_flops"] - one["mat"]["flops"] == two["train_flops"] - two["mat"]["flops"]
    executed = [sum(row["flops_executed"] for row in rows) for rows in probes]
    assert executed[1] == 2 * executed[0] > 2 * one["mat"]["flops"]
    assert one["train_flops_executed"] - executed[0] == two["train_flops_executed"] - executed[1]
    for a, b in zip(its_losses, other_losses, strict=True):
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=3e-4)


def rank_that_evaluates(rank: int, devices: int, meeting: str, out: str) -> None:
    from incubate_lib.data.sets import load_data

    team = join_team(rank, devices, meeting)
    _, eval_set = load_data(load_settings("smoke", ["data.test_images=95"]).data)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    Path(f"{out}-{rank}").write_text(repr(evaluate(model, eval_set, team=team) | by_class(model, eval_set, 4, team=team)))


@pytest.mark.parametrize("devices", [2, 3])
def test_evaluation_counts_every_image_once_whatever_the_number_of_devices(devices, tmp_path):
    from incubate_lib.data.sets import load_data

    together(rank_that_evaluates, devices, str(tmp_path / "meeting"), str(tmp_path / "out"))
    _, eval_set = load_data(load_settings("smoke", ["data.test_images=95"]).data)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    expected, classes = evaluate(model, eval_set), by_class(model, eval_set, 4)
    for rank in range(devices):
        output = eval((tmp_path / f"out-{rank}").read_text())
        assert output["score"] == expected["score"] and output["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert {name: output[name] for name in classes} == classes and sum(classes["samples"]) == 95


def convolutional(tmp_path) -> str:
    """A settings file of a small network with BatchNorm, which nobody cuts into pieces.

    Its last stage must see more than one pixel: of one, the weight gradient of a bfloat16 convolution of stride 2 reads memory
    that nobody wrote (oneDNN), and is now and then not a number.
    """
    (tmp_path / "resnet.yaml").write_text(
        "data: {source: synthetic, num_images: 64, image_size: 32, test_images: 31, channels: 1}\n"
        "model: {name: resnet10t, img_size: 32, in_chans: 1, options: {channels: [8, 8, 16, 16], stem_width: 8}}\n"
        "training: {epochs: 2, batch_size: 16, warmup_epochs: 0, lr: 1e-3}\n"
        "mat: {units: conv_layers, probe: 4, threshold: quantile, alpha: 0.5}\nrun: [end_to_end, mat]\n"
    )
    return str(tmp_path / "resnet.yaml")


@pytest.mark.parametrize(
    ("strategy", "how"),
    [("end_to_end", []), ("end_to_end", ["training.ema=0.5"]), ("mat", ["training.micro_batch=4"]),
     ("end_to_end", ["precision=bfloat16"])],
    ids=["plain", "moving average", "mat, micro-batches", "bfloat16"],
)  # fmt: skip
def test_what_several_devices_record_is_true_of_the_weights_they_save(strategy, how, tmp_path, data_folder):
    """Running statistics of BatchNorm are each device's own; one that reads the file has those of the first."""
    node = plan(load_settings(convolutional(tmp_path), how), [strategy]).nodes[0]
    train_on(2, tmp_path / "meeting", node)
    recorded, (_, eval_set) = node.folder.metrics()[-1], node.data()
    saved = evaluate(load_trained(node.settings, node.folder, eval_set.num_classes), eval_set, node.settings.precision)
    assert recorded["score"] == saved["score"] == node.summary()["score"]
    assert recorded["loss"] == pytest.approx(saved["loss"], rel=1e-5)


def rank_with_buffers(rank: int, devices: int, meeting: str, out: str) -> None:
    model = torch.nn.Linear(1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        model.register_buffer(f"of_{str(dtype)[6:]}", torch.tensor([rank, 1 - rank]).to(dtype))
    join_team(rank, devices, meeting).broadcast_buffers(model)
    Path(f"{out}-{rank}").write_text(repr({name: value.tolist() for name, value in model.named_buffers()}))


def test_buffers_of_every_type_are_shared(tmp_path):
    together(rank_with_buffers, 2, str(tmp_path / "meeting"), str(tmp_path / "out"))
    first, second = ((tmp_path / f"out-{rank}").read_text() for rank in range(2))
    assert first == second and len(eval(first)) == 5 and eval(first)["of_int64"] == [0, 1]


def run_node(data: str, env: dict[str, str] | None = None) -> None:
    """The caller: a kernel or a command line."""
    os.environ.update(env or {}, INCUBATE_DATA=data)
    open_phase("meta", "smoke", [*EVERYTHING, "machine.devices=2"]).run()


def ranks_of(folder: Path) -> list[int]:
    """Return the process ids of the ranks of a job, the first rank first."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().split(b"\0")
            environment = dict(line.partition(b"=")[::2] for line in (place / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if f"phases/{folder.name}/job.json".encode() in command and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(place.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.xdist_group("torchrun")
def test_killed_and_resumed_on_two_devices_equals_uninterrupted(tmp_path, monkeypatch):
    """The caller is killed, then a rank, then it runs to its end: the same bits as without; nobody is left behind."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "whole"))
    node = open_phase("meta", "smoke", EVERYTHING)
    train_on(2, tmp_path / "meeting", node)
    whole, whole_losses = node.summary(), losses(node.folder)

    hooks = Hooks(tmp_path)
    hooks.hold("meta", 30)
    for name, value in (hooks.env | {"INCUBATE_DATA": str(tmp_path / "killed")}).items():
        monkeypatch.setenv(name, value)
    node = open_phase("meta", "smoke", [*EVERYTHING, "machine.devices=2"])
    saved = lambda: (node.folder.path / "checkpoint.pt").exists()  # noqa: E731
    caller = context.Process(target=run_node, args=(str(tmp_path / "killed"), hooks.env))
    caller.start()
    wait_for(saved, "the first checkpoint")
    ranks = ranks_of(node.folder.path)
    assert len(ranks) == 2
    caller.kill()
    caller.join()
    wait_for(lambda: not ranks_of(node.folder.path), "the ranks to end after their caller")
    assert not node.folder.summary() and node.folder.status()["state"] == "interrupted"

    def kill_second_rank():
        status = lambda: read_json(node.folder.path / "status.json")  # noqa: E731
        wait_for(lambda: status()["attempt"] == 2 and status()["progress"].get("step"), "a step of the second attempt")
        os.kill(ranks_of(node.folder.path)[1], signal.SIGKILL)

    killer = multiprocessing.get_context("fork").Process(target=kill_second_rank)
    killer.start()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 died \(exit code -9; -9: killed|rank 0 of 2: RuntimeError"):
        node.run()
    killer.join()
    assert node.folder.status()["state"] == "failed"

    hooks.let_go("meta")
    summary = node.run()
    assert node.folder.status()["resumed_at"] > 0 and node.folder.status()["attempt"] == 3
    assert losses(node.folder) == whole_losses
    assert summary["weights_sha256"] == whole["weights_sha256"]
    assert summary["devices"] == 2


def run_in_a_job(data: str, env: dict[str, str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the job's own process has it
    run_node(data, env)


@pytest.mark.xdist_group("torchrun")
def test_ranks_save_when_slurm_warns_every_process_of_a_job(tmp_path, monkeypatch):
    """Preemption sends TERM to all of them: caller, torch.distributed.run and ranks."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    node = open_phase("meta", "smoke", [*EVERYTHING, "machine.devices=2"])
    hooks = Hooks(tmp_path)
    hooks.hold("meta", 30)
    caller = context.Process(target=run_in_a_job, args=(str(tmp_path), hooks.env | {"INCUBATE_STOP": str(tmp_path / "STOP")}))
    caller.start()
    wait_for(lambda: (read_json(node.folder.path / "status.json") or {}).get("progress", {}).get("step", 0) > 0, "a step")
    ranks = ranks_of(node.folder.path)
    parent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (caller.pid, parent, *ranks):
        os.kill(pid, signal.SIGTERM)
    assert join(caller, "the caller to end") == 1 and (tmp_path / "STOP").exists()
    status = node.folder.status()
    assert status["state"] == "stopped" and status["saved_step"] > 0
    assert f"stopped at step {status['saved_step']}" in "".join(
        read_json(path)["message"] for path in node.folder.path.glob("rank-*.json")
    )


@pytest.mark.xdist_group("torchrun")
def test_a_rank_that_fails_ends_the_phase_with_its_traceback(tmp_path, data_folder, monkeypatch, capsys):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os
        if os.environ.get("RANK") == "1":
            from incubate_lib.training.trainer import Trainer
            original = Trainer.step
            def step(self, number):
                if number == 5:
                    raise OSError("the disk is on fire")
                return original(self, number)
            Trainer.step = step
    """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    node = open_phase("meta", "smoke", ["machine.devices=2"])
    with pytest.raises(RankFailed, match="seed 0 meta: rank 1 of 2: OSError: the disk is on fire") as caught:
        node.run()
    assert "trainer.step(step)" in caught.value.rank_traceback and "on fire" in capsys.readouterr().out
    assert node.folder.status()["state"] == "failed" and "on fire" in node.folder.status()["error"]
    assert not ranks_of(node.folder.path)


def test_what_the_first_failing_rank_said_is_raised(tmp_path):
    folder = PhaseFolder(tmp_path)
    for rank, kind, moment in [(0, "ConnectionError", 2.0), (1, "FloatingPointError", 1.0)]:
        report = {"rank": rank, "time": moment, "kind": kind, "message": f"{kind} of {rank}", "traceback": "here"}
        launch.write_json(tmp_path / f"rank-{rank}.json", report)
    error = launch.failure_of(folder, 2, "t", "")
    assert type(error) is FloatingPointError and str(error) == "FloatingPointError of 1"


def test_more_devices_than_there_are_is_told(data_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    node = plan(load_settings("smoke", ["machine.devices=2"])).nodes[0]
    with pytest.raises(SettingsError, match=r"machine\.devices is 2, but this machine has 1 GPU"):
        node.run()
    assert not (node.folder.path / "status.json").exists() and not (node.folder.path / "lease").exists()


def test_the_number_of_devices_is_no_part_of_a_phases_identity(data_folder):
    one, two = (open_phase("meta", "smoke", overrides) for overrides in ([], ["machine.devices=2"]))
    assert one.digest == two.digest and one.folder.path == two.folder.path
    assert MachineSettings().devices == 1 and TrainingSettings().micro_batch is None


@pytest.mark.xdist_group("torchrun")
def test_the_command_line_trains_on_two_devices_through_the_notebook(tmp_path):
    environment = os.environ | {"INCUBATE_DATA": str(tmp_path), "COLUMNS": "200"}
    what = ["run", "smoke", "--devices", "2", "--strategies", "end_to_end"]
    result = command_line.incubate(*what, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = PhaseFolder(tmp_path / "runs" / "smoke" / "seed-0" / "end_to_end")
    assert folder.summary()["devices"] == 2 and (folder.path / "notebook.ipynb").exists()
    assert not ranks_of(folder.path.resolve())
