"""What pico SAM is trained on: the recipe's numbers, the losses, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from samseg_monai.sam.build import SamModel

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image (B, 3, S, S), masks (B, K, S, S), boxes (B, K, 4)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; it is written into the card."""

    seed: int = 0
    steps: int = 3500
    batch_size: int = 16  # images
    objects: int = 3  # boxes asked per image: the decoder is cheap beside the encoder
    box_jitter: float = 0.05  # largest move of a box side, as a share of the box's length
    lr: float = 1e-3
    warmup: int = 150  # steps
    weight_decay: float = 0.05
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.998  # decay of the averaged weights, which are the ones that are kept
    multimask_weight: float = 0.3
    quality_weight: float = 0.2


def mask_loss(logits: torch.Tensor, target: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus soft Dice of each mask.

    Args:
        logits, target: (N, M, h, w), target in [0, 1] (a pixel on the outline is partly inside).
        area: (N,) area of each box as a share of the image.

    Returns:
        (N, M). Cross-entropy is summed and divided by the box's area: else the plain background outside the box would
        outweigh a small object by a hundred to one. Below 3 % of the image the weight stays, else the smallest objects
        would rule the gradient of the first steps.
    """
    pixels = area[:, None].clamp(min=0.03) * logits.shape[-2] * logits.shape[-1]
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((-2, -1)) / pixels
    inside = logits.sigmoid()
    overlap = (inside * target).sum((-2, -1))
    return entropy + 1 - (2 * overlap + 1) / (inside.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def training_loss(sam: SamModel, batch: Batch, recipe: Recipe) -> torch.Tensor:
    """Loss of one batch: single mask, best of the other masks, predicted quality (IoU) of all of them."""
    image, masks, boxes = batch
    size, rows = image.shape[-1], boxes.flatten(0, 1)
    # no cache: it is shared by all threads, and two of them work here
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        embedding = sam.image_encoder(image)
        logits, quality = sam.decode(embedding.repeat_interleave(boxes.shape[1], 0), boxes=rows, multimask=None)
    logits, quality = logits.float(), quality.float()
    area = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1]) / size**2
    fine = F.avg_pool2d(masks.flatten(0, 1)[:, None].float(), 2)
    coarse = F.avg_pool2d(fine, fine.shape[-1] // logits.shape[-1])
    # The single mask is judged at twice the decoder's resolution: bilinear upsampling is part of what it must foresee.
    sharp = F.interpolate(logits[:, :1], fine.shape[-2:], mode="bilinear", align_corners=False)
    single = mask_loss(sharp, fine, area)[:, 0]
    others = mask_loss(logits[:, 1:], coarse.expand(-1, logits.shape[1] - 1, -1, -1), area).amin(1)
    with torch.no_grad():
        hard, wanted = logits > 0, coarse > 0.5
        union = (hard | wanted).sum((-2, -1)).clamp(min=1)
        iou = (hard & wanted).sum((-2, -1)) / union
    loss = single.mean() + recipe.multimask_weight * others.mean()
    return loss + recipe.quality_weight * F.mse_loss(quality, iou)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero at ``recipe.steps``."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
