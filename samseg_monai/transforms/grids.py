"""Arrays that lie on the same voxel grid: the check, and making a new array on the grid of another one."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samseg_monai.data.files.volumes import affine_difference
from samseg_monai.errors import DataError, raise_all

logger = logging.getLogger(__name__)


def on_grid_of(source: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give ``values`` the device, affine, metadata and transform history of ``source``, so that both invert alike."""
    values = values.to(source.device)
    if not isinstance(source, MetaTensor):
        return values
    return MetaTensor(values, meta=deepcopy(source.meta), applied_operations=deepcopy(source.applied_operations))


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
            shape, expected = tuple(d[key].shape[1:]), tuple(image.shape[1:])
            if shape != expected:
                problems.append(f"{key} has shape {shape}, image has {expected}")
            elif isinstance(d[key], MetaTensor) and isinstance(image, MetaTensor):
                affine, wanted = (np.asarray(torch.as_tensor(x.affine).cpu(), dtype=float) for x in (d[key], image))
                difference, note = affine_difference(affine, wanted, shape)
                problems += [f"{key}: its {difference} of image"] if difference else []
                if note:
                    logger.info("%s: %s: %s", name_of(d), key, note)
                if not difference and not np.array_equal(affine, wanted):
                    d[key] = on_grid_of(image, d[key].as_tensor())
        raise_all(problems, DataError, f"{name_of(d)}: not on the grid of image; resample it first")
        return d
