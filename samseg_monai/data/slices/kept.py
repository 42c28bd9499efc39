"""Whole volumes that are validated again and again: transformed once, and of each only what is looked at is kept."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait
from torch.utils.data import get_worker_info

from samseg_monai.choices import IGNORE
from samseg_monai.data.slices.dataset import Transforms
from samseg_monai.data.slices.pickers import Picker, asked_slices
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.pictures import axial_axis

logger = logging.getLogger(__name__)

MOST_BYTES = 1_000_000_000  # of all cases together, where no rate is given: about 40 of BraTS with their boxed slices
_FAST = 1  # level of zlib: masks are almost empty, and shrink to a hundredth of their size at any
_MASKS = ("label", "reference", "prompt")


class KeptVolumes(Dataset):
    """MONAI's ``Dataset`` of cases for validations: what the transforms make of a case stays in memory.

    Kept are masks, compressed without loss, and of the image the slices that have a prompt or a label; the others of an
    image with a prompt are 0 in later epochs, since no network sees them. An image without a prompt is kept whole.
    Where random transforms without a seed are among them, nothing is kept. Processes of a loader keep their own cases,
    as long as they live (``persistent_workers``).

    With a ``picker`` a case has "slices", bool (D,), True for those that it picks of the label, the same in every
    epoch; voxels of the "reference" in all others are 255, which is in no score.

    Args:
        data: cases of a datalist.
        transform: MONAI dictionary transforms, or one Compose: key -> (C, H, W, D).
        rate: fraction of the cases, the first ones, that is kept, 0 to 1; None: as many as fit in 1 GB.
        picker: which slices are validated; None: all.
        seed: non-negative, of a picker that draws.
    Raises: ConfigError for a rate or seed out of range. When a case is asked for, DataError if slices are to be picked
        of a case without "label", or whose "reference" does not lie on its slices.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Transforms,
        *,
        rate: float | None = None,
        picker: Picker | None = None,
        seed: int = 0,
    ) -> None:
        if rate is not None and not 0 <= rate <= 1:
            raise ConfigError(f"KeptVolumes: rate must be from 0 to 1, got {rate}; null keeps what fits in 1 GB")
        if seed < 0:
            raise ConfigError(f"KeptVolumes: seed must not be negative, got {seed}")
        # no copy: what is inverted later on looks for the very transforms that made it
        super().__init__(data=data, transform=transform if isinstance(transform, Compose) else Compose(transform))
        self.picker, self.seed = picker, seed
        self._kept: dict[int, dict[str, Any]] = {}
        self._bytes = 0
        self._first = len(data) if rate is None else round(len(data) * rate)
        self._most = MOST_BYTES if rate is None else None
        drawn = [type(t).__name__ for t in self.transform.flatten().transforms if _draws(t)]
        if drawn and self._first:
            logger.info("validation: %s draws anew in every epoch, so no case is kept in memory", ", ".join(drawn))
            self._first = 0

    @property
    def cache_bytes(self) -> int:
        """Memory that the kept cases occupy in this process, in bytes."""
        return self._bytes

    def _transform(self, index: int) -> Any:
        if (kept := self._kept.get(index)) is not None:
            return {key: value.volume() if isinstance(value, _Packed) else value for key, value in kept.items()}
        item: Any = super()._transform(index)
        if self.picker is not None:
            item = self._picked(item, index)
        if index < self._first and isinstance(item, Mapping):
            self._keep(item, index)
        return item

    def _picked(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        assert self.picker is not None
        if not isinstance(item.get("label"), torch.Tensor):
            raise DataError(f"{item.get('case')}: slices are picked of 'label', but there are only {sorted(item)}")
        label = item["label"].as_subclass(torch.Tensor)
        rng = np.random.default_rng((self.seed, 0, index))
        slices = torch.zeros(label.shape[-1], dtype=torch.bool)
        slices[self.picker.draw(self.picker.candidates(label), rng)] = True
        reference = {"reference": _judged_in(item, slices)} if "reference" in item else {}
        return {**item, **reference, "slices": slices}

    def _keep(self, item: Mapping[str, Any], index: int) -> None:
        packed = {key: _pack(key, value, item) for key, value in item.items()}
        size = sum(value.nbytes for value in packed.values() if isinstance(value, _Packed))
        worker = get_worker_info()
        share = 1 if worker is None else worker.num_workers
        if self._most is None or self._bytes + size <= self._most / share:
            self._kept[index], self._bytes = packed, self._bytes + size


def _draws(transform: Any) -> bool:
    """Whether what a transform makes of a case differs from one call to the next."""
    return isinstance(transform, RandomizableTrait) and getattr(transform, "seed", None) is None


def _judged_in(item: Mapping[str, Any], slices: torch.Tensor) -> torch.Tensor:
    """The reference of a case, on its own grid, with 255 outside of ``slices`` of the image's grid."""
    image, reference = item["image"], item["reference"]
    to_reference = np.linalg.solve(np.asarray(reference.affine, dtype=float), np.asarray(image.affine, dtype=float))
    axis = int(np.abs(to_reference[:3, 2]).argmax())
    numbers = np.rint(to_reference[axis, 2] * np.arange(len(slices)) + to_reference[axis, 3]).astype(int)
    size = reference.shape[axis + 1]
    if sorted(numbers) != list(range(size)):
        raise DataError(f"{item.get('case')}: slices of the image are not those of the reference; set picker to null")
    left_out = torch.ones(size, dtype=torch.bool)
    left_out[numbers[slices.numpy()]] = False
    judged = reference.clone()
    judged.as_subclass(torch.Tensor).movedim(axis + 1, 0)[left_out] = IGNORE
    return judged


def _looked_at(item: Mapping[str, Any]) -> torch.Tensor | None:
    """Slices, bool (D,), of an image (C, H, W, D) that a validation looks at; None for all.

    That is what the network sees, and what a picture of the worst slice shows, as long as it is cut the same way.
    """
    image, boxes, label = item["image"], item.get("boxes"), item.get("label")
    rows = boxes if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else None  # with clicks, of a volume
    seen = asked_slices(item.get("prompt"), rows)
    if seen is None or not isinstance(image, MetaTensor) or axial_axis(np.asarray(image.affine)) != 2:
        return item.get("slices")
    if isinstance(label, torch.Tensor):
        seen = seen | (label.as_subclass(torch.Tensor) > 0).flatten(0, 2).any(0)
    return seen & item["slices"] if "slices" in item else seen


@dataclass(frozen=True)
class _Packed:
    """A volume in less memory."""

    values: torch.Tensor | bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    numbers: torch.Tensor | None  # of the slices that ``values`` are; None: all
    history: dict[str, Any] | None  # what a MetaTensor is made with beside its values

    @property
    def nbytes(self) -> int:
        return len(self.values) if isinstance(self.values, bytes) else self.values.nbytes

    def volume(self) -> torch.Tensor:
        if isinstance(self.values, bytes):
            found = np.frombuffer(bytearray(zlib.decompress(self.values)), dtype=np.uint8).reshape(self.shape)
            plain = torch.from_numpy(found).to(self.dtype)
        elif self.numbers is None:
            plain = self.values.clone()
        else:
            plain = torch.zeros(self.shape, dtype=self.dtype)
            plain[..., self.numbers] = self.values
        return plain if self.history is None else MetaTensor(plain, **deepcopy(self.history))


def _pack(key: str, value: Any, item: Mapping[str, Any]) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return value
    plain, numbers = value.as_subclass(torch.Tensor), None
    values: torch.Tensor | bytes
    if key in _MASKS and bool((plain == (small := plain.byte())).all()):
        values = zlib.compress(small.contiguous().numpy().data, _FAST)
    else:
        seen = _looked_at(item) if key == "image" else None
        numbers = None if seen is None else seen.nonzero()[:, 0]
        values = plain.clone() if numbers is None else plain[..., numbers]
    history = None
    if isinstance(value, MetaTensor):
        history = deepcopy({"meta": value.meta, "applied_operations": value.applied_operations})
    return _Packed(values, value.dtype, tuple(value.shape), numbers, history)
