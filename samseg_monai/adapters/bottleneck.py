"""Bottlenecks of two linear layers behind or beside frozen ones.

Behind a layer (Houlsby et al. 2019, arXiv:1902.00751) ``y = W x + b`` becomes ``y + s (U f(D y + c) + e)``: a way
around the bottleneck stays. Beside the two layers of an MLP (AdaptFormer, Chen et al. 2022, arXiv:2205.13535) the
bottleneck reads what the first of them reads, and its output is added to that of the second. Beside the attention of a
slice (Wu et al. 2023, arXiv:2304.12620) one reads what the same attention makes of the slice's neighbours.
"""

from __future__ import annotations

import math
import threading
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.products import Linear, SharedLinear, linear

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """``s (U f(D x + c) + e)``, (..., channels) to the same, with D (width, channels), U (channels, width) learned.

    D starts Kaiming uniform with a = sqrt(5), U and both biases at zero: a fresh one gives zeros.

    Args:
        channels: of input and output.
        width: of the bottleneck, at least 1.
        scale: s, above 0.
        activation: f, one of ``ACTIVATIONS``.
        like: a tensor whose device and type those of the parameters are.
    """

    def __init__(self, channels: int, width: int, *, scale: float, activation: str, like: Tensor) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.down, self.up = Linear(channels, width, **where), Linear(width, channels, **where)
        self.activation, self.scale = ACTIVATIONS[activation](), scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, input: Tensor) -> Tensor:
        """(..., channels) to the same."""
        return self.scale * self.up(self.activation(self.down(input)))


class _Handed(threading.local):
    """What one layer hands to another within a forward pass; each thread has its own, and a copy begins empty."""

    value: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor, which is not kept."""
        value, self.value = self.value, None
        assert value is not None, "the last layer of an MLP was called before its first one"
        return value

    def __reduce__(self) -> tuple[type[_Handed], tuple[()]]:
        return _Handed, ()


class _First(SharedLinear):
    """The first layer of an MLP, which hands on what it reads."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.handed = _Handed()

    def forward(self, input: Tensor) -> Tensor:
        self.handed.value = input
        return super().forward(input)


class BottleneckLinear(SharedLinear):
    """A frozen linear layer and a ``Bottleneck`` (``adapter``) whose output is added to its own.

    The bottleneck reads the layer's output; of a pair that ``beside`` makes it reads what the MLP reads. The tensors of
    ``base`` are shared and keep the keys ``weight`` and ``bias``, so that a plain checkpoint loads before or after.

    Args:
        base: layer to take over.
        width: of the bottleneck, 1 to 65536.
        scale: factor of what the bottleneck adds, above 0.
        activation: "gelu" or "relu".
    Attributes:
        enabled: False makes it compute what its base computes, bit for bit.
    Shape: ``(..., in_features)`` to ``(..., out_features)``.
    Raises:
        AdapterError: listing everything that is wrong with the arguments.
    """

    def __init__(self, base: nn.Linear, *, width: int, scale: float = 1.0, activation: str = "gelu") -> None:
        raise_all(_problems(base, width, scale, activation), AdapterError, "BottleneckLinear cannot be built")
        super().__init__(base)
        self.adapter = Bottleneck(base.out_features, width, scale=scale, activation=activation, like=base.weight).train(
            base.training
        )
        self.enabled = True
        self.handed: _Handed | None = None

    @classmethod
    def beside(cls, first: nn.Linear, last: nn.Linear, **arguments: Any) -> tuple[nn.Linear, BottleneckLinear]:
        """Both layers of an MLP, the second with a bottleneck that reads what the first reads.

        Raises:
            AdapterError: as of the class, or the MLP's input and output are of different widths.
        """
        if not isinstance(first, nn.Linear) or first.in_features != getattr(last, "out_features", None):
            raise AdapterError(f"a bottleneck beside an MLP needs linear layers n to m and m to n, got {first}, {last}")
        reading, adding = _First(first), cls(last, **arguments)
        adding.handed = reading.handed
        return reading, adding

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        # taken first: a recomputation for the backward pass may stop behind the last tensor that it needs
        read = None if self.handed is None else self.handed.take()
        output = super().forward(input)
        return output + self.adapter(output if read is None else read) if self.enabled else output


class DepthBranch(nn.Module):
    """The space-depth transpose of Medical SAM Adapter (Wu et al. 2023, arXiv:2304.12620), for one attention layer.

    Each token attends to those at its place in the slices of its slab, by the queries, keys and values that the frozen
    layer makes for its attention within the slice, and without positions: those that SAM has are of two axes. What the
    layer's projection makes of it goes through a bottleneck, which starts at zero, and is added to the layer's output.

    Args:
        proj: the attention's projection, of which the bottleneck reads; its tensors stay where they are.
        depth: slices of a slab, D, at least 2.
        views: passes through the network per slice, V.
        width: of the bottleneck, 1 to 65536.
        activation: of the bottleneck, "gelu" or "relu".
    Attributes:
        enabled: False makes it add nothing.
    Shape: output (B, H, W, C); queries, keys and values (B, H, W, heads, d), where B is slabs times D times V and the
        slices of a slab follow each other; to (B, H, W, C).
    Raises:
        AdapterError: listing everything that is wrong with the arguments.
    """

    def __init__(self, proj: nn.Linear, *, depth: int, views: int = 1, width: int, activation: str = "relu") -> None:
        problems = _problems(proj, width, 1.0, activation)
        problems += [] if depth >= 2 else [f"depth must be at least 2, got {depth}"]
        raise_all(problems, AdapterError, "DepthBranch cannot be built")
        super().__init__()
        self.adapter = Bottleneck(proj.out_features, width, scale=1.0, activation=activation, like=proj.weight)
        self.depth, self.views, self.enabled = depth, views, True
        self.train(proj.training)

    def forward(self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, proj: nn.Linear) -> Tensor:
        """What the attention made of each slice, with what its slab adds; see the class for shapes."""
        if not self.enabled:
            return output
        places = (-1, self.views, *output.shape[1:3])
        slabs = (x.unflatten(0, (-1, self.depth, self.views)).movedim(1, -2) for x in (q, k, v))
        # (slabs * V * H * W, heads, D, d): with more axes, or gaps, a slower kernel is taken
        mixed = scaled_dot_product_attention(*(x.flatten(0, 3).contiguous() for x in slabs))
        mixed = mixed.unflatten(0, places).movedim(-2, 1).flatten(0, 2).flatten(-2)
        # both layers are linear: a product of (width, C), not of (C, C), for each token
        down, adapter = self.adapter.down, self.adapter
        bias = down.bias if proj.bias is None else down.bias + down.weight @ proj.bias
        hidden = linear(mixed, down.weight @ proj.weight, bias)
        return output + adapter.scale * adapter.up(adapter.activation(hidden))


def _problems(base: Any, width: int, scale: float, activation: str) -> list[str]:
    if not isinstance(base, nn.Linear):
        return [f"base must be an nn.Linear, got {type(base).__name__}; name a linear layer"]
    problems = []
    if not 1 <= width <= 65536:
        problems.append(f"width must be 1 to 65536, got {width}")
    if not scale > 0:
        problems.append(f"scale must be greater than 0, got {scale}")
    if activation not in ACTIVATIONS:
        problems.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return problems
