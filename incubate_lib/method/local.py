"""Local learning: all modules of a network at once, each from a loss of its own; no gradient leaves a module.

InfoPro (arXiv 2101.10832) has a module keep what its images look like and tell what they show: a decoder and a small
classifier, or supervised contrast (arXiv 2004.11362) instead of the classifier. DGL, decoupled greedy learning (arXiv
1901.08164), has the classifier alone. The last module has the network's own loss. What was added is left out in the end.

Both papers have ResNets for images of 32 pixels. For these, heads and weights are the papers'; all else is our own choice, and
marked so. Here K modules share one optimiser, and none is updated before all have had their turn.

Letters used for shapes: B batch, N tokens, C channels, H and W pixels.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incubate_lib.method.incubation import Copied, Replay, layers_before
from incubate_lib.method.network import Partition, replaced, run_to

Method = Literal["infopro", "dgl"]
Pair = tuple[float, float]  # at the first and at the last of the modules that have a head; linear between them

SMALL = 64  # pixels, and channels, up to which heads are as published
HIDDEN = 128  # features of InfoPro's classifier; own choice: also the channels of heads of wider networks
COLOURS = 12  # channels within the decoder
TEMPERATURE = 0.07  # of contrast
# weights of reconstruction and of the task, by the number of modules
PUBLISHED = {2: ((5, 5), (0.5, 0.5)), 4: ((1, 0), (0, 1)), 8: ((5, 0), (0, 1)), 16: ((5, 0.5), (0, 1))}
TOKENS = ((5, 1), (0.5, 1))  # own choice, for networks of tokens


class Local(NamedTuple):
    """What a module's loss is made of."""

    output: Tensor  # [B, outputs]: logits, or features where the module learns by contrast
    weight: float = 1.0  # of the loss of that
    contrast: bool = False
    decoded: Tensor | None = None  # [B, C, H, W]: logits of the images' pixels
    decoded_weight: float = 0.0


def as_map(features: Tensor) -> Tensor:
    """Return what a layer hands on as a map [B, C, H, W]. ValueError unless it is one, or tokens [B, N, C] of a square.

    Of tokens those that are left over come first (class token, registers) and are left out. Maps whose channels come last
    are those whose second and third sizes are equal, unless the last two are.
    """
    if features.ndim == 3:
        side = math.isqrt(features.shape[1])
        return features[:, features.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    if features.ndim != 4:
        raise ValueError(f"a module hands on {tuple(features.shape)}, which is neither a map nor tokens")
    _, first, second, third = features.shape
    return features.permute(0, 3, 1, 2) if first == second != third else features


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """Return the supervised contrastive loss of features [B, D] with labels [B], the mean over those that have a partner."""
    features = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    partners = (labels[:, None] == labels[None]) & ~itself
    likely = (features @ features.T / TEMPERATURE).masked_fill(itself, float("-inf")).log_softmax(1)
    number = partners.sum(1)
    each = -likely.masked_fill(~partners, 0).sum(1) / number.clamp(min=1)
    return each.sum() / (number > 0).sum().clamp(min=1)


class InfoProHead(nn.Module):
    """A decoder to the images' pixels, and a classifier of one convolution and two linear layers.

    Published: the decoder works at the image's size, and the convolution halves maps of 16 and 32 channels and doubles these.
    Own choice, for tokens and larger images: the decoder's first convolution comes before the map is enlarged, and the
    classifier's has at most 128 channels.
    """

    def __init__(self, features: Tensor, image: tuple[int, int, int], outputs: int, by_contrast: bool, weights: Pair) -> None:
        super().__init__()
        channels, self.size = as_map(features).shape[1], image[1:]
        self.enlarge_first = features.ndim == 4 and max(self.size) <= SMALL
        self.by_contrast, self.weights = by_contrast, weights
        self.narrow = nn.Sequential(_conv(channels, COLOURS, 3, bias=True), nn.BatchNorm2d(COLOURS), nn.ReLU())
        self.pixels = _conv(COLOURS, image[0], 3, bias=True)
        halved = self.enlarge_first and channels in (16, 32)
        wide = 2 * channels if halved else channels if channels <= SMALL else HIDDEN
        self.conv = nn.Sequential(_conv(channels, wide, 3, 2 if halved else 1), nn.BatchNorm2d(wide), nn.ReLU())
        self.classify = nn.Sequential(nn.Linear(wide, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN if by_contrast else outputs))

    def forward(self, features: Tensor) -> Local:
        x = as_map(features)
        output = self.classify(self.conv(x).mean((2, 3)))
        decoded = self._enlarged(self.narrow(x)) if not self.enlarge_first else self.narrow(self._enlarged(x))
        return Local(output, self.weights[1], self.by_contrast, self.pixels(decoded), self.weights[0])

    def _enlarged(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=True)


def pooled(x: Tensor, side: int) -> Tensor:
    """Return maps [B, C, H, W] averaged to [B, C, side, side], as by adaptive_avg_pool2d, which is not deterministic on a GPU."""
    for dim in (2, 3):
        size = x.shape[dim]
        bounds = [(i * size // side, math.ceil((i + 1) * size / side)) for i in range(side)]
        x = torch.cat([x.narrow(dim, first, end - first).mean(dim, keepdim=True) for first, end in bounds], dim)
    return x


class DGLHead(nn.Module):
    """A classifier: pooled to a quarter, three 1 × 1 convolutions, pooled to 2 × 2, three layers with batch norm, one without.

    Own choice for more than 64 channels: the convolutions have 128 channels.
    """

    def __init__(self, features: Tensor, outputs: int) -> None:
        super().__init__()
        _, channels, height, _ = as_map(features).shape
        self.side = max(2, height // 4)
        wide = channels if channels <= SMALL else HIDDEN
        convs = [(channels if i == 0 else wide, wide) for i in range(3)]
        self.convs = nn.Sequential(*(layer for a, b in convs for layer in (_conv(a, b, 1), nn.BatchNorm2d(b), nn.ReLU())))
        wide *= 4
        layers = [layer for _ in range(3) for layer in (nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU())]
        self.classify = nn.Sequential(*layers, nn.Linear(wide, outputs))

    def forward(self, features: Tensor) -> Local:
        x = self.convs(pooled(as_map(features), self.side))
        return Local(self.classify(pooled(x, 2).flatten(1)))


class TokenHead(nn.Module):
    """What tells of each token of a text what it is asked for: two layers behind a norm. Own choice; DGL knows images only."""

    def __init__(self, features: Tensor, outputs: int) -> None:
        super().__init__()
        width = features.shape[-1]
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, features: Tensor) -> Local:
        return Local(self.classify(features))


def _conv(inner: int, outer: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=bias)


class Joined(nn.Module):
    """A head as a network with one output, for those who count what it keeps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        made = self.head(x)
        return made.output if made.decoded is None else torch.cat([made.output, made.decoded.flatten(1)], dim=1)


def handed_on(partition: Partition, index: int) -> Tensor:
    """Return an empty tensor on the meta device of the shape that module `index` hands on, for two images."""
    return torch.empty(partition.chain.stretches[partition.ends[index]].shape, device="meta")


def weights_of(partition: Partition, given: tuple[Pair | None, Pair | None] = (None, None)) -> list[Pair]:
    """Return the weights (of reconstruction, of the task) of all modules but the last, linear between first and last.

    None: the published ones for so many modules. Own choice: of another number those of the nearest, and of tokens `TOKENS`.
    """
    heads = partition.num_modules - 1
    nearest = min(PUBLISHED, key=lambda modules: abs(modules - partition.num_modules))
    default = TOKENS if heads and handed_on(partition, 0).ndim == 3 else PUBLISHED[nearest]
    ends = [own or usual for own, usual in zip(given, default, strict=True)]
    shares = [i / (heads - 1) if heads > 1 else 0.0 for i in range(heads)]
    return [tuple(first + share * (last - first) for first, last in ends) for share in shares]


def heads_of(
    method: Method,
    partition: Partition,
    image: tuple[int, ...],
    outputs: int,
    by_contrast: bool = False,
    weights: tuple[Pair | None, Pair | None] = (None, None),
) -> list[nn.Module]:
    """Return the heads of all modules but the last, freshly initialised, for images [C, H, W] or contexts of [T] tokens.

    ValueError where a module hands on what is no map, and for InfoPro of text.
    """
    features = [handed_on(partition, i) for i in range(partition.num_modules - 1)]
    if len(image) == 1:
        if method != "dgl":
            raise ValueError("a text has no pixels that a module could draw again")
        return [TokenHead(one, outputs) for one in features]
    if method == "dgl":
        return [DGLHead(one, outputs) for one in features]
    both = zip(features, weights_of(partition, weights), strict=True)
    return [InfoProHead(one, image, outputs, by_contrast, pair) for one, pair in both]


class LocalLearning(nn.Module):
    """A network whose modules learn one after the other in each update.

    In train mode `forward(x)` returns the modules' indices, and `forward(x, index)`, called in their order, what the loss of a
    module is made of. What it hands on is kept without its graph, so that of one module at a time is there. In eval mode
    `forward(x)` returns the network's output.
    """

    def __init__(self, network: nn.Module, partition: Partition, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network, self.partition, self.heads = network, partition, nn.ModuleList(heads)
        before = [layers_before(network, partition, i) for i in range(partition.num_modules)]
        self.replays = [{path: Copied(network.get_submodule(path)) for path in paths} for paths in before]
        self._share()

    def _share(self) -> None:
        """Make the parts anew: they share the network's weights."""
        # in a list: all that they hold is registered by the network
        self.parts = [replaced(self.network, replays) if replays else self.network for replays in self.replays]
        self.train(self.training)

    def _apply(self, *how: Any, **more: Any) -> "LocalLearning":
        super()._apply(*how, **more)  # which may move weights to other tensors
        self._share()
        return self

    def train(self, mode: bool = True) -> "LocalLearning":
        super().train(mode)
        for part in self.parts:
            part.train(mode)
        return self

    def forward(self, x: Tensor, index: int | None = None) -> Any:
        """Map images [B, C, H, W] to an output, or to what one module learns from: see above."""
        if index is None:
            return range(self.partition.num_modules) if self.training else self.network(x)
        later = [place for replays in self.replays[index + 1 :] for place in replays.items()]
        with ExitStack() as hooks:
            for path, replay in later:
                if self.partition.module_of(self.partition.chain.spans[path][1]) == index:
                    keep = partial(_keep_shape, replay=replay)
                    hooks.enter_context(self.parts[index].get_submodule(path).register_forward_hook(keep))
            output = run_to(self.parts[index], self.partition, index, x)
        if index == self.partition.num_modules - 1:
            return Local(output)
        for path, replay in self.replays[index + 1].items():
            if path in self.partition.chain.stretches[self.partition.ends[index]].layers:
                replay.value = output.detach()
        return self.heads[index](output)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the network wants no decay of, as timm's networks say it."""
        return {f"network.{name}" for name in getattr(self.network, "no_weight_decay", set)()}

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each module and its head."""
        own: list[list[nn.Parameter]] = [[] for _ in range(self.partition.num_modules)]
        for name, parameter in self.network.named_parameters():
            own[self.partition.owner(name)].append(parameter)
        for parameters, head in zip(own, self.heads, strict=False):
            parameters.extend(head.parameters())
        return own


def _keep_shape(layer: nn.Module, args: Any, output: Any, replay: Replay) -> None:
    """Have a layer stand for what it returns: its values are asked for at the cut only, and given there."""
    replay.value = output.new_zeros(()).expand(output.shape) if isinstance(output, Tensor) else output
