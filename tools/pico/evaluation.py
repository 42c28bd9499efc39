"""Held-out Dice of a SAM with box prompts on drawn shapes, beside what the boxes alone give away."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from samseg_monai.errors import ConfigError
from samseg_monai.sam.build import SamModel
from tools.pico.objective import Batch, Recipe
from tools.pico.shapes import draw_sample

HELD_OUT_SEED = 1_000_003  # a stream of images on which no run trains: training seeds are smaller


class ShapeDataset(Dataset):
    """Images ``start`` ... ``stop - 1`` of stream ``seed``: image (3, S, S), masks (K, S, S) uint8, boxes (K, 4)."""

    def __init__(self, seed: int, start: int, stop: int, *, size: int, objects: int, jitter: float) -> None:
        self.seed, self.start, self.stop = seed, start, stop
        self.size, self.objects, self.jitter = size, objects, jitter

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, item: int) -> Batch:
        sample = draw_sample(self.seed, self.start + item, size=self.size, objects=self.objects, jitter=self.jitter)
        masks = torch.from_numpy(sample.masks.astype(np.uint8))
        return torch.from_numpy(sample.image), masks, torch.from_numpy(sample.boxes)


def dice_of(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Dice of binary masks (..., H, W) over the last two axes; 1 where both are empty."""
    both = (prediction & reference).sum((-2, -1)).float()
    total = prediction.sum((-2, -1)) + reference.sum((-2, -1))
    return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)


def inscribed_ellipse(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """(N, S, S) bool: the ellipse inscribed in each box (N, 4), what a box gives away without looking at the image."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    at = torch.arange(size) + 0.5
    x = (at - centre[:, :1]) / half[:, :1]
    y = (at - centre[:, 1:]) / half[:, 1:]
    return y[:, :, None] ** 2 + x[:, None, :] ** 2 <= 1


@torch.no_grad()
def evaluate_dice(sam: SamModel, *, n: int, seed: int, batch_size: int = 16) -> dict[str, float]:
    """Held-out Dice of the single mask and of the ellipse in the box, means over objects; see ``evaluate_pico``."""
    recipe, size, training = Recipe(), sam.image_size, sam.training
    images = ShapeDataset(seed, 0, n, size=size, objects=recipe.objects, jitter=recipe.box_jitter)
    scores, baseline = [], []
    sam.eval()
    for image, masks, boxes in DataLoader(images, batch_size=batch_size):
        rows = boxes.flatten(0, 1)
        logits, _ = sam.decode(sam.image_encoder(image).repeat_interleave(boxes.shape[1], 0), boxes=rows)
        full = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)[:, 0]
        reference = masks.flatten(0, 1).bool()
        scores.append(dice_of(full > 0, reference))
        baseline.append(dice_of(inscribed_ellipse(rows, size), reference))
    sam.train(training)
    return {"dice": torch.cat(scores).mean().item(), "box_ellipse_dice": torch.cat(baseline).mean().item()}


def evaluate_pico(sam: SamModel, *, n: int, seed: int = HELD_OUT_SEED) -> float:
    """Mean Dice at full resolution over the objects of ``n`` drawn images, each prompted with its jittered box.

    Args:
        sam: any SAM that takes z-scored square images; it is left in the mode it was in.
        n: images; each has three objects (see ``Recipe.objects``).
        seed: stream of images; the default one is never trained on.

    Raises:
        ConfigError: n is not positive.
    """
    if n < 1:
        raise ConfigError(f"evaluate_pico: n is {n}; give a positive number of images")
    return evaluate_dice(sam, n=n, seed=seed)["dice"]
