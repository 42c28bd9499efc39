"""Boxes of a 2-D image drawn from its label as a person might draw them, as numbers that are never rounded."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTransform

from samseg_monai.errors import ConfigError, PromptError, raise_all
from samseg_monai.transforms.boxes import Rectangle, rectangles
from samseg_monai.transforms.float_boxes import is_number, no_boxes

Random = np.random.RandomState | np.random.Generator


class BoxesFromLabeld(RandomizableTransform, MapTransform):
    """Boxes around ``label > 0``: tight, or with each side moved outward at random, shifted, and clipped to the image.

    With ``seed`` the boxes of an image depend on (seed, case name) and its label alone, else they come from ``self.R``.
    The law is relative to the tight box, so that it is the same at every size of the image.

    Args:
        label_key: slice (C, H, W) or volume of one slice (C, H, W, 1).
        boxes_key: where the boxes go: float32 (N, 4), x0 y0 x1 y1 in pixel edges; one row of NaN for an empty label.
        loosen: smallest and largest outward shift of a side, each drawn on its own, as a fraction of the tight box's
            length along that axis; 0 <= low <= high.
        tight: fraction of boxes that are the tight rectangle instead, 0 to 1.
        shift: the whole loosened box is moved along each axis by up to this fraction of its side, 0 to 0.5.
        seed: non-negative, see above.
        case_key: where the name of the case is found; needed with ``seed``.
        per_component: a box per 8-connected component, largest first.
        max_boxes: with ``per_component``, rows of the result: the largest are kept and NaN fills up, so that batches
            collate. None gives as many rows as there are boxes.
        allow_missing_keys: a case without the label keeps what is under ``boxes_key``.
    Raises: ConfigError listing all settings that are out of range; PromptError for a label of several slices, when
        ``seed`` is given and the case has no name, or when a person's boxes are there already.
    """

    def __init__(
        self,
        label_key: str = "label",
        boxes_key: str = "boxes",
        *,
        loosen: Sequence[float] = (0.0, 0.0),
        tight: float = 0.0,
        shift: float = 0.0,
        seed: int | None = None,
        case_key: str = "case",
        per_component: bool = False,
        max_boxes: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, label_key, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        problems = [f"{key} must be a number, got {value!r}" for key, value in
                    (("tight", tight), ("shift", shift)) if not is_number(value)]  # fmt: skip
        if not isinstance(loosen, Sequence) or len(loosen) != 2 or not all(map(is_number, loosen)):
            problems.append(f"loosen is a pair of numbers (low, high), got {loosen!r}")
        raise_all(problems, ConfigError, "boxes cannot be drawn from labels")
        if not 0 <= loosen[0] <= loosen[1]:
            problems.append(f"loosen is a pair (low, high) with 0 <= low <= high, got {loosen!r}")
        if not 0 <= tight <= 1:
            problems.append(f"tight is the fraction of tight boxes, 0 to 1, got {tight!r}")
        if not 0 <= shift <= 0.5:
            problems.append(f"shift is a fraction of the box's side, 0 to 0.5, got {shift!r}")
        if shift and loosen[-1] > 1:
            problems.append(f"loosen of more than 1 together with shift may move boxes off the image, got {loosen!r}")
        if seed is not None and seed < 0:
            problems.append(f"seed must not be negative, got {seed}")
        if max_boxes is not None and max_boxes < 1:
            problems.append(f"max_boxes must be at least 1, got {max_boxes}")
        raise_all(problems, ConfigError, "boxes cannot be drawn from labels")
        self.boxes_key = boxes_key
        self.loosen = (float(loosen[0]), float(loosen[1]))
        self.tight, self.shift = float(tight), float(shift)
        self.seed = seed
        self.case_key = case_key
        self.per_component = per_component
        self.max_boxes = max_boxes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if isinstance(d.get(self.boxes_key), (list, tuple)):
            raise PromptError(
                f"{d.get(self.case_key, 'unnamed case')}: boxes are given, but are to be drawn from {self.keys[0]!r}; "
                "set prompt::source to 'json' or prompt::boxes to null"
            )
        for key in self.key_iterator(d):
            label = torch.as_tensor(d[key]).as_subclass(torch.Tensor)
            if label.ndim == 4 and label.shape[-1] == 1:
                label = label[..., 0]
            if label.ndim != 3:
                raise PromptError(
                    f"{d.get(self.case_key, 'unnamed case')}: boxes are for 2-D images, but {key} has shape "
                    f"{tuple(d[key].shape)}; volumes take prompt masks"
                )
            mask = (label > 0).any(dim=0).cpu()  # (C, H, W) -> (H, W)
            random = self._random(d)
            drawn = [self._draw(r, mask.shape, random) for r in rectangles(mask, per_component=self.per_component)]
            d[self.boxes_key] = self._rows(drawn)
        return d

    def _rows(self, drawn: list[list[float]]) -> torch.Tensor:
        rows = self.max_boxes if self.per_component and self.max_boxes else max(1, len(drawn))
        boxes = no_boxes(rows)
        for n, box in enumerate(drawn[:rows]):
            boxes[n] = torch.tensor(box, dtype=torch.float32)
        return boxes

    def _random(self, d: Mapping[Hashable, Any]) -> Random:
        if self.seed is None:
            return self.R
        if self.case_key not in d:
            raise PromptError(f"seeded boxes need the name of the case under {self.case_key!r}, got keys {list(d)}")
        return np.random.default_rng((self.seed, zlib.crc32(str(d[self.case_key]).encode())))

    def _draw(self, rectangle: Rectangle, size: Sequence[int], random: Random) -> list[float]:
        # every box takes the same number of draws, so that one of them does not change the next
        chance = random.uniform()
        outward = random.uniform(*self.loosen, size=4)
        moved = random.uniform(-self.shift, self.shift, size=2)
        tight = np.array(rectangle, dtype=np.float64)
        if chance < self.tight:
            return tight.tolist()
        side = np.tile(tight[2:] - tight[:2], 2)  # width, height, width, height
        box = tight + outward * side * (-1, -1, 1, 1)
        box += np.tile(moved * (box[2:] - box[:2]), 2)
        height, width = size
        return np.clip(box, 0, (width, height, width, height)).tolist()
