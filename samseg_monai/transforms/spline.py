"""Resize slices by cubic splines, as the published Synapse pipelines do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from samseg_monai.errors import ConfigError


class SplineResized(MapTransform):
    """Bring the longer side of every slice to ``size``, with ``scipy.ndimage.zoom``.

    The protocol of TransUNet, SAMed and SAM-LST stores slices at 224 (cubic image, nearest label) and enlarges them to
    the network's size by the same function; its grids meet at the corners' centres, other than MONAI's ``Resized``.
    The transform does not record itself and cannot be inverted: evaluate with ``SliceVolumeInferer(direct=True)``.

    Args:
        keys: (C, H, W) slices or (C, H, W, D) volumes, whose slices are resized one by one.
        size: longer side afterwards, in pixels.
        order: of the spline for each key, 0 (nearest) to 5; one number for all.
        allow_missing_keys: skip absent keys.

    Raises:
        ConfigError: ``size`` below 2, a wrong number of orders or an order that there is none of.
    """

    def __init__(
        self, keys: KeysCollection, size: int, order: int | Sequence[int] = 3, *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orders = [order] * len(self.keys) if isinstance(order, int) else list(order)
        if size < 2 or len(self.orders) != len(self.keys) or not set(self.orders) <= set(range(6)):
            raise ConfigError(
                f"SplineResized: size must be at least 2 and order a number from 0 to 5 or one per key, got {size} and "
                f"{order} for {len(self.keys)} keys"
            )
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, order in self.key_iterator(d, self.orders):
            d[key] = self._resize(d[key], order)
        return d

    def _resize(self, image: torch.Tensor, order: int) -> torch.Tensor:
        height, width = image.shape[1:3]
        factor = self.size / max(height, width)
        if factor == 1:
            return image
        array = torch.as_tensor(image).as_subclass(torch.Tensor).cpu().numpy()
        slices = array.reshape(*array.shape[:3], -1)  # (C, H, W, D), D = 1 for one slice
        resized = [
            [ndimage.zoom(channel[..., z], factor, order=order) for z in range(slices.shape[3])] for channel in slices
        ]
        result = np.moveaxis(np.asarray(resized), 1, -1)  # (C, D, h, w) -> (C, h, w, D)
        return torch.from_numpy(np.ascontiguousarray(result.reshape(*result.shape[:3], *array.shape[3:])))
