"""Slices of volumes as a map-style dataset: each volume is transformed once, its picked slices are kept."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from samseg_monai.data.pickers import AllSlices, EveryNth, Foreground, MaxArea, Picker, RandomN
from samseg_monai.data.slice_cache import Slices, describe, describe_item, fingerprint, load, pick, save
from samseg_monai.errors import ConfigError, DataError, SamsegError, raise_all

__all__ = ["AllSlices", "EveryNth", "Foreground", "MaxArea", "Picker", "RandomN", "SliceDataset"]

logger = logging.getLogger(__name__)

Transforms = Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None


class SliceDataset(Dataset):
    """One item is one slice; ``batch_size`` of a loader counts slices.

    Volumes go through ``volume_transforms`` when the dataset is built, in a thread pool; random transforms among them
    are drawn once per case, from (seed, case). Of the result only the picked slices are kept. ``slice_transforms`` run
    on every access, and every random draw of an item comes from (seed, epoch, index of the item): the number of workers
    and the order of access change nothing. Somebody has to call ``set_epoch`` before each epoch, or every epoch is
    augmented alike; the epoch lies in shared memory, so that persistent workers hear of it too.

    Args:
        data: cases of a datalist; each needs "case", the name.
        volume_transforms: MONAI dictionary transforms, or one Compose, that load a case: key -> (C, H, W, D).
        slice_transforms: the same for a slice: key -> plain (C, H, W) tensor.
        picker: which slices.
        keys: volumes of which slices are kept, "label" among them; "prompt" is kept wherever the transforms make one.
        cache: "memory" or "disk" (a file per case, named by a hash of case, files, volume transforms, picker and keys).
        cache_dir: folder of the files, needed with "disk".
        seed: non-negative.
        num_threads: cases transformed at the same time.
        progress: show a progress bar on stderr.
    Shape: an item is {key: plain tensor (C, H, W), "case": str, "slice": int, and whatever ``slice_transforms`` add};
        "label" and "prompt" enter ``slice_transforms`` as uint8, all else as float32.
    Raises: ConfigError for bad settings; DataError naming every case that cannot be prepared, or if no slice is picked.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        volume_transforms: Transforms,
        slice_transforms: Transforms = None,
        *,
        picker: Picker,
        keys: Sequence[str] = ("image", "label"),
        cache: str = "memory",
        cache_dir: str | Path | None = None,
        seed: int = 0,
        num_threads: int = 2,
        progress: bool = True,
    ) -> None:
        _check(data, cache=cache, cache_dir=cache_dir, seed=seed, num_threads=num_threads)
        self.data = [dict(item) for item in data]
        self.volume_transforms = composed(volume_transforms)
        self.slice_transforms = composed(slice_transforms)
        self.picker = picker
        self.keys = tuple(keys)
        self.seed = seed
        self._folder = Path(cache_dir) if cache == "disk" and cache_dir is not None else None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._files = self._name_files()
        self._slices: list[Slices | None] = [None] * len(self.data)
        self._numbers = self._prepare(num_threads, progress)
        rng = np.random.default_rng(0)
        self._index = [(i, k) for i, z in enumerate(self._numbers) for k in range(len(picker.draw(z, rng)))]
        self._report()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        epoch = int(self._epoch)
        position, row = self._drawn(index, epoch)
        return self._transformed(position, row, (self.seed, epoch, index))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose random draws the next items get."""
        self._epoch.fill_(epoch)

    def cache_bytes(self) -> int:
        """Memory that the kept slices occupy, in bytes: whole storages, each once."""
        storages: dict[int, int] = {}
        for slices in self._slices:
            storages |= slices.storages() if slices is not None else {}
        return sum(storages.values())

    def _drawn(self, index: int, epoch: int) -> tuple[int, int]:
        """Case of an item, and which of the case's candidates it is in this epoch."""
        position, rank = self._index[index]
        numbers = self._numbers[position]
        number = self.picker.draw(numbers, np.random.default_rng((self.seed, epoch, position)))[rank]
        return position, numbers.index(number)

    def _transformed(self, position: int, row: int, seeds: tuple[int, ...], **extra: Any) -> dict[str, Any]:
        slices = self._slices[position] or self._from_file(position, mapped=True)
        item: dict[str, Any] = {key: tensors[row].clone() for key, tensors in slices.tensors.items()}
        item |= {"case": str(self.data[position]["case"]), "slice": self._numbers[position][row], **extra}
        self.slice_transforms.set_random_state(seed=seed_of(*seeds))
        item = self.slice_transforms(item)
        # history and metadata of a single slice are of no use later on, but cost time in every collate
        return {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in item.items()}

    def _prepare(self, num_threads: int, progress: bool) -> list[list[int]]:
        numbers: list[list[int]] = [[] for _ in self.data]
        problems: dict[int, str] = {}
        with ThreadPoolExecutor(num_threads) as pool:
            jobs = {pool.submit(self._prepare_case, i): i for i in range(len(self.data))}
            bar = track(
                as_completed(jobs), "Caching slices", len(jobs), console=Console(stderr=True), disable=not progress
            )
            for job in bar:
                error = job.exception()
                if error is None:
                    numbers[jobs[job]] = job.result()
                elif isinstance(error, Exception):
                    problems[jobs[job]] = f"{self.data[jobs[job]]['case']}: {_root_of(error)}"
                else:
                    raise error
        raise_all([problems[i] for i in sorted(problems)], DataError, "These cases cannot be prepared")
        return numbers

    def _prepare_case(self, position: int) -> list[int]:
        if self._folder is not None:
            return self._from_file(position).numbers
        slices = self._slices[position] = self._build(position)
        return slices.numbers

    def _from_file(self, position: int, *, mapped: bool = False) -> Slices:
        path = self._files[position]
        slices = load(path, mapped=mapped)
        if slices is None:
            slices = self._build(position)
            save(slices, path)
        return slices

    def _build(self, position: int) -> Slices:
        item = self.data[position]
        # a copy for each case: MONAI's random transforms keep their draws in themselves, where other threads see them
        transforms = deepcopy(self.volume_transforms)
        transforms.set_random_state(seed=seed_of(self.seed, zlib.crc32(str(item["case"]).encode())))
        volume = transforms(dict(item))
        if not isinstance(volume, Mapping):
            raise ConfigError(f"volume transforms must give one dictionary per case, got {type(volume).__name__}")
        keys = [key for key in self.keys if key in volume or key != "prompt"]
        if "prompt" in volume and "prompt" not in keys:
            keys.append("prompt")
        for key in dict.fromkeys([*keys, "label"]):
            if key not in volume:
                raise DataError(f"no {key!r} after the volume transforms, only {sorted(map(str, volume))}")
            shape = tuple(getattr(volume[key], "shape", ()))
            if len(shape) != 4 or shape[1:] != tuple(volume["label"].shape[1:]):
                raise DataError(f"{key!r} must be (C, H, W, D) on the label's grid, got {shape}")
        label = torch.as_tensor(volume["label"]).as_subclass(torch.Tensor)
        return pick(volume, keys, self.picker.candidates(label))

    def _name_files(self) -> list[Path]:
        if self._folder is None:
            return []
        settings = [describe(self.volume_transforms), repr(self.picker), self.keys, self.seed]
        return [self._folder / f"{fingerprint(describe_item(item), settings)}.pt" for item in self.data]

    def _report(self) -> None:
        empty = [str(item["case"]) for item, numbers in zip(self.data, self._numbers, strict=True) if not numbers]
        if not self._index:
            raise DataError(f"{self.picker} picks no slice in any of {len(self.data)} cases; are the labels empty?")
        if empty:
            logger.warning("%s picks no slice in %d cases: %s", self.picker, len(empty), ", ".join(empty))
        megabytes = self.cache_bytes() / 1e6
        logger.info("%d slices of %d cases, %.1f MB in memory", len(self), len(self.data) - len(empty), megabytes)


def _check(
    data: Sequence[Mapping[str, Any]], *, cache: str, cache_dir: str | Path | None, seed: int, num_threads: int
) -> None:
    problems = []
    if cache not in ("memory", "disk"):
        problems.append(f"cache is 'memory' or 'disk', got {cache!r}")
    if cache == "disk" and cache_dir is None:
        problems.append("cache 'disk' needs cache_dir, the folder for its files")
    if seed < 0:
        problems.append(f"seed must not be negative, got {seed}")
    if num_threads < 1:
        problems.append(f"num_threads must be at least 1, got {num_threads}")
    raise_all(problems, ConfigError, "SliceDataset cannot be set up")
    if not data:
        raise DataError("SliceDataset got an empty list of cases; check the datalist and its section")
    unnamed = [f"item {i} has only {sorted(item)}" for i, item in enumerate(data) if "case" not in item]
    raise_all(unnamed, DataError, "Every item needs 'case', its name")


def composed(transforms: Transforms) -> Compose:
    """Transforms as one Compose; of None it does nothing."""
    if isinstance(transforms, Compose):
        return transforms
    return Compose(list(transforms) if isinstance(transforms, (list, tuple)) else transforms)


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers, none of which shines through."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _root_of(error: BaseException) -> str:
    """What went wrong first: MONAI wraps the cause once per level of Compose."""
    while error.__cause__ is not None and not isinstance(error, SamsegError):
        error = error.__cause__
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text if isinstance(error, SamsegError) else f"{type(error).__name__}: {text}"
