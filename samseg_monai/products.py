"""Matrix products on x86 CPUs with oneDNN: in float32 instead of MKL's, and of 8-bit numbers where that is asked for.

PyTorch hands products of float32 matrices to MKL, which on AMD's processors does not use all that they have: with
AVX-512 oneDNN was 1.9 to 2.4 times as fast there on one thread (190 to 245 against 95 to 110 GFLOP/s, PyTorch 2.14).
oneDNN comes with PyTorch and is what its compiler chooses for these products. Sums are taken in another order, nothing
else differs. Where a product is small, of another type, on another device or part of a graph that is being drawn, all
functions here do what PyTorch does.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samseg_monai.errors import ConfigError

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


class SharedLinear(Linear):
    """A linear layer with the tensors of ``base``, under the same names: a plain checkpoint loads before or after."""

    def __init__(self, base: nn.Linear) -> None:
        # "meta": no memory is taken and no random number drawn for tensors that are replaced at once
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)


def int8_problem() -> str | None:
    """Why there are no products of 8-bit numbers here; None where there are."""
    if "onednn" not in torch.backends.quantized.supported_engines or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this PyTorch has none of oneDNN's products of 8-bit numbers"
    # without these instructions sums of 8-bit products can overflow, and the result would be wrong without a word
    told: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() or told.get("avx_vnni"):
        return None
    return "this processor cannot add up products of 8-bit numbers (VNNI)"


class Int8Linear(Linear):
    """``Linear`` whose product is one of 8-bit numbers, on CPUs, for a network that does not learn.

    Each row of the weight is rounded to -127 ... 127 times a step of its own, once; the input of each call to 0 ... 254
    steps from its smallest to its largest value. Sums are exact, and the result is float32. The tensors stay as they
    are, so that keys and hashes do. An input that is not finite, or empty, and a graph that is being drawn get the
    product of ``Linear``.

    Raises:
        ConfigError: the input is on another device.
    """

    _packed: tuple[tuple[int, int], Tensor, Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, without a gradient."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(input)
        if input.device.type != "cpu":
            raise ConfigError(f"int8: products of 8-bit numbers are for CPUs, not {input.device}; give device cpu")
        rows = input.detach().reshape(-1, input.shape[-1]).float()
        low, high = (value.item() for value in rows.aminmax()) if rows.numel() else (math.nan, math.nan)
        if not (math.isfinite(low) and math.isfinite(high)):
            return super().forward(input)
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / 254, 1e-30)
        zero = round(-low / step)
        codes = torch.add(rows.new_tensor(zero + 0.5), rows, alpha=1 / step).to(torch.uint8)
        weight, steps, zeros = self._weight()
        bias = None if self.bias is None else self.bias.detach()
        out = torch.ops.onednn.qlinear_pointwise(
            codes, step, zero, weight, steps, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.view(*input.shape[:-1], self.out_features)

    def _weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded weight in oneDNN's own order, the step of each row, and zeros; anew where the weight changed."""
        weight = self.weight.detach()
        version = weight.data_ptr(), self.weight._version
        if self._packed is None or self._packed[0] != version:
            steps = weight.abs().amax(1).clamp_min(1e-30) / 127
            codes = (weight / steps[:, None]).round().to(torch.int8)
            zeros = torch.zeros(len(steps), dtype=torch.int32)
            self._packed = version, torch.ops.onednn.qlinear_prepack(codes, None), steps, zeros
        return self._packed[1:]

    def __getstate__(self) -> dict[str, Any]:
        """Without what oneDNN holds, which cannot be copied."""
        return {key: value for key, value in super().__getstate__().items() if key != "_packed"}


def round_to_int8(module: nn.Module) -> None:
    """Make all plain linear layers below ``module`` to ``Int8Linear``; they stay the same objects."""
    for child in module.modules():
        if type(child) in (nn.Linear, Linear):
            child.__class__ = Int8Linear


def adopt(module: nn.Module) -> None:
    """Make all plain linear layers below ``module`` to ``Linear``; they stay the same objects."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
