"""One way to run every phase: in this process, or on several devices in processes of their own."""

import os
from typing import Any

import torch

from incubate_lib.config import SettingsError
from incubate_lib.phases.job import Job
from incubate_lib.phases.launch import train_on_devices
from incubate_lib.phases.train import modified, train_phase
from incubate_lib.training.runs import whose
from incubate_lib.training.team import Team, pick_device


def run_phase(job: Job) -> dict[str, Any]:
    """Train one phase to its end, or go on from its checkpoint, and return its summary; a finished one is only read.

    The phase stops when its stop file is touched after this call; in a batch job also when that is there already, or the
    job's own ($INCUBATE_STOP) is. On several devices it trains in a subprocess.
    """
    own = os.environ.get("INCUBATE_STOP")
    stop_files = {str(path): None if own else modified(path) for path in (job.folder.stop_file, own) if path}
    folder, used = job.folder, job.used()
    if done := folder.finished(job.digest, used):
        folder.drop_checkpoints()  # a kill may have come between the summary and this
        return done
    if missing := sorted(job.inputs.keys() - used.keys()):
        raise SettingsError(f"{job.title} starts from {', '.join(missing)}, not trained yet; `incubate run` does it")
    device = pick_device()
    if device.type == "cuda" and job.machine.devices > torch.cuda.device_count():
        raise SettingsError(f"machine.devices is {job.machine.devices}, but this machine has {torch.cuda.device_count()} GPU(s)")
    with folder.claim(whose(job.digest, used, job.facts.num_images)):
        if done := folder.finished(job.digest, used):  # finished by another process while this one waited
            return done
        job = job.model_copy(update={"stop_files": stop_files, "lease": folder.lease.number})
        if job.machine.team_size > 1 and job.settings.training is not None:
            return train_on_devices(job, folder)
        if threads := os.environ.get("INCUBATE_THREADS"):  # this phase's share of the cores, when several run side by side
            torch.set_num_threads(int(threads))
        return train_phase(job, Team(device=device))
