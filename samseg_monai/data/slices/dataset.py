"""Slices of volumes as a map-style dataset: each volume is transformed once, its picked slices are kept.

A picker names the candidates of a volume once, when its slices are cached, and draws among them in every epoch; only
``RandomN`` draws less than everything.
"""

from __future__ import annotations

import logging
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from samseg_monai.data import CUT
from samseg_monai.data.slices.cache import CachedCase, describe, describe_item, encode, frozen_encoder
from samseg_monai.data.slices.padding import fill_up
from samseg_monai.data.slices.pickers import Picker
from samseg_monai.errors import CacheError, ConfigError, DataError, raise_all, reason_of

logger = logging.getLogger(__name__)

Transforms = Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None
Slices = dict[str, np.ndarray]  # arrays, since torch would send every tensor to a worker by a file descriptor

DEFAULT_VARIANTS = 8  # as many as a square has rotations and reflections
MASK_KEYS = ("label", "prompt")


class SliceDataset(Dataset):
    """One item is one slice; ``batch_size`` of a loader counts slices.

    Volumes go through ``volume_transforms`` when the dataset is built, in a thread pool; random transforms among them
    are drawn once per case, from (seed, case). Of the result only the picked slices are kept. ``slice_transforms`` run
    on every access, and every random draw of an item comes from (seed, epoch, index of the item): the number of workers
    and the order of access change nothing. Somebody has to call ``set_epoch`` before each epoch, or every epoch is
    augmented alike; the epoch lies in shared memory, so that persistent workers hear of it too.

    With ``variants`` draws come from (seed, variant, slice) instead: a slice has that many looks and no more, and an
    epoch shows one of them, all in turn, in an order drawn anew for every slice and cycle of ``variants`` epochs. Items
    then have "variant", from 0, before ``slice_transforms`` run, so that a transform may enumerate instead of drawing.
    With ``length`` an epoch is that many items, however many slices there are: one pass after the other over all of
    them, each in an order drawn from (seed, pass), is cut into epochs, and what a picker draws and which look is shown
    change with the pass instead of the epoch.
    ``fill`` computes what a frozen encoder makes of every look; from then on items have "embedding".

    Args:
        data: cases of a datalist; each needs "case", the name.
        volume_transforms: MONAI dictionary transforms, or one Compose, that load a case: key -> (C, H, W, D).
        slice_transforms: the same for a slice: key -> plain (C, H, W) tensor. One that cuts samples out of it, and
            answers with a list of them, is of one sample.
        picker: which slices.
        keys: volumes of which slices are kept, "label" among them; "prompt" is kept wherever the transforms make one.
        cache: "memory" or "disk" (a file per case, see ``cache``).
        cache_dir: folder of the files, needed with "disk".
        seed: non-negative.
        num_threads: cases transformed at the same time.
        progress: show a progress bar on stderr.
        variants: looks per slice, at least 1; None is 8 where embeddings are kept, but no more than ``epochs``, and
            without end where not.
        epochs: how many epochs there will be, at least 1: looks that none of them shows are not computed.
        epoch_transforms: run behind ``slice_transforms`` on every access and draw from (seed, epoch, item), whatever
            the look is: for boxes, which are no part of an embedding. They must leave the image as it is.
        depth: slices of a slab, at least 1. With more an item is a list of that many neighbouring slices, in order, of
            which (depth - 1) // 2 lie before the picked one; beyond the volume its first or last one is repeated. All
            go through the transforms with the same draws. ``SliceCollate`` lays the slabs of a batch one behind the
            other, and every slice counts in the loss: a volume's are predicted from all places in a slab.
        length: items of an epoch, at least 1; None: as many as one pass has.
        embedding_dir: folder of the embeddings; None keeps none. Per slice and variant 2 bytes per number of the
            encoder's output, which is 512 kB for SAM at 512 pixels and 2 MB at 1024.
    Attributes: ``cut``: case -> voxels that the crop leaves out, and of how many (``samseg_monai.data.CUT``), where it
        leaves any out.
    Shape: an item is {key: plain tensor (C, H, W), "case": str, "slice": int, and whatever the transforms add};
        with ``Patches`` (C, H, W, D) and slice 0. "label" and "prompt" enter ``slice_transforms`` as uint8, all else as
        float32. "embedding" is (V, C, gh, gw), bf16; V is what the network makes of one image: its scans, or 1.
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
        variants: int | None = None,
        epochs: int | None = None,
        epoch_transforms: Transforms = None,
        depth: int = 1,
        length: int | None = None,
        embedding_dir: str | Path | None = None,
    ) -> None:
        at_least = {"num_threads": num_threads, "variants": variants, "epochs": epochs, "depth": depth}
        at_least["length"] = length
        _check(data, cache, cache_dir, seed=seed, **at_least)
        self.data = [dict(item) for item in data]
        # copies: what is drawn here stays here, so that others who use these transforms find the same cache
        self.volume_transforms, self.slice_transforms = composed(volume_transforms), composed(slice_transforms)
        self.epoch_transforms = composed(epoch_transforms)
        self.picker, self.keys, self.seed, self.depth = picker, tuple(keys), seed, depth
        self._endless = variants is None and embedding_dir is None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        made_by = {"volume_transforms": describe(self.volume_transforms), "picker": repr(picker), "keys": self.keys}
        made_by |= {"depth": depth} if depth > 1 else {}
        self._made_by = [{**made_by, "item": describe_item(item), "seed": seed} for item in self.data]
        self._files = [CachedCase(cache_dir, key) for key in self._made_by] if cache == "disk" and cache_dir else []
        self._slices: list[Slices | None] = [None] * len(self.data)
        self._held: list[list[int]] = [[] for _ in self.data]  # numbers of the slices that are kept of each case
        self.cut: dict[str, dict[str, int]] = {}
        self._numbers = self._prepare(num_threads, progress)
        self._first = np.cumsum([0, *(len(numbers) for numbers in self._numbers)]).tolist()  # row of each case
        rng = np.random.default_rng(0)
        self._index = [(i, k) for i, z in enumerate(self._numbers) for k in range(len(picker.draw(z, rng)))]
        self._length, self._order = length, (-1, np.arange(0))  # the pass whose order was drawn last
        passes = epochs and length and -(-epochs * length // max(1, len(self._index)))
        most = min(DEFAULT_VARIANTS, passes or epochs or DEFAULT_VARIANTS)
        self.variants = variants or (1 if embedding_dir is None else most)
        self._embedding_dir = embedding_dir
        self._embeddings: list[CachedCase] = []
        self._filled: list[int] | None = None  # height and width of every slice, where embeddings need them to be one
        # now, while no transform has drawn
        looks = {"slice_transforms": describe(self.slice_transforms), "variants": self.variants}
        self._made_by = [{**key, **looks, "row": row} for key, row in zip(self._made_by, self._first, strict=False)]
        self._report()

    def __len__(self) -> int:
        return self._length or len(self._index)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        epoch = int(self._epoch)
        turn, place = self._place(epoch, index)
        position, rank = self._index[place]
        numbers = self._numbers[position]
        number = self.picker.draw(numbers, np.random.default_rng((self.seed, turn, position)))[rank]
        candidate = numbers.index(number)
        items = []
        for offset in self._offsets:
            if self._endless:
                item = self._transformed(position, candidate, (self.seed, epoch, index), offset)
            else:
                variant = self.variant(self._first[position] + candidate, turn)
                item = self._look(position, candidate, variant, offset)
                if self._embeddings:
                    row = candidate * self.variants + variant
                    item["embedding"] = self._embeddings[position].read(row)["embedding"]
            self.epoch_transforms.set_random_state(seed=seed_of(self.seed, epoch, index, 1))
            items.append(dict(self.epoch_transforms(item)))
        return items if self.depth > 1 else items[0]

    @property
    def _offsets(self) -> range:
        """Where the slices of a slab lie, seen from the picked one."""
        return range(-((self.depth - 1) // 2), self.depth // 2 + 1)

    def _place(self, epoch: int, index: int) -> tuple[int, int]:
        """Which pass over all slices an item belongs to, and which slice of it that is."""
        if self._length is None:
            return epoch, index
        turn, place = divmod(epoch * self._length + index, len(self._index))
        if self._order[0] != turn:
            self._order = turn, np.random.default_rng((self.seed, turn, 2)).permutation(len(self._index))
        return turn, int(self._order[1][place])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose random draws the next items get."""
        self._epoch.fill_(epoch)

    def variant(self, row: int, epoch: int) -> int:
        """Which look of a slice an epoch (with ``length``: a pass) shows; ``row`` counts all candidates."""
        cycle, step = divmod(epoch, self.variants)
        return int(np.random.default_rng((self.seed, row, cycle)).permutation(self.variants)[step])

    def cache_bytes(self) -> int:
        """Memory that the kept slices occupy, in bytes: whole arrays, each once."""
        arrays = [array for slices in self._slices if slices is not None for array in slices.values()]
        return sum((array if array.base is None else array.base).nbytes for array in arrays)

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
        Raises: ConfigError if the encoder learns; CacheError as ``CachedCase.ensure``.
        """
        if self._embedding_dir is None:
            return 0
        if self.depth > 1:
            raise ConfigError(f"embeddings are of single slices, got depth {self.depth}; leave embedding_dir out")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        encoder = frozen_encoder(network)
        device = _device_of(encoder) if device is None else torch.device(device)
        identity, folder = encoder.embedding_identity(), self._embedding_dir
        self._filled = self._common_size() if identity.get("rectangular") else None
        filled = {} if self._filled is None else {"filled": self._filled}
        files = [CachedCase(folder, {**key, **filled, "network": identity}) for key in self._made_by]
        rows = [len(numbers) * self.variants for numbers in self._numbers]
        todo = [i for i, file in enumerate(files) if rows[i] and not file.is_whole()]
        left, done, start = sum(rows[i] for i in todo), 0, time.monotonic()
        if todo:
            logger.info("Embedding slices: %d looks at %d cases to compute, in %s", left, len(todo), folder)
        with tqdm(total=left, desc="Embedding slices", unit="slice", disable=not (todo and progress)) as bar:
            for position in todo:
                build = partial(self._encoded, position, encoder, device, batch_size)
                built = files[position].ensure(build, rows[position], planned=left, tell=not done)
                left -= rows[position]
                minutes = (time.monotonic() - start) * left / rows[position] / 60
                if built and not done and minutes >= 1:  # by the first case, which is all that is known by then
                    logger.info("Embedding slices: about %.0f min", minutes)
                done += rows[position] if built else 0
                bar.update(rows[position])
        self._embeddings = files
        return done

    def _common_size(self) -> list[int] | None:
        """Height and width that all slices are filled up to before a network sees them that does not do so by itself:
        embeddings of one batch must be of one size. None where slices have one already."""
        sizes = {tuple(self._look(i, 0, 0)["image"].shape[-2:]) for i, numbers in enumerate(self._numbers) if numbers}
        if len(sizes) == 1:
            return None
        size = [max(sides) for sides in zip(*sizes, strict=True)]
        logger.info("Slices of %d sizes are filled up to %d x %d pixels", len(sizes), *size)
        return size

    def _encoded(
        self, position: int, encoder: Any, device: torch.device, batch_size: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        rows = range(len(self._numbers[position]) * self.variants)
        for start in range(0, len(rows), batch_size):
            looks = [self._look(position, *divmod(row, self.variants)) for row in rows[start : start + batch_size]]
            yield {"embedding": encode(encoder, [look["image"].to(device) for look in looks])}

    def _look(self, position: int, candidate: int, variant: int, offset: int = 0) -> dict[str, Any]:
        row = self._first[position] + candidate
        item = self._transformed(position, candidate, (self.seed, variant, row), offset, variant=variant)
        return item if self._filled is None else fill_up(item, self._filled)

    def _transformed(
        self, position: int, candidate: int, seeds: tuple[int, ...], offset: int, **extra: Any
    ) -> dict[str, Any]:
        slices, held = self._slices[position], self._held[position]
        # a number beyond the volume is that of its last slice, which is kept where such a number is asked for
        row = bisect_left(held, min(max(self._numbers[position][candidate] + offset, held[0]), held[-1]))
        if slices is None:
            item: dict[str, Any] = self._read(position, row)
        else:
            item = {key: torch.from_numpy(array[row].copy()) for key, array in slices.items()}
        item |= {"case": str(self.data[position]["case"]), "slice": held[row], **extra}
        self.slice_transforms.set_random_state(seed=seed_of(*seeds))
        made = self.slice_transforms(item)
        item = made[0] if isinstance(made, list) else made
        # history and metadata of a single slice are of no use later on, but cost time in every collate
        return {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in item.items()}

    def _read(self, position: int, row: int) -> dict[str, Any]:
        file = self._files[position]
        try:
            values = file.read(row)
        except CacheError as error:  # deleted or damaged since the start
            logger.warning("%s", error)
            self._from_file(position)
            values = file.read(row)
        return {key: value for key, value in values.items() if key not in ("slice", "cut", "picked")}

    def _prepare(self, num_threads: int, progress: bool) -> list[list[int]]:
        def attempt(position: int) -> list[int] | str:
            try:
                if self._files:
                    return self._from_file(position)
                picked, self._held[position], self._slices[position], cut = self._build(position)
                self._note(position, cut)
                return picked
            except Exception as error:  # noqa: BLE001  whatever a transform raises is a problem of its case
                return f"{self.data[position]['case']}: {reason_of(error)}"

        with ThreadPoolExecutor(num_threads) as pool:
            jobs = pool.map(attempt, range(len(self.data)))
            found = list(tqdm(jobs, "Caching slices", len(self.data), disable=not progress))
        raise_all(
            [f for f in found if isinstance(f, str)], DataError, "These cases cannot be prepared", cases=len(found)
        )
        return [f for f in found if not isinstance(f, str)]

    def _from_file(self, position: int) -> list[int]:
        file = self._files[position]

        def build() -> list[dict[str, torch.Tensor]]:
            picked, held, slices, cut = self._build(position)
            rows = {key: torch.from_numpy(array) for key, array in slices.items()}
            each = {"slice": torch.tensor(held, dtype=torch.int64), "cut": cut.repeat(len(held), 1)}
            if self.depth > 1:
                each["picked"] = torch.tensor([number in picked for number in held], dtype=torch.int64)
            return [{**each, **rows}]

        if not file.is_whole():
            file.ensure(build)
        for cut in file.column("cut")[:1]:
            self._note(position, cut)
        held = self._held[position] = file.column("slice").tolist()
        if self.depth == 1:
            return list(held)
        return [number for number, picked in zip(held, file.column("picked").tolist(), strict=True) if picked]

    def _note(self, position: int, cut: torch.Tensor) -> None:
        """Keep what the crop leaves out of a case, where it does (``samseg_monai.data.CUT``)."""
        counts = dict(zip(CUT, cut.tolist(), strict=True))
        if counts["image"] or counts["label"]:
            self.cut[str(self.data[position]["case"])] = counts

    def _build(self, position: int) -> tuple[list[int], list[int], Slices, torch.Tensor]:
        """Of a case: numbers along the last axis of its picked slices, and of all N that are kept; key -> (N, C, H, W);
        what a crop left out."""
        item = self.data[position]
        # a copy for each case: MONAI's random transforms keep their draws in themselves, where other threads see them
        transforms = deepcopy(self.volume_transforms)
        transforms.set_random_state(seed=seed_of(self.seed, zlib.crc32(str(item["case"]).encode())))
        volume = transforms(dict(item))
        if not isinstance(volume, Mapping):
            raise ConfigError(f"volume transforms must give one dictionary per case, got {type(volume).__name__}")
        kept = [key for key in self.keys if key in volume or key != "prompt"]
        kept = list(dict.fromkeys([*kept, *(["prompt"] if "prompt" in volume else []), "label"]))
        for key in kept:
            if key not in volume:
                raise DataError(f"no {key!r} after the volume transforms, only {sorted(map(str, volume))}")
            shape = tuple(getattr(volume[key], "shape", ()))
            if len(shape) != 4 or shape[1:] != tuple(volume["label"].shape[1:]):
                raise DataError(f"{key!r} must be (C, H, W, D) on the label's grid, got {shape}")
        numbers = self.picker.candidates(torch.as_tensor(volume["label"]).as_subclass(torch.Tensor))
        last = volume["label"].shape[-1] - 1
        held = sorted({min(max(number + offset, 0), last) for number in numbers for offset in self._offsets})
        cut = torch.as_tensor(volume.get("cut", [0] * len(CUT)), dtype=torch.int64)
        return numbers, held, {key: _pick(self.picker, volume[key], held, key) for key in kept}, cut

    def _report(self) -> None:
        empty = [str(item["case"]) for item, numbers in zip(self.data, self._numbers, strict=True) if not numbers]
        if not self._index:
            raise DataError(
                f"{self.picker} picks no {self.picker.units[0]} in any of {len(self.data)} cases; are the labels empty?"
            )
        if empty:
            logger.warning(
                "%s picks no %s in %d cases: %s", self.picker, self.picker.units[0], len(empty), ", ".join(empty)
            )
        for name, what in (("image", "the images' foreground"), ("label", "the labels")):
            rows = [counts for counts in self.cut.values() if counts[name]]
            if rows:
                most = max(100 * counts[name] / counts[f"{name}_of"] for counts in rows)
                logger.warning("the crop cuts %s in %d of %d cases, at most %.2g %%; set crop_mm to a larger one", what,
                               len(rows), len(self.data), most)  # fmt: skip
        megabytes = self.cache_bytes() / 1e6
        cases, passed = len(self.data) - len(empty), len(self._index)
        logger.info("%d %s of %d cases, %.1f MB in memory", passed, self.picker.units[1], cases, megabytes)


def _pick(picker: Picker, volume: torch.Tensor, numbers: list[int], key: str) -> np.ndarray:
    """Copies of what is taken of a volume (C, H, W, D), uint8 of a mask and float32 else, which may be freed.

    Raises: DataError if a mask holds anything but whole numbers 0 to 255, which uint8 would alter.
    """
    picked = picker.taken(torch.as_tensor(volume).as_subclass(torch.Tensor).cpu(), numbers).numpy()
    with np.errstate(invalid="ignore"):  # of NaN in a mask, told below
        array = picked.astype(np.uint8 if key in MASK_KEYS else np.float32, order="C")
    if key in MASK_KEYS and not np.array_equal(array, picked):
        raise DataError(f"{key} must hold whole numbers from 0 to 255; put AsDiscreted behind what resamples it")
    return array


def _check(data: Sequence[Mapping[str, Any]], cache: str, cache_dir: Any, **at_least_0_or_1: int | None) -> None:
    """Raise ConfigError for settings that are out of range, DataError for no cases or such without a name."""
    problems = []
    if cache not in ("memory", "disk"):
        problems.append(f"cache is 'memory' or 'disk', got {cache!r}")
    if cache == "disk" and cache_dir is None:
        problems.append("cache 'disk' needs cache_dir, the folder for its files")
    for name, value in at_least_0_or_1.items():
        least = 0 if name == "seed" else 1
        if value is not None and value < least:
            problems.append(f"{name} must be at least {least}, got {value}")
    raise_all(problems, ConfigError, "SliceDataset cannot be set up")
    if not data:
        raise DataError("SliceDataset got an empty list of cases; check the datalist and its section")
    unnamed = [f"item {i} has only {sorted(item)}" for i, item in enumerate(data) if "case" not in item]
    raise_all(unnamed, DataError, "Every item needs 'case', its name")


def composed(transforms: Transforms) -> Compose:
    """A copy of transforms as one Compose; of None it does nothing."""
    return deepcopy(transforms) if isinstance(transforms, Compose) else Compose(deepcopy(transforms))


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers, none of which shines through."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _device_of(network: Any) -> torch.device:
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
