"""Frozen encoders as the banks see them: a network with ``encode``, ``embedding_identity`` and ``encoder_frozen``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from samseg_monai.data.embedding_bank import Compute, EmbeddingBank
from samseg_monai.errors import ConfigError

NEEDED = ("encode", "embedding_identity", "encoder_frozen")


def frozen_encoder(network: Any) -> Any:
    """The network whose embeddings may be stored, out of its wrapper for several GPUs.

    Raises: ConfigError if it has no encoder of its own, or one that learns.
    """
    inner = network.module if isinstance(network, (DistributedDataParallel, DataParallel)) else network
    absent = [name for name in NEEDED if not hasattr(inner, name)]
    if absent:
        raise ConfigError(
            f"embeddings cannot be stored: {type(inner).__name__} has no {', '.join(absent)}; use a SamSegmenter, or "
            "leave embedding_dir out"
        )
    if not inner.encoder_frozen:
        raise ConfigError(
            f"embeddings cannot be stored: the image encoder of this {type(inner).__name__} learns, so they change in "
            "every step; leave embedding_dir out, or freeze the encoder (strategies ladder, decoder, zero-shot)"
        )
    return inner


def encode(encoder: Any, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (S, H, W), all on the encoder's device, to embeddings (b, V, C, gh, gw): V per image.

    The encoder runs in evaluation mode and without gradients. Images of several sizes are encoded one by one.
    Raises: ConfigError if their embeddings differ in size.
    """
    sizes = {tuple(image.shape) for image in images}
    batches = [torch.stack(list(images))] if len(sizes) == 1 else [image[None] for image in images]
    modes = [(m, m.training) for m in encoder.modules()] if isinstance(encoder, nn.Module) else []
    if any(training for _, training in modes):
        encoder.eval()
    try:
        with torch.no_grad():
            parts = [encoder.encode(batch).unflatten(0, (len(batch), -1)) for batch in batches]
    finally:
        for module, training in modes:
            module.training = training
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise ConfigError(
            f"embeddings of one bank must have one size, got {shapes}; pad the slices, or rectangular=false"
        )
    return torch.cat(parts)


class VolumeEmbeddings:
    """Embeddings of the slices of one volume, kept in a bank of its own; a slice is encoded when it is first wanted.

    Args:
        folder: where the banks lie.
        network: as ``frozen_encoder`` takes it.
        settings: JSON values that say how a slice is prepared for the network.
        volume: (S, H, W, D), from which the slices are cut.
    Raises: ConfigError as ``frozen_encoder``; CacheError as ``EmbeddingBank``.
    """

    def __init__(self, folder: str | Path, network: Any, settings: Any, volume: torch.Tensor) -> None:
        self.encoder = frozen_encoder(network)
        self.folder, self.depth = folder, volume.shape[-1]
        self.key = {"volume": _hash(volume), "slices": settings, "network": self.encoder.embedding_identity()}
        self._bank: EmbeddingBank | None = None

    def get(self, numbers: list[int], images: torch.Tensor) -> torch.Tensor:
        """Embeddings (b, V, C, gh, gw) in bf16 of the slices ``numbers``, prepared as ``images`` (b, S, h, w)."""

        def compute(rows: list[int]) -> torch.Tensor:
            return encode(self.encoder, [images[numbers.index(row)] for row in rows])

        todo: Compute = compute
        if self._bank is None:
            self._bank, todo = EmbeddingBank.for_rows(self.folder, self.key, self.depth, compute, numbers)
        self._bank.ensure(numbers, todo, len(numbers))
        return torch.stack([self._bank.read(row) for row in numbers]).to(images.device)


def _hash(volume: torch.Tensor) -> str:
    array = np.ascontiguousarray(volume.detach().cpu().as_subclass(torch.Tensor).numpy())
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    digest.update(array.data)
    return digest.hexdigest()
