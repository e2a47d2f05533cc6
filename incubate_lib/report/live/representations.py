"""How alike the parts of trained networks are, and where they disagree: finished phases are read, nothing is trained.

`similarity` is linear CKA (Kornblith et al. 2019, arXiv 1905.00414) between a module's output and that of the meta module it
replaces, with the unbiased estimator of HSIC (Song et al. 2012, eq. 5; Nguyen et al. 2021, arXiv 2010.15327): the plain one
grows with the width alone, of 256 images and two unrelated features of width 768 it makes 0.75. Features are all tokens side by
side, as is usual for Vision Transformers (Raghu et al. 2021, arXiv 2108.08810): the next module's attention reads each of them.
Summaries mislead: in small networks that pool by averaging the class token, which nobody reads in the end, varied most.

`disagreements` are the evaluated images that one of meta model and deep network gets right and the other does not.

Letters: n images, p and q features, B images of a batch, C channels, H and W pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from incubate_lib import tasks
from incubate_lib.config import SettingsError
from incubate_lib.data.sets import ImageSet
from incubate_lib.data.sources import open_source
from incubate_lib.data.stream import StreamedSet
from incubate_lib.method.network import Partition, counted_through, outputs
from incubate_lib.phases.networks import build_target, in_target_names, partition_of
from incubate_lib.phases.recipes import load_trained, prepare
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.report.style import Figure
from incubate_lib.report.words import BASELINE, LOOKS, label
from incubate_lib.tasks import Task
from incubate_lib.training.team import pick_device
from incubate_lib.training.trainer import autocast

BATCH = 64  # images at a time through a network
PIECE = 16_384  # features at a time in double precision
SMALLEST = 4  # images that the unbiased estimator needs
NETWORKS = LOOKS["networks"]  # in which a module stands


# -- similarity ---------------------------------------------------------------------------------------------------------------


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two features [n, p] and [n, q] of the same images, at most 1; around 0 for unrelated ones.

    1 of features that are a rotation, mirroring or multiple of each other; other linear maps change it. Not a number if one
    of them is the same for all images. ValueError for fewer than four images or different numbers of them.
    """
    if len(x) != len(y) or len(x) < SMALLEST:
        raise ValueError(f"features of {len(x)} and {len(y)} images; it takes the same {SMALLEST} or more")
    return _alike(*(_gram([features]) for features in (x, y)))


def _alike(k: Tensor, m: Tensor) -> float:
    norm = (_hsic(k, k) * _hsic(m, m)) ** 0.5
    return _hsic(k, m) / norm if norm > 0 else float("nan")


def _gram(batches: Sequence[Tensor]) -> Tensor:
    """Return inner products [n, n] of features given in batches [B, …], in double precision, a piece of the features at a time.

    Means are taken off first, which changes nothing but rounding.
    """
    pieces = torch.cat([batch.flatten(1) for batch in batches]).split(PIECE, dim=1)
    centred = (piece.double() - piece.double().mean(0) for piece in pieces)
    return sum(piece @ piece.T for piece in centred)


def _hsic(k: Tensor, m: Tensor) -> float:
    """Return the unbiased estimate of the Hilbert-Schmidt independence criterion of two Gram matrices [n, n]."""
    n = len(k)
    k, m = (gram - gram.diag().diag() for gram in (k, m))
    terms = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return float(terms) / (n * (n - 3))


def similarity(plan: Plan, strategy: str, seed: int = 0, images: int = 256) -> pd.DataFrame:
    """Return the CKA of each module's output with that of the meta module it replaces, on the same evaluated images.

    A row a module and network (see NETWORKS): columns strategy, seed, module_index (0-based), network, cka, images. In a hybrid
    both get the same input; in the assembled and the fine-tuned network the target module gets what the target modules before
    it made. The last module's outputs are logits. Read `hybrid` against `start`, the module before its incubation: blocks add to
    what they are given, so even a random one can look like a module that changes little. Hybrids are left out where nothing was
    incubated, end to end where it is not finished in this plan. Images are taken evenly from all that are evaluated: those of a
    folder are sorted by class. Computed in float32. SettingsError for a strategy without a meta model, and for one that is not
    finished.
    """
    final, meta, joined = _phases(plan, strategy, seed)
    eval_set = final.data()[1]
    if images < SMALLEST:
        raise SettingsError(f"images is {images}; it takes at least {SMALLEST}")
    count = min(images, len(eval_set))
    evenly = torch.linspace(0, len(eval_set) - 1, count).long()
    s, number = final.settings, final.facts.outputs
    batches = [tasks.get(s.task).inputs(eval_set.some(some)) for some in evenly.split(BATCH)]
    partition, found = partition_of(s), {}  # (module, network) → CKA
    trained = load_trained(meta.settings, meta.folder, number)
    wanted = [_gram(module) for module in _outputs(in_target_names(s, trained, build_target(s, number)), partition, batches)]
    modules = [(node, alone) for node in final.upstream("incubate") for alone in node.kind.alone(node.settings)]
    for node, alone in modules:
        index, inputs = alone.module_index, {name: n.folder.path for name, n in node.inputs.items()}
        hybrid = prepare(alone, inputs, number)
        for network in ("start", "hybrid"):
            if network == "hybrid":
                own = partition.part(index, counted_through(partition, index, node.folder.load_weights()))
                hybrid.network.load_state_dict(own, strict=False)
            found[index, network] = _alike(wanted[index], _gram(_outputs(hybrid.network, partition, batches)[index]))
    networks = {"assembled": joined, "finetuned": final, "end_to_end": _baseline(plan, final)}
    for network, node in networks.items():
        if node is not None:
            modules = _outputs(load_trained(node.settings, node.folder, number), partition, batches)
            for index, module in enumerate(modules):
                found[index, network] = _alike(wanted[index], _gram(module))
    order = [(index, network) for index in range(len(wanted)) for network in NETWORKS]
    rows = [(strategy, seed, *place, found[place], count) for place in order if place in found]
    return pd.DataFrame(rows, columns=["strategy", "seed", "module_index", "network", "cka", "images"])


def similarity_figure(table: pd.DataFrame) -> Figure:
    """Draw the rows of `similarity` over the modules, a line a network; several seeds as mean ± standard deviation."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    seeds = table["seed"].nunique()
    there = [network for network in NETWORKS if network in set(table["network"])]
    for place, network in enumerate(there):
        by_module = table[table["network"] == network].groupby("module_index")["cka"]
        # side by side, or equal ones hide each other
        x = by_module.mean().index + 1 + 0.05 * (place - (len(there) - 1) / 2)
        error = by_module.std() if seeds > 1 else None
        look = {"markersize": 7, "capsize": 3, "linewidth": 1.4} | NETWORKS[network]["look"]
        axis.errorbar(x, by_module.mean(), yerr=error, label=NETWORKS[network]["label"], **look)
    axis.axhline(1, color="#BBBBBB", linewidth=0.8)
    modules = sorted(table["module_index"].unique())
    names = [f"module {i + 1}" + ("\n(logits)" if i == modules[-1] else "") for i in modules]
    axis.set_xticks([i + 1 for i in modules], names)
    axis.set_ylim(min(-0.05, table["cka"].min() - 0.05), 1.05)
    axis.set_ylabel("similarity to the meta module\n(linear CKA, 1: alike)")
    strategies = ", ".join(label(name) for name in table["strategy"].unique())
    spread = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    axis.set_title(f"{strategies}: {spread}, {table['images'].iloc[0]} images of the evaluation", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside right center", frameon=False)
    return figure


@torch.no_grad()
def _outputs(network: nn.Module, partition: Partition, batches: list[Tensor]) -> list[list[Tensor]]:
    """Send batches of images through a network; return the outputs of each module, batch by batch, on the CPU."""
    network, device = network.to(pick_device()).eval(), pick_device()
    found = [[output.cpu() for output in outputs(network, partition, x.to(device))] for x in batches]
    return [list(module) for module in zip(*found, strict=True)]


# -- what is finished ---------------------------------------------------------------------------------------------------------


def _phases(plan: Plan, strategy: str, seed: int) -> tuple[Node, Node, Node]:
    """Return the phases finetune, meta and assemble of a strategy; SettingsError unless there are such and all are finished."""
    final, about = plan.finals.get((strategy, seed)), f"strategy {strategy}, seed {seed},"
    if final is None:
        there = ", ".join(f"{name} (seed {number})" for name, number in plan.finals) or "none"
        raise SettingsError(f"{about} is not part of what was asked for, which is: {there}")
    for phase, what in {"assemble": "modules", "meta": "meta model to compare with"}.items():
        if not final.upstream(phase):
            raise SettingsError(f"strategy {strategy} has no {what}; choose one of Deep Incubation")
    needed = [node for phase in ("meta", "incubate", "assemble") for node in final.upstream(phase)]
    missing = [node.title for node in (*needed, final) if node.finished() is None]
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SettingsError(f"{about} is not finished: {names}; `incubate run` goes on")
    meta = final.upstream("meta")[0]
    if meta.settings.model.img_size != final.settings.model.img_size:
        raise SettingsError(f"{about} has a meta model for images of another size, which these modules cannot be compared with")
    return final, meta, final.upstream("assemble")[0]


def _baseline(plan: Plan, final: Node) -> Node | None:
    """Return end-to-end training of the same network if it is part of the plan and finished."""
    node = plan.finals.get((BASELINE, final.settings.seed))
    same = node is not None and sum(node.settings.target_depths) == sum(final.settings.target_depths)
    return node if same and node.finished() is not None else None


# -- disagreements ------------------------------------------------------------------------------------------------------------

CASES = ("both right", "only meta model right", "only deep network right", "both wrong")
DEEP = ("assembled", "finetuned")
WHO = {"meta": "meta model", "assembled": "assembled", "finetuned": "fine-tuned"}


@dataclass(frozen=True)
class Disagreements:
    """What the meta model, the assembled and the fine-tuned network say of every evaluated image."""

    strategy: str
    seed: int
    task: Task
    # a row an image, a column each of meta, assembled, finetuned: what is wrong, in words, and nothing where it is right
    mistakes: pd.DataFrame
    eval_set: ImageSet | StreamedSet

    def cases(self, network: str = "finetuned") -> pd.Series:
        """Return for every image which of CASES it is, for the `assembled` or the `finetuned` network."""
        if network not in DEEP:
            raise SettingsError(f"network is {network!r}; it must be one of {', '.join(DEEP)}")
        meta, deep = (self.mistakes[column].isna() for column in ("meta", network))
        which = np.select([meta & deep, meta & ~deep, ~meta & deep], CASES[:3], default=CASES[3])
        return pd.Series(pd.Categorical(which, CASES), index=self.mistakes.index, name="case")

    def counts(self) -> pd.DataFrame:
        """Return the number of images of each case: a row a network, a column a case."""
        rows = {NETWORKS[network]["label"]: self.cases(network).value_counts(sort=False) for network in DEEP}
        return pd.DataFrame(rows).T[list(CASES)].rename_axis(index="network", columns=None)

    def figure(self, network: str = "finetuned", num: int = 8) -> Figure:
        """Draw the first `num` images that only the meta model, and that only the deep network gets right."""
        cases = self.cases(network)
        figure = Figure(figsize=(1.25 * num, 4.4), layout="constrained")
        title = f"{label(self.strategy)}, {NETWORKS[network]['label']} (seed {self.seed})"
        figure.suptitle(title, fontsize=11)
        wrong_of = {CASES[1]: network, CASES[2]: "meta"}
        for panel, (case, wrong) in zip(figure.subfigures(2, 1), wrong_of.items(), strict=True):
            places = cases.index[cases == case]
            words = f"{case}: {len(places)} of {len(cases)} images"
            panel.suptitle(words, fontsize=10, x=0.01, ha="left")
            axes = panel.subplots(1, num, squeeze=False)[0]
            for axis in axes:
                axis.axis("off")
            for axis, place, pixels in zip(axes, places, self.pixels(places[:num]), strict=False):
                axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                below = {"ha": "center", "va": "top", "fontsize": 9, "color": "#A33D00"}
                said = textwrap.fill(self.mistakes.loc[place, wrong], 16, max_lines=3, placeholder="…")
                axis.text(0.5, -0.04, f"{WHO[wrong]}:\n{said}", transform=axis.transAxes, **below)
        return figure

    def pixels(self, places: Sequence[int]) -> list[np.ndarray]:
        """Return images [H, W, C] uint8 as they are evaluated; read again, which spares keeping those of a large set."""
        if not len(places):
            return []
        images = self.task.inputs(self.eval_set.some(torch.as_tensor(np.asarray(places))))
        images = 255 * (images * self.eval_set.std + self.eval_set.mean)
        return list(images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def disagreements(plan: Plan, strategy: str, seed: int = 0) -> Disagreements:
    """Ask the meta model, the assembled and the fine-tuned network of a strategy about every evaluated image.

    In the precision of the run, so that the numbers are those of its records. SettingsError as `similarity`, and for a task
    that does not name mistakes.
    """
    final, meta, joined = _phases(plan, strategy, seed)
    about, task = final.settings, tasks.get(final.settings.task)
    if type(task).mistakes is Task.mistakes:
        raise SettingsError(f"this run learns {about.task}, and that task does not say which images a network gets wrong")
    eval_set, device = final.data()[1], pick_device()
    nodes = {"meta": meta, "assembled": joined, "finetuned": final}
    networks = {name: load_trained(node.settings, node.folder, node.facts.outputs).to(device) for name, node in nodes.items()}
    names = task.output_names(open_source(about.data, final.machine)[0].classes)
    found: dict[str, list[str | None]] = {name: [] for name in networks}
    for batch in eval_set.eval_batches(keep=False):
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        for name, network in networks.items():
            with autocast(device, about.precision):
                output = network(task.inputs(batch))
            found[name] += task.mistakes(output, batch, names)
    mistakes = pd.DataFrame(found, dtype=object).rename_axis(index="image")
    return Disagreements(strategy, seed, task, mistakes, eval_set)
