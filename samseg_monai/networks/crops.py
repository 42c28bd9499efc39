"""Squares around boxes: cut out of a slice on a grid of their own, and laid back into it; boxes drawn as masks.

Boxes are (R, 4) as x0 y0 x1 y1, float edges in pixels of the slice, x along its last axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samseg_monai.networks.joining import empty_logits


def draw_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, 4), rows with NaN are no box, to (B, 1, H, W) of 0 and 1: 1 where a pixel's centre is in any box."""
    height, width = size
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    x0, y0, x1, y1 = boxes.float()[..., None].unbind(-2)  # (B, N, 1) each; NaN compares false
    across, down = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)  # (B, N, W) and (B, N, H)
    return (down[..., :, None] & across[..., None, :]).any(1, keepdim=True).float()


def squares(boxes: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Upper left corners (R, 2) as x y and sides (R, 1), in pixels, of the squares around the boxes.

    A square has the box's centre; its side is the box's longer one, moved out by ``margin`` of it at either end.
    """
    boxes = boxes.float()
    longer = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=1.0)  # a square has at least a pixel
    side = (1 + 2 * margin) * longer
    return (boxes[:, :2] + boxes[:, 2:] - side) / 2, side


def cut_out(image: Tensor, corner: Tensor, side: Tensor, size: int) -> Tensor:
    """(R, S, H, W) to (R, S, size, size): the squares, bilinearly; 0 outside of the slice."""
    steps = (torch.arange(size, device=image.device) + 0.5) / size
    points = corner[:, None, :] + side[:, None, :] * steps[None, :, None]  # (R, size, 2) as x, y
    frame = torch.tensor([image.shape[-1], image.shape[-2]], device=image.device)
    x, y = (2 * points / frame - 1).unbind(-1)
    return _sample(image, x, y, "zeros")


def lay_back(logits: Tensor, corner: Tensor, side: Tensor, size: tuple[int, int]) -> Tensor:
    """(R, C, n, n) of the squares to (R, C, H, W), bilinearly; outside of its square a slice has nothing."""
    height, width = size
    x = 2 * (torch.arange(width, device=logits.device) + 0.5 - corner[:, :1]) / side - 1  # (R, W)
    y = 2 * (torch.arange(height, device=logits.device) + 0.5 - corner[:, 1:]) / side - 1  # (R, H)
    inside = (y.abs() <= 1)[:, None, :, None] & (x.abs() <= 1)[:, None, None, :]
    classes = max(logits.shape[1] - 1, 1)
    return torch.where(inside, _sample(logits, x, y, "border"), empty_logits(logits, len(logits), classes, size))


def _sample(image: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """(R, C, H, W) at columns x (R, w) and rows y (R, h), both -1 to 1 from edge to edge, to (R, C, h, w)."""
    grid = torch.stack(
        [x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=-1
    )  # (R, h, w, 2)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)
