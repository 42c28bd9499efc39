"""Picked slices of one case: how they are kept, in memory and in a file, and what the file's name depends on."""

from __future__ import annotations

import dis
import hashlib
import inspect
import json
import logging
import os
import pickle
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable

from samseg_monai.errors import DataError

logger = logging.getLogger(__name__)

LAYOUT = 1  # of the files; another layout is another name, so old files are never misread
MASK_KEYS = ("label", "prompt")
# MONAI's random state and thread-local switches: they differ between runs and say nothing about the result
VOLATILE = {"R", "_tracing", "_do_transform"}
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Slices:
    """Picked slices of one case.

    Args:
        numbers: index of each slice along the last axis of the volume, ascending.
        tensors: key -> one (C, H, W) tensor per slice, in the order of ``numbers``; uint8 for masks, float32 else.
    """

    numbers: list[int]
    tensors: dict[str, list[torch.Tensor]]

    def storages(self) -> dict[int, int]:
        """Memory behind the tensors: address -> bytes, each storage once."""
        found = (tensor.untyped_storage() for tensors in self.tensors.values() for tensor in tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    def __reduce__(self) -> tuple[Any, ...]:
        # as arrays: torch would send every tensor to a spawned worker by a file descriptor, and there are thousands
        return _from_arrays, (
            self.numbers,
            {key: [t.numpy() for t in tensors] for key, tensors in self.tensors.items()},
        )


def pick(volume: Mapping[str, Any], keys: Iterable[str], numbers: list[int]) -> Slices:
    """Copy slices out of a transformed volume, so that the volume can be freed (a view would keep all of it).

    Args:
        volume: key -> (C, H, W, D).
        keys: what to keep.
        numbers: slices to keep, indices of the last axis.
    Raises: DataError if a mask holds anything but whole numbers 0 to 255, which uint8 would alter.
    """
    tensors = {}
    for key in keys:
        plain = torch.as_tensor(volume[key]).as_subclass(torch.Tensor).cpu()
        dtype = torch.uint8 if key in MASK_KEYS else torch.float32
        planes = [plain[..., z].to(dtype, copy=True).contiguous() for z in numbers]
        unchanged = (torch.equal(p.to(plain.dtype), plain[..., z]) for p, z in zip(planes, numbers, strict=True))
        if key in MASK_KEYS and not all(unchanged):
            raise DataError(f"{key} must hold whole numbers from 0 to 255; put AsDiscreted behind what resamples it")
        tensors[key] = planes
    return Slices(list(numbers), tensors)


def _from_arrays(numbers: list[int], arrays: dict[str, list[np.ndarray]]) -> Slices:
    return Slices(numbers, {key: [torch.from_numpy(array) for array in planes] for key, planes in arrays.items()})


def save(slices: Slices, path: Path) -> None:
    """Write atomically: another process never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    torch.save({"numbers": slices.numbers, "tensors": slices.tensors}, part)
    part.replace(path)


def load(path: Path, *, mapped: bool = False) -> Slices | None:
    """Read a file written by ``save``; None when it is absent, truncated or not ours.

    Args:
        path: file.
        mapped: map the file instead of reading it, for taking one slice out of many.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        slices = Slices(list(content["numbers"]), dict(content["tensors"]))
        complete = all(len(tensors) == len(slices.numbers) for tensors in slices.tensors.values())
    except UNREADABLE as error:
        logger.warning("%s cannot be read (%s) and is built again", path, type(error).__name__)
        return None
    return slices if complete else None


def fingerprint(*parts: Any) -> str:
    """Hash of everything that ``describe`` finds in ``parts``: 32 hexadecimal digits, the same in every process."""
    text = json.dumps([LAYOUT, *(describe(part) for part in parts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
    """A JSON-able description of a transform or value: class names and settings, no addresses, no random state.

    What a random transform has drawn is left out as well, so that it is described alike before and after its calls.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in _above:
        return "cycle"
    above = (*_above, id(value))
    if isinstance(value, Mapping):
        return sorted(([str(k), describe(v, _above=above)] for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, (list, tuple)):
        return [describe(entry, _above=above) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(describe(entry, _above=above)) for entry in value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().as_subclass(torch.Tensor).numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        return [str(array.dtype), list(np.shape(value)), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = value.__code__
        body = [code.co_code.hex(), code.co_names, [c for c in code.co_consts if isinstance(c, (int, float, str))]]
        return [value.__module__, value.__qualname__, body, describe([value.__defaults__, cells], _above=above)]
    if isinstance(value, MethodType):
        return describe([value.__func__, value.__self__], _above=above)
    if isinstance(value, partial):
        return describe([value.func, value.args, value.keywords], _above=above)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    kind: type = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    drawn = drawn_by(kind) if isinstance(value, Randomizable) else frozenset()
    settings = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in VOLATILE | drawn}
    if not settings:
        text = repr(value)
        return [name, text if " at 0x" not in text else ""]
    return [name, describe(settings, _above=above)]


@cache
def drawn_by(kind: type) -> frozenset[str]:
    """Attributes that a random transform assigns to itself in its methods, in so far as they are no settings of it."""
    found: set[str] = set()
    for method in (inspect.unwrap(m) for part in kind.__mro__ for name, m in vars(part).items() if _runs(name, m)):
        for before, step in pairwise(dis.get_instructions(method)):
            if step.opname == "STORE_ATTR" and "self" in (before.argval, *_last(before.argval)):
                found.add(step.argval)
    return frozenset(found - set(inspect.signature(kind).parameters))


def _runs(name: str, method: Any) -> bool:
    return isinstance(method, FunctionType) and name != "__init__" and not name.startswith("set_")


def _last(argval: Any) -> tuple[Any, ...]:
    return argval[-1:] if isinstance(argval, tuple) else ()  # Python 3.13 loads two variables at a time
