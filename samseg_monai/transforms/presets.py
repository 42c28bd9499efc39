"""Augmentation by name, and the one transform of it that MONAI lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import RandBiasField, RandBiasFieldd

from samseg_monai.errors import ConfigError

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
