"""MHA and NRRD: headers line by line, damaged files. The oracle parses both by their definitions.

MetaIO: https://itk.org/Wiki/ITK/MetaIO/Documentation; NRRD: https://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import bz2
import gzip
import math
import random
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samseg_monai.data.files.volumes import read_volume, value_problem
from samseg_monai.errors import DataError
from samseg_monai.transforms import LoadCased
from tests.mutations.harness import Trial, damaged, pick

META = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
}  # fmt: skip
NRRD = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1",
    "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2", "int": "i4", "signed int": "i4",
    "int32": "i4", "int32_t": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4", "float": "f4", "double": "f8",
}  # fmt: skip
SPACES = {
    "left-posterior-superior": (1, 1, 1), "LPS": (1, 1, 1), "right-anterior-superior": (-1, -1, 1),
    "RAS": (-1, -1, 1), "left-anterior-superior": (1, -1, 1), "LAS": (1, -1, 1),
}  # fmt: skip
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
WORDS = ("0", "-1", "nan", "inf", "abc", "1e30", "1e-6", "", "2", "0.001", "25", "1,5", "3x", "99999999999999999999")


def directions() -> np.ndarray:
    """Axes of a stored volume as columns, turned by 20 degrees."""
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def mha(shape: tuple[int, ...], kind: str = "MET_SHORT") -> list[list[str]]:
    """Lines of a good header, key and value."""
    turn = directions().T.ravel()  # MetaIO lists the axes one after the other
    return [
        ["ObjectType", "Image"], ["NDims", "3"], ["BinaryData", "True"], ["BinaryDataByteOrderMSB", "False"],
        ["CompressedData", "False"], ["TransformMatrix", " ".join(f"{x:.9g}" for x in turn)],
        ["Offset", "-40 -50 10"], ["CenterOfRotation", "0 0 0"], ["AnatomicalOrientation", "RAI"],
        ["ElementSpacing", "0.9 1.1 3"], ["DimSize", " ".join(map(str, shape))], ["ElementType", kind],
        ["ElementDataFile", "LOCAL"],
    ]  # fmt: skip


def nrrd(shape: tuple[int, ...], kind: str = "short", encoding: str = "raw") -> list[list[str]]:
    """Lines of a good header, field and value; the first is the magic."""
    steps = (directions() * [0.9, 1.1, 3]).T
    vectors = " ".join(f"({','.join(f'{x:.9g}' for x in step)})" for step in steps)
    return [
        ["NRRD0004", ""], ["type", kind], ["dimension", "3"], ["space", "left-posterior-superior"],
        ["sizes", " ".join(map(str, shape))], ["space directions", vectors], ["kinds", "domain domain domain"],
        ["endian", "little"], ["encoding", encoding], ["space origin", "(-40,-50,10)"],
    ]  # fmt: skip


def text_of(lines: list[list[str]], end: str = "\n") -> bytes:
    """The header as bytes."""
    if lines and lines[0][0].startswith("NRRD"):
        text = "".join(
            (key if not value and n == 0 else f"{key}: {value}") + end for n, (key, value) in enumerate(lines)
        )
        return (text + end).encode("latin1")
    return "".join(f"{key} = {value}{end}" for key, value in lines).encode("latin1")


def numbers(text: str, count: int) -> list[float] | None:
    """So many finite numbers, else None."""
    words = re.split("[ \t]+", text)
    if len(words) != count or not all(NUMBER.fullmatch(word) for word in words):
        return None
    found = list(map(float, words))
    return found if all(map(math.isfinite, found)) else None


def rule_of(content: bytes) -> tuple[str, dict[str, Any]]:
    """Why the rules refuse a file, "" for nothing; and what has to come of it: array, affine, and whether a note."""
    if not content or content.startswith((b"version https://git-lfs", b"%!")):
        return "empty, a pointer or a program", {}
    if content[:1000].lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        return "a web page", {}
    return _of_nrrd(content) if content.startswith(b"NRRD") else _of_mha(content)


def _of_mha(content: bytes) -> tuple[str, dict[str, Any]]:
    fields: dict[str, str] = {}
    rest = content
    while True:
        line, end, rest = rest.partition(b"\n")
        found = re.fullmatch(r"\s*([!-9;<>-~]+)\s*[=:][ \t]*(.*?)[ \t]*\r?", line.decode("latin1"))
        if not found or not end:
            return f"a line that is none: {line[:40]!r}", {}
        if fields.setdefault(found[1], found[2]) != found[2]:
            return f"{found[1]} twice", {}
        if found[1] == "DimSize" and "NDims" not in fields:
            return "numbers of so many axes before their number", {}
        if found[1] == "ElementDataFile":
            break
    if fields["ElementDataFile"].upper() != "LOCAL":
        return "names another file", {}
    if fields.get("ObjectType", "Image") != "Image" or fields.get("NDims") != "3":
        return "no image of three axes", {}
    size = numbers(fields.get("DimSize", ""), 3)
    kind = META.get(fields.get("ElementType", ""))
    if size is None or kind is None or any(n < 1 or n % 1 for n in size):
        return f"DimSize {fields.get('DimSize')}, ElementType {fields.get('ElementType')}", {}
    channels = numbers(fields.get("ElementNumberOfChannels", "1"), 1)
    if channels is None or channels[0] < 1 or channels[0] % 1 or fields.get("HeaderSize", "0") != "0":
        return "channels or a HeaderSize that are none", {}
    if numbers(fields.get("CenterOfRotation", "0 0 0"), 3) is None:
        return f"CenterOfRotation {fields['CenterOfRotation']}", {}
    flags = {}
    for name, default in (("BinaryData", "True"), ("CompressedData", "False"), ("BinaryDataByteOrderMSB", "False")):
        value = fields.get(name, fields.get("ElementByteOrderMSB", default) if name.endswith("MSB") else default)
        if value.lower() not in ("true", "false"):
            return f"{name} {value}", {}
        flags[name] = value.lower() == "true"
    order = ">" if flags["BinaryDataByteOrderMSB"] else "<"
    voxels = math.prod(map(int, size)) * int(channels[0])
    if not flags["BinaryData"]:
        words = rest.split()
        if len(words) < voxels or not all(NUMBER.fullmatch(word.decode("latin1")) for word in words[:voxels]):
            return "text that is no number of each voxel", {}
        array = np.array([float(word) for word in words[:voxels]])
    else:
        if flags["CompressedData"]:
            stored = fields.get("CompressedDataSize", "")
            if not stored.isdigit():
                return f"CompressedDataSize {stored}", {}
            try:
                rest = zlib.decompress(rest[: int(stored)])
            except zlib.error as error:
                return f"damaged stream ({error})", {}
        if len(rest) < voxels * np.dtype(kind).itemsize:
            return "fewer voxels than the header speaks of", {}
        array = np.frombuffer(rest, order + kind, voxels)
    spacing = fields.get("ElementSpacing", fields.get("ElementSize"))
    sides = numbers(spacing if spacing is not None else "1 1 1", 3)
    matrix = next((fields[n] for n in ("TransformMatrix", "Rotation", "Orientation") if n in fields), None)
    offset = next((fields[n] for n in ("Offset", "Position", "Origin") if n in fields), None)
    turn, origin = numbers(matrix or "1 0 0 0 1 0 0 0 1", 9), numbers(offset or "0 0 0", 3)
    if sides is None or turn is None or origin is None or min(sides) <= 0:
        return f"geometry that is none: {spacing}, {matrix}, {offset}", {}
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.reshape(turn, (3, 3)).T * sides, origin
    return _placed(array, list(map(int, size)), affine, (1, 1, 1), None in (spacing, matrix))


def _of_nrrd(content: bytes) -> tuple[str, dict[str, Any]]:
    parts = re.split(rb"\r?\n\r?\n", content, maxsplit=1)
    if len(parts) < 2:
        return "a header without an end", {}
    head, data = parts
    lines = head.decode("latin1").replace("\r\n", "\n").split("\n")
    if not re.fullmatch("NRRD000[1-5]", lines[0]):
        return f"magic {lines[0][:12]!r}", {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith("#") or re.match(r"[^:]+:=", line):
            continue
        key, colon, value = line.partition(": ")
        key = key.lower().replace(" ", "")
        if not colon or key in fields:
            return f"a line that is none, or twice: {line[:40]!r}", {}
        fields[key] = value.strip()
    if "datafile" in fields:
        return "names another file", {}
    unknown = set(fields) - {
        "type", "dimension", "space", "sizes", "spacedirections", "kinds", "endian", "encoding", "spaceorigin",
        "spacings", "centers", "centerings", "labels", "units", "spaceunits", "thicknesses", "content", "min", "max",
        "axismins", "axismaxs", "oldmin", "oldmax", "lineskip", "byteskip", "spacedimension", "measurementframe",
        "samplingunits", "number", "blocksize", "sampleunits",
    }  # fmt: skip
    if unknown:
        return f"fields that there are not: {unknown}", {}
    kind, dimension = NRRD.get(fields.get("type", "")), fields.get("dimension")
    size = numbers(fields.get("sizes", ""), 3)
    if kind is None or dimension != "3" or size is None or any(n < 1 or n % 1 for n in size):
        return f"type {fields.get('type')}, dimension {dimension}, sizes {fields.get('sizes')}", {}
    if (kinds := fields.get("kinds")) is not None and kinds.split() not in (["domain"] * 3, ["space"] * 3):
        return f"kinds {kinds}", {}
    array = _decoded(data, fields, kind, math.prod(map(int, size)))
    return array if isinstance(array, tuple) else _of_space(array, list(map(int, size)), fields)


def _decoded(data: bytes, fields: dict[str, str], kind: str, voxels: int) -> Any:
    encoding, endian = fields.get("encoding", "").lower(), fields.get("endian")
    if np.dtype(kind).itemsize > 1 and endian not in ("little", "big") and encoding not in ("ascii", "text", "txt"):
        return f"endian {endian}", {}
    for skip in ("lineskip", "byteskip"):
        if skip in fields and fields[skip] != "0":
            return f"{skip} {fields[skip]}", {}
    try:
        if encoding in ("gzip", "gz"):
            unzip = zlib.decompressobj(31)
            data = unzip.decompress(data) + unzip.flush()
            if not unzip.eof:
                return "truncated gzip", {}
        elif encoding in ("bzip2", "bz2"):
            data = bz2.decompress(data)
        elif encoding in ("ascii", "text", "txt"):
            words = data.replace(b",", b" ").split()
            return np.array([float(word) for word in words[:voxels]]) if len(words) >= voxels else ("cut text", {})
        elif encoding == "hex":
            data = bytes.fromhex(data.decode("latin1"))
        elif encoding != "raw":
            return f"encoding {encoding}", {}
    except (ValueError, OSError, zlib.error) as error:
        return f"damaged data ({error})", {}
    dtype = np.dtype(kind).newbyteorder(">" if endian == "big" else "<")
    if len(data) < voxels * dtype.itemsize:
        return "fewer voxels than the header speaks of", {}
    return np.frombuffer(data, dtype, voxels)


def _of_space(array: np.ndarray, size: list[int], fields: dict[str, str]) -> tuple[str, dict[str, Any]]:
    space, vectors, origin = fields.get("space"), fields.get("spacedirections"), fields.get("spaceorigin")
    affine = np.eye(4)
    if space is not None:
        steps = [numbers(part.replace(",", " "), 3) for part in re.findall(r"\( *([^()]*?) *\)", vectors or "")]
        if "spacings" in fields or re.sub(r"\([^()]*\)", "", vectors or "").strip(" \t"):
            return "two sizes of voxels, or more than vectors", {}
        if space not in SPACES or len(steps) != 3 or None in steps:
            return f"space {space}, {vectors}", {}
        affine[:3, :3] = np.array(steps).T
        start = numbers((origin or "(0,0,0)").strip("()").replace(",", " "), 3)
        if start is None or (origin is not None and not re.fullmatch(r"\(.*\)", origin)):
            return f"space origin {origin}", {}
        affine[:3, 3] = start
        return _placed(array, size, affine, SPACES[space], False)
    if "spacings" in fields and vectors:
        return "two sizes of voxels", {}
    if vectors is not None or origin is not None:
        return "directions in no space", {}
    sides = numbers(fields.get("spacings", "1 1 1"), 3)
    if sides is None or min(sides) <= 0:
        return f"spacings {fields.get('spacings')}", {}
    affine[:3, :3] = np.diag(sides)
    return _placed(array, size, affine, (1, 1, 1), True)


def _placed(
    array: np.ndarray, size: list[int], affine: np.ndarray, signs: tuple[int, ...], noted: bool
) -> tuple[str, dict[str, Any]]:
    affine = np.diag([*signs, 1.0]) @ affine  # to LPS
    affine[:2] *= -1  # to RAS
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if min(lengths) == 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return "a singular affine", {}
    if any(n > 1 and not 0.05 <= side <= 20 for side, n in zip(lengths, size, strict=True)):
        return f"voxels of {lengths} mm", {}
    axes = affine[:3, :3] / lengths
    noted |= bool(np.abs(axes.T @ axes - np.eye(3)).max() > 0.01)
    size = size if array.size == math.prod(size) else [array.size // math.prod(size), *size]
    if array.dtype.kind == "i" and array.dtype.itemsize in (1, 8):
        return "numbers that MONAI does not load", {}
    array = array.reshape(size, order="F")
    array = array if array.ndim == 3 else np.moveaxis(array, 0, 3)
    if not np.isfinite(array).all() or np.abs(array.astype(float)).max() > np.finfo(np.float32).max:
        return "values of no image", {}
    return ("one value everywhere", {}) if array.min() == array.max() else (
        "", {"array": array, "affine": affine, "noted": noted})  # fmt: skip


def change(lines: list[list[str]], rng: random.Random) -> str:
    """Change one line of a header; returns what was done."""
    at = rng.randrange(len(lines))
    key, value = lines[at]
    how = rng.random()
    if how < 0.12:
        del lines[at]
        return f"{key} taken out"
    if how < 0.17:
        lines.insert(rng.randrange(len(lines)), [key, pick(rng, value, "1", "abc")])
        return f"{key} twice"
    if how < 0.22:
        lines[at][0] = pick(rng, key.lower(), key.upper(), f"{key}x", "")
        return f"{key} -> {lines[at][0]}"
    words = re.split(r"([ ,()]+)", value)
    choices = {
        "ElementDataFile": ("other.raw", "LIST", "local", "LOCAL ", "/etc/passwd", "a%d.raw 1 4 1", ""),
        "ElementType": (*META, "MET_UCHAR_ARRAY", "MET_LONG", "MET_OTHER", "short"),
        "ObjectType": ("Mesh", "image", "Scene", "Tube"), "type": (*NRRD, "block", "long double", "complex"),
        "encoding": ("raw", "gzip", "gz", "ascii", "hex", "bzip2", "text", "zlib"), "endian": ("big", "middle"),
        "space": (*SPACES, "scanner-xyz", "3D-right-handed", "RAI", "left-posterior-superior-time"),
        "kinds": ("domain domain list", "vector domain domain", "space space space", "domain domain"),
        "dimension": ("2", "4", "0", "abc", "1000"), "NDims": ("2", "4", "0", "-3", "abc", "1000", "3.5"),
        "NRRD0004": (),
    }  # fmt: skip
    if key in ("BinaryData", "BinaryDataByteOrderMSB", "CompressedData"):
        lines[at][1] = pick(rng, "True", "False", "true", "1", "yes", "")
    elif key in choices and choices[key] and rng.random() < 0.9:
        lines[at][1] = rng.choice(choices[key])
    elif key == "NRRD0004":
        lines[at][0] = pick(rng, "NRRD0001", "NRRD0005", "NRRD0009", "NRRD", "NRRD0004x")
    else:
        spots = [n for n, word in enumerate(words) if word.strip(" ,()")]
        if rng.random() < 0.25 and spots:
            del words[rng.choice(spots)]
        elif spots:
            words[rng.choice(spots)] = rng.choice(WORDS)
        lines[at][1] = "".join(words) + (pick(rng, " 7", " x") if rng.random() < 0.1 else "")
    return f"{key}: {value} -> {lines[at][1]}"


def make(folder: Path) -> Any:
    """Files of both formats, packed and not, read as for prepare and as for training."""
    loader = LoadCased("image", image_only=True, ensure_channel_first=True)
    (folder / "good.mha").write_bytes(text_of(mha((8, 7, 4))) + bytes(range(224)) * 2)
    loader({"image": str(folder / "good.mha"), "case": "a"})  # ITK is imported by the first file
    (folder / "other.raw").write_bytes(bytes(range(256)) * 8)

    def trial(rng: random.Random) -> Trial:
        shape = rng.choice([(8, 7, 4), (8, 7, 1), (5, 6, 3)])
        array = np.array([rng.randrange(-300, 300) for _ in range(math.prod(shape))], dtype="<i2")
        data, packed = array.tobytes(), rng.random() < 0.3
        if rng.random() < 0.5:
            suffix, lines = ".mha", mha(shape)
            if packed:
                data = zlib.compress(data)
                lines[4][1] = "True"
                lines.insert(5, ["CompressedDataSize", str(len(data))])
            if rng.random() < 0.1:
                lines.insert(-1, [*pick(rng, ("ElementNumberOfChannels", "2"), ("ElementNumberOfChannels", "1"),
                                        ("HeaderSize", "10"), ("HeaderSize", "-1"), ("Comment", "x"))])  # fmt: skip
        else:
            suffix, lines = ".nrrd", nrrd(shape, encoding="gzip" if packed else "raw")
            data = gzip.compress(data, 1, mtime=0) if packed else data
            if rng.random() < 0.1:
                lines.append([*pick(rng, ("data file", "other.raw"), ("datafile", "LIST"), ("line skip", "1"),
                                    ("byte skip", "-1"), ("spacings", "1 1 1"), ("content", "x"))])  # fmt: skip
        told = [change(lines, rng) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        content = text_of(lines, rng.choice(("\n", "\n", "\n", "\r\n"))) + data
        if rng.random() < 0.2:
            how, content = damaged(content, rng)
            told.append(how)
        path = folder / f"a{suffix}"
        path.write_bytes(content)
        rule, expected = rule_of(content)
        return Trial(f"{suffix} {shape} {'packed ' * packed}{'; '.join(told)}", lambda: _read(path, loader), rule,
                     lambda found: _differs(found, expected))  # fmt: skip

    return trial


def _read(path: Path, loader: LoadCased) -> tuple[Any, Any]:
    volume = read_volume(path)
    if problem := value_problem(volume.array):
        raise DataError(problem)
    return volume, loader({"image": str(path), "case": "a"})["image"]


def _differs(found: tuple[Any, Any], expected: dict[str, Any]) -> str:
    volume, loaded = found
    array, affine = expected["array"], expected["affine"]
    if volume.array.shape != array.shape or not np.allclose(volume.array, array):
        return f"array {volume.array.shape} is not that of the file {array.shape}"
    if not np.allclose(volume.affine, affine, rtol=1e-4, atol=1e-4):
        return f"affine {volume.affine.round(4).tolist()} in place of {affine.round(4).tolist()}"
    if expected["noted"] and not volume.notes:
        return "a geometry that is a guess, without a note"
    given = np.asarray(loaded.as_subclass(torch.Tensor))
    given = given[0] if array.ndim == 3 else np.moveaxis(given, 0, 3)
    if given.shape != array.shape or not np.allclose(given, array):
        return f"MONAI loads {given.shape}, the file is {array.shape}"
    if not np.allclose(np.asarray(loaded.affine), affine, rtol=1e-4, atol=1e-4):
        return f"MONAI loads the affine {np.asarray(loaded.affine).round(4).tolist()} for {affine.round(4).tolist()}"
    return ""
