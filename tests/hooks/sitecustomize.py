"""Read by every python of a test's jobs: lets steps take time, or fail, without changing any number."""

import importlib.util
import os
import sys
import time


class Finder:
    """Changes `Trainer.step` as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "incubate_lib.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module.Trainer.step = changed(module.Trainer.step)

        spec.loader.exec_module = exec_module
        return spec


def changed(step):
    hooks, job = os.environ["TEST_HOOKS"], os.environ["SLURM_JOB_NAME"].split("/")  # experiment/seed-0/…/phase
    seed, phase = job[1], job[-1]

    def slow(self, number):
        if os.path.exists(f"{hooks}/slow-{seed}"):
            time.sleep(0.4 if number < 100 else 3)  # so that none is done before it is told to, however busy the machine is
        if number == 5 and os.path.exists(f"{hooks}/fail-{phase}-{seed.removeprefix('seed-')}"):
            raise OSError("the disk is on fire")
        return step(self, number)

    return slow


if "TEST_HOOKS" in os.environ:
    sys.meta_path.insert(0, Finder())
