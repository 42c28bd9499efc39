"""Intensities brought to the range that a run asks for, and slices resized, by cubic splines as others did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensityd,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
)
from scipy import ndimage

from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms.grids import EachKeyd, on_grid_of

BYTE = 255.0
TOPS = {"unit": 1.0, "slice": 1.0, "sam": BYTE}  # "slice" is made of "unit" by the network, slice by slice
SPLINES, MODES = [3, 0, 0], ["bilinear", "nearest", "nearest"]  # of image, label and prompt
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


class ScaleGreysd(EachKeyd):
    """Bring images to 0 to ``top``: those of 8 bits keep their greys, others are stretched as ``bytes_of`` says.

    Args:
        keys: images of any shape.
        top: what 255 becomes; 255 for SAM's own mean and deviation, 1 for inputs from 0 to 1.
    Returns: float32 with geometry and history of the image.
    Raises: ConfigError unless ``top`` is positive.
    """

    def __init__(self, keys: KeysCollection, top: float = BYTE, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not top > 0:
            raise ConfigError(f"top must be positive, got {top!r}")
        self.top = float(top)

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        plain = torch.as_tensor(d[key]).as_subclass(torch.Tensor).detach().cpu().numpy()
        d[key] = on_grid_of(d[key], torch.from_numpy(bytes_of(plain) * np.float32(self.top / BYTE)))


class NeighbourSlicesd(EachKeyd):
    """Each slice of a volume between its neighbours, as three channels: the one before, itself, the one behind.

    The first and last slice of a volume stand in for the neighbours that they do not have.

    Args:
        keys: (1, H, W, D) volumes, whose slices are cut along the last axis.
        wanted: False leaves them as they are.
    Attributes: ``described``: as of ``ScaleInputd``.
    Returns: (3, H, W, D) with geometry and history of the volume.
    Raises: DataError for a volume of another number of channels.
    """

    def __init__(self, keys: KeysCollection, wanted: bool = True, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.wanted = wanted
        self.described = (
            [{"_target_": f"samseg_monai.transforms.{type(self).__name__}", "keys": keys}] if wanted else []
        )

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        if not self.wanted:
            return
        volume = d[key]
        plain = torch.as_tensor(volume).as_subclass(torch.Tensor)
        if plain.ndim != 4 or len(plain) != 1:
            raise DataError(
                f"neighbouring slices are of one scan, (1, H, W, D); {key!r} has shape {tuple(plain.shape)}"
            )
        last = plain.shape[-1] - 1
        steps = torch.arange(last + 1).add(torch.tensor([[-1], [0], [1]])).clamp(0, last)
        d[key] = on_grid_of(volume, torch.cat([plain[..., numbers] for numbers in steps]))


class SplineResized(MapTransform):
    """Bring the longer side of every slice to ``size``, with ``scipy.ndimage.zoom``.

    The protocol of TransUNet, SAMed and SAM-LST stores slices at 224 (cubic image, nearest label) and enlarges them to
    the network's size by the same function; its grids meet at the corners' centres, other than MONAI's ``Resized``.
    The transform does not record itself and cannot be inverted: evaluate with ``SliceVolumeInferer(direct=True)``.

    Args:
        keys: (C, H, W) slices or (C, H, W, D) volumes, whose slices are resized one by one.
        size: longer side afterwards, in pixels.
        order: of the spline for each key, 0 (nearest) to 5; one number for all.

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
        whole = np.ascontiguousarray(result.reshape(*result.shape[:3], *array.shape[3:]))
        return torch.from_numpy(whole).to(image.device)  # SciPy's numbers are the processor's


class ScaleInputd(MapTransform):
    """Intensities as ``scale`` names them: z-scores of each channel, 0 to 1, or 0 to 255 for SAM's own normalisation.

    Args:
        keys: images, channel-first.
        scale: "zscore", "unit", "slice" (the same here) or "sam".
        window: for "unit", "slice" and "sam": the two intensities (CT: in HU) that become 0 and the top.
        percentiles: without a window: the two percentiles of each channel that become 0 and the top. With neither the
            greys of an image of 8 bits are kept (``ScaleGreysd``).
        nonzero: for "zscore": mean and deviation over voxels that are not 0.

    Attributes:
        described: the transforms behind it, as components of a config.

    Raises:
        ConfigError: there is no such scale.
    """

    def __init__(
        self,
        keys: KeysCollection,
        scale: str,
        *,
        window: Sequence[float] | None = None,
        percentiles: Sequence[float] | None = None,
        nonzero: bool = False,
    ) -> None:
        super().__init__(keys)
        if scale != "zscore" and scale not in TOPS:
            raise ConfigError(f"input_scale: got {scale!r}; choose one of 'zscore', 'unit', 'slice', 'sam'")
        given, top = {"keys": keys}, TOPS.get(scale, 1.0)
        span = {"b_min": 0.0, "b_max": top, "clip": True}
        kind: Any
        if scale == "zscore":
            kind, given = NormalizeIntensityd, {**given, "nonzero": nonzero, "channel_wise": True}
        elif window is not None:
            kind, given = ScaleIntensityRanged, {**given, "a_min": window[0], "a_max": window[1], **span}
        elif percentiles is not None:
            lower, upper = percentiles
            kind, given = ScaleIntensityRangePercentilesd, {**given, "lower": lower, "upper": upper, **span}
            given["channel_wise"] = True
        else:
            kind, given = ScaleGreysd, {**given, "top": top}
        self.described = [{"_target_": kind.__name__, **given}]
        self.transform = kind(**given)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(self.transform(data))


def stored_slices(keys: Sequence[str], size: int | None) -> Compose:
    """Slices of ``size`` pixels, as a protocol stores them before they are enlarged again; None leaves them alone.

    Args:
        keys: image, label and prompt, in this order; absent ones are passed over.
        size: longer side in pixels.
    """
    given = {"keys": list(keys), "size": size, "order": SPLINES[: len(keys)], "allow_missing_keys": True}
    return _described("samseg_monai.transforms.SplineResized", SplineResized, given) if size else Compose([])


def resized_slices(keys: Sequence[str], size: int, *, spline: bool = False, stretch: bool = False) -> Compose:
    """The longer side of each slice brought to ``size``: bilinearly, or by splines where slices were stored so.

    Args:
        keys: image, label and prompt, in this order; absent ones are passed over.
        size: longer side in pixels.
        spline: see ``SplineResized``; it cannot be inverted.
        stretch: bring both sides to ``size``; not by splines.
    """
    if spline:
        return stored_slices(keys, size)
    how: dict[str, Any] = {"spatial_size": size, "size_mode": "longest"}
    if stretch:
        how = {"spatial_size": [size, size], "size_mode": "all"}
    given = {"keys": list(keys), **how, "mode": MODES[: len(keys)], "allow_missing_keys": True}
    return _described("Resized", Resized, given)


def _described(name: str, kind: Any, given: dict[str, Any]) -> Compose:
    compose = Compose([kind(**given)])
    setattr(compose, "described", [{"_target_": name, **given}])  # noqa: B010 as components of a config
    return compose
