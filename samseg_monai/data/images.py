"""Stand-in for the reader of image files until the branch images is merged."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.data import ImageReader
from PIL import Image


class ImageFileReader(ImageReader):
    """Grey (H, W, 1) or RGB (H, W, 1, 3) arrays with an affine of the pixel's sides."""

    def __init__(self, spacing: float | None = None) -> None:
        self.spacing = spacing

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        names = [data] if isinstance(data, (str, bytes)) or not isinstance(data, (list, tuple)) else data
        return np.asarray(Image.open(names[0]))

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        array = img[:, :, None].astype(np.float32)
        step = self.spacing or 1.0
        affine = np.diag([step, step, 1.0, 1.0])
        meta = {"affine": affine, "original_affine": affine.copy(), "spatial_shape": np.array(array.shape[:3])}
        meta["original_channel_dim"] = float("nan") if array.ndim == 3 else -1
        return array, meta
