"""What a file of weights holds, read without its values: names, types and shapes, so that nothing large is allocated.

A safetensors file tells them in its header. For ``torch.save`` the opcodes are followed on a stack of descriptions:
nothing is called or imported, no value is part of itself, and only a flat table of names and tensors comes out of it.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from samseg_monai.bundles.archive import DAMAGED
from samseg_monai.bundles.pickles import PICKLE_BYTES, STORAGES
from samseg_monai.errors import BundleError

MOST_TENSORS = 20_000  # ten times those of SAM's largest network with everything adapted
MOST_ITEMS = 100  # of a tuple: sizes and strides
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MARK = object()


def described_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of one of ``torch.save`` by name, on the device ``meta``, without values.

    Raises:
        BundleError: it is neither, holds anything but a flat table of tensors, tensors larger than what is stored of
            them, or more of them than any network.
    """
    try:
        return _safe(path) if path.suffix == ".safetensors" else _saved(path)
    except (SafetensorError, *DAMAGED, TypeError, OverflowError, AttributeError, AssertionError) as error:
        raise BundleError(f"{path.name}: no tensors by name ({error or type(error).__name__}); get it again") from error


def _safe(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as content:
        names = list(content.keys())
        _few(names)
        parts = {name: content.get_slice(name) for name in names}
        return {name: _meta(_DTYPES.get(part.get_dtype()), part.get_shape()) for name, part in parts.items()}


def _saved(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        entry = archive.getinfo(f"{folder}/data.pkl")
        if entry.file_size > PICKLE_BYTES:
            raise ValueError(f"{entry.file_size:,} bytes of names")
        with archive.open(entry) as stream:
            found = _followed(
                stream, {i.filename.removeprefix(f"{folder}/data/"): i.file_size for i in archive.infolist()}
            )
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("not a flat table of names and tensors")
    _few(list(found))
    return found


def _few(names: list[str]) -> None:
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{len(names):,} tensors, a network has at most {MOST_TENSORS:,}")


def _meta(dtype: torch.dtype | None, shape: Any) -> Tensor:
    if dtype is None:
        raise ValueError("numbers of a type that no network has")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _followed(stream: IO[bytes], records: dict[str, int]) -> Any:
    """What a pickle builds, as descriptions: dictionaries with names as keys, tuples, plain values, tensors.

    Args:
        stream: the pickle, protocol 2.
        records: bytes of each stored storage by its key.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "STOP":
            [result] = stack
            return result
        if name in _VALUES:
            stack.append(_VALUES[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if isinstance(memo[argument], (dict, list)):
                raise ValueError("a table that is part of another one twice, or of itself")
            stack.append(memo[argument])
        elif name == "TUPLE" or name in _TUPLES:
            items = _popped(stack) if name == "TUPLE" else _last(stack, _TUPLES[name])
            deep = any(isinstance(part, tuple) for item in items if isinstance(item, tuple) for part in item)
            if len(items) > MOST_ITEMS or deep:  # the hash and the text of tuples within tuples can take for ever
                raise ValueError("a tuple that no tensor needs")
            stack.append(tuple(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = _last(stack, 2) if name == "SETITEM" else _popped(stack)
            keys = items[::2]
            if len(items) % 2 or not all(isinstance(key, str) for key in keys) or not isinstance(stack[-1], dict):
                raise ValueError("a table whose keys are no names")
            stack[-1].update(zip(keys, items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), records))
        elif name == "REDUCE":
            called, given = _last(stack, 2)
            if not isinstance(called, str) or called not in _CALLS:
                raise ValueError("a call that no tensor needs")
            stack.append(_CALLS[called](*given))
        elif name == "BUILD":  # attributes of an OrderedDict: what a module tells of its version
            if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                raise ValueError("attributes of what is no table")
        elif name != "PROTO":
            raise ValueError(f"{name}, which no table of tensors needs")
    raise ValueError("its end is missing")


def _popped(stack: list[Any]) -> list[Any]:
    """The values behind the last mark, which go with it."""
    at = next((at for at in range(len(stack) - 1, -1, -1) if stack[at] is _MARK), None)
    if at is None:
        raise ValueError("values that are missing")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _last(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) < count or any(item is _MARK for item in items):
        raise ValueError("values that are missing")
    del stack[-count:]
    return items


def _storage(told: Any, records: dict[str, int]) -> tuple[torch.dtype, int]:
    """Type and number of values of a storage, all of which have to be stored."""
    word, kind, key, _, count = told
    if word != "storage" or not all(isinstance(text, str) for text in (kind, key)) or type(count) is not int:
        raise ValueError("a storage that is none")
    dtype = _TYPES[kind]
    if records[key] != count * dtype.itemsize:
        raise ValueError(f"storage {key}: {records[key]:,} bytes for {count:,} values of {dtype}")
    return dtype, count


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, *more: Any) -> Tensor:
    dtype, count = storage
    whole = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides) or math.prod(shape) > count:
        raise ValueError(f"a tensor of shape {shape} in a storage of {count:,} values")
    if math.prod(shape) and offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= count:
        raise ValueError(f"a tensor that ends behind its storage of {count:,} values")
    return _meta(dtype, shape)


def _parameter(tensor: Any, grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


def _table() -> dict[str, Any]:
    return {}


class WithoutValues(TorchFunctionMode):
    """Within it networks are built on the device ``meta``: their tensors have shapes, and take no memory.

    Only what makes large tensors is moved there: MONAI builds some networks from numbers that it computes with torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK, "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: (), "GLOBAL": str,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), lambda value: value
    ),
}  # fmt: skip
_CALLS: dict[Any, Callable[..., Any]] = {
    "collections OrderedDict": _table,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_OTHER_NAMES = {"Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128", "ComplexFloat": "complex64"}
_TYPES: dict[str, torch.dtype] = {
    f"torch {name}Storage": getattr(torch, _OTHER_NAMES.get(name, name.lower())) for name in STORAGES
}
