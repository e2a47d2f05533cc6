"""MAT, Modular Adaptive Training (arXiv 2405.07527, NeurIPS 2023): which units train, and updates of only those.

    units = find_units(model, "sublayers")
    updates = PartialUpdates(model, units, images[:1])
    history.append(principal_eigenvalues(modular_kernels(model, units, probe)))     # now and then
    updates.apply(choose(torch.stack(history), alpha=0.1).active)

There is no public code of the paper, and it leaves open most of what is a choice here; the defaults are our own.

What a resting unit saves: the gradients of its weights, a third of its share of a training step; everything else below the
lowest unit that is active (`cut`: nothing down there needs a gradient any more, so the backward pass ends above); and with
`stop_error`, which **changes the gradients of what lies below**, also the way of the error through resting branches: it then
takes the skip connection only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from incubate_lib.method.rows import with_rows
from incubate_lib.method.units import Unit, owners_of
from incubate_lib.method.watch import check_held_alone, eval_mode, watched_parameters

Threshold = Literal["ratio", "quantile", "mass"]


@dataclass(frozen=True)
class Choice:
    """Which units are active, from which eigenvalue on, and whether the strongest had to be taken although it was below."""

    active: Tensor  # bool [U]
    cut: float
    forced: bool = False


def choose(history: Tensor, *, alpha: float, beta: float = 0.0, threshold: Threshold = "ratio") -> Choice:
    """Apply the dynamic threshold to the principal eigenvalues [E, U] of all E evaluations so far, the latest last.

    Modular: active are units whose eigenvalue is at least the cut. `ratio`: λ_min + α (λ_max − λ_min) over units;
    `quantile`: the α-quantile of units; `mass`: the strongest that together have 1 − α of the sum. α from 0 (all) to 1 (the
    strongest). Temporal, from the third evaluation on: with Δ_t = |λ_t − λ_0|, a unit whose |Δ_t − Δ_{t−1}| / Δ_1 is below
    β rests as well; 0 is never. When nothing would be left, the strongest unit goes on. Raises ValueError for α outside
    [0, 1], β below 0, and eigenvalues that are not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 (all units train) to 1 (the strongest one)")
    if beta < 0:
        raise ValueError(f"beta is {beta}; it must be 0 or larger")
    now = history[-1]
    if not now.isfinite().all():
        raise ValueError(f"an eigenvalue is {now[~now.isfinite()][0].item()}")
    if threshold == "ratio":
        cut = now.min() + alpha * (now.max() - now.min())
    elif threshold == "quantile":
        cut = torch.quantile(now, alpha, interpolation="higher")
    else:
        strongest = now.sort(descending=True).values
        enough = strongest.cumsum(0) >= (1 - alpha) * strongest.sum() * (1 - 1e-12)  # the last sum is the sum, but for rounding
        cut = strongest[int(enough.nonzero()[0])] if enough.any() else strongest[-1]
    active = now >= min(cut, now.max())  # rounding must not rest the strongest
    if beta and len(history) > 2:
        moved = (history - history[0]).abs()
        active &= (moved[-1] - moved[-2]).abs() >= beta * moved[1]
    forced = not active.any()
    if forced:
        active[now.argmax()] = True
    return Choice(active, float(cut), forced)


def same_number(active: Tensor, scores: Tensor) -> Tensor:
    """Return the units of the largest scores [U], as many as are active: the control of any other ranking."""
    chosen = torch.zeros_like(active)
    chosen[scores.topk(int(active.sum())).indices.to(active.device)] = True
    return chosen


def gradient_norms(model: nn.Module, units: Sequence[Unit], images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the norm of the gradient of the outputs' mean `loss` for each unit, in eval mode: float64 [U] on the CPU."""
    names = sorted({name for unit in units for name in unit.rows})
    parameters = {name: model.get_parameter(name).detach().requires_grad_() for name in names}
    with eval_mode(model), torch.enable_grad():
        output = torch.func.functional_call(model, parameters, (images,))
        gradients = torch.autograd.grad(loss(output), list(parameters.values()))
    if images.is_meta:  # only to be counted
        return torch.zeros(len(units))
    squares = {n: g.double().square().reshape(len(g), -1).sum(1).cpu() for n, g in zip(parameters, gradients, strict=True)}

    def of(unit: Unit) -> Tensor:
        parts = [squares[n][slice(*rows)] for n, ranges in unit.rows.items() for rows in ranges or [(None, None)]]
        return torch.cat(parts).sum()

    return torch.stack([of(unit) for unit in units]).sqrt()


# -- partial updates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """What an optimiser steps as one: a parameter, or adjacent rows of it, which share its memory."""

    name: str
    parameter: nn.Parameter
    leaf: nn.Parameter  # for the optimiser: the parameter itself, or a view of its rows
    rows: slice | None = None
    unit: int | None = None  # to which it belongs


class PartialUpdates:
    """Lets the units of a model rest and train again, in place. Everything trains at first.

    A resting unit costs no gradient of its weights and, with an optimiser over the `pieces` and `hand_over` before each of
    its steps, no step: weights, momentum and decay stay as they are, bit for bit. Parameters that belong to no unit
    train, but with `cut` those used before the lowest active unit rest with all that is down there. Wrap
    (DistributedDataParallel) and compile the model anew after an `apply` that changed something. `image` [1, C, H, W] is
    passed through once to see what is used first. Raises ValueError for `stop_error` where there is no way around the
    units, for parameters that two units or two layers have, and for layers whose rows cannot rest alone: any but a plain
    Linear or Conv2d, and those whose weight is used outside their own call, past what would cut it.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], image: Tensor, *, cut: bool = True, stop_error: bool = False
    ) -> None:
        self.model, self.units, self.cut, self.stop_error = model, list(units), cut, stop_error
        self.learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        owners = owners_of(units, model)
        check_held_alone(model, sorted(owners))
        self.owner = {name: unit for name, unit in owners.items() if isinstance(unit, int)}  # whole parameters → their unit
        # divided ones → the unit of each row, -1: none
        self.row_owner = {name: rows for name, rows in owners.items() if isinstance(rows, Tensor)}
        if stop_error and not self.row_owner and not all(unit.entrances for unit in units):
            raise ValueError(
                "stop_error: the error has no way around these units, so nothing below them would learn; it is for residual "
                "branches (sublayers, blocks) and for rows (heads, filters)"
            )
        with eval_mode(model), torch.no_grad(), watched_parameters(model) as uses:
            model(image)
        # what was not seen in use is never cut off, nor what is used above as well
        self.height = {name: uses[name].last if name in uses else math.inf for name in self.learns}
        first = {name: uses[name].first if name in uses else math.inf for name in self.learns}
        self.heights = torch.tensor([min(first[name] for name in unit.rows) for unit in units])
        for name in self.row_owner:
            if name not in uses or uses[name].outside:
                how = "outside its own layer's call" if name in uses else "nowhere in a forward pass"
                raise ValueError(f"rows of {name} cannot rest alone; it is used {how}")
        for layer in dict.fromkeys(name.rpartition(".")[0] for name in self.row_owner):
            model.set_submodule(layer, with_rows(layer, model.get_submodule(layer)))
        pieces = [self._pieces(name) for name in self.learns]
        self.pieces = [piece for some in pieces for piece in some]
        self.divided = [some for some in pieces if some[0].rows is not None]
        self.detached: list[torch.utils.hooks.RemovableHandle] = []
        self.active = torch.ones(len(units), dtype=torch.bool)

    def _pieces(self, name: str) -> list[Piece]:
        parameter = self.model.get_parameter(name)
        if name not in self.row_owner:
            return [Piece(name, parameter, parameter, unit=self.owner.get(name))]
        owners, counts = torch.unique_consecutive(self.row_owner[name], return_counts=True)
        pieces, first = [], 0
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            rows = slice(first, first := first + count)
            pieces.append(Piece(name, parameter, nn.Parameter(parameter.data[rows]), rows, None if owner < 0 else owner))
        return pieces

    def apply(self, active: Tensor) -> bool:
        """Let exactly these units, bool [U], train from now on; return whether that is a change."""
        active = active.bool().cpu()
        if torch.equal(active, self.active):
            return False
        self.active = active
        lowest = self.heights[active].min() if active.any() else self.heights.max()
        if not self.cut or lowest == self.heights.min():
            lowest = -math.inf
        for name in self.learns:
            trains = bool(self.height[name] >= lowest)
            if name in self.owner:
                trains = bool(active[self.owner[name]])
            elif name in self.row_owner:
                rows = torch.where(self.row_owner[name] < 0, trains, active[self.row_owner[name]])
                trains = bool(rows.any())
                layer, _, short = name.rpartition(".")
                if short == "weight":
                    self.model.get_submodule(layer).divide(None if rows.all() else rows.nonzero().flatten(), self.stop_error)
            parameter = self.model.get_parameter(name).requires_grad_(trains)
            if not trains:
                parameter.grad = None
        for handle in self.detached:
            handle.remove()
        self.detached = []
        if self.stop_error and not self.row_owner:
            resting = (unit for unit, trains in zip(self.units, active.tolist(), strict=True) if not trains)
            entrances = [self.model.get_submodule(name) for unit in resting for name in unit.entrances]
            self.detached = [layer.register_forward_pre_hook(_detached) for layer in entrances]
        return True

    def hand_over(self) -> None:
        """Give each piece that is rows of a parameter its gradient, or none if it rests: optimisers pass over those."""
        active = [*self.active.tolist(), True]  # the last is for rows of no unit
        for pieces in self.divided:
            gradient = pieces[0].parameter.grad
            if gradient is None:
                parts = [None] * len(pieces)
            else:  # all at once, because filters are thousands
                parts = gradient.split([piece.rows.stop - piece.rows.start for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                piece.leaf.grad = part if active[-1 if piece.unit is None else piece.unit] else None

    @torch.no_grad()
    def drift(self, optimizer: torch.optim.AdamW) -> None:
        """Move what rests on with its last momentum, as AdamW would if momentum and variance stayed (Multirate)."""
        group_of = {id(leaf): group for group in optimizer.param_groups for leaf in group["params"]}
        for piece in self.pieces:
            state = optimizer.state.get(piece.leaf)
            if not state or piece.unit is None or self.active[piece.unit]:
                continue
            group = group_of[id(piece.leaf)]
            first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
            piece.leaf.mul_(1 - group["lr"] * group["weight_decay"])
            spread = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
            piece.leaf.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / first)


def _detached(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Stop the error at the entrance of a resting branch; not in eval mode, or kernels computed there would lack its part."""
    return (inputs[0].detach(), *inputs[1:]) if layer.training else inputs
