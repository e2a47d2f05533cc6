"""Layers of which only some rows train: attention heads within q, k and v, filters of a convolution.

In training mode only; in eval mode they are what they replace, so that kernels and gradients computed there are whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ByRows:
    """What layers share of which only some rows train."""

    rows: Tensor | None = None  # of the weight, that get a gradient; none: all
    stop_error = False  # whether only these rows send the error on, too
    has_way_around = False  # for the error, when all rows rest; or nothing below would learn

    def divide(self, rows: Tensor | None, stop_error: bool) -> None:
        self.rows, self.stop_error = None if rows is None else rows.to(self.weight.device), stop_error

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or not self.training:
            return super().forward(x)
        if not len(self.rows):
            return super().forward(x.detach() if self.stop_error and self.has_way_around else x)
        return self.by_rows(*_cast(x, self.weight, self.bias), self.rows.to(x.device))


class RowLinear(_ByRows, nn.Linear):
    """A Linear of which only some rows train, in a residual branch."""

    has_way_around = True

    def by_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        return _LinearRows.apply(x, weight, bias, rows, self.stop_error)


class RowConv2d(_ByRows, nn.Conv2d):
    """A Conv2d of which only some filters train."""

    def by_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        return _ConvRows.apply(x, weight, bias, rows, self.stop_error, self.stride, self.padding, self.dilation)


def with_rows(name: str, layer: nn.Module) -> nn.Module:
    """Return a layer of the same parameters of which rows can rest."""
    if isinstance(layer, _ByRows):
        return layer
    own = {name for name, _ in layer.named_parameters()}  # weight_norm and spectral_norm put others in their place
    if not is_matrix(layer) or not own <= {"weight", "bias"}:
        raise ValueError(f"rows of {name} ({layer}) cannot rest alone; only those of a plain Linear or Conv2d without groups can")
    divided = object.__new__(RowLinear if isinstance(layer, nn.Linear) else RowConv2d)
    divided.__dict__ = layer.__dict__
    return divided


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer is the product of its weight with something at each place; subclasses may do anything to their weights."""
    if "forward" in vars(layer):  # somebody put another one in its place
        return False
    if type(layer) in (nn.Conv2d, RowConv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, RowLinear)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do what autocast does for a matrix product; inside an autograd.Function it would come too late for the backward."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, stop_error):
        ctx.save_for_backward(x, weight, rows)
        ctx.has_bias, ctx.stop_error = bias is not None, stop_error
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        x, weight, rows = ctx.saved_tensors
        part = delta.index_select(-1, rows)
        flat = part.flatten(0, -2)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = part @ weight.index_select(0, rows) if ctx.stop_error else delta @ weight
        to_weight = torch.zeros_like(weight).index_copy(0, rows, flat.T @ x.flatten(0, -2))
        if ctx.has_bias:
            to_bias = weight.new_zeros(len(weight)).index_copy(0, rows, flat.sum(0))
        return to_x, to_weight, to_bias, None, None


class _ConvRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, stop_error, stride, padding, dilation):
        ctx.save_for_backward(x, weight, rows)
        ctx.has_bias, ctx.stop_error, ctx.how = bias is not None, stop_error, (stride, padding, dilation)
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx, delta):
        x, weight, rows = ctx.saved_tensors
        part, some = delta.index_select(1, rows), weight.index_select(0, rows)
        more = (*ctx.how, False, [0, 0], 1)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            pair = (part, some) if ctx.stop_error else (delta, weight)
            to_x = torch.ops.aten.convolution_backward(pair[0], x, pair[1], None, *more, [True, False, False])[0]
        gradient = torch.ops.aten.convolution_backward(part, x, some, None, *more, [False, True, False])[1]
        to_weight = torch.zeros_like(weight).index_copy(0, rows, gradient)
        if ctx.has_bias:
            to_bias = weight.new_zeros(len(weight)).index_copy(0, rows, part.sum((0, 2, 3)))
        return to_x, to_weight, to_bias, None, None, None, None, None
