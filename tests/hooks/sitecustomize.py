"""Read by every python that has this folder on its path: all that tests start (conftest.py). Nothing of what is computed changes.

Phases wait, or fail, as a test says in the file $TEST_HOOKS, which `patience.Hooks` writes. torchvision takes CIFAR's files with
other images in them, whose sums are in the file $TEST_CIFAR. Both are asked for when they are needed: a warm process has
imported everything before a test begins. FLOPs are counted once in all processes (counted.py).
"""

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time

import counted

NAP = 0.1  # seconds: the shortest step of a phase that is held, so that it saves and tells in between as a long one does
LAST_NAP = 0.3  # seconds: of a step after a stop was asked for; the loop looks once a second, so few steps are left


class Finder:
    """Changes a module as soon as it is imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def with_other_sums(cifar):
    begin = cifar.CIFAR10.__init__

    def begin_with_other_sums(self, *arguments, **more):
        if "TEST_CIFAR" in os.environ:
            with open(os.environ["TEST_CIFAR"]) as file:
                vars(self).update(json.load(file))
        begin(self, *arguments, **more)

    cifar.CIFAR10.__init__ = begin_with_other_sums


def with_counts(facts):
    if "TEST_COUNTS" in os.environ:
        facts.count = counted.once(facts.count)


def with_hooks(loop):
    loop.fit = hooked(loop.fit)


def rule(kind, folder):
    """Return the number that a rule has for a phase; None without such a rule."""
    with open(os.environ["TEST_HOOKS"]) as file:
        rules = json.load(file)[kind]
    name = named(folder)
    return next((number for phase, number in rules.items() if f"/{phase}/" in name), None)


def named(folder):
    """Return the name that a phase has in the run that trains it, such as /smoke/seed-0/deep_incubation/incubate-2/."""
    with open(folder / "phase.json") as file:
        about = json.load(file)
    phase = about["settings"].get("group") or about["settings"]["phase"]
    index = about["settings"].get("options", {}).get("module_index")
    last = phase if index is None else f"{phase}-{index}"
    return f"/{about['run']}/seed-{about['settings']['seed']}/{'' if phase == 'meta' else about['strategy'] + '/'}{last}/"


def hooked(fit):
    def hooked_fit(trainer, eval_set, *, folder, should_stop, **more):
        if not os.path.exists(os.environ.get("TEST_HOOKS", "")):
            return fit(trainer, eval_set, folder=folder, should_stop=should_stop, **more)
        step, done = trainer.step, 0

        def hooked_step(number):
            nonlocal done
            if number == rule("fail", folder.path):
                raise OSError("the disk is on fire")
            while (limit := rule("hold", folder.path)) is not None:
                stopping = should_stop()
                time.sleep(LAST_NAP if stopping else NAP)
                if stopping or done < limit:
                    break
            done += 1
            return step(number)

        trainer.step = hooked_step
        return fit(trainer, eval_set, folder=folder, should_stop=should_stop, **more)

    return hooked_fit


if "TEST_STACKS" in os.environ:  # each process, and each fork of it, writes its stack there when it is asked to
    stacks = open(os.environ["TEST_STACKS"], "a")  # noqa: SIM115  for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)

if "PYTEST_CURRENT_TEST" in os.environ:  # a test started this process; pytest-xdist's own find this folder on their path, too
    sys.meta_path.insert(0, Finder("incubate_lib.training.loop", with_hooks))
    sys.meta_path.insert(0, Finder("incubate_lib.phases.facts", with_counts))
    sys.meta_path.insert(0, Finder("torchvision.datasets.cifar", with_other_sums))
