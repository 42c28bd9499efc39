"""Maps of several boxes become the map of their image, and an image without a box gets a map of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EMPTY_LOGIT = -20.0  # of a class where there is nothing to predict: sigmoid(-20) = 2e-9, still finite in every type


def empty_logits(like: Tensor, count: int, num_classes: int, size: Sequence[int]) -> Tensor:
    """Logits (count, C, H, W) of images without a box: -20, and 20 for the background of several classes.

    Args:
        like: gives the device.
        num_classes: 1 means C = 1, K > 1 means C = K + 1 with the background first.
        size: H and W.
    """
    channels = 1 if num_classes == 1 else num_classes + 1
    logits = torch.full((count, channels, *size), EMPTY_LOGIT, dtype=torch.float32, device=like.device)
    logits[:, :-num_classes] = -EMPTY_LOGIT
    return logits


def join_boxes(logits: Tensor, counts: Sequence[int], num_classes: int) -> list[Tensor]:
    """Logits (R, C, H, W) of R boxes, ``counts[i]`` of them on image i, to one (C, H, W) per image.

    A pixel gets the largest logit of a class and the smallest of the background.
    """
    return [
        torch.cat([maps[:, :-num_classes].amin(0), maps[:, -num_classes:].amax(0)])
        for maps in logits.split(list(counts))
    ]


def best_mask(logits: Tensor, quality: Tensor, views: int) -> Tensor:
    """Of the masks of every box the one with the highest predicted quality.

    Args:
        logits: (R * V, M, h, w), the V views of a box in a row.
        quality: (R * V, M), as SAM's decoder predicts it; its mean over the views decides.
        views: V.
    Returns:
        (R * V, 1, h, w): all views of a box give the same mask, so that their mean is one of an object.
    """
    best = quality.float().unflatten(0, (-1, views)).mean(1).argmax(1).repeat_interleave(views)  # (R * V,)
    return logits[torch.arange(len(logits), device=logits.device), best][:, None]
