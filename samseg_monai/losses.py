"""Losses: only what MONAI lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnLogitGrid(nn.Module):
    """Compare on the grid of the logits: a finer label is thinned out by nearest neighbour first.

    SAMed (Zhang and Liu 2023) and SAM-LST (Chai et al. 2023) compare SAM's quarter-resolution logits with the label
    like this. Labels that are on the logits' grid already pass unchanged.

    Args:
        loss: called with logits (B, C, h, w) and label (B, 1, h, w).
    Shape: logits (B, C, h, w), label (B, 1, H, W) to what ``loss`` returns.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        if label.shape[-2:] != logits.shape[-2:]:
            plain = label.as_subclass(torch.Tensor)
            label = F.interpolate(plain, logits.shape[-2:], mode="nearest-exact")
        return self.loss(logits, label)
