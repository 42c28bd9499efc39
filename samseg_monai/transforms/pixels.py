"""Grey values of image files brought to a fixed range, and slices resized by cubic splines as others did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from samseg_monai.errors import ConfigError
from samseg_monai.transforms.grids import on_grid_of

BYTE = 255.0
PERCENTILE = 99.5  # as in the task recipes of volumes: the brightest half percent is often an artefact


def bytes_of(image: np.ndarray) -> np.ndarray:
    """Values 0 to 255 of an image, as float32 of the same shape.

    Values within 0 to 255 of which one is above 1 (an image of 8 bits) stay as they are. All others, as of 16 bits, are
    stretched, all channels alike: minimum to 0, the 99.5 percentile to 255, and cut off there.
    """
    values = np.asarray(image, dtype=np.float32)
    if values.size and values.min() >= 0 and 1 < values.max() <= BYTE:
        return values
    low, high = (float(v) for v in (values.min(), np.percentile(values, PERCENTILE))) if values.size else (0.0, 1.0)
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32) * np.float32(BYTE)


class ScaleGreysd(MapTransform):
    """Bring images to 0 to ``top``: those of 8 bits keep their greys, others are stretched as ``bytes_of`` says.

    Args:
        keys: images of any shape.
        top: what 255 becomes; 255 for SAM's own mean and deviation, 1 for inputs from 0 to 1.
        allow_missing_keys: skip keys that the case does not have.
    Returns: float32 with geometry and history of the image.
    Raises: ConfigError unless ``top`` is positive.
    """

    def __init__(self, keys: KeysCollection, top: float = BYTE, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not top > 0:
            raise ConfigError(f"top must be positive, got {top!r}")
        self.top = float(top)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            plain = torch.as_tensor(d[key]).as_subclass(torch.Tensor).detach().cpu().numpy()
            d[key] = on_grid_of(d[key], torch.from_numpy(bytes_of(plain) * np.float32(self.top / BYTE)))
        return d


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
