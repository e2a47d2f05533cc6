"""A mixture of experts in the place of a block's MLP, as the Switch Transformer has it (arXiv 2101.03961).

A router sends each token to the one expert that it finds most probable. An expert takes a fixed number of tokens of each
context, in the order of the text; those that find no place pass the layer by. Every shape is fixed, so that the network can be
counted, cut and compiled, and a context's output depends on no other one of its batch.

Letters: B batch, T tokens, D channels, E experts, C places of an expert.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

BALANCE = 0.01  # weight of the loss that keeps experts equally busy, as published


class Routes(NamedTuple):
    shares: Tensor  # [B, T, E], what the router thinks of each expert, in float32
    expert: Tensor  # [B, T], the one that is taken
    place: Tensor  # [B, T], at which place of it; from C on there is none


class SwitchMlp(nn.Module):
    """Experts, each of them an MLP, and a router in front of them."""

    def __init__(self, width: int, hidden: int, num_experts: int, capacity: float) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(width, hidden) for _ in range(num_experts))
        self.capacity = capacity  # places of all experts, in tokens of a context
        self.loss_share = 1.0  # of an update's loss that a batch has; the trainer sets it

    def places(self, tokens: int) -> int:
        """Return how many of a context's tokens an expert takes: C."""
        return min(tokens, math.ceil(self.capacity * tokens / len(self.experts)))

    def routes(self, x: Tensor) -> Routes:
        """Return where each token of [B, T, D] goes."""
        shares = self.router(x).float().softmax(-1)
        expert = shares.argmax(-1)
        taken = F.one_hot(expert, len(self.experts))
        return Routes(shares, expert, (taken.cumsum(1) * taken).sum(-1) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        number, (shares, expert, place) = self.places(x.shape[1]), self.routes(x)
        beyond = number * len(self.experts)  # a place that belongs to no expert
        index = torch.where(place < number, expert * number + place, beyond)[..., None].expand_as(x)
        room = x.new_zeros(len(x), beyond + 1, x.shape[2]).scatter(1, index, x)
        done = [mlp(part) for mlp, part in zip(self.experts, room[:, :beyond].split(number, 1), strict=True)]
        room = torch.cat([*done, torch.zeros_like(done[0][:, :1])], 1)
        out = room.gather(1, index) * shares.gather(2, expert[..., None]).to(room.dtype)
        return _WithLoss.apply(out, self.imbalance(shares, expert) * (self.loss_share * BALANCE)) if self.training else out

    def imbalance(self, shares: Tensor, expert: Tensor) -> Tensor:
        """Return the published loss of balance, of each context by itself and then averaged: 1 where all are equally busy.

        By itself, so that a batch in pieces, on several devices too, has the loss of the whole batch.
        """
        busy = F.one_hot(expert, len(self.experts)).float().mean(1)
        return len(self.experts) * (busy * shares.mean(1)).sum(-1).mean()


class _WithLoss(torch.autograd.Function):
    """Returns its input; in the backward pass it adds a loss's gradient to what is differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)


@torch.no_grad()
def routing(model: nn.Module, tokens: Tensor) -> list[dict[str, float | str]]:
    """Return a row for each mixture of a network: the share of `tokens` that its busiest expert is sent, and that of those that
    find no place."""
    rows, hooks = [], []

    def look(name: str):
        def hook(layer: SwitchMlp, inputs: tuple[Tensor, ...]) -> None:
            routes = layer.routes(inputs[0])
            busiest = F.one_hot(routes.expert, len(layer.experts)).float().mean((0, 1)).max().item()
            dropped = (routes.place >= layer.places(inputs[0].shape[1])).float().mean().item()
            rows.append({"layer": name, "busiest": busiest, "dropped": dropped})

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, SwitchMlp):
            hooks.append(layer.register_forward_pre_hook(look(name)))
    was_training = model.training
    try:
        model.eval()(tokens)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return rows
