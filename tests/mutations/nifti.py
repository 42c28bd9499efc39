"""NIfTI: headers field by field, damaged files. The oracle reads the bytes by the format's own standard.

Standard: https://nifti.nimh.nih.gov/nifti-1 (nifti1.h) and nifti2.h.
"""

from __future__ import annotations

import gzip
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samseg_monai.data.files.volumes import read_volume, value_problem
from samseg_monai.errors import DataError
from samseg_monai.transforms import LoadCased
from tests.mutations.harness import Trial, damaged, pick

# name -> (offset, format) in NIfTI-1 and NIfTI-2
FIELDS = {
    "sizeof_hdr": ((0, "i"), (0, "i")), "magic": ((344, "4s"), (4, "8s")), "dim": ((40, "8h"), (16, "8q")),
    "datatype": ((70, "h"), (12, "h")), "bitpix": ((72, "h"), (14, "h")), "pixdim": ((76, "8f"), (104, "8d")),
    "vox_offset": ((108, "f"), (168, "q")), "slope": ((112, "f"), (176, "d")), "inter": ((116, "f"), (184, "d")),
    "units": ((123, "B"), (500, "i")), "qform": ((252, "h"), (344, "i")), "sform": ((254, "h"), (348, "i")),
    "quatern": ((256, "3f"), (352, "3d")), "qoffset": ((268, "3f"), (376, "3d")), "srow": ((280, "12f"), (400, "12d")),
}  # fmt: skip
SIZES, STARTS = (348, 540), (352, 544)
TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
    32: "c8", 1792: "c16", 128: "V3", 2304: "V4",
}  # fmt: skip
VOXELS, SIDES = 1 << 31, (0.05, 20.0)


def build(fields: dict[str, Any], data: bytes, version: int = 1, order: str = "<") -> bytes:
    """A file of these fields, whatever they are."""
    start = STARTS[version - 1]
    raw = bytearray(start)
    for name, value in fields.items():
        at, form = FIELDS[name][version - 1]
        struct.pack_into(order + form, raw, at, *(value if isinstance(value, (list, tuple)) else [value]))
    return bytes(raw) + data


def good(array: np.ndarray, version: int = 1) -> dict[str, Any]:
    """Fields of an array (X, Y, Z) of int16, oblique by 20 degrees, with equal forms."""
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.c_[rotation * [0.9, 1.1, 3.0], [-40, -50, 10]]
    half = math.radians(10)
    magic = b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n"
    return {
        "sizeof_hdr": SIZES[version - 1], "magic": magic, "dim": [3, *array.shape, 1, 1, 1, 1], "datatype": 4,
        "bitpix": 16, "pixdim": [1, 0.9, 1.1, 3.0, 0, 0, 0, 0], "vox_offset": STARTS[version - 1], "slope": 1,
        "inter": 0, "units": 2, "qform": 1, "sform": 1, "quatern": [0, 0, math.sin(half)], "qoffset": [-40, -50, 10],
        "srow": list(affine.ravel()),
    }  # fmt: skip


def rule_of(name: str, content: bytes) -> tuple[str, dict[str, Any]]:
    """Why the rules refuse a file, "" for nothing; and what has to come of it: array, affine, and whether a note."""
    if not content:
        return "empty", {}
    if content.startswith((b"version https://git-lfs", b"%!", b"\xc5\xd0\xd3\xc6")):
        return "a pointer or a program", {}
    if content[:1000].lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        return "a web page", {}
    packed = content[:2] == b"\x1f\x8b"
    if packed != name.endswith(".gz"):
        return "packed, whatever its name says, or the other way round", {}
    if packed:
        raw, rest = b"", content
        while rest:
            unzip = zlib.decompressobj(31)
            try:
                raw += unzip.decompress(rest) + unzip.flush()
            except zlib.error as error:
                return f"damaged gzip ({error})", {}
            if not unzip.eof:
                return "truncated gzip", {}
            rest = unzip.unused_data.lstrip(b"\0")
        content = raw
    return _of_bytes(content)


def _of_bytes(raw: bytes) -> tuple[str, dict[str, Any]]:
    sizes = {order: struct.unpack(f"{order}i", raw[:4])[0] for order in "<>"} if len(raw) >= 4 else {}
    order = next((order for order, size in sizes.items() if size in SIZES), "")
    if not order:
        return "no size of a NIfTI header", {}
    version = SIZES.index(sizes[order]) + 1
    if len(raw) < SIZES[version - 1]:
        return "cut header", {}
    f = {name: struct.unpack_from(order + at[version - 1][1], raw, at[version - 1][0]) for name, at in FIELDS.items()}
    if f["magic"][0] not in ((b"n+1\0",) if version == 1 else (b"n+2\0\r\n\x1a\n", b"n+2\0\0\0\0\0")):
        return f"magic {f['magic'][0]!r}", {}
    kind = TYPES.get(f["datatype"][0])
    if kind is None or kind[0] in "cV":
        return "numbers of no real type", {}
    axes, dim = f["dim"][0], f["dim"]
    if not 3 <= axes <= 7 or any(n < 0 for n in dim[1 : axes + 1]):
        return f"{axes} axes {dim}", {}
    shape = dim[1 : axes + 1]
    if axes > 4:
        return f"{axes} axes {shape}", {}
    voxels = math.prod(shape)
    if not 0 < voxels <= VOXELS:
        return f"{voxels} voxels", {}
    offset, least = f["vox_offset"][0], STARTS[version - 1]
    if not math.isfinite(offset) or offset < least or offset != int(offset):
        return f"vox_offset {offset}", {}
    dtype = np.dtype(kind).newbyteorder(order)
    if len(raw) < offset + voxels * dtype.itemsize:
        return "fewer voxels than its header speaks of", {}
    if len(raw) > offset + voxels * dtype.itemsize:
        return "bytes behind its voxels", {}
    array = np.frombuffer(raw, dtype, voxels, int(offset)).reshape(shape, order="F")
    slope, inter = f["slope"][0], f["inter"][0]
    if not math.isfinite(inter) and math.isfinite(slope) and slope != 0:
        return "an intercept that is no number", {}
    if math.isfinite(slope) and slope != 0 and (slope, inter) != (1, 0):
        with np.errstate(all="ignore"):
            array = array * np.float64(slope) + np.float64(inter)
    return _geometry(f, array, kind)


def _geometry(f: dict[str, Any], array: np.ndarray, kind: str) -> tuple[str, dict[str, Any]]:
    if f["units"][0] & 7 in (1, 3):
        return "lengths in metres or micrometres", {}
    stated = np.array(f["pixdim"], dtype=float)[1:4]
    sides = np.where(stated == 0, 1.0, np.abs(stated))
    codes = {name: f[name][0] if 0 <= f[name][0] <= 5 else 0 for name in ("sform", "qform")}
    noted = bool((stated <= 0).any()) or any(codes[name] != f[name][0] for name in codes)
    sform, qform = np.array([*f["srow"], 0, 0, 0, 1], dtype=float).reshape(4, 4), _qform(f, sides)
    three = array.ndim == 3
    if codes["sform"]:
        affine = sform
        if not three and qform is None:
            return "a quaternion that is no rotation, which MONAI looks at", {}
        if three and not _same_size(sform, sides):  # the form whose voxels have the size that the header states
            if qform is None:
                return "pixdim is the size of no form's voxels", {}
            affine = qform if _same_size(qform, sides) else sform
            if not codes["qform"] and _moved(affine, sform, array.shape) >= 0.05:
                return "pixdim is not the size of the voxels of its only form", {}
    elif codes["qform"]:
        affine = qform
    elif not np.isfinite(f["quatern"]).all():
        return "a quaternion that is no rotation", {}
    else:
        affine = np.diag([-1.0, 1, 1, 1]) @ np.diag([*sides, 1.0])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(array.shape[:3]) - 1) / 2)
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return "no affine", {}
    if not codes["sform"] and any(not side > 0 and n > 1 for side, n in zip(np.abs(stated), array.shape, strict=False)):
        return "voxels of a size that is none", {}
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if any(n > 1 and not SIDES[0] <= side <= SIDES[1] for side, n in zip(lengths, array.shape, strict=False)):
        return f"voxels of {lengths} mm", {}
    scans = [array[..., n] for n in range(array.shape[3])] if array.ndim == 4 else [array]
    if not np.isfinite(array).all() or np.abs(array).max() > np.finfo(np.float32).max:
        return "values of no image", {}
    if any(scan.min() == scan.max() for scan in scans):
        return "one value everywhere", {}
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    differ = codes["sform"] and codes["qform"] and qform is not None and not np.abs(qform - sform).max() <= 0.1
    return "", {"array": array, "affine": affine, "noted": bool(noted or differ)}


def _same_size(affine: np.ndarray, sides: np.ndarray) -> bool:
    return bool(np.allclose(sides, np.linalg.norm(affine[:3, :3], axis=0)))


def _moved(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """By how many voxels of ``other`` the corner moves that moves most."""
    corners = np.array([[x, y, z, 1] for x in (-0.5, shape[0] - 0.5) for y in (-0.5, shape[1] - 0.5)
                        for z in (-0.5, shape[2] - 0.5)])  # fmt: skip
    if not np.isfinite(affine).all() or not np.isfinite(other).all():
        return math.inf
    moved = np.linalg.pinv(other[:3, :3]) @ ((affine - other) @ corners.T)[:3]
    return float(np.linalg.norm(moved, axis=0).max())


def _qform(f: dict[str, Any], sides: np.ndarray) -> np.ndarray | None:
    b, c, d = map(float, f["quatern"])
    rest = 1 - (b * b + c * c + d * d)
    if rest < -1e-6:
        return None
    if math.isnan(rest):
        return np.full((4, 4), np.nan)
    a = math.sqrt(max(0.0, rest))
    length = math.sqrt(a * a + b * b + c * c + d * d)
    a, b, c, d = (x / length for x in (a, b, c, d))
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ])  # fmt: skip
    turn[:, 2] *= -1 if f["pixdim"][0] == -1 else 1
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * sides, f["qoffset"]
    return affine


NUMBERS = (0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-6, -0.9, 2.0, 0.001, 25.0)


def change(fields: dict[str, Any], rng: random.Random) -> str:
    """Change one field; returns what was done."""
    name = rng.choice(
        ["dim", "dim", "datatype", "bitpix", "vox_offset", "pixdim", "pixdim", "qform", "sform", "srow", "srow",
         "quatern", "qoffset", "slope", "inter", "units", "magic", "sizeof_hdr"]
    )  # fmt: skip
    old = fields[name]
    if name == "dim":
        value = list(old)
        value[rng.choice((0, 1, 2, 3, 4))] = pick(rng, 0, -1, 1, 2, 3, 4, 5, 7, 8, 9, 4000, 32767, -32768)
    elif name == "datatype":
        value = pick(rng, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 77, -1)
    elif name == "bitpix":
        value = pick(rng, 0, 1, 8, 32, -16, 32767)
    elif name == "vox_offset":
        value = pick(rng, 0, 1, 16, 348, 351, 353, 360, 368, 544, 1000, 10**7, -352)
        if rng.random() < 0.3 and fields["sizeof_hdr"] == 348:
            value = pick(rng, float("nan"), float("inf"), 352.5)
    elif name in ("pixdim", "srow", "quatern", "qoffset"):
        value = list(old)
        for _ in range(rng.choice((1, 1, 3))):
            value[rng.randrange(min(len(value), 5))] = pick(rng, *NUMBERS)
        if name == "srow" and rng.random() < 0.2:
            value = [0.0] * 12
    elif name in ("qform", "sform"):
        value = pick(rng, 0, 0, 0, 2, 3, 4, 5, 6, -1, 300)
    elif name in ("slope", "inter"):
        value = pick(rng, 0.0, 2.0, -1.5, 1e30, -1e38, float("nan"), float("inf"), 1e-40)
    elif name == "units":
        value = pick(rng, 0, 1, 2, 3, 4, 8, 10, 11, 9, 255)
    elif name == "magic":
        value = pick(rng, b"ni1\0", b"n+1\0", b"n+2\0", b"\0\0\0\0", b"n+1x", b"ni2\0", b"NI1\0")
    else:
        value = pick(rng, 0, 348, 540, 347, 1, -1, 1543569408)
    fields[name] = value
    return f"{name} {old} -> {value}"


def make(folder: Path) -> Any:
    """Volumes of ints, floats and both versions, read as for prepare and as for training."""
    loader = LoadCased("image", image_only=True, ensure_channel_first=True)

    def trial(rng: random.Random) -> Trial:
        version, order = rng.choice((1, 1, 1, 2)), rng.choice("<<<>")
        shape = rng.choice([(8, 7, 4), (8, 7, 1), (8, 7, 4, 2), (6, 5, 3, 1)])
        array = np.array([rng.randrange(-300, 300) for _ in range(math.prod(shape))]).reshape(shape)
        fields = good(array, version)
        fields["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
        kind = rng.choice(["i2", "i2", "f4"])
        fields |= {"datatype": 4, "bitpix": 16} if kind == "i2" else {"datatype": 16, "bitpix": 32}
        told = [change(fields, rng) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        values = array.astype(kind)
        if kind == "f4" and rng.random() < 0.1:
            values.flat[rng.randrange(values.size)] = pick(rng, np.nan, np.inf, 3e38)
        content = build(fields, values.astype(order + kind).tobytes(order="F"), version, order)
        suffix = rng.choice((".nii", ".nii.gz"))
        if suffix == ".nii.gz":
            content = gzip.compress(content, 1, mtime=0)
        if rng.random() < 0.25:
            how, content = damaged(content, rng)
            told.append(how)
        if rng.random() < 0.03:
            suffix = ".nii" if suffix == ".nii.gz" else ".nii.gz"
        path = folder / f"a{suffix}"
        path.write_bytes(content)
        rule, expected = rule_of(path.name, content)
        return Trial(f"{suffix} {version} {order} {shape} {'; '.join(told)}", lambda: _read(path, loader), rule,
                     lambda found: _differs(found, expected))  # fmt: skip

    return trial


def _read(path: Path, loader: LoadCased) -> tuple[Any, Any]:
    volume = read_volume(path)
    scans = np.moveaxis(volume.array, 3, 0) if volume.array.ndim == 4 else volume.array[None]
    if problem := next(filter(None, map(value_problem, [volume.array, *scans])), ""):
        raise DataError(problem)
    return volume, loader({"image": str(path), "case": "a"})["image"]


def _differs(found: tuple[Any, Any], expected: dict[str, Any]) -> str:
    volume, loaded = found
    array, affine = expected["array"], expected["affine"]
    if volume.array.shape != array.shape or not np.allclose(volume.array, array, rtol=1e-6, atol=0):
        return f"array {volume.array.shape} is not that of the file {array.shape}"
    if not np.allclose(volume.affine, affine, rtol=1e-4, atol=1e-4):
        return f"affine {volume.affine.round(4).tolist()} in place of {affine.round(4).tolist()}"
    if expected["noted"] and not volume.notes:
        return "a header that was mended, without a note"
    given = np.asarray(loaded.as_subclass(torch.Tensor))
    wanted = np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]
    if given.shape != wanted.shape or not np.allclose(given, wanted, rtol=1e-5, atol=0):
        return f"MONAI loads {given.shape}, the file is {wanted.shape}"
    if not np.allclose(np.asarray(loaded.affine), affine, rtol=1e-4, atol=1e-4):
        return f"MONAI loads the affine {np.asarray(loaded.affine).round(4).tolist()} for {affine.round(4).tolist()}"
    return ""
