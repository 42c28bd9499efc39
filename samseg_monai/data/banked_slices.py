"""Slices with a fixed number of augmented variants each, whose embeddings are computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from samseg_monai.data.embedding_bank import EmbeddingBank
from samseg_monai.data.encoding import encode, frozen_encoder
from samseg_monai.data.slice_cache import describe, describe_item
from samseg_monai.data.slices import Picker, SliceDataset, Transforms, composed, seed_of
from samseg_monai.errors import ConfigError

DEFAULT_VARIANTS = 8  # as many as a square has rotations and reflections


class BankedSlices(SliceDataset):
    """A ``SliceDataset`` whose augmentation is drawn from (seed, variant, slice) instead of (seed, epoch, item).

    A slice then has ``variants`` looks and no more, and an epoch shows one of them: all in turn, in an order that is
    drawn anew for every slice and cycle of ``variants`` epochs. Items have "variant", 0 to variants - 1, before
    ``slice_transforms`` run, so that a transform may enumerate instead of drawing. ``fill`` computes what the frozen
    encoder makes of every look; from then on items have "embedding", and images and labels stay as they were.

    Args:
        data, volume_transforms, slice_transforms, picker, settings: as of ``SliceDataset``.
        variants: looks per slice, at least 1; None is 8 where embeddings are kept, and without end where not: the
            dataset is then a ``SliceDataset`` and no more.
        epoch_transforms: run behind ``slice_transforms`` on every access and draw from (seed, epoch, item), whatever
            the look is: for boxes, which are no part of an embedding. They must leave the image as it is.
        embedding_dir: folder of the embeddings; None keeps none. Per slice and variant 2 bytes per number of the
            encoder's output, which is 512 kB for SAM at 512 pixels and 2 MB at 1024.
    Shape: "embedding" is (V, C, gh, gw), bf16; V is what the network makes of one image: its scans, or 1.
    Raises: as ``SliceDataset``; ConfigError for ``variants`` below 1.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        volume_transforms: Transforms,
        slice_transforms: Transforms = None,
        *,
        picker: Picker,
        variants: int | None = None,
        epoch_transforms: Transforms = None,
        embedding_dir: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if variants is not None and variants < 1:
            raise ConfigError(f"variants must be at least 1, got {variants}")
        super().__init__(data, volume_transforms, slice_transforms, picker=picker, **settings)
        self.variants = variants or (1 if embedding_dir is None else DEFAULT_VARIANTS)
        self.epoch_transforms = composed(epoch_transforms)
        self._endless = variants is None and embedding_dir is None
        self._embedding_dir = None if embedding_dir is None else Path(embedding_dir)
        self._bank: EmbeddingBank | None = None
        self._first = np.cumsum([0, *(len(numbers) for numbers in self._numbers)]).tolist()  # row of each case
        # now, while the files are those that were read and no transform has drawn
        self._key = {
            "data": [describe_item(item) for item in self.data],
            "volume_transforms": describe(self.volume_transforms),
            "slice_transforms": describe(self.slice_transforms),
            "picker": repr(picker),
            "keys": self.keys,
            "seed": self.seed,
            "variants": self.variants,
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        epoch = int(self._epoch)
        item = super().__getitem__(index) if self._endless else self._banked(index, epoch)
        self.epoch_transforms.set_random_state(seed=seed_of(self.seed, epoch, index, 1))
        return dict(self.epoch_transforms(item))

    def _banked(self, index: int, epoch: int) -> dict[str, Any]:
        position, candidate = self._drawn(index, epoch)
        row = self._first[position] + candidate
        variant = self.variant(row, epoch)
        item = self._look(position, candidate, variant)
        if self._bank is not None:
            item["embedding"] = self._bank.read(row * self.variants + variant)
        return item

    def variant(self, row: int, epoch: int) -> int:
        """Which look of a slice an epoch shows; ``row`` counts all candidates of all cases."""
        cycle, step = divmod(epoch, self.variants)
        return int(np.random.default_rng((self.seed, row, cycle)).permutation(self.variants)[step])

    def fill(
        self,
        network: Any,
        *,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> int:
        """Compute the embeddings that are not on disk yet; has to be called before a loader starts its workers.

        Without ``embedding_dir`` there is nothing to do.

        Args:
            network: with ``encode``, ``embedding_identity`` and ``encoder_frozen``, as SamSegmenter has them.
            batch_size: images per call of the encoder, at least 1.
            device: where the network lies; None asks its parameters.
            progress: show a progress bar on stderr.
        Returns: how many embeddings were computed.
        Raises: ConfigError if the encoder learns; CacheError if the disk is too small, or
            holds other files under these names.
        """
        if self._embedding_dir is None:
            return 0
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        encoder = frozen_encoder(network)
        device = _device_of(encoder) if device is None else torch.device(device)

        def compute(rows: list[int]) -> torch.Tensor:
            looks = (self._look(*self._place(row // self.variants), row % self.variants) for row in rows)
            return encode(encoder, [look["image"].to(device) for look in looks])

        rows = self._first[-1] * self.variants
        key = {**self._key, "network": encoder.embedding_identity()}
        first = list(range(min(batch_size, rows)))
        bank, compute_rest = EmbeddingBank.for_rows(self._embedding_dir, key, rows, compute, first)
        count = bank.fill(compute_rest, batch_size, progress=progress)
        self._bank = bank
        return count

    def _look(self, position: int, candidate: int, variant: int) -> dict[str, Any]:
        row = self._first[position] + candidate
        return self._transformed(position, candidate, (self.seed, variant, row), variant=variant)

    def _place(self, row: int) -> tuple[int, int]:
        """Case, and which of its candidates."""
        position = int(np.searchsorted(self._first, row, side="right")) - 1
        return position, row - self._first[position]


def _device_of(network: Any) -> torch.device:
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
