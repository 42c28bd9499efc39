"""Augmentation that MONAI lacks: by name, left-right mirroring that knows sides, a coil's bias on z-scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Orientationd, RandAffined, RandBiasField, RandBiasFieldd, RandFlipd
from monai.utils import TraceKeys

from samseg_monai.choices import IGNORE
from samseg_monai.data.files.boxes import is_number
from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.transforms.grids import on_grid_of

Transform = Callable[[Any], Any]


def named_transforms(presets: Mapping[str, Mapping[str, Transform | None]], name: str) -> list[Transform]:
    """The transforms of one preset, in their order.

    Args:
        presets: name of the preset -> name of the transform -> transform; None is left out.
        name: which preset.
    Raises: ConfigError for an unknown name, with those there are.
    """
    if name not in presets:
        raise ConfigError(
            f"augmentation: there is no {name!r}, only {', '.join(presets)}; transforms of your own go into "
            "augmentation_transforms, as a list"
        )
    return [transform for transform in presets[name].values() if transform is not None]


class RandShiftedAffined(RandAffined):
    """MONAI's ``RandAffined`` with shifts as a fraction of each slice's own sides, whatever its size, or of those of a
    volume's slices, all of which are shifted alike.

    Args:
        keys, settings: as of ``RandAffined``, but ``translate_range``.
        shift: largest shift along each axis of a slice, as a fraction of the side, 0 to 1.
    Raises: ConfigError for another ``shift``.
    """

    def __init__(self, keys: KeysCollection, *, shift: float = 0.0, **settings: Any) -> None:
        if not is_number(shift) or not 0 <= shift <= 1:
            raise ConfigError(f"shift is a fraction of a slice's side, 0 to 1, got {shift!r}")
        super().__init__(keys, **settings)
        self.shift = float(shift)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        size = data[self.first_key(dict(data))].shape[1:3]
        self.rand_affine.rand_affine_grid.translate_range = tuple(self.shift * side for side in size)
        return dict(super().__call__(data, lazy=lazy))


class RandBiasFromMinimumd(RandBiasFieldd):
    """MONAI's ``RandBiasFieldd`` for images that may be negative, as z-scores are.

    A coil's bias multiplies what the scanner measured. Multiplied to z-scores it would leave the mean alone and push
    dark and bright tissue apart; here it multiplies what lies above the minimum of each channel, which is 0 in images
    of 0 to 1 or 0 to 255. Pixels of exactly 0 stay 0: the background of skull-stripped, normalised brains.

    Args:
        keys, degree, coeff_range, prob, allow_missing_keys: as of ``RandBiasFieldd``; the field is ``exp`` of a
            Legendre polynomial whose coefficients are drawn from ``coeff_range``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        degree: int = 3,
        coeff_range: tuple[float, float] = (-0.1, 0.1),
        *,
        prob: float = 0.1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, degree, coeff_range, prob=prob, allow_missing_keys=allow_missing_keys)
        self.rand_bias_field = _FromMinimum(degree, coeff_range, prob=1.0)


class _FromMinimum(RandBiasField):
    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> torch.Tensor:
        image = torch.as_tensor(img)
        floor = image.amin(tuple(range(1, image.ndim)), keepdim=True)
        above = torch.as_tensor(super().__call__(image - floor, randomize))
        return torch.where(image == 0, image, above + floor)


def left_right_axis(transforms: Sequence[Any]) -> int | None:
    """Spatial axis, 0 or 1, that runs between left and right in the slices of volumes oriented by ``transforms``.

    Args:
        transforms: the bundle's ``orient_transforms``; the last ``Orientationd`` among them counts.
    Returns: None without an ``Orientationd``, and where slices are sagittal (left and right lie in different slices).
    """
    codes = [transform.ornt_transform.axcodes for transform in transforms if isinstance(transform, Orientationd)]
    axes = [axis for axis, code in enumerate(codes[-1] or "RAS") if code in "LR"] if codes else []
    return axes[0] if axes and axes[0] < 2 else None


class RandMirroredd(RandFlipd):
    """Mirror slices left to right with probability ``prob``, and exchange the labels of classes that differ by side.

    In the mirrored image the right kidney lies where the left one was, and its label becomes "left kidney". Only the
    left-right axis is mirrored: a patient upside down, or front to back, is none that a scanner shows.

    Args:
        keys: arrays on one grid, channel-first: image, label, prompt; all are mirrored together. "label" holds classes,
            whole numbers of any dtype.
        axis: spatial axis between left and right, see ``left_right_axis``.
        classes: names behind the label values 1 to K.
        pairs: [left, right] names of classes that change places. None means that nobody has said: refused if a class
            is named left or right. An empty list says that there are none.
        prob: of a slice to be mirrored.
    Raises:
        ConfigError: at construction, for an axis that is none of a slice, unknown names, a class in two pairs, or sides
            among the classes that nobody has paired; all at once.
        DataError: for a label with values that are no classes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        axis: int | None,
        classes: Sequence[str] = (),
        pairs: Sequence[Sequence[str]] | None = None,
        *,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        _check(axis, classes, pairs)
        super().__init__(keys, prob=prob, spatial_axis=axis, allow_missing_keys=allow_missing_keys)
        self.table = torch.arange(IGNORE + 1)  # voxels that nobody has judged stay such
        self.values = torch.tensor([*range(len(classes) + 1), IGNORE])
        for pair in pairs or ():
            one, other = (list(classes).index(name) + 1 for name in pair)
            self.table[one], self.table[other] = other, one
        self.exchanges = bool(pairs)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        d = super().__call__(data, lazy=lazy)
        return self._exchange(d, list(self.key_iterator(d))) if self._do_transform else d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror back and exchange the labels back, in so far as the forward call did."""
        traces = {key: self.get_most_recent_transform(data[key]) for key in self.key_iterator(dict(data))}
        done = [key for key, trace in traces.items() if trace[TraceKeys.DO_TRANSFORM]]
        return self._exchange(super().inverse(data), done)

    def _exchange(self, d: dict[Hashable, Any], keys: Sequence[Hashable]) -> dict[Hashable, Any]:
        if self.exchanges and "label" in keys:
            values = torch.as_tensor(d["label"]).as_subclass(torch.Tensor)
            if values.numel() and not torch.isin(values, self.values.to(values.device)).all():
                raise DataError(
                    f"label has values {float(values.min()):g} to {float(values.max()):g}, classes are 0 to "
                    f"{len(self.values) - 2}: recode labels before they are mirrored"
                )
            d["label"] = on_grid_of(d["label"], self.table[values.long()].to(values.dtype))
        return d


def side_mirror(transforms: Sequence[Any], *, wanted: bool, **settings: Any) -> RandMirroredd | None:
    """``RandMirroredd`` along the left-right axis of a bundle's slices; None where they have none, or it is not wanted.

    Args:
        transforms: the bundle's ``orient_transforms``, see ``left_right_axis``.
        wanted: nothing is checked, and nothing said of sides, where no slice will be mirrored.
        settings: as of ``RandMirroredd``, but the axis.
    """
    axis = left_right_axis(transforms)
    return RandMirroredd(axis=axis, **settings) if wanted and axis is not None else None


def _check(axis: int | None, classes: Sequence[str], pairs: Sequence[Sequence[str]] | None) -> None:
    problems = []
    if axis not in (0, 1):
        problems.append(f"axis is 0 or 1, the one of a slice between left and right, got {axis}")
    odd = [pair for pair in pairs or () if not isinstance(pair, (list, tuple)) or len(pair) != 2]
    problems += [f"{pair!r}: mirrored_classes is a list of pairs, [[left, right], ...]" for pair in odd]
    names = [name for pair in pairs or () if pair not in odd for name in pair]
    problems += [f"{name}: no such class; there are {', '.join(classes)}" for name in names if name not in classes]
    problems += [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if pairs is None:
        sided = [name for name in classes if {"left", "right"} & set(re.split(r"[^a-z]+", name.lower()))]
        problems += [
            f"{name}: a side among the classes; set mirrored_classes to the pairs that change places, such as "
            '[["left lung", "right lung"]], or to [] if none do'
            for name in sided
        ]
    raise_all(problems, ConfigError, "slices cannot be mirrored left to right")
