"""What the rest of the package knows of an image encoder: a backbone is one file that says this of itself.

Strategies, learning rates, weights, taps and export ask here and nowhere else. A new backbone is a ``SamSpec`` that
builds a ``Backbone`` and a line in ``spec.SPECS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch
from torch import nn

# Layers of a block that can be adapted: attention inputs, attention output, first and second layer of the MLP.
TARGETS = ("q", "k", "v", "proj", "lin1", "lin2")


@dataclass(frozen=True)
class Rows:
    """Where a target lies: which rows of the weight of which linear layer of a block."""

    layer: str  # path within the block
    part: int = 0  # which of the pieces of a group of rows
    parts: int = 1  # equal pieces of a group; 3 where query, key and value are one layer
    groups: int = 1  # how often the pieces repeat: the number of heads for [q, k, v] per head


@dataclass(frozen=True)
class SamSpec(ABC):
    """The numbers that every SAM has, and how its image encoder is built."""

    name: str  # as used for ``sam_variant``
    _: KW_ONLY
    image_size: int = 1024  # side in pixels of the padded square that the published weights were made for
    patch_size: int = 16  # stride of the image embedding, in pixels
    prompt_dim: int = 256  # channels of the image embedding, prompts and mask decoder
    decoder_mlp_dim: int = 2048  # hidden width of the mask decoder's transformer
    decoder_heads: int = 8  # of the mask decoder's transformer
    mask_in_chans: int = 16  # hidden channels that encode a mask prompt
    iou_hidden_dim: int = 256  # hidden width of the head that predicts mask quality

    @abstractmethod
    def encoder(self, *, image_size: int, checkpointing: bool = False) -> Backbone:
        """Build the image encoder with random weights for a square of ``image_size`` pixels."""


class Backbone(nn.Module, ABC):
    """An image encoder: (B, 3, h, w), normalised, to an embedding (B, prompt_dim, h / patch, w / patch).

    Attributes:
        stem: beginnings of the names of what lies before the first block.
        unused_in_files: names and shapes of what published files hold and no encoder uses.
        checkpointing: recompute the blocks in the backward pass instead of storing their activations.
    """

    stem: tuple[str, ...] = ("patch_embed.",)
    unused_in_files: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    checkpointing: bool = False

    @abstractmethod
    def forward(
        self, x: torch.Tensor, taps: Sequence[int] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Encode ``x``; with ``taps``, also return the outputs (B, h', w', C') of those blocks, in order."""

    @abstractmethod
    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        """The blocks and their names within the encoder, in order of depth."""

    def targets(self, block: nn.Module) -> Mapping[str, Rows]:
        """Which of ``TARGETS`` a block has, and where; none for a block without attention."""
        return {}

    def sized_tables(self) -> set[str]:
        """Names of the tables that follow the image size."""
        return set()

    def depth_of(self, name: str) -> int:
        """Layer of a tensor: 0 for the stem, i + 1 for block i, one more than there are blocks for what follows."""
        if name.startswith(self.stem):
            return 0
        names = [block for block, _ in self.named_blocks()]
        inside = (i + 1 for i, block in enumerate(names) if name.startswith(f"{block}."))
        return next(inside, len(names) + 1)
