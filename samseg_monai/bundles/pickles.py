"""Weights that are pickles, looked at without loading them: the opcodes of what ``torch.save`` writes.

``torch.load(weights_only=True)``, the only way in which this package reads pickles, has its own list of what it admits;
the one here is shorter, and holds for whoever reads the file with something else.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import IO

from samseg_monai.bundles.archive import DAMAGED

PICKLE_BYTES = 4 << 20  # a state dict's pickle holds names and shapes only
MOST = 20  # findings of one kind; the rest tells nothing new
# what torch.save writes for plain values and tensors (pickle protocol 2); GLOBAL is looked at by name
OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINPERSID",
    "REDUCE", "BUILD",
}  # fmt: skip
STORAGES = (
    "BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half", "Int", "Long",
    "Short",
)  # fmt: skip
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"} | {
    f"torch {name}Storage" for name in STORAGES
}
# entries of the ZIP that torch.save writes, below its one folder
ENTRIES = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)


def pickle_problems(stream: IO[bytes]) -> Iterator[str]:
    """Say what in a file of ``torch.save`` is more than plain values and tensors.

    A TorchScript archive is code; a pickle without the ZIP around it (``torch.save`` before 1.6) is refused, too.

    Args:
        stream: the file, open for seeking.
    """
    start = stream.read(4)
    stream.seek(0)
    if start != b"PK\x03\x04":
        yield "not the ZIP that torch.save writes"
        return
    try:
        with zipfile.ZipFile(stream) as archive:
            yield from _entry_problems(archive)
    except DAMAGED as error:
        yield f"a damaged ZIP ({error})"


def _entry_problems(archive: zipfile.ZipFile) -> Iterator[str]:
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        yield "entries given twice, or several folders: other readers may find another pickle"
    if _surrounded(archive):
        yield "bytes before or behind its ZIP, or a comment: other readers may find another pickle"
    if not any(name.partition("/")[2] == "data.pkl" for name in names):
        yield "no data.pkl: not written by torch.save"
    for member in members:
        entry = member.filename.partition("/")[2]
        if entry.endswith(".py") or entry.startswith("code/") or entry == "constants.pkl":
            yield f"{member.filename}: TorchScript or a package, whose code torch.jit.load or torch.package runs"
        elif not ENTRIES.fullmatch(entry) or member.orig_filename != member.filename:
            yield f"{member.filename}: torch.save writes no such entry for weights"
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
            yield f"{member.filename}: compressed or encrypted, as torch.save writes none"
        elif entry.lower().endswith(".pkl"):
            if member.file_size > PICKLE_BYTES:
                yield f"{member.filename}: {member.file_size:,} bytes, too long for the names of a state dict"
                continue
            with archive.open(member) as pickle:
                yield from (f"{member.filename} {problem}" for problem in _opcode_problems(pickle))


def _surrounded(archive: zipfile.ZipFile) -> bool:
    """Whether there is something before the first member of a ZIP, or behind its table of contents."""
    if archive.fp is None or archive.comment or min((m.header_offset for m in archive.infolist()), default=0) > 0:
        return True
    archive.fp.seek(-22, 2)  # the record that ends a ZIP without a comment
    return archive.fp.read(4) != b"PK\x05\x06"


def _opcode_problems(stream: IO[bytes]) -> Iterator[str]:
    """Name every opcode and every global of a pickle that no state dict of tensors needs, without executing it."""
    seen: set[str] = set()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            what = f"{opcode.name} {argument}" if opcode.name in ("GLOBAL", "INST") else opcode.name
            if what.removeprefix("GLOBAL ") in GLOBALS or opcode.name in OPCODES or what in seen:
                continue
            if len(seen) < MOST:
                yield f"byte {position}: {what}, which is called or imported when it is read"
            seen.add(what)
    except (ValueError, IndexError, KeyError, EOFError, OverflowError, MemoryError) as error:
        yield f"no whole pickle ({error or type(error).__name__})"
        return
    if stream.read(1):
        yield "bytes behind its end: a second pickle may follow"
