"""Arrays that lie on the same voxel grid: the check, and making a new array on the grid of another one."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation

from samseg_monai.choices import IGNORE
from samseg_monai.data.files.volumes import affine_difference, axes_to_turn
from samseg_monai.errors import DataError, raise_all

logger = logging.getLogger(__name__)
MOST_PADDED = 1 << 28  # values: 1 GB as float32, more than four scans of a head at their full size


def on_grid_of(source: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give ``values`` the device, affine, metadata and transform history of ``source``, so that both invert alike."""
    values = values.to(source.device)
    if not isinstance(source, MetaTensor):
        return values
    return MetaTensor(values, meta=deepcopy(source.meta), applied_operations=deepcopy(source.applied_operations))


def foreground(label: torch.Tensor) -> torch.Tensor:
    """Where a recoded label has a class: bool of its shape, False in voxels that nobody has judged."""
    plain = label.as_subclass(torch.Tensor)
    return (plain > 0) & (plain != IGNORE)


def refuse_huge(shape: Sequence[int], sides: Sequence[int], what: str) -> None:
    """Raise DataError where an array of ``shape`` (C, H, W, D) would grow to ``sides`` (H, W, D) beyond all memory.


    Args:
        what: what would make it grow, with the key of the settings, for the message.
    """
    values = shape[0] * math.prod(sides)
    if values > max(MOST_PADDED, math.prod(shape)):
        raise DataError(
            f"{what} would enlarge {tuple(shape[1:])} to {tuple(sides)}, {values:,} values; give the size that the "
            "data have, or null"
        )


def name_of(d: Mapping[Hashable, Any]) -> str:
    """Name of a case, for messages and seeds."""
    return str(d.get("case", "unnamed case"))


class EachKeyd(MapTransform):
    """A dictionary transform that changes a case for one of its keys after the other."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            self._change(d, key)
        return d

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        """Change ``d``, a copy of the case, as ``d[key]`` asks for."""
        raise NotImplementedError


def _affine(array: MetaTensor) -> np.ndarray:
    return np.asarray(torch.as_tensor(array.affine).cpu(), dtype=float)


def _stored_like(array: MetaTensor, image: MetaTensor) -> MetaTensor:
    """As ``volumes.stored_like``."""
    codes = axes_to_turn(_affine(array), _affine(image), array.shape[1:])
    return cast(MetaTensor, Orientation(axcodes=codes, labels=None)(array)) if codes else array


class CheckSameGridd(MapTransform):
    """Refuse a case whose ``keys`` are not on the grid of its "image", as a coarse mask made on another image.

    Axes that are stored in another order or direction are turned to the image's, which moves no voxel in the patient.
    Shapes are compared without the channel, affines (where both have one) by ``affine_difference``: what is as good as
    the image's grid is noted, and taken for it from here on.

    Args:
        keys: arrays to check, channel-first.
    Raises: DataError naming the case and both grids, all differing keys at once.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d["image"]
        problems = []
        for key in self.key_iterator(d):
            both = isinstance(d[key], MetaTensor) and isinstance(image, MetaTensor)
            stored = _stored_like(d[key], image) if both else d[key]
            shape, expected = tuple(stored.shape[1:]), tuple(image.shape[1:])
            if shape != expected:
                problems.append(f"{key} has shape {shape}, image has {expected}")
            elif both:
                affine, wanted = _affine(stored), _affine(image)
                difference, note = affine_difference(affine, wanted, shape)
                problems += [f"{key}: its {difference} of image"] if difference else []
                if note:
                    logger.info("%s: %s: %s", name_of(d), key, note)
                if not difference and not np.array_equal(_affine(d[key]), wanted):
                    d[key] = on_grid_of(image, stored.as_tensor())
        raise_all(problems, DataError, f"{name_of(d)}: not on the grid of image; resample it first")
        return d
