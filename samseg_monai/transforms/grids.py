"""Arrays that lie on the same voxel grid: the check, and making a new array on the grid of another one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
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


class CheckSameGridd(MapTransform):
    """Refuse a case whose ``keys`` are not on the grid of ``reference_key``, as a coarse mask made on another image.

    Shapes are compared without the channel, affines (where both have one) within 0.001 mm per entry.

    Args:
        keys: arrays to check, channel-first.
        reference_key: array they are compared with, channel-first.
        case_key: where the name of the case is found for the message.
        allow_missing_keys: skip keys that the case does not have.
    Raises: DataError naming the case and both grids, all differing keys at once.
    """

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: str = "image",
        *,
        case_key: str = "case",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        reference = d[self.reference_key]
        problems = []
        for key in self.key_iterator(d):
            shape, expected = tuple(d[key].shape[1:]), tuple(reference.shape[1:])
            if shape != expected:
                problems.append(f"{key} has shape {shape}, {self.reference_key} has {expected}")
            elif isinstance(d[key], MetaTensor) and isinstance(reference, MetaTensor):
                affine, wanted = (np.asarray(torch.as_tensor(x.affine).cpu()) for x in (d[key], reference))
                if affine.shape != wanted.shape or not np.allclose(affine, wanted, rtol=0, atol=AFFINE_TOLERANCE):
                    problems.append(
                        f"{key} has affine {np.round(affine, 4).tolist()}, "
                        f"{self.reference_key} has {np.round(wanted, 4).tolist()}"
                    )
        case = d.get(self.case_key, "unnamed case")
        raise_all(problems, DataError, f"{case}: not on the grid of {self.reference_key}; resample it first")
        return d
