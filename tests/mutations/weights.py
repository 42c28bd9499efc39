"""Files of tensors: safetensors and ``torch.save``, headers, pickles, damage; read as a model and as those of a bundle.

Oracle: the format of safetensors (https://github.com/huggingface/safetensors), the check sums of ZIPs, and what was
saved here.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samseg_monai.bundles.tensors import described_tensors
from samseg_monai.checkpoints import load_model
from samseg_monai.sam.weights.read import read_state
from tests.mutations.harness import Trial, damaged, pick

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def network() -> torch.nn.Module:
    """A few tensors, one of whole numbers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def state() -> dict[str, torch.Tensor]:
    """Its state."""
    return {name: value.clone() for name, value in network().state_dict().items()}


def safetensors_of(header: dict[str, Any], data: bytes) -> bytes:
    """The file of a header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def make(folder: Path) -> Any:
    """Files of both kinds, read as a full model."""
    base = state()
    names = {torch.float32: "F32", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in base.items():
        raw = value.numpy().tobytes()
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw

    def trial(rng: random.Random) -> Trial:
        if rng.random() < 0.55:
            return _safe(folder / "model.safetensors", header, data, base, rng)
        return _saved(folder / "model.pt", base, rng)

    return trial


def _read(path: Path, base: dict[str, torch.Tensor]) -> Any:
    model = network()
    load_model(model, path)
    return model.state_dict(), read_state(path), described_tensors(path)


def _differs(found: Any, expected: dict[str, torch.Tensor]) -> str:
    loaded, read, described = found
    for name, value in expected.items():
        if not torch.equal(loaded[name], value.to(loaded[name].dtype)) or read[name].shape != value.shape:
            return f"{name} is {loaded[name]} for {value}"[:200]
        if described[name].shape != value.shape:
            return f"{name} is described as {described[name].shape}"
    return ""


def _safe(path: Path, header: dict[str, Any], data: bytes, base: dict[str, torch.Tensor], rng: random.Random) -> Trial:
    header = json.loads(json.dumps(header))
    name = rng.choice(list(base))
    entry, told = header[name], ""
    how = rng.randrange(12)
    if how == 0:
        entry["shape"] = pick(rng, [], [1], [2, 3], [3, 2], [-1], [2**40], [0], "x", None, [2.0], [True])
    elif how == 1:
        entry["dtype"] = pick(rng, "F16", "F64", "I32", "U8", "BF16", "BOOL", "F8_E4M3", "x", None, "C64")
    elif how == 2:
        entry["data_offsets"] = pick(rng, [0, 8], [8, 0], [-8, 0], [0, 2**60], [0], "x", [0, 0], [4, 12])
    elif how == 3:
        del entry[rng.choice(sorted(entry))]
    elif how == 4:
        header[pick(rng, "x", "module.0.weight", f"{name} ", "é")] = header.pop(name)
    elif how == 5:
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += b"\0" * 4
    elif how == 6:
        header["__metadata__"] = pick(rng, {"a": 1}, [], None, {"format": "pt", "key": "x" * 1000})
    elif how == 7:
        bad = bytearray(data)
        at = entry["data_offsets"][0]
        bad[at : at + 4] = struct.pack("<f", pick(rng, math.nan, math.inf, 1.5))
        data = bytes(bad)
    told = f"{how} {name} {json.dumps(header.get(name))}"[:150]
    content = safetensors_of(header, data)
    if how == 8:
        content = struct.pack("<Q", pick(rng, 0, 1, 2**63, len(content), 10**9)) + content[8:]
    elif how == 9:
        told, content = damaged(content, rng)
    elif how == 10:
        content += b"\0" * rng.randrange(1, 9)
    path.write_bytes(content)
    rule, expected = _safe_rule(content, base)
    return Trial(f"safetensors {told}", lambda: _read(path, base), rule, lambda found: _differs(found, expected))


def _safe_rule(content: bytes, base: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    if len(content) < 8 or content.startswith((b"version https", b"<!DOC")):
        return "cut", {}
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8 or content[8:9] != b"{":
        return "a header beyond the file", {}
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError as error:
        return f"no header ({error})", {}
    data = content[8 + length :]
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        return "metadata that are no texts", {}
    end, found = 0, {}
    entries = [(name, entry) for name, entry in header.items()]
    for _, entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            return f"an entry {entry}"[:100], {}
        shape, offsets = entry["shape"], entry["data_offsets"]
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
                return f"an entry {entry}"[:100], {}
        if len(offsets) != 2 or entry["dtype"] not in BYTES:
            return f"an entry {entry}"[:100], {}
    for name, entry in sorted(entries, key=lambda pair: pair[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(entry["shape"]) * BYTES[entry["dtype"]]:
            return f"{name}: a hole, or another length", {}
        end = stop
        found[name] = (entry, data[start:stop])
    if end != len(data):
        return "bytes that belong to nothing", {}
    return _fits({name: _tensor(*pair) for name, pair in found.items()}, base)


def _tensor(entry: dict[str, Any], raw: bytes) -> torch.Tensor:
    kinds = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
             "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
    kind = getattr(torch, kinds[entry["dtype"]])
    return (
        torch.frombuffer(bytearray(raw), dtype=kind).reshape(entry["shape"])
        if raw
        else torch.zeros(entry["shape"], dtype=kind)
    )


def _fits(found: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    if set(found) != set(base):
        return f"tensors {set(found) ^ set(base)}", {}
    for name, value in found.items():
        if value.shape != base[name].shape:
            return f"{name}: shape {tuple(value.shape)}", {}
        if value.is_floating_point() != base[name].is_floating_point() or value.is_complex():
            return f"{name}: {value.dtype} for {base[name].dtype}", {}
        if value.is_floating_point() and not value.isfinite().all():
            return f"{name}: not finite", {}
    return "", found


def _saved(path: Path, base: dict[str, torch.Tensor], rng: random.Random) -> Trial:
    value: Any = dict(base)
    name = rng.choice(list(base))
    how, rule, expected = rng.randrange(16), "", dict(base)
    told = {
        0: "a value more", 1: "a list", 2: "wrapped", 3: "renamed", 4: "another shape", 5: "another type", 6: "NaN",
        7: "numpy", 8: "a module", 9: "a parameter", 10: "ordered", 11: "complex", 12: "sparse",
    }.get(how, "whole")  # fmt: skip
    if how == 0:
        value["epoch"], rule = pick(rng, 3, "x", None, [1]), "more than tensors"
    elif how == 1:
        value, rule = pick(rng, list(base.values()), base[name], 3, {}, None), "no table"
    elif how == 2:
        value, rule = {pick(rng, "model", "state_dict"): value}, "no bare table"
    elif how == 3:
        value[f"module.{name}"], rule = value.pop(name), "another name"
    elif how == 4:
        value[name], rule = value[name].reshape(-1, 1, 1), "another shape"
    elif how == 5:
        value[name] = value[name].to(pick(rng, torch.float64, torch.float16, torch.int32, torch.bool, torch.bfloat16))
        rule, expected = _fits(value, base)
    elif how == 6:
        value["0.bias"], rule = torch.tensor([math.nan, 1.0]), "not finite"
    elif how == 7:
        value["best"], rule = np.float64(0.5), "more than tensors"
    elif how == 8:
        value, rule = network(), "code"
    elif how == 9:
        value = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in value.items()}
    elif how == 10:
        value = collections.OrderedDict(value)
    elif how == 11:
        value["0.bias"], rule = value["0.bias"].to(torch.complex64), "complex"
    elif how == 12:
        value["0.weight"], rule = value["0.weight"].to_sparse(), "sparse"
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=rng.random() < 0.9)
    content = stream.getvalue()
    open_rule: str | None = rule
    if not content.startswith(b"PK"):
        open_rule, told = rule if rule else None, f"{told}, as before torch 1.6"
    if how in (13, 14):
        told, content = damaged(content, rng)
        open_rule = _zip_rule(content)
    elif how == 15 and rng.random() < 0.5:
        told, content, open_rule = "a pickle", pickle.dumps(dict.fromkeys(base, 1)), "no tensors"
    path.write_bytes(content)
    return Trial(
        f"torch.save {told} {name}", lambda: _read(path, base), open_rule, lambda found: _differs(found, expected)
    )


def _zip_rule(content: bytes) -> str | None:
    """Damage that the check sums show; else it is in what the ZIP says of itself."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            bad = archive.testzip()
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
        OverflowError,
        zlib.error,
    ) as error:
        return f"no ZIP ({error})"
    return f"{bad}: a check sum that differs" if bad else None
