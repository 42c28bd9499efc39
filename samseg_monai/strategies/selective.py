"""Selective fine-tuning: train some of SAM's own tensors in place, named by patterns, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.strategies.base import OnEncoder, Segmenter, unused_of_decoder, unused_of_prompts

NORM, ATTENTION = "<norm>", "<attention>"


class Selective(OnEncoder):
    """SAM's own tensors that match a pattern learn; all others stay frozen.

    ``["sam"]`` is full fine-tuning, ``["sam.mask_decoder"]`` the decoder alone, ``["*.bias"]`` BitFit (Ben Zaken et al.
    2022, arXiv:2106.10199), ``["<norm>"]`` scales and shifts of all normalisations, ``["<attention>"]`` the projections
    of the encoder's attention (Touvron et al. 2022, arXiv:2203.09795). What the task never uses (the mask
    quality head, the masks that are not returned, prompts of other kinds) is left out by itself. Batch normalisation
    learns its scale and shift; its stored statistics stay those of the pretraining.

    Args:
        patterns: a parameter's name or its beginning up to a dot; ``*`` stands for anything; ``<norm>`` for the
            parameters of all normalisation layers, whatever they are called; ``<attention>`` for those of the layers
            that make queries, keys and values in the image encoder's blocks, and of the layers behind the attention.
        frozen: patterns of what of these stays frozen all the same, such as ``["sam.prompt_encoder"]``.
        name: how tables call it.
        decoder: also train what the task uses of the mask decoder, whatever is ``frozen``; "hierarchical" with a second
            one behind it.
    Raises:
        AdapterError: no or malformed patterns; on installing, every pattern that matches nothing that the task uses.
    """

    newer: ClassVar[dict[str, Any]] = {"decoder": False}

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        frozen: Sequence[str] = (),
        name: str = "selective",
        decoder: bool | Literal["hierarchical"] = False,
    ) -> None:
        self.decoder = decoder
        given = {"patterns": patterns, "frozen": frozen}
        problems = [
            f"{key} must be a list of names or patterns, got {value!r}"
            for key, value in given.items()
            if isinstance(value, str) or not all(isinstance(pattern, str) and pattern for pattern in value)
        ]
        if not problems and not patterns:
            problems = ["patterns must name something that learns; for nothing there is ZeroShot"]
        raise_all([*problems, *self.decoder_problems()], AdapterError, "Selective cannot be built")
        self.patterns, self.frozen, self.name = tuple(patterns), tuple(frozen), name

    def install(self, segmenter: Segmenter) -> list[str]:
        """Change no layer; owned are SAM's parameters that a pattern matches, and what ``decoder`` adds to them."""
        second, unused = self.second_decoder(segmenter), set(self.unused(segmenter))
        usable = [name for name, _ in segmenter.named_parameters() if name not in unused]
        groups = {NORM: _norm_parameters(segmenter), ATTENTION: _attention_parameters(segmenter)}
        problems = [
            f"{pattern!r} matches nothing that the task uses; there is {_outline(usable)}"
            for pattern in (*self.patterns, *self.frozen)
            if not any(_matches(pattern, name, groups) for name in usable)
        ]
        raise_all(problems, AdapterError, "Selective does not fit this network")
        owned = {
            name
            for name in usable
            if any(_matches(pattern, name, groups) for pattern in self.patterns)
            and not any(_matches(pattern, name, groups) for pattern in self.frozen)
        }
        if not owned:
            raise AdapterError(
                f"Selective: frozen {list(self.frozen)} leaves nothing of {list(self.patterns)} to learn"
            )
        owned |= self.learnt_decoder(segmenter, second)
        # a mask head of another size may start as copies of SAM's masks only where they can grow apart
        self.tile_masks = "sam.mask_decoder.mask_tokens.weight" in owned
        return [name for name in segmenter.state_dict() if name in owned]

    def unused(self, segmenter: Segmenter) -> list[str]:
        """The mask quality head, masks that are not returned, and prompts of other kinds."""
        return [*unused_of_decoder(segmenter), *unused_of_prompts(segmenter)]


def _norm_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters of all normalisation layers."""
    return {
        f"{prefix}.{name}"
        for prefix, layer in network.named_modules()
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, LayerNorm2d, _NormBase))
        for name, _ in layer.named_parameters(recurse=False)
    }


def _attention_parameters(segmenter: Segmenter) -> set[str]:
    """Names of the parameters of the layers q, k, v and proj of all blocks of the image encoder."""
    encoder = segmenter.sam.image_encoder
    return {
        f"sam.image_encoder.{path}.{rows.layer}.{name}"
        for path, block in encoder.named_blocks()
        for target, rows in encoder.targets(block).items()
        if target in ("q", "k", "v", "proj")
        for name, _ in block.get_submodule(rows.layer).named_parameters()
    }


def _matches(pattern: str, name: str, groups: Mapping[str, set[str]]) -> bool:
    if pattern in groups:
        return name in groups[pattern]
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _outline(names: Sequence[str]) -> str:
    """The modules that hold the tensors ``names``, three levels deep, numbers as stars."""
    modules = (".".join(name.split(".")[:3]) for name in names)
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in modules))
