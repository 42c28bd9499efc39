"""BoxEllipse: an ellipse in the box with five learned numbers; what there is to learn about boxes without any image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samseg_monai.errors import ConfigError
from samseg_monai.networks.joining import EMPTY_LOGIT

SMALLEST = 1e-3  # pixels: the shortest side of a box, so that a box without an area is no division by zero


class BoxEllipse(nn.Module):
    """Logit ``k (1 - (2 (x - cx) / (a w))^2 - (2 (y - cy) / (b h))^2)`` of the pixel centres (x, y) in a box w by h.

    The factors a and b of the half axes and the sharpness k are learned as logarithms, the centre (cx, cy) as an
    offset from the box's own in fractions of its sides. At the start a = b = 1 without offset: the ellipse inscribed in
    the box. Logits are bounded below by -20, smoothly: l < 0 becomes 20 l / (20 - l), whose gradient never ends.

    Args:
        sharpness: k at the start, above 0; the logit in the centre.
    Shape: image (R, S, H, W), of which only the size counts, and boxes (R, 4) as x0 y0 x1 y1, float edges in pixels, x
        along W, to logits (R, 1, H, W).
    Raises: ConfigError if the sharpness is not above 0.
    """

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        if not (math.isfinite(sharpness) and sharpness > 0):
            raise ConfigError(f"sharpness: got {sharpness}; a finite number above 0")
        self.log_axes = nn.Parameter(torch.zeros(2))  # x, y
        self.offset = nn.Parameter(torch.zeros(2))  # x, y
        self.log_sharpness = nn.Parameter(torch.tensor([math.log(sharpness)]))

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        boxes = boxes.float()
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=SMALLEST)  # (R, 2) as x, y
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + self.offset * sides
        half = self.log_axes.exp() * sides / 2
        across, down = (self._distances(image, axis, centre, half) for axis in (0, 1))  # (R, W) and (R, H)
        logits = self.log_sharpness.exp() * (1 - across[:, None, :] - down[:, :, None])
        below = logits.clamp(max=0) / EMPTY_LOGIT
        return (F.relu(logits) + EMPTY_LOGIT * (below / (1 + below)))[:, None]

    def facts(self) -> dict[str, float]:
        """What was learnt, for the run card: axes and offset as fractions of the box's sides, and the sharpness."""
        names = ("axis_x", "axis_y", "offset_x", "offset_y", "sharpness")
        values = (*self.log_axes.exp(), *self.offset, *self.log_sharpness.exp())
        return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}

    @staticmethod
    def _distances(image: Tensor, axis: int, centre: Tensor, half: Tensor) -> Tensor:
        """(R, n) squared distances of pixel centres along x (0) or y (1), in half axes."""
        pixels = torch.arange(image.shape[-1 - axis], device=image.device) + 0.5
        return ((pixels - centre[:, axis, None]) / half[:, axis, None]) ** 2
