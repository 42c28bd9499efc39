"""Where a network looks: slices cropped in the plane, in mm, and brought to the spacing that it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CropForegroundd, InvertibleTransform, MapTransform, Resize
from monai.utils import TraceKeys

from samseg_monai.data import CUT
from samseg_monai.errors import PromptError
from samseg_monai.transforms.grids import foreground, name_of, on_grid_of, refuse_huge
from samseg_monai.transforms.points import prompted
from samseg_monai.transforms.prompts import WHOLE, boxes_on_image

logger = logging.getLogger(__name__)

AXES = (0, 1)  # in the plane of the slices
_BORDER = 0.9  # of the pixels at the border of all slices that have one value where there is a background
_WORTH = 0.01  # of the foreground: what a crop that cannot hold all of it must gain to leave the middle
_RANGE = 0.05  # beyond the trained spacings, that is still as good as trained on


class CropInPlaned(CropForegroundd):
    """Crop slices to a size in mm without cutting off what the network is asked about.

    The crop lies in the middle where that cuts nothing of the image's foreground and of what is held. Else it moves, by
    as little as it can, to hold what is held and as much of the foreground as possible (where no place holds all of it,
    only for a hundredth more). It grows, along one axis, only where what is held does not fit. Where an image is
    smaller than the crop it is padded with 0 on both sides. What is left out is told per case, in the log and
    under "cut": int64 (4,), see ``samseg_monai.data.CUT``.

    Foreground of an image is what differs from its border where that has one value (skull-stripped brains, padding),
    else what lies above the mean.

    Args:
        keys: arrays (C, H, W, D) on one grid, "image" among them; all are cropped alike.
        size_mm: along the first and second axis; pixels where an image has no spacing; None: no crop.
        size: in voxels of ``spacing``, in place of ``size_mm``: how older settings give it; None: ``size_mm`` counts.
        spacing: in-plane spacing in mm that was trained on; None: that of each case, so that ``size`` is in its voxels.
        held: keys of masks of which nothing may be cut, and "boxes", those that a person gave for a 2-D image, or with
            clicks for a volume; a case need not have them. A prompt that is the whole slice is not held: it is what the
            crop shows.
    Raises: PromptError, naming the case, if any voxel of a prompt that is held is lost; DataError if an image would be
        padded beyond all memory.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size_mm: Sequence[float] | None = None,
        *,
        size: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        held: Sequence[str] = ("prompt",),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, "image", start_coord_key=None, end_coord_key=None, allow_missing_keys=allow_missing_keys)
        self.size_mm, self.size, self.spacing, self.held = size_mm, size, spacing, tuple(held)
        self._told: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        d = dict(data)
        if self.size is None and self.size_mm is None:
            return d
        image = d["image"]
        shown = _foreground(image)
        low, high = np.zeros(3, int), np.array(image.shape[1:])
        holding = () if d.get(WHOLE) else self.held
        held = [_extent(d, key) for key in holding if d.get(key) is not None]
        for axis, wanted in zip(AXES, self._voxels(image), strict=True):
            ends = [box[:, axis] for box in held if box is not None]
            span = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else None
            low[axis], high[axis] = _place(shown.sum([a for a in range(3) if a != axis]).numpy(), wanted, span)
            if high[axis] - low[axis] > wanted and name_of(d) not in self._told:
                logger.warning(
                    "%s: the crop grows from %d to %d voxels along axis %d to hold what is asked about; the network "
                    "sees it smaller than in training", name_of(d), wanted, high[axis] - low[axis], axis,
                )  # fmt: skip
        refuse_huge(image.shape, [int(side) for side in high - low], f"{name_of(d)}: crop_mm (or crop_size)")
        counts = {"image": int(shown.sum())}
        told = ("label", "prompt") if "prompt" in holding else ("label",)
        counts |= {key: int(foreground(d[key]).sum()) for key in told if key in self.keys and key in d}
        for key, mode in self.key_iterator(d, self.mode):
            d[key] = self.cropper.crop_pad(img=d[key], box_start=low, box_end=high, mode=mode, lazy=False)
        inside = self.cropper.compute_slices(roi_start=low, roi_end=high)
        left = {"image": int(shown[inside].sum())}
        left |= {key: int(foreground(d[key]).sum()) for key in counts if key != "image"}
        return {**d, "cut": self._tell(name_of(d), counts, left)}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pad what was cropped, with 0."""
        return dict(data) if self.size is None and self.size_mm is None else super().inverse(data)

    def _voxels(self, image: torch.Tensor) -> list[int]:
        """Size of the crop on the grid of ``image``."""
        own = image.pixdim[:2].tolist() if isinstance(image, MetaTensor) else [1.0, 1.0]
        if self.size is not None:
            sides = [n * s for n, s in zip(self.size, self.spacing or own, strict=True)]
        else:
            sides = list(self.size_mm or ())
        return [max(1, round(side / spacing)) for side, spacing in zip(sides, own, strict=True)]

    def _tell(self, case: str, counts: Mapping[str, int], left: Mapping[str, int]) -> torch.Tensor:
        lost = {key: counts[key] - left[key] for key in counts}
        if lost.get("prompt"):
            raise PromptError(
                f"{case}: the crop cuts {lost['prompt']} of {counts['prompt']} prompted voxels off; set crop_mm to null"
            )
        cut = [f"{n} of {counts[key]} voxels of {_NAMES[key]}" for key, n in lost.items() if n]
        if cut and case not in self._told:
            logger.warning("%s: the crop leaves out %s", case, " and ".join(cut))
        self._told.add(case)
        values = {**lost, **{f"{key}_of": n for key, n in counts.items()}}
        return torch.tensor([values.get(name, 0) for name in CUT])


_NAMES = {"image": "the image's foreground", "label": "the label", "prompt": "the prompt"}


def for_training(transforms: Sequence[Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    """``transforms`` with a crop that holds the label, of which there are prompts to come."""
    found = [copy(transform) for transform in transforms]
    for transform in found:
        if isinstance(transform, CropInPlaned):
            transform.held = ("label",)
    return found


def _foreground(image: torch.Tensor) -> torch.Tensor:
    """(S, H, W, D) to (H, W, D): voxels of any scan that show more than background."""
    found = torch.zeros(tuple(image.shape[1:]), dtype=torch.bool)
    for scan in image.as_subclass(torch.Tensor).cpu():
        border = torch.cat([scan[side].flatten() for side in (0, -1)] + [scan[:, side].flatten() for side in (0, -1)])
        value = border.median()
        found |= scan != value if (border == value).float().mean() >= _BORDER else scan > scan.float().mean()
    return found


def _extent(d: Mapping[Hashable, Any], key: str) -> np.ndarray | None:
    """First and last plus one of what is marked, along both axes (2, 2); None where nothing is."""
    if key == "boxes":
        boxes = boxes_on_image(d) if isinstance(d["boxes"], (list, tuple)) else None
        if boxes is None or not prompted(boxes).any():
            return None
        rows = boxes.flatten(0, -2).numpy()  # x0 y0 x1 y1, and x, y and label of clicks
        y, x = (np.concatenate([rows[:, k:4:2], rows[:, 4 + k :: 3]], axis=1) for k in (1, 0))
        ends = [[np.floor(np.nanmin(y)), np.floor(np.nanmin(x))], [np.ceil(np.nanmax(y)), np.ceil(np.nanmax(x))]]
        return np.array(ends).astype(int)
    plane = foreground(d[key]).any(dim=0).any(dim=-1).cpu()  # (C, H, W, D) -> (H, W)
    marked = plane.nonzero().numpy()
    return np.stack([marked.min(axis=0), marked.max(axis=0) + 1]) if len(marked) else None


def _place(foreground: np.ndarray, size: int, held: tuple[int, int] | None) -> tuple[int, int]:
    """Start and end of a crop along one axis; they lie beyond the image where it is padded.

    Args:
        foreground: voxels of it at each position.
        size: wanted.
        held: start and end of what must be inside.
    """
    length = len(foreground)
    size = max(size, held[1] - held[0]) if held else size
    if size >= length:
        start = -((size - length) // 2)
        return start, start + size
    first, last = (max(0, held[1] - size), min(held[0], length - size)) if held else (0, length - size)
    middle = min(max(length // 2 - size // 2, first), last)
    sums = np.concatenate([[0], np.cumsum(foreground)])
    inside = (sums[size:] - sums[:-size])[first : last + 1]  # of a crop at each start
    best, total = inside.max(), sums[-1]
    if best < total and inside[middle - first] >= best - _WORTH * total:
        return middle, middle + size
    starts = first + np.flatnonzero(inside == best)
    start = int(starts[np.abs(starts - middle).argmin()])
    return start, start + size


class ResampleInPlaned(MapTransform, InvertibleTransform):
    """Bring slices to the in-plane spacing that a network was trained on, where that of a case is another one.

    A case whose spacing lies within the trained range, 5 % beyond it included, stays as it is. Slices keep their number
    and their field of view, so that the result's spacing is the median of the trained to half a voxel in all.
    Images are smoothed where they shrink, as scikit-image's ``resize`` does it; labels are taken from the nearest
    voxel; a prompt never vanishes (see ``boxes_of``). The inverse gives the grid of the image back.

    Args:
        keys: arrays (C, H, W, D) on one grid, "image" among them.
        trained: "median", "min" and "max" of the training cases, each along the first and second axis, in mm; None:
            nobody knows, and nothing is changed.
        wanted: False changes nothing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        trained: Mapping[str, Sequence[float]] | None,
        *,
        wanted: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.trained = trained if wanted else None
        self._told: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.trained is None:
            return d
        image = d["image"]
        own = image.pixdim[:2].tolist()
        ranges = list(zip(own, self.trained["min"], self.trained["max"], strict=True))
        if all((1 - _RANGE) * least <= spacing <= (1 + _RANGE) * most for spacing, least, most in ranges):
            return d
        pairs = zip(image.shape[1:3], own, self.trained["median"], strict=True)
        size = (*(max(1, round(n * spacing / wanted)) for n, spacing, wanted in pairs), image.shape[3])
        refuse_huge(image.shape, size, f"{name_of(d)}: resample, a spacing of {own} mm,")
        if name_of(d) not in self._told:
            self._told.add(name_of(d))
            texts = [" x ".join(f"{x:.3g}" for x in spacing) for spacing in (own, self.trained["median"])]
            logger.warning("%s: spacing in the plane %s mm, trained on %s mm: resampled", name_of(d), *texts)
        for key in self.key_iterator(d):
            d[key] = self._resized(d[key], str(key), size)
        return d

    def _resized(self, array: torch.Tensor, key: str, size: Sequence[int]) -> torch.Tensor:
        mode = {"image": "trilinear", "prompt": "area"}.get(key, "nearest-exact")
        resized: Any = Resize(size, mode=mode, anti_aliasing=key == "image", dtype=torch.float32)(array)
        resized.applied_operations[-1][TraceKeys.CLASS_NAME] = type(self).__name__
        if key == "image":
            return resized
        if key == "prompt":  # what a thin box leaves of itself is half of the slice's most
            level = 0.5 * resized.as_tensor().amax(dim=(1, 2), keepdim=True)
            return on_grid_of(resized, (resized.as_tensor() > level).to(array.dtype))
        return on_grid_of(resized, resized.as_tensor().to(array.dtype))

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take slices back to the grid that they had, where they were resampled."""
        d = dict(data)
        for key in self.key_iterator(d):
            history = d[key].applied_operations
            if history and history[-1][TraceKeys.CLASS_NAME] == type(self).__name__:
                d[key] = Resize(1).inverse_transform(d[key], history.pop())
        return d
