"""Where prompts come from: each source becomes one mask volume that travels through the same transforms as the image.

Sources: ``label`` (simulated from the ground truth), ``json`` (boxes given by a person), ``image`` (the whole slice),
``mask`` (a coarse segmentation file: ``LoadImaged`` on the prompt key, then ``CheckSameGridd``).
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTransform

from samseg_monai.data.files.boxes import volume_boxes
from samseg_monai.errors import ConfigError, PromptError
from samseg_monai.transforms.boxes import rectangles
from samseg_monai.transforms.grids import on_grid_of


class PromptFromLabeld(RandomizableTransform, MapTransform):
    """Simulate a person's box: per slice the filled rectangle around ``label > 0``, each side moved outward at random.

    With ``seed``, the draws of a volume depend on (seed, case name, slice number) alone: the order of cases, other
    slices and an in-plane crop do not change them. Slices, and volumes without ``seed``, draw from ``self.R``.

    Args:
        label_key: (C, H, W, D) volume or (C, H, W) slice.
        prompt_key: where the prompt goes: uint8, one channel, 0 or 1, geometry and history of the label.
        loosen: smallest and largest outward shift of a side, as a fraction of the box's length along that axis;
            0 <= low <= high. Shifts are rounded to pixels and clipped to the image. (0, 0) is the tight rectangle.
        seed: non-negative, see above.
        case_key: where the name of the case is found; needed with ``seed``.
        per_component: a rectangle for every connected component of the slice (rectangles that touch become one prompt).
    Raises: ConfigError for a bad ``loosen`` or ``seed``; PromptError when ``seed`` is given and the case has no name.
    """

    def __init__(
        self,
        label_key: str = "label",
        prompt_key: str = "prompt",
        *,
        loosen: Sequence[float] = (0.0, 0.0),
        seed: int | None = None,
        case_key: str = "case",
        per_component: bool = False,
    ) -> None:
        MapTransform.__init__(self, label_key)
        RandomizableTransform.__init__(self, prob=1.0)
        if len(loosen) != 2 or not 0 <= loosen[0] <= loosen[1]:
            raise ConfigError(f"loosen is a pair (low, high) with 0 <= low <= high, got {loosen!r}")
        if seed is not None and seed < 0:
            raise ConfigError(f"seed of PromptFromLabeld must not be negative, got {seed}")
        self.prompt_key = prompt_key
        self.loosen = (float(loosen[0]), float(loosen[1]))
        self.seed = seed
        self.case_key = case_key
        self.per_component = per_component

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            mask = (d[key].as_subclass(torch.Tensor) > 0).any(dim=0).cpu()  # (C, H, W[, D]) -> (H, W[, D])
            prompt = torch.zeros(mask.shape, dtype=torch.uint8)
            if mask.ndim == 2:
                self._fill(prompt, mask, self.R)
            else:
                for z in mask.flatten(0, 1).any(dim=0).nonzero()[:, 0].tolist():
                    self._fill(prompt[..., z], mask[..., z], self._random(d, z))
            d[self.prompt_key] = on_grid_of(d[key], prompt[None])
        return d

    def _random(self, d: Mapping[Hashable, Any], z: int) -> np.random.RandomState | np.random.Generator:
        if self.seed is None:
            return self.R
        if self.case_key not in d:
            raise PromptError(f"seeded prompts need the name of the case under {self.case_key!r}, got keys {list(d)}")
        return np.random.default_rng((self.seed, zlib.crc32(str(d[self.case_key]).encode()), z))

    def _fill(
        self, prompt: torch.Tensor, mask: torch.Tensor, random: np.random.RandomState | np.random.Generator
    ) -> None:
        height, width = mask.shape
        for x0, y0, x1, y1 in rectangles(mask, per_component=self.per_component):
            left, top, right, bottom = random.uniform(*self.loosen, size=4)
            x0, x1 = max(0, x0 - round(left * (x1 - x0))), min(width, x1 + round(right * (x1 - x0)))
            y0, y1 = max(0, y0 - round(top * (y1 - y0))), min(height, y1 + round(bottom * (y1 - y0)))
            prompt[y0:y1, x0:x1] = 1


class PromptFromImaged(MapTransform):
    """The whole of every slice is the prompt; for networks that want a box when nobody gave one.

    Args:
        image_key: (C, H, W, D) or (C, H, W).
        prompt_key: where the prompt goes: uint8 ones, one channel, geometry and history of the image.
    """

    def __init__(self, image_key: str = "image", prompt_key: str = "prompt") -> None:
        super().__init__(image_key)
        self.prompt_key = prompt_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.prompt_key] = on_grid_of(d[key], torch.ones((1, *d[key].shape[1:]), dtype=torch.uint8))
        return d


class PromptFromBoxesd(MapTransform):
    """Rasterise boxes that a person gave. Runs straight after loading, before any reorientation.

    ``data[boxes_key]`` is a list of ``{"slice": k, "box": [i0, j0, i1, j1]}`` or ``{"slices": [k0, k1], "box": ...}``:
    voxel indices along axes 0, 1 and (slices) 2 of the stored array, from 0, all ends included. An empty list is a case
    without prompts. The list is taken out of the case: it would not collate, and "boxes" names the slices' boxes later.

    Args:
        image_key: (C, H, W, D), whose grid the boxes refer to.
        prompt_key: where the prompt goes: uint8, one channel, 0 or 1, geometry and history of the image.
        boxes_key: where the list is found.
        case_key: where the name of the case is found for the message.
    Raises: PromptError naming the case and every bad box at once.
    """

    def __init__(
        self,
        image_key: str = "image",
        prompt_key: str = "prompt",
        boxes_key: str = "boxes",
        *,
        case_key: str = "case",
    ) -> None:
        super().__init__(image_key)
        self.prompt_key = prompt_key
        self.boxes_key = boxes_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        case = d.get(self.case_key, "unnamed case")
        boxes = d.pop(self.boxes_key, None)
        if not isinstance(boxes, (list, tuple)):
            raise PromptError(f"{case}: {self.boxes_key!r} must be a list of boxes (it may be empty), got {boxes!r}")
        for key in self.key_iterator(d):
            shape = tuple(d[key].shape[1:])
            prompt = torch.zeros(shape, dtype=torch.uint8)
            for i0, j0, i1, j1, k0, k1 in volume_boxes(
                boxes, shape, f"{case}: bad boxes for an image of {shape} voxels"
            ):
                prompt[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1] = 1
            d[self.prompt_key] = on_grid_of(d[key], prompt[None])
        return d
