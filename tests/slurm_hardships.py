"""What can happen to phases on a cluster: three seeds go through it, beside the modules of the chain."""

import time
from typing import Any

from slurm_site import Site

MODULES = [f"seed-0/deep_incubation/incubate-{module}" for module in range(3)]  # of the chain, which runs already
# a run of its own, of three seeds
LONG = ["name=long", "phases.end_to_end.epochs=10", "phases.end_to_end.warmup_epochs=1"]
VARIANT = ["smoke", *(part for value in LONG for part in ("--set", value))]
ONE = ["--strategies", "end_to_end", *VARIANT[1:]]
KEYS = [f"seed-{seed}/end_to_end" for seed in range(3)]


def go_through(site: Site) -> dict[str, Any]:
    """Put three seeds, each on a node of its own, through all of it; return what was seen.

    They do some steps, and go on only when told so.

    Seed 0: its time limit, then the stop button of the watch widget. Seed 1: preemption, a requeue, scancel. Both would not save
    by themselves. Seed 2: its node is lost. Meanwhile the controller is away for a while. In the end `incubate run` again.
    """
    call, cluster, run = site.cluster.call, site.cluster, site.planned(*ONE)
    for key in KEYS:
        site.hooks.hold(f"{run}/{key}", 20)  # more than an epoch; four attempts of that kind are fewer than all
    low = ["--partition", "low", "--sbatch", "exclude=n[4-9]"]
    site.submit(*ONE, "--seeds", "2", *low)
    site.skip_analysis(run)
    site.submit(*ONE, "--seeds", "0", "1", *low, "--set", "machine.checkpoint_seconds=1000")
    ids = [site.jobs(run)[key] for key in KEYS]
    attempts = lambda seed: site.attempts(run, KEYS[seed])  # noqa: E731

    def wait_for_attempt(number: int, *seeds: int) -> None:
        site.wait_for_attempt(number, run, *(KEYS[seed] for seed in seeds))

    wait_for_attempt(1, 0, 1, 2)
    cluster.wait_for(lambda: site.phases(run)[KEYS[2]].status().get("saved_step"), "the first checkpoint of seed 2")
    running = lambda module: site.phases("smoke")[module].status()["state"] == "running"  # noqa: E731
    cluster.wait_for(lambda: all(map(running, MODULES)), "the modules of the chain, side by side")
    for module in MODULES:
        site.hooks.let_go(f"smoke/{module}")
    nodes = [attempts(seed)[0]["node"] for seed in range(3)]
    shown = site.incubate("status", *VARIANT).stdout
    with site.watch("smoke", LONG, ["end_to_end"], range(3)) as live:
        watched = [live.headline.value, live.table.value]

    limit = int((time.time() - attempts(0)[0]["began"]) / 60) + 1  # a minute more at most; Slurm looks every half minute
    call("scontrol", "update", f"JobId={ids[0]}", f"TimeLimit={limit}")
    call("sbatch", "-p", "gpu", "-w", nodes[1], "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.kill(nodes[2])
    call("scontrol", "update", f"NodeName={nodes[2]}", "State=DOWN", "Reason=test")
    cluster.restart_controller()
    cluster.wait_for(lambda: "ended" in attempts(0)[0], "the time limit of seed 0")
    call("scontrol", "update", f"JobId={ids[0]}", "TimeLimit=60")  # at once: its next attempt is to have more time
    wait_for_attempt(2, 1)
    call("scontrol", "requeue", ids[1])
    wait_for_attempt(2, 0, 2)
    site.hooks.let_go(f"{run}/{KEYS[2]}")
    wait_for_attempt(3, 1)
    call("scancel", ids[1])
    cluster.wait_for(lambda: site.states()[ids[1]] == "CANCELLED", "the end of seed 1's job")
    cluster.wait_for(lambda: site.states()[ids[2]] == "COMPLETED", "the end of seed 2's job")
    with site.watch("smoke", LONG, ["end_to_end"], range(3)) as live:
        live.stop.click()
        stopped = live.said.value
        site.wait_until_ended(run)
        live.refresh()
        watched += [live.headline.value, live.table.value]
    halfway = [site.phases(run)[key].status() for key in KEYS]
    cluster.start("slurmd", "-N", nodes[2])
    for key in KEYS[:2]:
        site.hooks.let_go(f"{run}/{key}")
    more = site.submit(*ONE, "--seeds", "0", "1", "2")
    site.skip_analysis(run)
    site.wait_until_ended(run)
    return {
        "run": run, "nodes": nodes, "shown": shown, "watched": watched, "stopped": stopped, "halfway": halfway, "more": more,
    }  # fmt: skip
