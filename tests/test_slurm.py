"""The chain on a real Slurm cluster of several nodes, started for the test on this machine."""

import itertools
import os
import re

import pytest
import sentences
import slurm_cluster
import yaml
from slurm_hardships import KEYS, LONG, MODULES, go_through
from slurm_site import Site, TrainedHere, weights

from incubate_lib.backends.slurm.attempts import NO_WORD, WARNED
from incubate_lib.pipeline.strategies import open_phase

missing = [] if os.environ.get("INCUBATE_REQUIRE_SLURM") else slurm_cluster.missing()  # then they fail instead
pytestmark = [
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)} here: the Slurm backend is tested with Debian's slurm-wlm"
    ),
]
BOTH = ["--strategies", "end_to_end", "deep_incubation"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("slurm"))
    yield site
    site.cluster.close()
    assert not site.cluster.processes()


@pytest.fixture(scope="module")
def here(tmp_path_factory, chain):
    """The same phases trained on this machine, uninterrupted and with one thread: what → weights. They begin early, too."""
    wanted = {"chain": ([], ["end_to_end", "deep_incubation"], [0]), "hardships": (LONG, ["end_to_end"], [0, 1, 2])}
    return TrainedHere({what: (tmp_path_factory.mktemp("here"), *how) for what, how in wanted.items()}).weights


# -- the happy path -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(site):
    """Submitted first; the other runs go on beside it, on other nodes, so that no core is idle."""
    there = ["--sbatch", "exclude=n[1-5]"]
    for module in MODULES:
        site.hooks.hold(f"smoke/{module}", 3)  # until all of them run
    return site.submit(*BOTH, *there), site.submit(*BOTH, *there)


def test_the_chain_ends_with_everything(site, hardships):
    site.wait_until_ended("smoke")
    run = site.data / "runs" / "smoke"
    assert all((run / key / "notebook.ipynb").exists() for key in site.phases("smoke")) and len(site.phases("smoke")) == 7
    assert (run / "06_analysis.ipynb").exists() and (run / "report.html").exists()
    result = site.incubate("run", "smoke", *BOTH, "--backend", "slurm")
    assert sentences.submitted(0) in result.stdout and sentences.THAN_END_TO_END in result.stdout


def test_every_phase_is_submitted_once(chain):
    output, again = chain
    assert f"{sentences.done_already(0, 7)}, {sentences.queued(0, 8)}" in output
    assert sentences.queued(7, 0) in again


def test_modules_ran_on_different_nodes_at_once(site, hardships):
    spans = [site.attempts("smoke", module)[-1] for module in MODULES]
    assert len({span["node"] for span in spans}) == 3
    assert all(a["began"] < b["until"] and b["began"] < a["until"] for a, b in itertools.combinations(spans, 2))
    assert {span["ended"] for span in spans} == {"done"}


def test_the_log_of_a_phase_is_shown(site, hardships):
    result = site.incubate("logs", "smoke", "incubate-1")
    assert result.returncode == 0 and "-- job " in result.stdout and "seed 0 module 2 of 3" in result.stdout
    assert "is 3 phases" in site.incubate("logs", "smoke", "incubate").stderr
    assert sentences.did_you_mean("") in site.incubate("logs", "smoke", "seed-0/mta").stderr
    assert "Analysis" in site.incubate("logs", "smoke", "analysis").stdout


# -- nothing is lost ------------------------------------------------------------------------------------------------------

# runs go on at once, so each has a name of its own; that of the hardships stands with them
FAILING = ["--seeds", "9", "--set", "name=failing", "--set", "phases.incubate.epochs=1"]
TWO_NODES = ["name=two-nodes", "phases.end_to_end.epochs=4", "training.micro_batch=4"]


@pytest.fixture(scope="module")
def others(site, chain, here):
    """A seed whose meta model fails and a run on two nodes, submitted early: they go on beside the hardships."""
    site.hooks.fail("seed-9/meta", 5)
    away = ["--sbatch", "exclude=n[1-3,6-9]"]
    failing = site.submit(*BOTH, *FAILING, "--set", "machine.checkpoint_seconds=1000", *away)
    two = site.submit("--strategies", "end_to_end", *(p for m in TWO_NODES for p in ("--set", m)), "--nodes", "2", *away)
    site.skip_analysis(two.partition(":")[0])
    return {"failing": failing.partition(":")[0], "two nodes": two.partition(":")[0]}


@pytest.fixture(scope="module")
def hardships(site, others):
    """What was seen while three seeds went through it all."""
    return go_through(site)


def test_whatever_happens_ends_in_the_same_weights_as_on_this_machine(site, hardships, here):
    assert weights(site.data / "runs" / hardships["run"]) == here("hardships") and len(here("hardships")) == 3
    chain = weights(site.data / "runs" / "smoke")
    assert {key: chain[key] for key in here("chain")} == here("chain") and len(here("chain")) == 7


def test_what_is_warned_saves_at_once_and_goes_on_from_there(site, hardships):
    """A time limit, a stop; a preemption, a requeue, a scancel: only the warning makes these phases save."""
    for seed, number in enumerate((3, 4)):
        attempts = site.attempts(hardships["run"], KEYS[seed])
        assert len(attempts) == number and attempts[-1]["ended"] == "done", attempts
        log = (site.data / "runs" / hardships["run"] / KEYS[seed] / "log.txt").read_text()
        saved = [int(step) for step in re.findall(r"Stopped: seed \d end_to_end: stopped at step (\d+) of 120", log)]
        assert sorted(set(saved)) == [a["from_step"] for a in attempts[1:]] and len(set(saved)) == number - 1
        assert saved[0] > 0


def test_a_phase_goes_on_on_another_node_when_its_own_is_lost(site, hardships):
    """Preemption may move it once more, when it went on on the node that is wanted for something else."""
    lost, *later = site.attempts(hardships["run"], KEYS[2])
    assert lost["node"] == hardships["nodes"][2] and lost["ended"] == NO_WORD
    assert later and all(a["node"] != lost["node"] and a["from_step"] > 0 for a in later)
    assert [a["ended"] for a in later] == [WARNED] * (len(later) - 1) + ["done"]


def test_stop_saves_and_run_submits_what_is_missing(site, hardships):
    assert f"those that run {sentences.SAVE_FIRST}" in hardships["stopped"]
    assert [status["state"] for status in hardships["halfway"]] == ["stopped", "stopped", "done"]
    assert all(0 < status["saved_step"] < 120 for status in hardships["halfway"][:2])
    assert site.attempts(hardships["run"], KEYS[0])[1]["ended"] == "stopped"
    assert f"{sentences.done_already(1, 3)}, {sentences.queued(0, 3)}" in hardships["more"]


def test_status_says_where_phases_run(hardships):
    assert re.search(r"seed 1 end_to_end +running +\d+\.\d/10\.0 .*\d+ running on n\d", hardships["shown"])
    assert re.search(r"analysis +queued .*\d+ Dependency", hardships["shown"])


def test_the_widget_shows_jobs_of_the_cluster(hardships):
    """Before anything happens to them, and after its button was pressed, whose message is tested above."""
    headline, table, headline_after, table_after = hardships["watched"]
    assert f"{sentences.phases_done(0, 3)}, 3 running" in headline and len(re.findall(r"\d+ running on n\d", table)) == 3
    assert f"{sentences.phases_done(1, 3)}, 2 stopped" in headline_after and " running on " not in table_after


# -- failures -------------------------------------------------------------------------------------------------------------


def test_what_fails_three_times_is_given_up_and_the_rest_finishes(site, others):
    site.wait_until_ended(others["failing"])
    phases = site.phases(others["failing"])
    assert {key for key, folder in phases.items() if folder.summary()} == {"seed-9/end_to_end"}
    assert [a["ended"] for a in site.attempts(others["failing"], "seed-9/meta")] == ["OSError: the disk is on fire"] * 3
    shown = site.incubate("status", "smoke", *FAILING).stdout
    assert f"{sentences.GIVEN_UP}OSError: the disk is on fire" in " ".join(shown.split())
    assert len(re.findall(r"seed 9 .*, deep_incubation +skipped", shown)) == 5 and re.search(r"analysis +skipped", shown)
    assert (phases["seed-9/meta"].path / "notebook.failed.ipynb").exists()


def test_two_nodes_train_one_phase(site, others, tmp_path, monkeypatch):
    """Two Slurm nodes with a device each end in the weights of two devices of this machine."""
    from test_devices import train_on

    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    node = open_phase("end_to_end", "smoke", TWO_NODES)
    train_on(2, tmp_path / "meeting", node)
    site.wait_until_ended(others["two nodes"])
    folder = site.phases(others["two nodes"])["seed-0/end_to_end"]
    assert folder.summary(), (folder.path / "log.txt").read_text()
    nodes = site.attempts(others["two nodes"], "seed-0/end_to_end")[0]["node"]
    assert folder.summary()["devices"] == 2 and nodes in ("n[4-5]", "n[4,6]", "n[5-6]")
    assert folder.summary()["weights_sha256"] == node.summary()["weights_sha256"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a node with a file system of its own needs a mount, and that root")
def test_a_node_that_does_not_see_the_run_is_told(site, chain):
    site.submit("--strategies", "end_to_end", "--seeds", "5", "--partition", "blind", "--gpus-per-node", "0")
    job = site.jobs("smoke")["seed-5/end_to_end"]
    site.cluster.wait_for(lambda: site.states().get(job) == "FAILED", "the job on the blind node to fail")
    shown = site.incubate("status", "smoke", "--seeds", "5").stdout
    assert re.search(r"end_to_end +lost", shown) and f"{job} failed on blind" in shown
    assert "node blind could not write" in shown and "does it see that folder?" in " ".join(shown.split())
    output = site.incubate("logs", "smoke", "seed-5/end_to_end").stderr
    assert "the phase has not begun, or its node does not see this folder" in output


# -- submission -----------------------------------------------------------------------------------------------------------


def test_a_hundred_phases_wait_in_the_queue_and_are_cancelled(site, chain):
    more = ["--set", "name=many", "--set", "phases.incubate.epochs=3"]
    output = site.submit(*BOTH, "--seeds", *map(str, range(10, 25)), *more, "--sbatch", "begin=now+1hour")
    assert "105 phases" in output and sentences.submitted(106) in output
    shown = site.incubate("status", "smoke", *more).stdout
    assert shown.count(" queued ") == 106 and "BeginTime" in shown and "Dependency: waits for the phases it starts from" in shown
    refused = site.incubate("run", "smoke", *BOTH, *more)
    assert refused.returncode == 2 and "106 job(s)" in refused.stderr and "in Slurm's queue" in refused.stderr
    changed = site.incubate(
        "run", "smoke", *BOTH, *more, "--set", "training.lr=5e-4", "--backend", "slurm", "--site", str(site.site)
    )
    assert changed.returncode == 2 and "106 job(s) of many with other settings are active" in changed.stderr
    assert "106 job(s)" in site.incubate("stop", "smoke", *more).stdout
    assert "PENDING" not in {site.states()[job] for job in site.jobs("many").values()}
    assert " queued " not in site.incubate("status", "smoke", *more).stdout


def test_a_phase_of_two_runs_is_one_job_and_is_cancelled_when_neither_needs_it(site, chain):
    later = ["--strategies", "deep_incubation", "--seeds", "30", "--sbatch", "begin=now+1hour"]
    one, other = ["--set", "name=one"], ["--set", "name=other", "--set", "phases.finetune.lr=1e-3"]
    assert sentences.queued(0, 7) in site.submit(*later, *one)
    assert f"{sentences.done_already(0, 6)}, {sentences.queued(5, 2)}" in site.submit(*later, *other)
    shared = {key for key, job in site.jobs("one").items() if job in site.jobs("other").values()}
    assert len(shared) == 5 and site.incubate("status", "smoke", *other).stdout.count(" queued ") == 7
    stopped = site.incubate("stop", "smoke", *one).stdout
    assert "2 job(s) of one" in stopped and "5 go on, because another run needs them, too" in stopped
    assert {key for key, job in site.jobs("one").items() if site.states()[job] == "PENDING"} == shared
    assert "7 job(s) of other" in site.incubate("stop", "smoke", *other).stdout
    assert not {site.states()[job] for run in ("one", "other") for job in site.jobs(run).values()} - {"CANCELLED"}


def test_a_study_goes_from_stage_to_stage(site, chain):
    """Rates first, then every strategy with the chosen ones."""
    file = site.folder / "trial.yaml"
    file.write_text(yaml.safe_dump({
        "preset": "smoke", "set": {"phases.end_to_end.epochs": 1}, "strategies": ["end_to_end"], "seeds": [0],
        "rates": {"values": [0.001], "seeds": [7]},
    }))  # fmt: skip
    study = ["study", str(file), "--backend", "slurm", "--site", str(site.site)]

    def call(status: int) -> str:
        result = site.incubate(*study)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout

    def wait() -> dict[str, str]:
        site.wait_until_ended("../studies/trial")
        return site.jobs("../studies/trial")

    assert sentences.submitted(1) in call(3)
    assert len(first := wait()) == 1 and "06_analysis" not in first
    output = call(3)
    assert sentences.submitted(1) in output and "rates" in output and "done" in output
    assert len(wait()) == 2
    assert "wrote" in call(0) and (site.data / "studies" / "trial.csv").exists()
    assert sentences.is_for_backend("--partition", "slurm") in site.incubate("study", str(file), "--partition", "gpu").stderr


def test_a_dry_run_prints_scripts_and_writes_nothing(site, chain):
    before = site.states(), sorted(site.data.rglob("*"))
    result = site.incubate("run", "smoke", *BOTH, "--seeds", "7", "--backend", "slurm", "--dry-run", "--sbatch", "account=mine")
    assert result.returncode == 0 and result.stdout.count("#!/bin/bash") == 8
    assert "--dependency=afterok:<job of seed-7/meta>" in result.stdout and "--account=mine" in result.stdout
    assert (site.states(), sorted(site.data.rglob("*"))) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "gpus"], f"--partition 'gpus': the cluster has no such partition; {sentences.did_you_mean('gpu?')}"),
        (["--gpus-per-node", "3"], "--gpus-per-node is 3, but a node of partition gpu has 2"),
        (["--nodes", "10"], "--nodes is 10, but partition gpu has 9 with 1 GPU(s)"),
        (["--partition", "brief", "--time", "60"], "--time is 60, but partition brief allows 10 minutes"),
        (["--cpus-per-task", "3"], "Slurm refuses such a job"),
        (["--nodes", "3"], sentences.not_divisible("machine.devices 3 (3 nodes)")),
        (["--time", "soon"], f"time is 'soon': {sentences.TIME}"),
        (["--sbatch", "dependency=singleton"], sentences.set_by_the_workbook("dependency")),
        (["--sbatch", "nodes=2"], sentences.own_field("nodes")),
        (["--devices", "2"], "--devices is for the CPU"),
        (["--jobs", "2"], sentences.is_for_backend("--jobs", "local")),
        (["--site", "nowhere.yaml"], sentences.unreadable_settings("nowhere.yaml")),
    ],
)
def test_what_the_cluster_cannot_do_is_told_before_anything_is_submitted(arguments, message, site, chain):
    before = sorted(site.data.rglob("*"))
    result = site.incubate("run", "smoke", "--seeds", "8", "--backend", "slurm", *arguments)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert sorted(site.data.rglob("*")) == before


def test_a_machine_without_slurm_is_told(site, chain):
    result = site.incubate("run", "smoke", "--backend", "slurm", PATH="/nowhere")
    assert result.returncode == 2 and "no sinfo on the path" in result.stderr
    local = site.incubate("run", "smoke", "--partition", "gpu")
    assert local.returncode == 2 and sentences.is_for_backend("--partition", "slurm") in local.stderr
