"""Slices of unequal shape in one batch: filled up at their ends, where no box has to move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import PadListDataCollate
from torch.nn import functional as F

from samseg_monai.choices import IGNORE

FILLED = {"image": 0, "label": IGNORE, "prompt": 0}  # the label by what counts nowhere: there is no image


def fill_up(item: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """``item`` with image, label and prompt (C, H, W) filled up at their ends to ``size`` (H, W)."""
    filled = dict(item)
    for key, value in FILLED.items():
        if isinstance(slices := filled.get(key), torch.Tensor):
            height, width = (wanted - side for wanted, side in zip(size, slices.shape[-2:], strict=True))
            filled[key] = F.pad(slices, (0, width, 0, height), value=value) if height or width else slices
    return filled


class SliceCollate(PadListDataCollate):
    """MONAI's, but what fills a label up is out of loss and scores, and never at the sides where boxes would move.

    With 0 a slice that nobody has asked about would be one of background, and have a loss. Of items that are slabs,
    lists of slices, it takes all slices one behind the other.
    """

    def __init__(self) -> None:
        super().__init__(method="end")

    def __call__(self, batch: Sequence[Any]) -> Any:
        batch = [item for entry in batch for item in (entry if isinstance(entry, list) else [entry])]
        shapes = [item["image"].shape[-2:] for item in batch]
        size = [max(sides) for sides in zip(*shapes, strict=True)]
        return super().__call__([fill_up(item, size) for item in batch])
