"""What a run would cost on given devices, before a step is trained: FLOPs, device-hours, a schedule, memory.

FLOPs and memory are counted on the networks themselves; of the images only their number is asked for. Seconds are FLOPs
over a speed: measured by `incubate bench` on the user's own machine, or a stated share of a device's peak. Judging, reading
images and saving are not in them, nor what devices that train one phase together lose by talking to each other.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from incubate_lib.config import Settings, SettingsError, check_numbers, load_settings, nearest, presets, refuse
from incubate_lib.config.errors import shortened
from incubate_lib.config.members import PHASES, TASKS
from incubate_lib.config.peaks import DEVICE, SHARE, check_stated, peak_flops
from incubate_lib.data.counts import Images, count_images
from incubate_lib.data.schedule import micro_batches, total_steps
from incubate_lib.phases.facts import Facts, count, outputs_for
from incubate_lib.phases.networks import model_shape
from incubate_lib.pipeline.graph import Node, Plan, closure, longest, remaining
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.planner.memory import peak_bytes
from incubate_lib.report.tables import records
from incubate_lib.report.tables.hardware import places
from incubate_lib.report.tables.records import Results

_COUNTED: dict[str, Facts] = {}  # sliders ask often


@dataclass(frozen=True)
class Speed:
    """Training FLOP/s of one device: measured for each kind of phase, or one number for all."""

    source: str  # where it comes from, in words
    flops_per_second: float
    measured: dict[str, float] = field(default_factory=dict)  # end_to_end, meta, incubate-0 … → FLOP/s
    network: str = ""  # on which it was measured
    device: str = ""  # where it was measured, with threads; empty for what is stated

    def seconds(self, phase: str, module_index: int | None, flops: float) -> float:
        """Return how long one device takes for so many FLOPs of a phase."""
        return flops / self.measured.get(_measured_as(phase, module_index), self.flops_per_second)


def _measured_as(phase: str, module_index: int | None) -> str:
    return PHASES[phase].measured_as(None if pd.isna(module_index) else module_index)


def stated_speed(device: str = DEVICE, share: float = SHARE, precision: str = "bfloat16") -> Speed:
    """Return a share of a device's nominal dense peak in that precision; SettingsError for a device that is not known."""
    peak = peak_flops(device, precision)
    how = f"the peak of {device} in {precision} is not known; measure it with `incubate bench … --save NAME`"
    check_stated(device, share)
    refuse(not peak, how)
    source = f"{share:.0%} of the {peak / 1e12:g} TFLOP/s ({precision}) of one {device}: an assumption"
    return Speed(source, share * peak)


def measured_speed(name: str) -> Speed:
    """Return what `incubate bench … --save NAME` measured; SettingsError if there is no such table."""
    rows = pd.read_csv(records.speed_file(name)).set_index("variant")
    first = rows.iloc[0]
    source = f"measured with {first['settings']} on {first['device']}, {first['threads']} thread(s), {first['precision']}, "
    source += f"batch {first['batch']}, {first['date'][:10]}"
    rates = rows["flops_per_second"].to_dict()
    return Speed(source, rates["end_to_end"], rates, first["model"], _where(rows))


def speed_of(results: Results) -> Speed:
    """Return the speed at which a run trained, for each kind of phase."""
    trained = results.phases[results.phases["flops"] > 0]
    kinds = [_measured_as(phase.phase, phase.module_index) for phase in trained.itertuples()]
    sums = trained.groupby(kinds)[["flops", "seconds"]].sum()
    whole = trained["flops"].sum() / trained["seconds"].sum()
    where = places(results.strategies)
    mixed = f", in which seconds of {len(where)} devices are mixed" if len(where) > 1 else ""
    rates = (sums["flops"] / sums["seconds"]).to_dict()
    return Speed(f"that of the run itself{mixed}", float(whole), rates)


def _where(rows: pd.DataFrame) -> str:
    """Return the hardware that seconds are of, in words; empty if it is not known."""
    return "; ".join(f"{device}, {threads} thread(s)" for device, threads in places(rows))


# -- what is planned ----------------------------------------------------------------------------------------------------


def open_plan(
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategies: Sequence[str] | None = None,
    images: int | None = None,
    classes: int | None = None,
) -> Plan:
    """Return the plan of one seed without opening images: for a preset, a file, or any plain timm ViT by its name.

    A timm name gets the ImageNet recipe and four modules. Images and classes are counted, as `count_images` does it, unless
    they are given; the plan's `images` says which numbers it is made for. `images` are those before `data.train_share`.
    """
    settings = open_settings(preset, overrides)
    shape = model_shape(settings.model)
    counted = count_images(settings.data, settings.machine, images=images, classes=classes, shape=shape)
    return plan_of(settings, counted, strategies)


def plan_of(settings: Settings, counted: Images, strategies: Sequence[str] | None = None) -> Plan:
    """Return the plan of one seed for so many images, of which `data.train_share` is trained on."""
    shared = round(counted.count * settings.data.train_share)
    facts = _facts(settings, outputs_for(settings, counted)).model_copy(update={"num_images": shared})
    return replace(plan(settings, strategies, facts=facts), images=counted.sentence)


def open_settings(preset: str, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a preset, of a file, or of a plain timm ViT by its name."""
    if preset in presets() or Path(preset).suffix in (".yaml", ".yml") or os.path.exists(preset):
        return load_settings(preset, list(overrides))
    import timm

    if not timm.is_model(preset):
        known = nearest(preset, [*presets(), *timm.list_models("vit*")])
        raise SettingsError(f"{shortened(repr(preset))} is no preset, no .yaml file and no timm model; {known}")
    name = preset.partition(".")[0]  # what follows names weights, which cost nothing
    own = [f"name={name}", f"model={{name: {name}}}", "partition={num_modules: 4}"]
    return load_settings("imagenet-vit-b", [*own, *overrides])


def _facts(settings: Settings, outputs: int) -> Facts:
    """Count, once for all settings whose networks are the same."""
    whole = settings.model_dump(mode="json", include={"task", "model", "partition", "strategies"})
    parts = {name: (s.get("low_resolution"), s.get("weights")) for name, s in whole.pop("strategies").items()}
    key = json.dumps([whole, parts, outputs])
    if key not in _COUNTED:
        _COUNTED[key] = count(settings, 1, outputs)
    return _COUNTED[key]


# -- what it costs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a plan costs: a row a phase and a row a strategy; a shared phase is listed in every strategy that needs it.

    phases: strategy, phase, module, epochs, steps, flops, device_hours, begin, end, machine, images, memory;
    strategies: strategy, flops, critical_flops, device_hours, hours, memory.
    """

    network: str
    images: str  # for how many images and classes it is, in words
    samples: str  # what its task calls them
    speed: Speed
    machines: int
    devices: int  # of each machine, that train one phase together
    reference: str | None  # the strategy that others are compared with
    adaptive: list[str]  # strategies that train adaptively, planned as if no unit ever rested
    phases: pd.DataFrame  # begin and end in hours; memory in bytes of a device
    strategies: pd.DataFrame


def forecast(
    todo: Plan,
    speed: Speed,
    *,
    machines: int = 1,
    spent: Mapping[str, int] | None = None,
    took: Mapping[str, float] | None = None,
) -> Forecast:
    """Return what each strategy of a plan costs on so many machines, each with the settings' devices for one phase at a time.

    `spent` has the FLOPs of phases that were trained, by their keys: with Modular Adaptive Training they are known only then;
    `took` has the device-seconds that they were measured to take, which count instead of the speed's. Of phases that could
    begin, the one with the longest way to the end goes first, as `incubate run` does it.
    """
    check_numbers({"machines": machines})
    spent, took = spent or {}, took or {}
    flops, settings = todo.flops | spent, todo.experiment.settings
    devices, known, rows, totals, adaptive = settings.machine.team_size, {}, [], [], []
    for (name, _), final in todo.finals.items():
        nodes = closure([final])
        kinds = {node.key: (node.settings.phase, node.settings.module_index) for node in nodes}
        seconds = {key: took[key] if key in took else speed.seconds(*kind, flops[key]) for key, kind in kinds.items()}
        hours = {key: time / 3600 for key, time in seconds.items()}
        places = _schedule(nodes, {key: time / devices for key, time in hours.items()}, machines)
        own = []
        for node in nodes:
            phase, training, images, steps = node.settings, node.settings.training, 0, 0
            if training:
                _, images = micro_batches(training.batch_size, training.micro_batch, devices)
                steps = total_steps(training.epochs, todo.experiment.facts.num_images, training.batch_size)
            own.append(
                {
                    "strategy": name,
                    "phase": phase.phase,
                    "module": None if phase.module_index is None else phase.module_index + 1,
                    "epochs": training.epochs if training else float(flops[node.key] > 0),  # a pass that renews statistics
                    "steps": steps,
                    "flops": float(flops[node.key]),
                    "device_hours": hours[node.key],
                    **dict(zip(("begin", "end", "machine"), places[node.key], strict=True)),
                    "images": images,
                    "memory": peak_bytes(node, known),
                }
            )
        rows += own
        table = pd.DataFrame(own)
        totals.append(
            {
                "strategy": name,
                "flops": table["flops"].sum(),
                "critical_flops": float(longest(nodes, flops)[final.key]),
                "device_hours": table["device_hours"].sum(),
                "hours": table["end"].max(),
                "memory": int(table["memory"].max()),
            }
        )
        if any(node.settings.mat and node.key not in spent for node in nodes):
            adaptive.append(name)
    whole = [name for name, _ in todo.finals if settings.strategies[name].is_whole]
    free = [name for name in whole if not settings.is_matched(name)]
    return Forecast(
        network=str(settings.model),
        images=todo.images,
        samples=TASKS[settings.task].samples,
        speed=speed,
        machines=machines,
        devices=devices,
        reference=next(iter([*free, *whole]), None),
        adaptive=adaptive,
        phases=pd.DataFrame(rows).astype({"module": "Int64"}),
        strategies=pd.DataFrame(totals),
    )


Place = tuple[float, float, int]  # begin and end in hours, and the machine


def _schedule(nodes: list[Node], hours: dict[str, float], machines: int) -> dict[str, Place]:
    """Return where each phase goes."""
    places: dict[str, Place] = {}
    free = dict.fromkeys(range(1, machines + 1), 0.0)  # machine → when it is free
    waiting, rest = list(nodes), remaining(nodes, hours)
    while waiting:
        ready = [node for node in waiting if all(before.key in places for before in node.inputs.values())]
        ends = {node.key: [places[before.key][1] for before in node.inputs.values()] for node in ready}
        begins = {key: max(before, default=0.0) for key, before in ends.items()}
        now = max(min(free.values()), min(begins.values()))
        node = max((n for n in ready if begins[n.key] <= now), key=lambda n: rest[n.key])
        machine = next(machine for machine, time in free.items() if time <= now)
        free[machine] = now + hours[node.key]
        places[node.key] = (now, free[machine], machine)
        waiting.remove(node)
    return places


# -- against what was measured ------------------------------------------------------------------------------------------


def against_measured(results: Results, speed: Speed) -> pd.DataFrame:
    """Return what a speed predicts for phases that were trained beside what they took: a row a phase, a last one in all.

    Columns: strategy, phase, module, flops, measured, spread (both seconds, mean and std over seeds), predicted (seconds),
    ratio (predicted over measured), where (the devices that were measured), elsewhere (whether that is not just the speed's).
    Only seconds of training count on both sides.
    """
    trained = results.phases[results.phases["flops"] > 0]
    rows = []
    for strategy, phases in trained.groupby("strategy", sort=False):
        all_seeds = results.strategies.get("strategy", pd.Series(dtype=object)) == strategy
        whole_run = _where(results.strategies[all_seeds])  # older tables say it once for all phases
        own = []
        for (phase, module), seeds in phases.groupby(["phase", "module_index"], sort=False, dropna=False):
            flops = seeds["flops"].mean()
            place = {"strategy": strategy, "phase": phase, "where": _where(seeds) or whole_run}
            times = {"module": module + 1, "flops": flops, "predicted": speed.seconds(phase, module, flops)}
            own.append(place | times | _spread(seeds["seconds"]))
        place = {"strategy": strategy, "phase": "all phases", "where": _where(phases) or whole_run}
        times = {column: sum(row[column] for row in own) for column in ("flops", "predicted")}
        rows += [*own, place | times | _spread(phases.groupby("seed")["seconds"].sum())]
    table = pd.DataFrame(rows).astype({"module": "Int64"})
    elsewhere = (table["where"] != speed.device) & (table["where"] != "") & bool(speed.device)
    return table.assign(ratio=table["predicted"] / table["measured"], elsewhere=elsewhere)


def _spread(seconds: pd.Series) -> dict[str, float]:
    return {"measured": seconds.mean(), "spread": seconds.std()}
