"""Boxes of 2-D images as numbers, from the file or the label to the network: never a mask, never rounded.

A 2-D image is a volume of one slice, (C, H, W, 1). Boxes are float32 (N, 4) as x0 y0 x1 y1 in pixel edges of the
tensor beside them (x along W, y along H): a box that covers the pixels a to b reads (a, b + 1). A row of NaN is no box.
An edge is half a pixel from a pixel's centre, to which affines refer, so that edge = index + 0.5; boxes follow any
resize, crop, flip or exchange of axes that MONAI writes into the affine.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from samseg_monai.errors import ConfigError, PromptError, raise_all
from samseg_monai.transforms.boxes import Rectangle, inscribed, rectangles
from samseg_monai.transforms.grids import on_grid_of

_PARALLEL = 1e-6  # of a pixel's side: what an affine may be off the axes by rounding
_DUST = 1e-3  # pixels: what rounding may put beyond the border

Random = np.random.RandomState | np.random.Generator


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number and no truth value: the command line also gives texts."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def move_boxes(boxes: torch.Tensor, before: Any, after: Any) -> torch.Tensor:
    """Boxes on one grid as boxes on another grid over the same picture.

    Args:
        boxes: (N, 4) in pixel edges of the grid whose affine is ``before``; rows with NaN stay NaN.
        before, after: affines (4, 4) from indices (i along H, j along W, k) to a common space.
    Returns: float32 (N, 4) in pixel edges of the grid of ``after``; not clipped.
    Raises: PromptError if the two grids are turned by other than right angles.
    """
    matrices = (np.asarray(torch.as_tensor(a).cpu(), dtype=np.float64) for a in (before, after))
    source, target = matrices
    matrix = np.linalg.solve(target, source)
    plane = np.abs(matrix[:2, :2])
    if plane.min(axis=0).max() > _PARALLEL * plane.max():
        raise PromptError(f"boxes cannot follow a rotation other than by right angles, got {matrix[:2, :2].tolist()}")
    x0, y0, x1, y1 = np.asarray(boxes.detach().cpu(), dtype=np.float64).T
    moved = []
    for y, x in ((y0, x0), (y1, x1)):
        index = np.stack([y - 0.5, x - 0.5, np.zeros_like(x), np.ones_like(x)])
        moved.append((matrix @ index)[:2] + 0.5)
    low, high = np.minimum(*moved), np.maximum(*moved)
    return torch.from_numpy(np.stack([low[1], low[0], high[1], high[0]], axis=1).astype(np.float32))


def clip_boxes(boxes: torch.Tensor, size: tuple[int, int], case: str = "unnamed case") -> torch.Tensor:
    """Boxes cut off at the border of an image of ``size`` (H, W).

    Raises: PromptError naming the case and every box of which nothing is left.
    """
    height, width = size
    high = boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes.clamp(min=0), high)  # NaN stays NaN in both
    lost = (clipped[:, 2] - clipped[:, 0] <= _DUST) | (clipped[:, 3] - clipped[:, 1] <= _DUST)
    problems = [
        f"box {n} lies outside: {[round(v, 2) for v in boxes[n].tolist()]} as x0, y0, x1, y1 in pixels of the image "
        "that the network is given, after crops"
        for n in lost.nonzero()[:, 0].tolist()
    ]
    raise_all(problems, PromptError, f"{case}: nothing is left of boxes in an image of {width} x {height} pixels")
    return clipped


class BoxesFromGivend(MapTransform):
    """Boxes that a person gave, in pixels of the stored image, as boxes on the image as it is now.

    Args:
        image_key: MetaTensor (C, H, W, 1) with the affine of its file as ``original_affine``; any transform that keeps
            its affine may have run.
        boxes_key: list of [x0, y0, x1, y1] in, float32 (N, 4) out, clipped to the image.
        case_key: where the name of the case is found for messages.
    Raises: PromptError, naming the case: there are no boxes, they are no numbers, or one lies wholly outside.
    """

    def __init__(self, image_key: str = "image", boxes_key: str = "boxes", *, case_key: str = "case") -> None:
        super().__init__(image_key)
        self.boxes_key = boxes_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        case = str(d.get(self.case_key, "unnamed case"))
        given = d.get(self.boxes_key)
        try:
            boxes = torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            boxes = torch.empty(0)
        if boxes.ndim != 2 or boxes.shape[-1] != 4 or not len(boxes) or not boxes.isfinite().all():
            raise PromptError(
                f"{case}: {self.boxes_key!r} must be a list of boxes [x0, y0, x1, y1] in pixels, got {given!r}; set "
                "prompt::boxes to a file that has this case"
            )
        for key in self.key_iterator(d):
            image = d[key]
            if not isinstance(image, MetaTensor) or "original_affine" not in image.meta:
                raise PromptError(f"{case}: {key} has no affine of its file; load it with LoadImaged")
            moved = move_boxes(boxes, image.meta["original_affine"], image.affine)
            d[self.boxes_key] = clip_boxes(moved, (image.shape[1], image.shape[2]), case)
        return d


class BoxesFromImaged(MapTransform):
    """The whole image as one box, for networks that want a box when nobody gave one.

    Args:
        image_key: (C, H, W, 1) or (C, H, W).
        boxes_key: where the box goes, float32 (1, 4).
    """

    def __init__(self, image_key: str = "image", boxes_key: str = "boxes") -> None:
        super().__init__(image_key)
        self.boxes_key = boxes_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            height, width = d[key].shape[1:3]
            d[self.boxes_key] = torch.tensor([[0, 0, width, height]], dtype=torch.float32)
        return d


class ShrinkBoxesd(MapTransform):
    """Move each side of every box inwards, against boxes that are known to be drawn too large; last before the network.

    Args:
        boxes_key: float (N, 4).
        fraction: of the box's length along the axis, at least 0 and less than 0.5; the middle of the box stays.
        case_key: where the name of the case is found for messages.
    Raises: ConfigError for another fraction; PromptError if nothing before has made boxes.
    """

    def __init__(self, boxes_key: str = "boxes", *, fraction: float = 0.0, case_key: str = "case") -> None:
        super().__init__(boxes_key)
        self.case_key = case_key
        if not is_number(fraction) or not 0 <= fraction < 0.5:
            raise ConfigError(f"shrink must be at least 0 and less than 0.5, got {fraction!r}")
        self.fraction = float(fraction)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            if not isinstance(d.get(key), torch.Tensor):
                raise PromptError(
                    f"{d.get(self.case_key, 'unnamed case')}: there are no boxes; prompt::source of 2-D images is "
                    "label, json (with a file of boxes), image or none"
                )
            low, high = d[key][:, :2], d[key][:, 2:]
            inwards = self.fraction * (high - low)
            d[key] = torch.cat([low + inwards, high - inwards], dim=1)
        return d


class EllipseFromBoxesd(MapTransform):
    """The ellipses inscribed in the boxes of an image, all together: how good are the boxes without any network?

    Args:
        boxes_key: (N, 4) on the grid of the image; rows of NaN give nothing.
        image_key: (C, H, W, 1) or (C, H, W).
        key: where the float32 mask of 0 and 1 goes, (1, H, W, 1) or (1, H, W), with geometry and history of the image.
    """

    def __init__(self, boxes_key: str = "boxes", image_key: str = "image", key: str = "ellipse") -> None:
        super().__init__(boxes_key)
        self.image_key = image_key
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for boxes_key in self.key_iterator(d):
            image = d[self.image_key]
            ellipse = inscribed(torch.as_tensor(d[boxes_key]), image.shape[1:3])
            d[self.key] = on_grid_of(image, ellipse.reshape(1, *image.shape[1:]))
        return d


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
            rows = self.max_boxes if self.per_component and self.max_boxes else max(1, len(drawn))
            drawn += [[torch.nan] * 4] * rows
            d[self.boxes_key] = torch.tensor(drawn[:rows], dtype=torch.float32)
        return d

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
