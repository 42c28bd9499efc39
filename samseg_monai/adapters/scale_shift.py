"""A scale and a shift behind a frozen layer (SSF, Lian et al. 2022, arXiv:2210.08823), which the layer can take in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ScaleShift(nn.Module):
    """``y * scale + shift`` with a value of each for every channel; ones and zeros at first, which change nothing.

    ``behind(layer)`` puts one behind a layer, as its child ``ssf``: the layer and its tensors stay as they are.

    Args:
        channels: number of channels.
        last: the channels are the last axis of y, as behind linear layers; else the second, as behind convolutions.
        like: a tensor whose device and type those of the parameters are.
    Attributes:
        enabled: False makes it hand on what it gets.
    """

    handle: Any

    def __init__(self, channels: int, *, last: bool, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, device=like.device, dtype=like.dtype))
        self.shift = nn.Parameter(torch.zeros(channels, device=like.device, dtype=like.dtype))
        self.last, self.enabled = last, True

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether the layer has weight and bias that begin with its output channels, and so can take one in."""
        own = dict(layer.named_parameters(recurse=False))
        return own.keys() == {"weight", "bias"} and own["weight"].shape[:1] == own["bias"].shape

    @classmethod
    def behind(cls, layer: Any) -> ScaleShift:
        """Put one behind a layer that ``fits``, and return it."""
        last = isinstance(layer, (nn.Linear, nn.LayerNorm))
        layer.ssf = cls(len(layer.bias), last=last, like=layer.weight).train(layer.training)
        layer.ssf.handle = layer.register_forward_hook(_pass_on)
        return layer.ssf

    def forward(self, output: Tensor) -> Tensor:
        """(..., channels) or (B, channels, ...) to the same, in the type of what it gets."""
        if not self.enabled:
            return output
        axes = [] if self.last else [1] * (output.ndim - 2)  # behind the channels
        scale, shift = self.scale.view(-1, *axes), self.shift.view(-1, *axes)
        # bf16 has nothing between 1 and 1.0078: the scale itself must not be rounded to it
        wide = output.to(torch.promote_types(output.dtype, scale.dtype))
        return torch.addcmul(shift, wide, scale).to(output.dtype)

    @torch.no_grad()
    def merge(self, layer: Any) -> None:
        """Take scale and shift into weight and bias of ``layer``, which then computes the same without this."""
        scale = self.scale.float()
        weight = layer.weight.float() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        bias = layer.bias.float() * scale + self.shift.float()
        for name, value in (("weight", weight), ("bias", bias)):
            old = getattr(layer, name)
            setattr(layer, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
        self.handle.remove()
        del layer.ssf


def _pass_on(layer: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return layer.ssf(output)
