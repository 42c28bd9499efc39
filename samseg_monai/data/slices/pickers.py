"""Slice pickers: which slices of a labelled volume are worth learning from.

A picker names the candidates of a volume once, when its slices are cached, and draws among them in every epoch; only
``RandomN`` draws less than everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from samseg_monai.errors import ConfigError


@dataclass(frozen=True)
class Picker:
    """What every picker can do. Immutable, and its ``repr`` is all there is to know about it."""

    def candidates(self, label: torch.Tensor) -> list[int]:
        """Slices (indices of the last axis, ascending) of ``label`` (C, H, W, D) that are kept in the cache."""
        return list(range(label.shape[-1]))

    def draw(self, candidates: list[int], rng: np.random.Generator) -> list[int]:
        """The candidates used in one epoch; their number depends on ``len(candidates)`` only."""
        return list(candidates)

    def _check(self, name: str) -> None:
        if (value := getattr(self, name)) < 1:
            raise ConfigError(f"{type(self).__name__}: {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class AllSlices(Picker):
    """Every slice, with or without foreground."""


@dataclass(frozen=True)
class EveryNth(Picker):
    """Slices 0, n, 2 n, ... with or without foreground; ``n`` is at least 1."""

    n: int

    def __post_init__(self) -> None:
        self._check("n")

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

    def __post_init__(self) -> None:
        self._check("min_voxels")

    def candidates(self, label: torch.Tensor) -> list[int]:
        return (_areas(label) >= self.min_voxels).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class RandomN(Picker):
    """``n`` (1 or more) slices with at least ``min_voxels`` foreground voxels (0: any slice) per case, other ones in
    every epoch; all of them where the case has fewer."""

    n: int
    min_voxels: int = 1

    def __post_init__(self) -> None:
        self._check("n")

    def candidates(self, label: torch.Tensor) -> list[int]:
        return (_areas(label) >= self.min_voxels).nonzero()[:, 0].tolist()

    def draw(self, candidates: list[int], rng: np.random.Generator) -> list[int]:
        drawn = rng.choice(len(candidates), size=min(self.n, len(candidates)), replace=False)
        return [candidates[i] for i in sorted(drawn.tolist())]


def _areas(label: torch.Tensor) -> torch.Tensor:
    return (label > 0).any(dim=0).sum(dim=(0, 1))  # (C, H, W, D) -> (D,)
