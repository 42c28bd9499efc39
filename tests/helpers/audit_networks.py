"""Networks whose predictions are known beforehand, to audit what a bundle makes of them."""

import torch
from torch import nn

WINDOW_HU = (-125.0, 275.0)  # what the abdomen's bundles scale to 0 ... 1
TOLERANCE_HU = 18.0


class Known(nn.Module):
    """Stands in for SamSegmenter: tumour wherever the first scan is brighter than ``threshold``, in the box or not."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, image, boxes=None):
        return torch.where(image[:, :1] > self.threshold, 10.0, -10.0)


class Fussy(Known):
    """``Known``, but it fails where nothing is as dark as a background."""

    def forward(self, image, boxes=None):
        if not (image[:, :1] == 0).any():
            raise RuntimeError("I do not like this")
        return super().forward(image, boxes)


class InBoxes(nn.Module):
    """Tumour in each pixel whose centre is in a box."""

    def forward(self, image, boxes):
        y, x = (torch.arange(n)[:, None] + 0.5 for n in image.shape[2:])
        x0, y0, x1, y1 = boxes.reshape(len(image), -1, 1, 1, 4).unbind(-1)  # (b, N, 1, 1)
        across, down = (x.T - x0) * (x1 - x.T), (y - y0) * (y1 - y)  # NaN is no box
        return torch.where(((across > 0) & (down > 0)).any(1, keepdim=True), 10.0, -10.0)


class Empty(nn.Module):
    """Never finds anything."""

    def forward(self, image, boxes=None):
        return torch.full_like(image[:, :1], -10.0)


class KnownOrgans(nn.Module):
    """Stands in for SamSegmenter on CT: class k + 1 wherever the image has the ``hu[k]``, background elsewhere."""

    def __init__(self, hu: list[float]):
        super().__init__()
        self.register_buffer("hu", torch.tensor(hu)[:, None, None])

    def forward(self, image):
        low, high = WINDOW_HU
        distance = (low + image[:, :1] * (high - low) - self.hu).abs()  # (b, K, h, w)
        organs = (TOLERANCE_HU - distance).clamp(-TOLERANCE_HU, TOLERANCE_HU)
        return torch.cat([torch.zeros_like(image[:, :1]), organs], dim=1)


class NoOrgans(nn.Module):
    """Background everywhere, in ``num_classes`` classes and the background."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, image):
        logits = torch.full((len(image), self.num_classes + 1, *image.shape[2:]), -10.0)
        logits[:, 0] = 10.0
        return logits


class Mixed(nn.Module):
    """Smooth logits of all classes that depend on the image and on the place: no two classes are alike anywhere."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.phases = torch.arange(num_classes + 1)[:, None, None]

    def forward(self, image):
        h, w = image.shape[2:]
        place = torch.linspace(0, 6, h)[:, None] + torch.linspace(0, 4, w)
        return torch.sin(place * (1 + 0.3 * self.phases) + 2 * self.phases + 3 * image[:, :1])
