"""The one cache: rows of a case (its slices, or what a frozen encoder makes of them) in a file of their own.

A file is safetensors: its tensors have one row per slice, "crc" holds a checksum per row, and its metadata the JSON of
everything that made it, whose hash is its name. It is written whole and moved, so that a process may be killed at any
moment; what is truncated or foreign is told and built again. A damaged row is an error, which removes its file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import IO, Any

import monai
import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import nn

from samseg_monai import __version__
from samseg_monai.errors import CacheError, ConfigError
from samseg_monai.files import unwrap, write_whole

logger = logging.getLogger(__name__)

Rows = Mapping[str, torch.Tensor]  # name -> (rows, ...), as many rows of each

VERSIONS = {"layout": 3, "samseg_monai": __version__, "monai": monai.__version__, "torch": torch.__version__}
RESERVE = 64_000_000  # bytes that stay free on the disk, or 1 % of what is to be written where that is more
TYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
# MONAI's random state and thread-local switches: they differ between runs and say nothing about the result
VOLATILE = {"R", "_tracing", "_do_transform", "_told"}


class CachedCase:
    """Rows of one case on disk.

    Args:
        folder: where the file lies, made if need be.
        key: JSON values, everything that the rows depend on; versions are added.
    """

    def __init__(self, folder: str | Path, key: Any) -> None:
        self._key = key
        self.path = Path(folder) / f"{hashlib.sha256(self.text.encode()).hexdigest()[:32]}.safetensors"

    @property
    def text(self) -> str:
        """JSON of all that made the rows: made anew, as it is long and most of it the same for all cases."""
        return json.dumps([VERSIONS, self._key], sort_keys=True)

    def is_whole(self, *, tell: bool = True) -> bool:
        """Whether the file is there, complete and ours; ``tell`` warns of one that is something else."""
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") == self.text:
                    return True
                problem = "is of something else"
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            problem = f"cannot be read ({type(error).__name__})"
        if tell:
            logger.warning("%s %s and is built again", self.path, problem)
        return False

    def ensure(
        self, build: Callable[[], Iterable[Rows]], rows: int | None = None, *, planned: int = 0, tell: bool = True
    ) -> bool:
        """Write the file, unless it is whole; of several processes that want to, one does and the others wait.

        Args:
            build: makes the rows, in their order, in blocks of one or more; type and shape of a row never change.
            rows: how many there are; None: as many as in the one block.
            planned: rows of this size that are to be written in all, for which the disk must have room.
            tell: log the size of all that is planned.
        Returns: whether this process wrote it.
        Raises: CacheError if the folder or file cannot be written, the disk has no room, or rows differ in shape.
        """
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("another process writes %s; waiting for it", self.path)
                lock.acquire()
        except OSError as error:
            raise CacheError(f"{self.path} cannot be made ({error}); choose another folder") from error
        try:
            if self.is_whole(tell=False):
                return False
            write_whole(self.path, lambda part: self._write(part, build(), rows, planned, tell))
            return True
        except OSError as error:
            raise CacheError(f"{self.path} cannot be written ({error}); free some space") from error
        finally:
            with suppress(OSError):  # of systems that keep what is open; whoever waits or comes later finds the file
                os.unlink(lock.lock_file)
            lock.release()

    def column(self, name: str) -> torch.Tensor:
        """All rows of one tensor; raises CacheError as ``read``, but compares no checksums."""
        return self._get(lambda file: file.get_tensor(name).clone())

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """One row of every tensor, as new tensors on the CPU.

        Raises: CacheError if the file is absent or damaged: the next start builds it again.
        """
        # a clone: what safetensors gives lies in the mapped file, which must not be changed and may be cut short
        values = self._get(lambda file: {n: file.get_slice(n)[row].clone() for n in sorted(file.keys())})
        if int(values.pop("crc")) != _checksum(values):
            try:
                self.path.unlink()
            except OSError:  # of a cache that may only be read
                logger.warning("%s cannot be removed; delete it", self.path)
            raise CacheError(f"row {row} of {self.path} is damaged; start again to have this file built anew")
        return values

    def _get(self, what: Callable[[Any], Any]) -> Any:
        try:
            with safe_open(self.path, "pt") as file:
                return what(file)
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{self.path} is missing or damaged ({error}); start again to have it built") from error

    def _write(self, part: Path, blocks: Iterable[Rows], rows: int | None, planned: int, tell: bool) -> None:
        done, sums, first = 0, [], None
        with open(part, "wb") as file:
            for block in blocks:
                plain = {n: t.detach().as_subclass(torch.Tensor).cpu().contiguous() for n, t in block.items()}
                shapes = {n: (t.dtype, tuple(t.shape[1:])) for n, t in plain.items()}
                count = len(next(iter(plain.values())))
                if first is None:
                    first, rows = shapes, count if rows is None else rows
                    starts = self._begin(file, shapes, rows, max(rows, planned), tell)
                if shapes != first:
                    raise CacheError(f"rows of {self.path} differ, {first} and {shapes}: pad slices to one size")
                for name, tensor in plain.items():
                    data = _bytes(tensor)
                    file.seek(starts[name] + (data.nbytes // count * done if count else 0))
                    file.write(data)
                sums += [_checksum({name: tensor[row] for name, tensor in plain.items()}) for row in range(count)]
                done += count
            if done != rows:
                raise CacheError(f"{self.path} was to hold {rows} rows, got {done}")
            file.seek(starts["crc"])
            file.write(_bytes(torch.tensor(sums, dtype=torch.int64)))

    def _begin(
        self,
        file: IO[bytes],
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        rows: int,
        planned: int,
        tell: bool,
    ) -> dict[str, int]:
        """Write safetensors' header (length, JSON); returns where each tensor starts. Large types go first: aligned."""
        columns = {"crc": (torch.int64, ()), **dict(sorted(shapes.items(), key=lambda item: -item[1][0].itemsize))}
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in columns.items()}
        needed = planned * sum(sizes.values())
        free, reserve = shutil.disk_usage(self.path.parent).free, max(RESERVE, needed // 100)
        if free < needed + reserve:
            raise CacheError(
                f"{human(needed)} do not fit on the disk of {self.path.parent}: {human(free)} are free, and "
                f"{human(reserve)} stay in reserve; choose a folder on another disk, or fewer variants or slices"
            )
        if tell and planned > rows:
            logger.info("%s are to be written to %s", human(needed), self.path.parent)
        header: dict[str, Any] = {"__metadata__": {"key": self.text}}
        starts, end = {}, 0
        for name, (dtype, shape) in columns.items():
            starts[name], end = end, end + rows * sizes[name]
            header[name] = {"dtype": TYPES[dtype], "shape": [rows, *shape], "data_offsets": [starts[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        return {name: start + 8 + len(text) for name, start in starts.items()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _checksum(values: Rows) -> int:
    crc = 0
    for name in sorted(values):
        crc = zlib.crc32(_bytes(values[name]), crc)
    return crc


def human(size: float) -> str:
    """A number of bytes as people say it: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def frozen_encoder(network: Any) -> Any:
    """The network whose embeddings may be kept, out of its wrapper for several GPUs.

    Raises: ConfigError if it has no encoder of its own, or one that learns.
    """
    inner = unwrap(network)
    absent = [name for name in ("encode", "embedding_identity", "encoder_frozen") if not hasattr(inner, name)]
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
    """Images (S, H, W), all on the encoder's device, to embeddings (b, V, C, gh, gw) in bf16: V per image.

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
        raise ConfigError(f"embeddings of one case must have one size, got {shapes}; pad slices, or rectangular=false")
    return torch.cat(parts).bfloat16()


class VolumeEmbeddings:
    """Embeddings of the slices of one volume, each encoded when it is first wanted and kept in a file of its own.

    Args:
        folder: where they lie.
        network: as ``frozen_encoder`` takes it.
        settings: JSON values that say how a slice is prepared for the network.
        volume: (S, H, W, D), from which the slices are cut.
    Raises: ConfigError as ``frozen_encoder``; CacheError as ``CachedCase``.
    """

    def __init__(self, folder: str | Path, network: Any, settings: Any, volume: torch.Tensor) -> None:
        self.encoder = frozen_encoder(network)
        self.key = {"volume": describe(volume), "slices": settings, "network": self.encoder.embedding_identity()}
        self.folder = CachedCase(folder, self.key).path.with_suffix("")

    def get(self, numbers: list[int], images: torch.Tensor) -> torch.Tensor:
        """Embeddings (b, V, C, gh, gw) in bf16 of the slices ``numbers``, prepared as ``images`` (b, S, h, w)."""
        files = [CachedCase(self.folder, {**self.key, "slice": number}) for number in numbers]
        todo = [k for k, file in enumerate(files) if not file.is_whole()]
        if todo:
            for k, values in zip(todo, encode(self.encoder, [images[k] for k in todo]), strict=True):
                files[k].ensure(partial(list, [{"embedding": values[None]}]))
        return torch.stack([file.read(0)["embedding"] for file in files]).to(images.device)


def describe_item(item: Mapping[str, Any]) -> Any:
    """A case of the datalist, with size and time of its files: a corrected label is another case."""

    def stamp(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [stamp(entry) for entry in value]
        if isinstance(value, (str, Path)) and os.path.isfile(value):
            status = os.stat(value)
            return [str(value), status.st_size, status.st_mtime_ns]
        return describe(value)

    return {str(key): stamp(value) for key, value in item.items()}


def describe(value: Any, *, _above: tuple[int, ...] = ()) -> Any:
    """A transform or value as JSON: class names and settings, no addresses, no random state.

    Describe a random transform before its first call: MONAI keeps what it drew beside its settings.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in _above:
        return "cycle"
    inner = partial(describe, _above=(*_above, id(value)))
    if isinstance(value, Mapping):
        return sorted(([str(k), inner(v)] for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, (list, tuple)):
        return [inner(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(inner(entry)) for entry in value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().as_subclass(torch.Tensor).numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        return [str(array.dtype), list(np.shape(value)), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, FunctionType):  # a lambda of a config has neither a name nor a source
        code, cells = value.__code__, [cell.cell_contents for cell in value.__closure__ or ()]
        body = [code.co_code.hex(), code.co_names, [c for c in code.co_consts if isinstance(c, (int, float, str))]]
        return [value.__module__, value.__qualname__, body, inner([value.__defaults__, cells])]
    if isinstance(value, MethodType):
        return inner([value.__func__, value.__self__])
    if isinstance(value, partial):
        return inner([value.func, value.args, value.keywords])
    if isinstance(value, ModuleType):
        return value.__name__
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type):
        return name
    settings = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in VOLATILE}
    return [name, inner(settings) if settings else ("" if " at 0x" in repr(value) else repr(value))]
