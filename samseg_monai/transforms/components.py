"""Small connected components removed from a segmentation.

MONAI's ``RemoveSmallObjectsd`` needs scikit-image, takes each value of a map of labels for one object however far its
parts lie from each other, and rounds a volume in mm^3 up to one voxel more where an affine is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import find_objects, generate_binary_structure, label

from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms.grids import on_grid_of

_ALL_NEIGHBOURS = generate_binary_structure(3, 3)
SPACING_DECIMALS = 5  # of mm: columns of an affine have noise (1.0000001), which must not decide what is small


class RemoveSmallComponentsd(MapTransform):
    """Set components that are smaller than ``min_mm3`` to 0; one of exactly ``min_mm3`` stays.

    A component is a set of voxels of one channel and one value, connected through faces, edges or corners (26
    neighbours): the same as a predicted lesion of BraTS's lesion-wise scores. Classes do not join and do not count
    together.

    Args:
        keys: segmentations (C, H, W, D) with an affine in mm: a map of whole numbers, 0 the background, or channels of
            0 and 1.
        min_mm3: smallest volume that stays, mm^3; None keeps everything.
        case_key: where the name of the case is found for messages.
        allow_missing_keys: skip keys that the case does not have.
    Returns: shape, dtype, device, geometry and history of the segmentation.
    Raises:
        ConfigError: at construction, for a volume that is not a positive number.
        DataError: for a segmentation without affine, of another shape, or with values that are not whole numbers.
    """

    def __init__(
        self, keys: KeysCollection, min_mm3: float | None, *, case_key: str = "case", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        number = isinstance(min_mm3, (int, float)) and not isinstance(min_mm3, bool) and 0 < min_mm3 < math.inf
        if min_mm3 is not None and not number:
            raise ConfigError(f"min_mm3 must be a positive volume in mm^3, got {min_mm3!r}; null keeps everything")
        self.min_mm3 = min_mm3
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d) if self.min_mm3 is not None else ():
            volume, where = d[key], f"{d.get(self.case_key, 'unnamed case')}: {key}"
            if not isinstance(volume, MetaTensor) or volume.ndim != 4:
                raise DataError(
                    f"{where} must be a MetaTensor (C, H, W, D) with an affine, got {type(volume).__name__} of shape "
                    f"{tuple(volume.shape)}; load it with LoadImaged"
                )
            voxel_mm3 = float(np.prod(np.round(volume.pixdim.double().cpu().numpy(), SPACING_DECIMALS)))
            labels = volume.as_tensor().detach().cpu().clone().numpy()
            for channel in labels:
                for box in find_objects((channel != 0).view(np.uint8)):
                    self._clear(channel[box], voxel_mm3, where)
            d[key] = on_grid_of(volume, torch.from_numpy(labels))
        return d

    def _clear(self, labels: np.ndarray, voxel_mm3: float, where: str) -> None:
        """Clear the small components of one channel (H, W, D) in place."""
        values = np.unique(labels)
        if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
            raise DataError(f"{where} has values that are not whole numbers; threshold it or take the largest logit")
        for value in values[values != 0]:
            parts, _ = label(labels == value, structure=_ALL_NEIGHBOURS)
            small = np.bincount(parts.ravel()) * voxel_mm3 < float(self.min_mm3 or 0)
            small[0] = False
            labels[small[parts]] = 0
