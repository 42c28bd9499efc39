"""Which slices of a volume are learnt from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from samseg_monai.choices import IGNORE
from samseg_monai.errors import ConfigError


@dataclass(frozen=True)
class Picker:
    """What every picker can do. Immutable, and its ``repr`` is all there is to know about it."""

    min_voxels = 0
    units = "slice", "slices"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if isinstance(self, RandomN) and name == "min_voxels" else 1
            if value < least:
                raise ConfigError(f"{type(self).__name__}: {name} must be at least {least}, got {value}")

    def candidates(self, label: torch.Tensor) -> list[int]:
        """Slices (indices of the last axis, ascending) of ``label`` (C, H, W, D) that are kept in the cache."""
        return (_areas(label) >= self.min_voxels).nonzero()[:, 0].tolist()

    def draw(self, candidates: list[int], rng: np.random.Generator) -> list[int]:
        """The candidates used in one epoch; their number depends on ``len(candidates)`` only."""
        return list(candidates)

    def taken(self, volume: torch.Tensor, candidates: list[int]) -> torch.Tensor:
        """What the cache keeps of a volume (C, H, W, D): its candidates (N, C, H, W)."""
        return volume[..., candidates].movedim(-1, 0)


@dataclass(frozen=True)
class AllSlices(Picker):
    """Every slice, with or without foreground."""


@dataclass(frozen=True)
class EveryNth(Picker):
    """Slices 0, n, 2 n, ... with or without foreground; ``n`` is at least 1."""

    n: int

    def candidates(self, label: torch.Tensor) -> list[int]:
        return list(range(0, label.shape[-1], self.n))


@dataclass(frozen=True)
class MaxArea(Picker):
    """The one slice with most foreground voxels, the first of equals; none for an empty label."""

    def candidates(self, label: torch.Tensor) -> list[int]:
        areas = _areas(label)
        return [int(areas.argmax())] if areas.max() > 0 else []


@dataclass(frozen=True)
class Foreground(Picker):
    """Every slice with at least ``min_voxels`` (1 or more) foreground voxels."""

    min_voxels: int = 1


@dataclass(frozen=True)
class RandomN(Picker):
    """``n`` (1 or more) slices with at least ``min_voxels`` foreground voxels (0: any slice) per case, other ones in
    every epoch; all of them where the case has fewer."""

    n: int
    min_voxels: int = 1

    def draw(self, candidates: list[int], rng: np.random.Generator) -> list[int]:
        drawn = rng.choice(len(candidates), size=min(self.n, len(candidates)), replace=False)
        return [candidates[i] for i in sorted(drawn.tolist())]


@dataclass(frozen=True)
class Patches(Picker):
    """No slices: each volume whole, ``n`` times (1 or more) in an epoch, for transforms that cut a patch out of it
    at random; none where nobody has judged a voxel."""

    n: int = 1
    units = "patch", "patches"

    def candidates(self, label: torch.Tensor) -> list[int]:
        return [0] if (label != IGNORE).any() else []

    def draw(self, candidates: list[int], rng: np.random.Generator) -> list[int]:
        return candidates * self.n

    def taken(self, volume: torch.Tensor, candidates: list[int]) -> torch.Tensor:
        return volume[None].expand(len(candidates), *volume.shape)


def _areas(label: torch.Tensor) -> torch.Tensor:
    return ((label > 0) & (label != IGNORE)).any(dim=0).sum(dim=(0, 1))  # (C, H, W, D) -> (D,)


def asked_slices(prompt: torch.Tensor | None, rows: object = None) -> torch.Tensor | None:
    """Bool (D,), on the CPU: which slices of a volume have a prompt; None where there is nothing to tell it by.

    Args:
        prompt: (N, H, W, D), above 0 inside.
        rows: (D, N, 4 + 3 P) of boxes and clicks, or of a single slice (N, 4 + 3 P), in place of it; NaN for none.
    """
    if prompt is not None:
        return (torch.as_tensor(prompt) > 0).flatten(0, -2).any(0).cpu()
    if not isinstance(rows, torch.Tensor):
        return None
    return (~rows.isnan()).reshape(rows.shape[0] if rows.ndim == 3 else 1, -1).any(1).cpu()
