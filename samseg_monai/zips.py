"""ZIP files from elsewhere: what in one would mean something else to another reader, and unpacking without harm.

Facts of the format: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from samseg_monai.errors import DataError, raise_all, visible
from samseg_monai.faults import OF_WRITING, writing

LONGEST_NAME = 500  # characters of a path
TOTAL_BYTES = 32 << 30  # several times a bundle with SAM's largest encoder, or a large exam
RATIO, RATIO_BYTES = 100, 16 << 20  # weights and images hardly shrink: a large member that shrinks so far is a bomb
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MOST_FILES = 200_000  # of exams in one ZIP
# what zipfile raises on archives that are damaged, or made to hurt; RuntimeError is its word for encrypted ones
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, LookupError,
           OverflowError)  # fmt: skip
_DEVICE = re.compile(r"(con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)
_LEFT_BEHIND = (".ds_store", "thumbs.db")  # and no desktop.ini, which Windows acts upon


def is_left_behind(name: str) -> bool:
    """Whether macOS or Windows has left this file behind, which is nobody's and does nothing."""
    part = name.rpartition("/")[2]
    return part.startswith("._") or part.lower() in _LEFT_BEHIND


def name_problem(name: str) -> str:
    """Why a path in a ZIP or bundle means something else on another machine, or nothing; "" for a plain one."""
    parts = name.rstrip("/").split("/")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "points outside"
    if not name.isprintable() or len(name) > LONGEST_NAME:
        return "has control characters in its name, or too many"
    if re.search(r'[\\:<>"|?*]', name) or any(part in ("", ".") or part[-1] in " ." for part in parts):
        return "its name means another path to other readers, or none"
    return "is the name of a device" if any(_DEVICE.fullmatch(part) for part in parts) else ""


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether bytes shrink further than those of weights and images do."""
    return unpacked > RATIO_BYTES and unpacked > RATIO * max(packed, 1)


def member_problems(member: zipfile.ZipInfo) -> Iterator[str]:
    """What is wrong with one entry of the table of contents."""
    if problem := name_problem(member.orig_filename):
        yield problem
    elif member.orig_filename != member.filename:
        yield "means another path to other readers"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield f"a link or special file (mode {member.external_attr >> 16:o})"
    if member.flag_bits & 0x1:
        yield "encrypted: cannot be looked into"
    if member.compress_type not in METHODS:
        yield f"compressed by method {member.compress_type}, which is not read here"
    if is_bomb(member.compress_size, member.file_size):
        yield f"{member.compress_size:,} -> {member.file_size:,} bytes: shrinks too far, a bomb"


def collisions(members: list[zipfile.ZipInfo]) -> Iterator[str]:
    """Names that are one file or folder on some file systems, which tell neither case nor Unicode forms apart."""
    # no more than a name may have: the time of a normal form can grow with the square of the length
    folded = [_folded(member.filename[:LONGEST_NAME].rstrip("/")) for member in members]
    files = {name for name, member in zip(folded, members, strict=True) if not member.is_dir()}
    taken: set[str] = set()
    for name, member in zip(folded, members, strict=True):
        if name in taken:
            yield f"{visible(member.filename)}: given twice: which of the two counts depends on the reader"
        taken.add(name)
        if files & set(accumulate(name[:LONGEST_NAME].split("/")[:-1], "{}/{}".format)):
            yield f"{visible(member.filename)}: lies in a folder that is a file, too"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def unpack(path: Path, folder: Path) -> None:
    """Write the files in the ZIP at ``path`` below ``folder``; what operating systems leave behind is not among them.

    Raises:
        DataError: no ZIP, a damaged or encrypted one, one that is larger than the disk or than any exam, or whose names
            lead out of the folder or mean one file twice; all that is wrong with it at once, before anything is
            written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            raise_all(_problems(path, folder, members), DataError, f"{path.name} is not unpacked; unpack it yourself")
            for member in members:
                if not member.is_dir() and not is_left_behind(member.filename):
                    target = folder / member.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with writing(target), archive.open(member) as stream, target.open("wb") as copy:
                        shutil.copyfileobj(stream, copy, 1 << 20)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno in OF_WRITING:
            raise  # of the machine that it is copied to
        raise DataError(f"{path.name}: is no ZIP, or a damaged one ({visible(str(error))}); copy it again") from error


def _problems(path: Path, folder: Path, members: Sequence[zipfile.ZipInfo]) -> list[str]:
    found = [f"{visible(member.orig_filename)}: {why}" for member in members for why in member_problems(member)]
    found += collisions(list(members))
    if len(members) > MOST_FILES:
        found.append(f"holds {len(members):,} files, expected at most {MOST_FILES:,}")
    total, size, free = sum(m.file_size for m in members), path.stat().st_size, shutil.disk_usage(folder).free
    if total > TOTAL_BYTES or is_bomb(size, total):
        found.append(f"{size:,} -> {total:,} bytes: unpacks to more than any exam, a bomb")
    elif total > free:
        found.append(f"unpacks to {total:,} bytes, but {free:,} are free in {folder.parent}")
    return found
