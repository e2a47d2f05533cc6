"""Time, FLOP rate and memory of steps that are measured in turn; nothing here knows what a step does."""

import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PIECE_SECONDS = 0.3  # steps are timed in pieces of at least that long
WARMUP_STEPS = 3  # not counted; on a CPU a slow step needs only one
SLOW_SECONDS = 2.0
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(eq=False)
class Variant:
    """One thing to be timed, and what a step of it costs by count."""

    name: str
    step: Callable[[], Tensor]
    flops: int  # of a step
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    compiled: bool = False
    exact: bool = False  # repeats bit for bit, as our phases do; matters on GPUs only
    against: "Variant | None" = None  # whose time its own is divided by
    steps: int = 1  # of a timed piece
    memory: int | None = None  # peak bytes of a step


def measure(variants: Iterable[Variant], *, rounds: int, device: torch.device, matmul: Variant) -> list[dict[str, Any]]:
    """Time variants and a matrix product in turn, round after round; return one row a variant, medians over rounds.

    Ratios are taken within a round, so that a machine whose speed drifts does not bend them. Variants are built one
    after another, so that a GPU's allocator can report what each holds.
    """
    alive: list[tuple[Variant, int]] = []
    gc.collect()  # what was measured before is to be gone for good, not to go in the middle of this
    before = _allocated(device)
    for variant in variants:
        if device.type == "cuda":
            gc.collect()
        alive.append((variant, _allocated(device) - before))
        before = _allocated(device)
    for variant, held in alive:
        before = _allocated(device)
        warm_up(variant, device)
        variant.memory = step_memory(variant, device, held + _allocated(device) - before)
    times: list[dict[Variant, float]] = []
    for turn in range(rounds):
        order = [matmul, *(variant for variant, _ in alive)]
        times.append({variant: _seconds(variant, device) for variant in (order[::-1] if turn % 2 else order)})
    if any(variant.compiled for variant, _ in alive):
        torch._dynamo.reset()  # it would keep the models
    return [_row(variant, times, matmul) for variant, _ in alive]


def _row(variant: Variant, times: list[dict[Variant, float]], matmul: Variant) -> dict[str, Any]:
    own, product = ([of[which] for of in times] for which in (variant, matmul))
    other = variant.against
    ratios = [of[variant] / of[other] for of in times] if other else [math.nan]
    shares = [variant.flops / t * p / matmul.flops for t, p in zip(own, product, strict=True)]
    numbers = {"variant": variant.name, "rounds": len(own), "steps_a_round": variant.steps, "step_flops": variant.flops}
    speeds = {
        "flops_per_second": variant.flops / statistics.median(own),
        "matmul_flops_per_second": matmul.flops / statistics.median(product),
        "share_of_matmul": statistics.median(shares),
        "peak_memory_bytes": variant.memory,
        "against": other.name if other else None,
        "flops_ratio": variant.flops / other.flops if other else math.nan,
    }
    return numbers | _spread("step_seconds", own) | speeds | _spread("ratio", ratios)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def yardstick(device: torch.device, precision: str) -> Variant:
    """Return a large square matrix product in that precision: what this machine can do, here and now."""
    n = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    product = Variant("matmul", lambda: a @ b, 2 * n**3)
    warm_up(product, device)
    return product


def warm_up(variant: Variant, device: torch.device) -> None:
    """Step a few times, and settle how many steps make a timed piece."""
    seconds = math.inf
    for _ in range(WARMUP_STEPS):
        seconds = min(seconds, _seconds(variant, device))
        if seconds > SLOW_SECONDS and device.type == "cpu" and not variant.compiled:
            break
    variant.steps = max(1, math.ceil(PIECE_SECONDS / seconds))


def _seconds(variant: Variant, device: torch.device) -> float:
    """Return the seconds of a step, over a piece of them; the device is synchronised before the clock is read."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(variant.exact)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(variant.steps):
        variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / variant.steps


def step_memory(variant: Variant, device: torch.device, held: int = 0) -> int | None:
    """Return the peak bytes of a step: weights, gradients, optimiser states, activations.

    On a GPU its allocator reports it, `held` being what the variant has there between steps. On a CPU live tensors are
    counted; compiled code hides them, so then it is None.
    """
    if device.type == "cuda":
        before = _allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        variant.step()
        return held + torch.cuda.max_memory_allocated(device) - before
    if variant.compiled:
        return None
    with LiveBytes(_state(variant)) as counted:
        variant.step()
    return counted.peak


def _state(variant: Variant) -> Iterable[Tensor]:
    """Yield what lies there between two steps."""
    for parameter in variant.model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in variant.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered: those it is given, and every result of an operation.

    Saved activations and gradients are results too. A storage counts once, however many views it has, until it is
    freed. What a kernel takes for itself is not seen.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()
        self._add(tensors)

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self._add(value for value in tree_iter(result) if isinstance(value, Tensor))
        return result

    def _add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self.seen:
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        self.seen.remove(key)
        self.live -= size


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
