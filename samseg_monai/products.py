"""Matrix products in float32 on x86 CPUs with oneDNN instead of MKL.

PyTorch hands products of float32 matrices to MKL, which on AMD's processors does not use all that they have: with
AVX-512 oneDNN was 1.9 to 2.4 times as fast there on one thread (190 to 245 against 95 to 110 GFLOP/s, PyTorch 2.14).
oneDNN comes with PyTorch and is what its compiler chooses for these products. Sums are taken in another order, nothing
else differs. Where a product is small, of another type, on another device or part of a graph that is being drawn, all
functions here do what PyTorch does.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1 << 19  # multiplications, below which a call costs more than it saves
NARROWEST = 32  # rows or columns of a weight, below which MKL is faster: the factors of LoRA


@lru_cache
def _available() -> bool:
    """Whether this PyTorch on this processor has the operation."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fits(*tensors: Tensor) -> bool:
    """Whether products of these may go to oneDNN, however small they are."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and _available()
        and bool(torch.backends.mkldnn.enabled)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, (..., K) and (N, K) to (..., N), without a gradient, of tensors that ``fits``."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), _dense(weight), bias, "none", [], "")


def times_plus(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """``x weight^T + other``, with other (..., N), as ``times``."""
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), other, _dense(weight), None, "add")


def _dense(weight: Tensor) -> Tensor:
    """Row by row or column by column without gaps: for any other order oneDNN has a loop hundreds of times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, differentiable once where oneDNN computes it."""
    # the size last: it must not be asked where a graph for all sizes is drawn
    given = (x, weight) if bias is None else (x, weight, bias)
    if not fits(*given) or x.numel() * weight.shape[0] < SMALLEST or min(weight.shape) < NARROWEST:
        return F.linear(x, weight, bias)
    learning = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if learning and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return times(x.detach(), weight.detach(), None if bias is None else bias.detach())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        # what is frozen keeps no activations
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # not a view, so that it may be overwritten
        return torch.ops.aten._unsafe_view(
            times(x.reshape(-1, x.shape[-1]), weight, bias), (*x.shape[:-1], len(weight))
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x = times(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        for_weight = None
        if ctx.needs_input_grad[1]:
            # oneDNN wants the first factor row by row: the smaller of both is copied
            given = x.flatten(0, -2)
            wide = weight.shape[0] > weight.shape[1]
            for_weight = times(given.t(), rows.t()).t() if wide else times(rows.t(), given.t())
        return for_x, for_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """PyTorch's linear layer with its product from here."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def adopt(module: nn.Module) -> None:
    """Make all plain linear layers below ``module`` to ``Linear``; they stay the same objects."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
