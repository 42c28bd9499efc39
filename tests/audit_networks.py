"""Networks whose predictions are known beforehand, to audit what a bundle makes of them."""

import torch
from torch import nn


class Known(nn.Module):
    """Stands in for SamSegmenter: tumour wherever the first scan is brighter than ``threshold``, in the box or not."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, image, boxes=None):
        return torch.where(image[:, :1] > self.threshold, 10.0, -10.0)


class Empty(nn.Module):
    """Never finds anything."""

    def forward(self, image, boxes=None):
        return torch.full_like(image[:, :1], -10.0)
