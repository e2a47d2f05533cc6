"""What jobs ask for: a site's file, options on top, phases that ask for something else."""

import os
import subprocess
from pathlib import Path

import pytest
import sentences
from project import block

from incubate_lib.backends.slurm.sbatch import requests, scripts
from incubate_lib.backends.slurm.settings import load_slurm
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.pipeline.strategies import plan


def write(path: Path, text: str) -> str:
    (path / "site.yaml").write_text(text)
    return str(path / "site.yaml")


def test_the_readmes_site_file_is_read(tmp_path):
    text = block("yaml", "# site.yaml")
    slurm = load_slurm(write(tmp_path, text), {})
    assert (slurm.time, slurm.gpus_per_node, slurm.nodes, slurm.python) == ("8:00:00", 4, 2, "python")
    assert slurm.prologue == ["module load cuda", "export NCCL_SOCKET_IFNAME=ib0"]
    trains, assembles = slurm.job("incubate", True), slurm.job("assemble", False)
    assert (trains.partition, trains.gpus_per_node, trains.nodes, trains.cpus_per_task) == ("gpu", 4, 2, 32)
    assert (assembles.partition, assembles.gpus_per_node, assembles.nodes, assembles.cpus_per_task) == ("cpu", 0, 1, None)
    assert slurm.job("analysis", False).time == "15" and assembles.sbatch == {"account": "my-project"}


def test_a_limit_that_leaves_no_time_to_save_is_told():
    with pytest.raises(SettingsError, match=r"time is 3, .*asked to save 120 s before it, .*give it at least 4 minutes"):
        load_slurm(None, {"time": "3"}).job("meta", True)
    assert load_slurm(None, {"time": "4"}).job("meta", True).time == "4"


def test_a_phase_can_do_without_an_option(tmp_path):
    slurm = load_slurm(write(tmp_path, "sbatch: {constraint: a100}\nphases: {assemble: {sbatch: {constraint: false}}}\n"), {})
    assert slurm.job("meta", True).sbatch == {"constraint": "a100"} and slurm.job("assemble", False).sbatch == {}


def test_options_override_the_file_and_phases_override_both(tmp_path):
    site = write(tmp_path, "time: 1-12\nsbatch: {qos: high}\nphases: {meta: {time: 30, sbatch: {qos: low}}}\n")
    slurm = load_slurm(site, {"time": "2:00", "nodes": None}, ["account=mine", "--exclusive", "mail-type=END=x"])
    assert slurm.time == "2:00" and slurm.sbatch == {"qos": "high", "account": "mine", "exclusive": None, "mail-type": "END=x"}
    meta = slurm.job("meta", True)
    assert meta.time == "30" and meta.sbatch["qos"] == "low" and meta.sbatch["account"] == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount: mine", r"unknown field 'acount'; .*Other options of sbatch go under sbatch: \{acount: …\}"),
        ("time: 90s", f"time is '90s': {sentences.TIME}"),
        ("nodes: 0", "nodes is 0"),
        ("gpus_per_node: -1", "gpus_per_node is -1"),
        ("phases: {metta: {}}", "metta"),
        ("phases: {meta: {nodez: 2}}", sentences.unknown("field", "phases.meta.nodez", "nodes")),
        ("sbatch: {output: log.txt}", sentences.set_by_the_workbook("output")),
        ("sbatch: {J: x}", sentences.set_by_the_workbook("J")),
        ("sbatch: {gpus-per-node: 2}", f"{sentences.own_field('gpus-per-node')}: set gpus_per_node"),
        ("- a list", sentences.MAPPING),
        ('partition: "gpu\\ntouch evil"', rf"partition is 'gpu\\ntouch evil': {sentences.ONE_LINE}"),
        ('python: "python\\rtouch evil"', f"python is .*: {sentences.ONE_LINE}"),
        ('sbatch: {comment: "x\\ntouch evil"}', rf"comment is 'x\\ntouch evil': {sentences.ONE_LINE}"),
        ('phases: {meta: {partition: "gpu\\u2028x"}}', f"phases.meta.partition is .*: {sentences.ONE_LINE}"),
        ('prologue: ["module load cuda\\ntouch evil"]', f"prologue.0 is .*: {sentences.ONE_LINE}"),
        ('prologue: "module load \\0cuda"', f"prologue.0 is .*: {sentences.ONE_LINE}"),
        ('time: "10\\n"', f"time is .*: {sentences.TIME}"),
    ],
)
def test_bad_site_files_are_told(text, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        load_slurm(write(tmp_path, text), {})


@pytest.mark.parametrize("options", [{"partition": "gpu\ntouch evil"}, {"sbatch": ["comment=a\ntouch evil"]}])
def test_options_of_the_command_line_are_one_line_each(options):
    with pytest.raises(SettingsError, match=sentences.ONE_LINE):
        load_slurm(None, {k: v for k, v in options.items() if k != "sbatch"}, options.get("sbatch", ()))


def test_a_prologue_is_lines_of_bash(tmp_path):
    block = load_slurm(write(tmp_path, "prologue: |\n  module load cuda\n\tconda activate x\n".replace("\t", "  ")), {})
    assert block.prologue == ["module load cuda", "conda activate x", ""]


def script_of(data: Path, monkeypatch, known_facts) -> str:
    monkeypatch.setenv("INCUBATE_DATA", str(data))
    todo = plan(load_settings("smoke"), ["end_to_end"], facts=known_facts)
    source = {"preset": "smoke", "overrides": []}
    slurm = load_slurm(None, {"gpus_per_node": 0}, ["comment=it's $(touch evil)"])
    script, *_ = scripts(todo, todo.nodes, source, slurm, requests(todo.nodes, slurm))
    return script.text(script.arguments(script.after))


@pytest.fixture(scope="module")
def known_facts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(tmp_path_factory.mktemp("data")))
        return plan(load_settings("smoke"), ["end_to_end"]).experiment.facts


def test_names_of_folders_are_quoted_and_what_is_no_line_is_refused(tmp_path, monkeypatch, known_facts):
    """The script is run with a false srun up to the step: nothing but the step is started."""
    strange = tmp_path / """a 'b' "c" $(touch evil) `touch evil` {0} %j; touch evil"""
    text = script_of(strange, monkeypatch, known_facts)
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s" "$INCUBATE_DATA" > "$SEEN"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), "SLURM_JOB_ID": "1"}
    assert subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "seen").read_text() == str(strange) and not (tmp_path / "evil").exists()
    with pytest.raises(SettingsError, match=f"option output of a job would be .*{sentences.ONE_LINE}"):
        script_of(tmp_path / "a\nb", monkeypatch, known_facts)
