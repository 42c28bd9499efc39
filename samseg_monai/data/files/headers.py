"""Headers of MHA and NRRD files, judged before ITK reads them.

ITK takes what it cannot read in a header for a default (an origin of two numbers, voxels without a size) and voxels
that are cut off for zeros, and some numbers of axes end the whole process.

Formats: https://itk.org/Wiki/ITK/MetaIO/Documentation and https://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import bz2
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from samseg_monai.faults import free_memory

_MOST_VOXELS = 1 << 31  # 8 GB as float32; a CT of the whole body has a quarter of it
_CHUNK = 1 << 22  # bytes unpacked at a time
_WHOLE, _NUMBER = r"[1-9]\d{0,9}", r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?"
_FLAG = "(?i:true|false)"
_META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4,
    "DOUBLE": 8,
}  # fmt: skip
# key -> what stands there, and how often: d is the number of axes
_META = {
    "ObjectType": ("Image", "1"), "NDims": ("[1-9]", "1"), "DimSize": (_WHOLE, "d"), "HeaderSize": ("0", "1"),
    "ElementType": (f"MET_(?:{'|'.join(_META_BYTES)})", "1"), "ElementNumberOfChannels": (_WHOLE, "1"),
    "CompressedDataSize": (_WHOLE, "1"),
    **dict.fromkeys(("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData"), (_FLAG, "1")),
    **dict.fromkeys(("ElementSpacing", "ElementSize"), (_NUMBER, "d")),
    **dict.fromkeys(("Offset", "Position", "Origin", "CenterOfRotation"), (_NUMBER, "d")),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), (_NUMBER, "dd")),
}  # fmt: skip
_NRRD_BYTES = {
    r"signed char|int8(?:_t)?|uchar|unsigned char|uint8(?:_t)?": 1,
    r"short|short int|signed short|signed short int|int16(?:_t)?|ushort|unsigned short|unsigned short int|"
    r"uint16(?:_t)?": 2,
    r"int|signed int|int32(?:_t)?|uint|unsigned int|uint32(?:_t)?|float": 4,
    r"longlong|long long|long long int|signed long long|signed long long int|int64(?:_t)?|ulonglong|"
    r"unsigned long long|unsigned long long int|uint64(?:_t)?|double": 8,
}  # fmt: skip
_VECTOR = rf"(?:none|\( *{_NUMBER}(?: *, *{_NUMBER})* *\))"
_NRRD = {
    "type": ("|".join(_NRRD_BYTES), "1"), "dimension": ("[1-9]", "1"), "sizes": (_WHOLE, "d"), "byteskip": ("0", "1"),
    "lineskip": ("0", "1"), "endian": ("little|big", "1"), "spacedirections": (_VECTOR, "d"),
    "encoding": ("(?i:raw|gz|gzip|bz2|bzip2|txt|text|ascii)", "1"), "spaceorigin": (_VECTOR, "1"),
    "space": ("LPS|RAS|LAS|(?:left-posterior|right-anterior|left-anterior)-superior", "1"),
    "spacings": (rf"(?i:{_NUMBER}|nan)", "d"), "kinds": (r"\S+", "d"),
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        named: the file that it names in place of the voxels behind it; None where there is none.
        notes: what it leaves out, so that a default counts.
        encoding: raw, zlib, gzip, bzip2 or text.
        values, size: numbers of an image, and bytes of each.
        start: of the voxels, in bytes.
        stored: bytes of them, where it says that.
    """

    named: str | None
    notes: tuple[str, ...] = ()
    encoding: str = "raw"
    values: int = 0
    size: int = 1
    start: int = 0
    stored: int | None = None


def read_header(content: bytes) -> Header:
    """Read the header of an MHA or NRRD file.

    Raises:
        ValueError: neither of the two formats, a header without an end, a field that is missing, given twice, or
            holds something else than it should.
    """
    return _nrrd(content) if content.startswith(b"NRRD") else _meta(content)


def check_voxels(header: Header, content: bytes) -> None:
    """Raise ValueError unless the voxels behind a header are there to their end."""
    data = content[header.start :]
    data = data if header.stored is None else data[: header.stored]
    needed = header.values * header.size
    if header.encoding == "text":
        words = data.replace(b",", b" ").split()[: header.values]
        found, needed = sum(bool(re.fullmatch(_NUMBER, word.decode("latin1"))) for word in words), header.values
    elif header.encoding == "raw":
        found = len(data)
    else:
        found = _unpacked(data, header.encoding, needed)
    if found < needed:
        raise ValueError(f"{found} of {needed} {'numbers' if header.encoding == 'text' else 'bytes'}")


def _unpacked(data: bytes, encoding: str, most: int) -> int:
    """Length of packed data, to their end, but no further than needed."""
    unpack: Any = bz2.BZ2Decompressor() if encoding == "bzip2" else zlib.decompressobj(31 if encoding == "gzip" else 15)
    found, rest = 0, data
    try:
        while rest and not unpack.eof and found <= most:
            found += len(unpack.decompress(rest, _CHUNK))
            rest = b"" if encoding == "bzip2" and unpack.needs_input else getattr(unpack, "unconsumed_tail", b"")
    except (OSError, zlib.error) as error:
        raise ValueError(f"its voxels cannot be unpacked: {error}") from error
    if not unpack.eof and found <= most:
        raise ValueError("its packed voxels have no end")
    return found


def _meta(content: bytes) -> Header:
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = content.find(b"\n", start)
        line = content[start : end if end >= 0 else None][:100_000].decode("latin1")
        found = re.fullmatch(r"\s*([!-9;<>-~]+)\s*[=:][ \t]*(.*?)\s*", line)
        if end < 0 or not found:
            raise ValueError("neither an MHA nor a NRRD file, or its header has no end")
        if fields.setdefault(found[1], found[2]) != found[2]:
            raise ValueError(f"{found[1]} stands twice in its header, {fields[found[1]]!r:.80} and {found[2]!r:.80}")
        if found[1] == "DimSize" and "NDims" not in fields:
            raise ValueError("its header has DimSize before NDims")
        start = end + 1
    if fields["ElementDataFile"].upper() != "LOCAL":
        return Header(fields["ElementDataFile"])
    axes = _checked(fields, _META, "NDims", ("NDims", "DimSize", "ElementType"))
    sides, placed = ({name for name in names if name in fields} for names in (
        ("ElementSpacing", "ElementSize"), ("TransformMatrix", "Rotation", "Orientation")))  # fmt: skip
    if any(float(side) <= 0 for name in sides for side in fields[name].split()):
        raise ValueError(f"its voxels are {fields[sides.pop()]} mm")
    text = fields.get("BinaryData", "True").lower() == "false"
    packed = fields.get("CompressedData", "False").lower() == "true"
    if packed and "CompressedDataSize" not in fields:  # ITK would hand on memory that nobody has written
        raise ValueError("its header has no CompressedDataSize")
    channels, stored = int(fields.get("ElementNumberOfChannels", 1)), fields.get("CompressedDataSize")
    return Header(
        None, _left_out(bool(sides), bool(placed)), "text" if text else "zlib" if packed else "raw",
        math.prod(map(int, fields["DimSize"].split()[:axes])) * channels,
        _META_BYTES[fields["ElementType"].removeprefix("MET_")], start, int(stored) if stored and packed else None,
    )  # fmt: skip


def _nrrd(content: bytes) -> Header:
    end = re.search(rb"\n\r?\n", content)
    lines = content[: end.start() if end else len(content)].decode("latin1").replace("\r", "").split("\n")
    fields: dict[str, str] = {}
    for line in lines[1:]:
        key, colon, value = line.partition(": ")
        if line.startswith("#") or re.match(r"[^:]+:=", line):
            continue
        key = re.sub(r"\s", "", key.lower())
        if not colon or key in fields:
            raise ValueError(f"a line of its header is {'given twice' if colon else 'no field'}: {line!r:.80}")
        fields[key] = value.strip()
    if "datafile" in fields:
        return Header(fields["datafile"])
    if end is None or not re.fullmatch(r"NRRD000[1-6]", lines[0]):
        raise ValueError("its header has no end, or is of another version")
    _checked(fields, _NRRD, "dimension", ("type", "dimension", "sizes", "encoding"))
    size = next(size for names, size in _NRRD_BYTES.items() if re.fullmatch(names, fields["type"]))
    placed = "space" in fields and "spacedirections" in fields
    if not placed and fields.keys() & {"space", "spacedirections", "spaceorigin"}:
        raise ValueError("its header has directions and no space, or the other way round")
    encoding = fields["encoding"].lower()
    kind = {"gz": "gzip", "bz2": "bzip2", "txt": "text", "ascii": "text"}.get(encoding, encoding)
    if size > 1 and kind != "text" and "endian" not in fields:
        raise ValueError("its header has no endian")
    values = math.prod(map(int, fields["sizes"].split()))
    return Header(None, _left_out(placed or "spacings" in fields, placed), kind, values, size, end.end())


def _left_out(sized: bool, placed: bool) -> tuple[str, ...]:
    sides = () if sized else ("its header tells no size of a voxel: taken as 1 mm",)
    return sides + (() if placed else ("its header tells no directions: left and right are a guess",))


def _checked(
    fields: Mapping[str, str], rules: Mapping[str, tuple[str, str]], axes: str, needed: tuple[str, ...]
) -> int:
    """Number of axes of a header whose fields hold what they should; ValueError for one that does not."""
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"its header has no {', '.join(missing)}")
    if not re.fullmatch(rules[axes][0], fields[axes]):
        raise ValueError(f"{axes}: {fields[axes]!r:.80}")
    number = int(fields[axes])
    for name, (form, count) in rules.items():
        times = {"1": 1, "d": number, "dd": number * number}[count]
        value = fields.get(name)
        if value is not None and not re.fullmatch(rf"(?:{form})(?:[ \t]+(?:{form})){{{times - 1}}}", value):
            raise ValueError(f"{name}: {value!r:.80} in its header")
    return number


def memory_problem(voxels: int, itemsize: int) -> str:
    """Why so many voxels cannot be loaded, as stored (``itemsize`` bytes each) and in float32; empty if they can."""
    if not 0 <= voxels <= _MOST_VOXELS:
        return f"speaks of {voxels} voxels, more than {_MOST_VOXELS}: damaged, or too large"
    needed, free = voxels * (itemsize + 4), free_memory()
    if needed <= free:
        return ""
    return f"speaks of {voxels} voxels, {needed / 1e9:.3g} GB in memory, of which {free / 1e9:.3g} GB are free"
