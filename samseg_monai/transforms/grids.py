"""Arrays that lie on the same voxel grid: the check, and making a new array on the grid of another one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResizeWithPadOrCropd
from monai.utils import fall_back_tuple

from samseg_monai.errors import DataError, raise_all

MOST_PADDED = 1 << 28  # values: 1 GB as float32, more than four scans of a head at their full size
AFFINE_TOLERANCE = 1e-3  # mm; the tolerance that MONAI itself uses for affines


def on_grid_of(source: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give ``values`` the device, affine, metadata and transform history of ``source``, so that both invert alike."""
    values = values.to(source.device)
    if not isinstance(source, MetaTensor):
        return values
    return MetaTensor(values, meta=deepcopy(source.meta), applied_operations=deepcopy(source.applied_operations))


class CropOrPadd(ResizeWithPadOrCropd):
    """MONAI's ``ResizeWithPadOrCropd``, which does not pad what it is given beyond all memory.

    Raises: DataError where a volume would be padded to more than 268 million values.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        padder: Any = self.padder
        wanted = padder.padder.spatial_size
        for key in self.key_iterator(dict(data)):
            shape = tuple(data[key].shape)
            sides = fall_back_tuple(wanted, shape[1:])
            values = shape[0] * math.prod(sides)
            if values > max(MOST_PADDED, math.prod(shape)):
                raise DataError(
                    f"crop_size: {list(sides[:2])} would pad {key} {shape[1:]} to {values:,} values; give the size "
                    "that the data have, or null"
                )
        return super().__call__(data, lazy)


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


class CheckSameGridd(MapTransform):
    """Refuse a case whose ``keys`` are not on the grid of its "image", as a coarse mask made on another image.

    Shapes are compared without the channel, affines (where both have one) within 0.001 mm per entry.

    Args:
        keys: arrays to check, channel-first.
    Raises: DataError naming the case and both grids, all differing keys at once.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d["image"]
        problems = []
        for key in self.key_iterator(d):
            shape, expected = tuple(d[key].shape[1:]), tuple(image.shape[1:])
            if shape != expected:
                problems.append(f"{key} has shape {shape}, image has {expected}")
            elif isinstance(d[key], MetaTensor) and isinstance(image, MetaTensor):
                affine, wanted = (np.asarray(torch.as_tensor(x.affine).cpu()) for x in (d[key], image))
                if affine.shape != wanted.shape or not np.allclose(affine, wanted, rtol=0, atol=AFFINE_TOLERANCE):
                    grids = [np.round(x, 4).tolist() for x in (affine, wanted)]
                    problems.append(f"{key} has affine {grids[0]}, image has {grids[1]}")
        raise_all(problems, DataError, f"{name_of(d)}: not on the grid of image; resample it first")
        return d
