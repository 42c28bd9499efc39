"""Transforms that a key of the run steers: what the intensities are scaled to, and where prompts come from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
)

from samseg_monai.errors import ConfigError
from samseg_monai.transforms.drawn_boxes import BoxesFromLabeld
from samseg_monai.transforms.float_boxes import BoxesFromGivend, BoxesFromImaged, ShrinkBoxesd
from samseg_monai.transforms.greys import ScaleGreysd
from samseg_monai.transforms.grids import CheckSameGridd
from samseg_monai.transforms.prompts import PromptFromBoxesd, PromptFromImaged, PromptFromLabeld
from samseg_monai.transforms.spline import SplineResized

TOPS = {"unit": 1.0, "sam": 255.0}
SPLINES, MODES = [3, 0, 0], ["bilinear", "nearest", "nearest"]  # of image, label and prompt


class ScaleInputd(MapTransform):
    """Intensities as ``scale`` names them: z-scores of each channel, 0 to 1, or 0 to 255 for SAM's own normalisation.

    Args:
        keys: images, channel-first.
        scale: "zscore", "unit" or "sam".
        window: for "unit" and "sam": the two intensities (CT: in HU) that become 0 and the top.
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
            raise ConfigError(f"input_scale: got {scale!r}; choose one of 'zscore', 'unit', 'sam'")
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


class GivenPromptd(MapTransform):
    """The prompt that a person or another network gives, straight after loading; nothing for other sources.

    Args:
        source: "json" (``PromptFromBoxesd``), "mask" (a file under ``prompt_key``, on the image's grid), "image" (the
            whole of each slice); anything else leaves the case as it is.
        image_key, prompt_key: the image, and where the prompt goes.
    """

    def __init__(self, source: str, image_key: str = "image", prompt_key: str = "prompt") -> None:
        super().__init__(image_key)
        mask = [LoadImaged(prompt_key, ensure_channel_first=True), CheckSameGridd(prompt_key)]
        steps: dict[str, list[Any]] = {
            "json": [PromptFromBoxesd(image_key, prompt_key)],
            "mask": mask,
            "image": [PromptFromImaged(image_key, prompt_key)],
        }
        self.transform = Compose(steps.get(source, []))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(self.transform(data))


class SimulatedPromptd(PromptFromLabeld):
    """``PromptFromLabeld`` where prompts are simulated, ``source`` "label"; nothing for other sources."""

    def __init__(self, source: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.source = source

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return super().__call__(data) if self.source == "label" else dict(data)


class SimulatedBoxesd(BoxesFromLabeld):
    """``BoxesFromLabeld`` where boxes are simulated, ``source`` "label"; nothing for other sources."""

    def __init__(self, source: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.source = source

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return super().__call__(data) if self.source == "label" else dict(data)


class FinalBoxesd(MapTransform):
    """The boxes of a 2-D image as the network gets them: those given, or the whole image, or those simulated before.

    Args:
        source: "json" (``BoxesFromGivend``), "image" (``BoxesFromImaged``), "none": no boxes; with any other they must
            be there already.
        shrink: see ``ShrinkBoxesd``.
        image_key, boxes_key: the image, and the boxes.
    """

    def __init__(self, source: str, shrink: float = 0.0, image_key: str = "image", boxes_key: str = "boxes") -> None:
        super().__init__(image_key)
        kinds: dict[str, Any] = {"json": BoxesFromGivend, "image": BoxesFromImaged}
        steps: list[Any] = [kinds[source](image_key, boxes_key)] if source in kinds else []
        self.transform = Compose([] if source == "none" else [*steps, ShrinkBoxesd(boxes_key, fraction=shrink)])

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


def resized_slices(keys: Sequence[str], size: int, *, spline: bool = False) -> Compose:
    """The longer side of each slice brought to ``size``: bilinearly, or by splines where slices were stored so.

    Args:
        keys: image, label and prompt, in this order; absent ones are passed over.
        size: longer side in pixels.
        spline: see ``SplineResized``; it cannot be inverted.
    """
    if spline:
        return stored_slices(keys, size)
    given = {"keys": list(keys), "spatial_size": size, "size_mode": "longest", "mode": MODES[: len(keys)]}
    return _described("Resized", Resized, {**given, "allow_missing_keys": True})


def _described(name: str, kind: Any, given: dict[str, Any]) -> Compose:
    compose = Compose([kind(**given)])
    setattr(compose, "described", [{"_target_": name, **given}])  # noqa: B010 as components of a config
    return compose
