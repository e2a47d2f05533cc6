"""Networks on top of a timm network: its maps of features as a pyramid, UPerNet's head, Mask R-CNN.

Letters: B images, C channels, S pixels of a side, K classes, W width of a pyramid.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from incubate_lib.config import in_a_line

FINEST = 3  # pixels, the smallest stride of a level: a quarter of 14 is one
MOST_LEVELS = 4
GROUP = 16  # channels with a norm in common
FEW = 256  # pixels; smaller images have fewer regions
# regions before and after suppression, and sampled to learn from; objects found at most; side of an anchor, in strides
LARGE, SMALL = (2000, 1000, 512, 100, 8), (200, 100, 32, 20, 4)
ALL_REGIONS, MASKED = 7, 14  # side of a region's map: for its class and box, and for its mask
POSITIVE = 4  # one in so many sampled regions shows an object, at most


class Pyramid(nn.Module):
    """A timm network and a pyramid of its features: [B, C, S, S] → maps [B, W, S/s, S/s] with strides s, finest first.

    Stages give a feature pyramid as they are; a plain network, whose blocks all have one grid, gives ViTDet's simple one
    (arXiv 2203.16527). ValueError for a network whose features are no map.
    """

    def __init__(self, backbone: nn.Module, shape: Sequence[int], width: int) -> None:
        super().__init__()
        self.backbone = backbone
        maps = _all_maps(backbone, shape)
        sides = [features.shape[-1] for features in maps]
        last = {side: place for place, side in enumerate(sides)}  # the last map of each size
        self.places = sorted(last.values())[-MOST_LEVELS:]
        self.is_plain = len(last) == 1
        strides = [shape[-1] / sides[place] for place in self.places]
        widths = [maps[place].shape[1] for place in self.places]
        if self.is_plain:
            scales = [scale for scale in (4, 2, 1, 0.5) if strides[0] / scale >= FINEST]
            self.levels = nn.ModuleList(_level(widths[0], width, scale) for scale in scales)
            strides = [strides[0] / scale for scale in scales]
        else:
            self.levels = FeaturePyramidNetwork(widths, width, norm_layer=LayerNorm2d)
        self.strides, self.width = strides, width
        for parameter in _unused(backbone, shape, self.places, self.is_plain):
            parameter.requires_grad_(False)  # the norm of a class token's way, for example

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        maps = _maps(self.backbone, x, self.places, self.is_plain)
        if self.is_plain:
            return OrderedDict((str(i), level(maps[-1])) for i, level in enumerate(self.levels))
        return self.levels(OrderedDict((str(i), features) for i, features in enumerate(maps)))


class OnTop(nn.Module):
    """What stands on a pyramid."""

    pyramid: Pyramid

    @property
    def backbone(self) -> nn.Module:
        """The timm network, without its classifier."""
        return self.pyramid.backbone

    def no_weight_decay(self) -> set[str]:
        """Return the backbone's embeddings and tokens, by their names here."""
        path = next(path for path, module in self.named_modules() if module is self.backbone)
        return {f"{path}.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}


def _level(features: int, width: int, scale: float) -> nn.Sequential:
    """Return what makes a map of another resolution, `scale` times as fine."""
    up: list[nn.Module] = [nn.MaxPool2d(2)] if scale < 1 else []
    for _ in range(int(math.log2(scale)) if scale > 1 else 0):
        up += [LayerNorm2d(features), nn.GELU()] if up else []
        up.append(nn.ConvTranspose2d(features, features // 2, 2, 2))
        features //= 2
    return nn.Sequential(*up, _conv(features, width, 1), _conv(width, width, 3))


def _conv(features: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(features, width, kernel, padding=kernel // 2, bias=False), LayerNorm2d(width))


def _maps(backbone: nn.Module, x: Tensor, places: list[int] | None, norm: bool) -> list[Tensor]:
    return backbone.forward_intermediates(x, places, norm=norm, output_fmt="NCHW", intermediates_only=True)


def _all_maps(backbone: nn.Module, shape: Sequence[int]) -> list[Tensor]:
    """Return all maps of features of an image, on the meta device; ValueError where there are none."""
    try:
        maps = _on_meta(backbone, shape, None, False)[1]
    except Exception as error:  # what knows of no maps fails somewhere inside
        raise ValueError(f"gives no maps of features ({type(error).__name__}: {in_a_line(error)[:80]})") from None
    if not maps or any(features.ndim != 4 or min(features.shape[2:]) < 2 for features in maps[-1:]):
        raise ValueError(f"gives features of shape {tuple(maps[-1].shape[1:]) if maps else ()}, which are no grid of places")
    return maps


@torch.enable_grad()
def _unused(backbone: nn.Module, shape: Sequence[int], places: list[int], norm: bool) -> list[nn.Parameter]:
    """Return the parameters that no map depends on; distributed training would wait for their gradients."""
    twin, maps = _on_meta(backbone, shape, places, norm)
    found = torch.autograd.grad(sum(features.sum() for features in maps), list(twin.parameters()), allow_unused=True)
    return [parameter for parameter, gradient in zip(backbone.parameters(), found, strict=True) if gradient is None]


def _on_meta(backbone: nn.Module, shape: Sequence[int], places: list[int] | None, norm: bool) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy of a network, and its maps of an image."""
    twin = copy.deepcopy(backbone).to("meta").requires_grad_(True).eval()
    return twin, _maps(twin, torch.empty(1, *shape, device="meta"), places, norm)


class UPerNet(OnTop):
    """Unified perceptual parsing (arXiv 1807.10221): [B, C, S, S] → class scores [B, K, S, S].

    Group norm (arXiv 1803.08494) stands where the paper has batch norm, whose statistics of a few images a device are poor.
    """

    def __init__(
        self, backbone: nn.Module, shape: Sequence[int], classes: int, width: int = 512, bins: Sequence[int] = (1, 2, 3, 6)
    ):
        super().__init__()
        width = _width(backbone, width)
        self.pyramid, self.bins = Pyramid(backbone, shape, width), bins
        levels = len(self.pyramid.strides)
        self.pooled = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU()) for _ in bins)
        self.top = _block(width * (1 + len(bins)), width)
        self.smooth = nn.ModuleList(_block(width, width) for _ in range(levels - 1))
        self.fuse = _block(width * levels, width)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        *finer, top = self.pyramid(x).values()
        pooled = [
            _resized(layer(F.adaptive_avg_pool2d(top, side)), top) for layer, side in zip(self.pooled, self.bins, strict=True)
        ]
        maps = [self.top(torch.cat([top, *pooled], 1))]
        for features in reversed(finer):  # what the coarser level says is added
            maps.insert(0, features + _resized(maps[0], features))
        maps = [layer(features) for layer, features in zip(self.smooth, maps[:-1], strict=True)] + maps[-1:]
        fused = self.fuse(torch.cat([_resized(features, maps[0]) for features in maps], 1))
        return _resized(self.classify(fused), x)


def _block(features: int, width: int) -> nn.Sequential:
    norm = nn.GroupNorm(math.gcd(width, max(1, width // GROUP)), width)
    return nn.Sequential(nn.Conv2d(features, width, 3, padding=1, bias=False), norm, nn.ReLU())


def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _width(backbone: nn.Module, most: int) -> int:
    """Return how wide a pyramid is: as the features, but no wider than published."""
    return min(most, backbone.num_features)


class Detector(OnTop):
    """torchvision's Mask R-CNN (arXiv 1703.06870) over a pyramid.

    It takes images [B, C, S, S] that are square and normalised already. With what they show, as a pair (images, targets),
    it gives the losses by name; in evaluation a dict of boxes, labels, scores and masks for each. While it trains, images
    alone give what the layers give for as many regions as are sampled, which is what FLOPs are counted by.
    """

    def __init__(self, backbone: nn.Module, shape: Sequence[int], classes: int, width: int = 256) -> None:
        super().__init__()
        width = _width(backbone, width)
        self.size = shape[-1]
        features = Pooled(Pyramid(backbone, shape, width))
        strides = features.pyramid.strides
        if any(stride != 2 ** round(math.log2(stride)) for stride in strides):
            raise ValueError(
                f"has maps with strides {strides}; those of Mask R-CNN must be powers of two: another patch_size does"
            )
        names = [str(i) for i in range(len(strides))]
        before, after, self.sampled, most, anchor = LARGE if self.size >= FEW else SMALL
        sizes = tuple((anchor * int(stride),) for stride in [*strides, 2 * strides[-1]])
        network = MaskRCNN(
            features,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            rpn_head=RPNHead(width, 3),
            rpn_pre_nms_top_n_train=before, rpn_pre_nms_top_n_test=before // 2,
            rpn_post_nms_top_n_train=after, rpn_post_nms_top_n_test=after,
            box_batch_size_per_image=self.sampled,
            box_detections_per_img=most,
            box_roi_pool=MultiScaleRoIAlign(names, ALL_REGIONS, 2), mask_roi_pool=MultiScaleRoIAlign(names, MASKED, 2),
            box_head=TwoMLPHead(width * ALL_REGIONS**2, 4 * width), box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1), mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        )  # fmt: skip
        self.features, self.rpn, self.roi_heads = features, network.rpn, network.roi_heads  # its own resizing is left out

    @property
    def pyramid(self) -> Pyramid:
        return self.features.pyramid

    def forward(self, x: Any) -> Any:
        images, targets = x if isinstance(x, tuple) else (x, None)
        maps = self.features(images)
        if self.training and targets is None:
            return self._counted(maps)
        sizes = [(self.size, self.size)] * len(images)
        regions, losses = self.rpn(ImageList(images, sizes), maps, targets)
        found, more = self.roi_heads(maps, regions, sizes, targets)
        return losses | more if self.training else found

    def _counted(self, maps: "OrderedDict[str, Tensor]") -> dict[str, Any]:
        heads, some = self.roi_heads, next(iter(maps.values()))

        def regions(number: int, side: int) -> Tensor:
            return F.adaptive_avg_pool2d(some, side).repeat_interleave(number, 0)

        boxes = heads.box_predictor(heads.box_head(regions(self.sampled, ALL_REGIONS)))
        masks = heads.mask_predictor(heads.mask_head(regions(self.sampled // POSITIVE, MASKED)))
        return {"rpn": self.rpn.head(list(maps.values())), "boxes": boxes, "masks": masks}


class Pooled(nn.Module):
    """A pyramid with a coarser level more, for large regions, as torchvision's detectors ask for their backbone."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, pyramid.width

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        maps = self.pyramid(x)
        maps["pool"] = F.max_pool2d(next(reversed(maps.values())), 1, 2)
        return maps
