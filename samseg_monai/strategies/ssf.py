"""Scaling and shifting the features of SAM's image encoder (SSF, Lian et al. 2022, arXiv:2210.08823)."""

from __future__ import annotations

from typing import Literal

from samseg_monai.adapters.scale_shift import ScaleShift
from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.strategies.base import OnEncoder, Segmenter, added_names


class SSF(OnEncoder):
    """A scale and a shift for each channel behind every layer of SAM's frozen image encoder that can take them in.

    These are all that have weight and bias: linear layers, normalisations, convolutions with a bias. ``merge()`` folds
    them into SAM's own tensors, exactly. They start at ones and zeros, so that a fresh network is SAM.

    Args:
        decoder: also train what the task uses of the mask decoder; "hierarchical" with a second one behind it.
    Raises:
        AdapterError: on installing, a second decoder does not fit.
    """

    name = "ssf"

    def __init__(self, decoder: bool | Literal["hierarchical"] = False) -> None:
        self.decoder = decoder
        raise_all(self.decoder_problems(), AdapterError, "SSF cannot be built")

    def install(self, segmenter: Segmenter) -> list[str]:
        """Put them behind the layers; owned are scales and shifts, and with ``decoder`` the mask decoder."""
        second = self.second_decoder(segmenter)
        for layer in [layer for layer in segmenter.sam.image_encoder.modules() if ScaleShift.fits(layer)]:
            ScaleShift.behind(layer)
        owned = added_names(segmenter, ScaleShift) | self.learnt_decoder(segmenter, second)
        return [name for name in segmenter.state_dict() if name in owned]
