"""The loss on the grid of the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnLogitGrid(nn.Module):
    """Compare on the grid of the logits: a finer label is thinned out by nearest neighbour first.

    SAMed (Zhang and Liu 2023) and SAM-LST (Chai et al. 2023) compare SAM's quarter-resolution logits with a thinned
    label, too; their grid meets the label's at the corners, ours at the pixels' centres, as that of the logits does (up
    to 2 of 512 pixels apart). Labels that are on the logits' grid already pass unchanged.

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
            # torch picks pixels of few kinds of integers only; float32 holds every class number exactly
            label = F.interpolate(plain.float(), logits.shape[-2:], mode="nearest-exact").to(plain.dtype)
        return self.loss(logits, label)
