"""Prompts of programs that run a bundle's parts one by one and give its inferer the image alone, as MONAI Label does.

Cases of this package have a name, under "case"; requests of such programs have none. Their prompts become those that a
case has, and travel from the transforms to the inferer in the image's own metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor

from samseg_monai.data.files.boxes import is_number
from samseg_monai.errors import DataError, PromptError
from samseg_monai.transforms.grids import EachKeyd, name_of
from samseg_monai.transforms.prompts import WHOLE

CARRIED = ("prompt", "boxes")
HOW = (
    'give a request of MONAI Label one of the entries (in 3D Slicer: options of the model) "boxes", a list [{"slices": '
    '[k0, k1], "box": [i0, j0, i1, j1]}] in voxels, also as text; "roi", the six voxel indices [i0, i1, j0, j1, k0, '
    'k1]; or "whole_slice", true to take the whole slice as the prompt on purpose'
)


class RequestedPromptd(EachKeyd):
    """Make the prompts of a request those of a case, straight after loading.

    Entries of the request, of which empty ones count as absent: "boxes", a list as cases have it (``GivenPromptd``), or
    JSON text of it; "roi", [i0, i1, j0, j1, k0, k1], voxel indices along the axes of the stored array, from 0, both
    ends included and in either order, cut to the volume; "whole_slice", true or false.

    Args:
        source: of prompts; only of "json" there are requests.
        images: whether cases are 2-D images, which such programs would store with rows and columns exchanged.
    Raises: PromptError where a request has no entry, several, or one that cannot be read; DataError for 2-D images.
    """

    def __init__(self, source: str, *, images: bool = False) -> None:
        super().__init__("image")
        self.source, self.images = source, images

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        if "case" in d:
            return
        if self.images:
            raise DataError(
                f"{name_of(d)}: a 2-D image without the name of its case; MONAI Label gives none, and would exchange "
                "rows and columns of the result: use samseg predict"
            )
        if self.source == "json":
            self._prompts(d, d[key])

    def _prompts(self, d: dict[Hashable, Any], image: torch.Tensor) -> None:
        boxes, roi, whole = (d.pop(name, None) for name in ("boxes", "roi", WHOLE))
        whole = str(whole).lower() in ("true", "1", "yes")  # some clients send text
        found = [name for name, there in (("boxes", boxes), ("roi", roi), (WHOLE, whole)) if there]
        if len(found) != 1:
            got = f"got {' and '.join(found)}" if found else "was trained with a box around each object and got none"
            raise PromptError(f"{name_of(d)}: this bundle {got}; {HOW}")
        if whole:
            d[WHOLE] = True
        else:
            d["boxes"] = _listed(boxes) if boxes else _region(roi, image.shape[1:])


class CarriedPromptd(EachKeyd):
    """Last of the transforms: put the "prompt" of a request into its image's metadata, for ``SliceVolumeInferer``, and
    the "boxes" of one with clicks."""

    def __init__(self) -> None:
        super().__init__("image")

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        for name in CARRIED:
            if "case" not in d and isinstance(d.get(name), torch.Tensor):
                d[key].meta[name] = d[name].as_subclass(torch.Tensor)


def carried_prompt(image: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The prompt (1, N, H, W, D) and the boxes (1, D, N, 4 + 3 P) that ``CarriedPromptd`` put into ``image``
    (1, C, H, W, D), None for each that it did not; they are taken out of it."""
    meta = image.meta if isinstance(image, MetaTensor) and len(image) == 1 else {}
    found = [meta.pop(name, None) for name in CARRIED]
    return tuple(each[None].to(image.device) if isinstance(each, torch.Tensor) else None for each in found)


def _listed(boxes: Any) -> Any:
    """The list that JSON text stands for."""
    try:
        return json.loads(boxes) if isinstance(boxes, str) else boxes
    except (ValueError, RecursionError) as error:
        raise PromptError(f"boxes of the request: no JSON ({error}); {HOW}") from error


def _region(roi: Any, shape: Sequence[int]) -> list[dict[str, Any]]:
    """The box in slices of six voxel indices, as far as it lies in the volume (H, W, D)."""
    numbers = roi if isinstance(roi, (list, tuple)) else []
    if len(numbers) != 6 or not all(is_number(index) and math.isfinite(index) for index in numbers):
        raise PromptError(f"roi of the request: got {roi!r}; {HOW}")
    ends = [sorted(round(index) for index in pair) for pair in (roi[:2], roi[2:4], roi[4:])]
    cut = [(max(low, 0), min(high, n - 1)) for (low, high), n in zip(ends, shape, strict=True)]
    if any(low > high for low, high in cut):
        raise PromptError(f"roi of the request: {list(roi)} lies outside a volume of {tuple(shape)} voxels")
    (i0, i1), (j0, j1), slices = cut
    return [{"slices": list(slices), "box": [i0, j0, i1, j1]}]
