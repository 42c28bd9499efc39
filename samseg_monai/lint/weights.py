"""Weights without loading them: the opcodes of a pickle, the table of a safetensors file.

``torch.load(weights_only=True)``, the only way in which this package reads pickles, has its own list of what it admits;
the one here is shorter, and holds for whoever reads the file with something else.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import IO

from samseg_monai.lint.files import DAMAGED, surroundings
from samseg_monai.lint.names import PICKLED, words

PICKLE_BYTES = 64 << 20  # a state dict's pickle holds names and shapes only
MOST = 20  # findings of one kind of a file; the rest tells nothing new
HEADER_BYTES = 100 << 20  # safetensors' own limit
STARTS = {b"PK\x03\x04": "a ZIP", b"\x80": "a pickle", b"\x7fELF": "a program", b"MZ": "a program", b"#!": "a script",
          b"\xcf\xfa\xed\xfe": "a program", b"\xca\xfe\xba\xbe": "a program"}  # fmt: skip
# what torch.save writes for plain values and tensors (pickle protocol 2); GLOBAL is looked at by name
OPCODES = words(
    """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_DICT
    EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET
    LONG_BINGET BINPERSID REDUCE BUILD GLOBAL"""
)
# entries of the ZIP that torch.save writes, below its one folder
ENTRIES = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)

Problem = tuple[str, str, str]  # where, what, why


def check_torch_file(stream: IO[bytes]) -> Iterator[Problem]:
    """Say what in a file of ``torch.save`` is more than a dictionary of plain values and tensors.

    A TorchScript archive is code and always refused. A pickle without the ZIP around it (``torch.save`` before 1.6, or
    any other pickle) is refused, too, with what it would call.
    """
    start = stream.read(4)
    stream.seek(0)
    if start != b"PK\x03\x04":
        yield "", kind_of(start) or "unknown bytes", "not the ZIP that torch.save writes"
        yield from check_pickle(stream, "")
        return
    try:
        with zipfile.ZipFile(stream) as archive:
            yield from _check_entries(archive)
    except DAMAGED as error:
        yield "", str(error), "a damaged ZIP: what other readers find in it cannot be told"


def _check_entries(archive: zipfile.ZipFile) -> Iterator[Problem]:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        yield "", "entries given twice, or several folders", "other readers may find another pickle"
    if what := surroundings(archive):
        yield "", what, "other readers may find another pickle"
    for member in members:
        entry = member.filename.partition("/")[2]
        if entry.endswith(".py") or entry.startswith("code/") or entry == "constants.pkl":
            yield member.filename, "TorchScript or a package", "holds code that torch.jit.load or torch.package runs"
        elif not ENTRIES.fullmatch(entry) or member.orig_filename != member.filename:
            yield member.filename, "unknown entry", "torch.save writes no such entry for weights"
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
            yield member.filename, "compressed or encrypted", "torch.save stores entries as they are"
        elif entry.lower().endswith(".pkl"):
            if member.file_size > PICKLE_BYTES:
                yield member.filename, f"{member.file_size:,} bytes", "too long for the names of a state dict"
                continue
            with archive.open(member) as pickle:
                yield from check_pickle(pickle, member.filename)
    if not any(name.partition("/")[2] == "data.pkl" for name in names):
        yield "", "no data.pkl", "not written by torch.save"


def check_pickle(stream: IO[bytes], where: str) -> Iterator[Problem]:
    """Name every opcode and every global of a pickle that no state dict of tensors needs, without executing it."""
    seen: set[str] = set()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if (opcode.name == "GLOBAL" and argument in PICKLED) or opcode.name in OPCODES - {"GLOBAL"}:
                continue
            calls = opcode.name in ("GLOBAL", "INST")
            what = f"{opcode.name} {argument}" if calls else opcode.name
            if what not in seen and len(seen) < MOST:
                why = "reading the pickle imports this, to call it" if calls else "torch.save writes no such opcode"
                yield f"{where} byte {position}".strip(), what, why
            seen.add(what)
    except (ValueError, IndexError, KeyError, EOFError, OverflowError, MemoryError) as error:
        yield where, str(error) or type(error).__name__, "not a whole pickle: what a reader makes of it cannot be told"
        return
    if where and stream.read(1):
        yield where, "bytes after its end", "a second pickle may follow"


def check_safetensors(stream: IO[bytes], size: int) -> Iterator[Problem]:
    """Compare the table of a safetensors file with its size (format: https://github.com/huggingface/safetensors)."""
    head = stream.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(HEADER_BYTES, size - 8):
        yield "", kind_of(head) or "unknown bytes", "no safetensors file"
        return
    try:
        table = json.loads(stream.read(length).decode("utf-8"))
        table.pop("__metadata__", None)
        end = max([int(entry["data_offsets"][1]) for entry in table.values()], default=0)
    except (ArithmeticError, ValueError, RecursionError, TypeError, LookupError, AttributeError) as error:
        yield "", f"{type(error).__name__} in its table", "no safetensors file"
        return
    if 8 + length + end != size:
        yield "", f"{size:,} bytes", f"its table says {8 + length + end:,}"


def kind_of(start: bytes) -> str:
    """What the first bytes of a file say that it is; "" if they are those of nothing that could be run or loaded."""
    return next((kind for magic, kind in STARTS.items() if start.startswith(magic)), "")
