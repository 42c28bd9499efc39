"""The files of a bundle, a folder or a ZIP, read where they lie: nothing is unpacked, no link is followed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO

from samseg_monai.errors import BundleError
from samseg_monai.lint.finding import Finding

TEXT_BYTES = 8 << 20  # no text of a bundle is longer
LONGEST_NAME = 500  # characters of a path in an archive
IN_MEMORY = 32 << 20
TOTAL_BYTES = 32 << 30  # several times a bundle with SAM's largest encoder
# what zipfile raises on archives that are damaged, or made to hurt; RuntimeError is its word for encrypted ones
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, LookupError)
END, END_BYTES = b"PK\x05\x06", 22  # the record that ends a ZIP
RATIO, RATIO_BYTES = 100, 16 << 20  # weights hardly shrink: a large member that shrinks so far is a bomb
OUTSIDE = "(outside) "  # begins the names of members that lie beside the bundle's folder
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Unreadable(Exception):
    """A file cannot be read as what it should be; the text says why."""


class BundleFiles:
    """The regular files below the root of a bundle.

    Attributes:
        sizes: bytes of each file by its path, with ``/`` between the parts.
        findings: what is wrong with the container itself.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.findings: list[Finding] = []

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading and seeking. Raises Unreadable."""
        raise NotImplementedError

    def blocks(self, name: str) -> Iterator[bytes]:
        """The content of a file, in blocks. Raises Unreadable."""
        with self.open(name) as stream:
            while block := stream.read(1 << 20):
                yield block

    def sha256(self, name: str) -> str:
        """Hexadecimal sha256 of a file. Raises Unreadable."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def text(self, name: str) -> str:
        """A file as text. Raises Unreadable if it is longer than any text of a bundle, or not UTF-8."""
        if self.sizes[name] > TEXT_BYTES:
            raise Unreadable(f"{self.sizes[name]:,} bytes; texts of a bundle have at most {TEXT_BYTES:,}")
        try:
            return b"".join(self.blocks(name)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 ({error.reason} at byte {error.start})") from error

    def close(self) -> None:
        """Let go of what is held open."""

    def note(self, name: str, rule: str, what: str, why: str) -> None:
        """Add a finding about the file ``name`` as a whole."""
        self.findings.append(Finding(name, "", rule, what, why))


class Folder(BundleFiles):
    """A bundle's folder.

    Raises: BundleError if it is not one.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        folders = [""]
        while folders:
            folders += self._enter(folders.pop())
        _require_configs(self.sizes, str(root))

    def _enter(self, prefix: str) -> list[str]:
        """Take down the files of one folder and return the folders in it, each with ``/`` at its end."""
        folders = []
        try:
            for entry in os.scandir(self.root / prefix):
                name = prefix + entry.name
                if entry.is_symlink():
                    self.note(name, "link", os.readlink(entry.path), "a link can lead out of the bundle")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    self.sizes[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    self.note(name, "link", "no regular file", "reading it may wait for ever or change a device")
        except OSError as error:
            self.note(prefix, "file", str(error.strerror), "cannot be read, so it cannot be judged")
        return folders

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading and seeking. Raises Unreadable."""
        try:
            return (self.root / name).open("rb")
        except OSError as error:
            raise Unreadable(f"cannot be opened ({error.strerror})") from error


class Archive(BundleFiles):
    """A ZIP that holds a bundle's folder.

    Raises: BundleError if it is not one.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise BundleError(f"{path}: not a ZIP ({error}); give the folder or the ZIP of a bundle") from error
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        roots = {m.filename.partition("/")[0] for m in members if re.fullmatch(r"[^/]+/configs/[^/]+", m.filename)}
        if len(roots) != 1:
            self.close()
            raise BundleError(f"{path}: holds {len(roots)} bundles with a folder configs, expected one")
        self._prefix = f"{roots.pop()}/"
        self._members = {self._inside(member): member for member in members}
        # what has an entry that is not to be trusted is named, and not read
        self.sizes = {name: m.file_size for name, m in self._members.items() if not any(_problems(m))}
        _require_configs(self.sizes, str(path))
        self._check_members()
        self._check_whole(path.stat().st_size)

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()

    def _inside(self, member: zipfile.ZipInfo) -> str:
        """Path within the bundle; what lies outside keeps a path that no bundle has."""
        name = member.filename
        return name.removeprefix(self._prefix) if name.startswith(self._prefix) else f"{OUTSIDE}{name}"

    def _check_members(self) -> None:
        files = {_folded(member) for member in self._members.values()}
        taken: set[str] = set()
        end = 0
        for member in sorted(self._zip.infolist(), key=lambda member: member.header_offset):
            name, folded = self._inside(member), _folded(member)
            for what, why in _problems(member):
                self.note(name, "zip", what, why)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                self.note(name, "link", f"mode {member.external_attr >> 16:o}", "a link can lead out of the bundle")
            if folded in taken:
                self.note(name, "zip", member.filename, "given twice: which of the two counts depends on the reader")
            taken.add(folded)
            for parent in files & set(accumulate(folded[:LONGEST_NAME].split("/")[:-1], "{}/{}".format)):
                self.note(name, "zip", parent, "lies in a folder that is a file, too")
            if member.header_offset < end:
                self.note(name, "zip", f"offset {member.header_offset}", "overlaps another member, as in a bomb")
            end = max(end, member.header_offset + member.compress_size)

    def _check_whole(self, size: int) -> None:
        members = self._zip.infolist()
        total = sum(member.file_size for member in members)
        if total > TOTAL_BYTES or _is_bomb(size, total):
            self.note("", "zip", f"{size:,} -> {total:,} bytes", "unpacks to more than any bundle: a bomb")
        if what := surroundings(self._zip):
            self.note("", "zip", what, "other readers may see another file")

    def open(self, name: str) -> IO[bytes]:
        """Copy a member to a temporary place and open that for seeking. Raises Unreadable."""
        member = self._members[name]
        small = member.file_size <= IN_MEMORY
        target: IO[bytes] = io.BytesIO() if small else tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        try:
            with self._zip.open(member) as stream:
                shutil.copyfileobj(stream, target, 1 << 20)
        except DAMAGED as error:
            raise Unreadable(f"damaged in the archive ({error})") from error
        if target.tell() != member.file_size:
            raise Unreadable(f"{target.tell():,} bytes, but the archive says {member.file_size:,}")
        target.seek(0)
        return target


def surroundings(archive: zipfile.ZipFile) -> str:
    """Name what a ZIP has before its first member or behind its table of contents; "" for nothing."""
    if min((member.header_offset for member in archive.infolist()), default=0) > 0:
        return "bytes before the first member"
    if archive.fp is None or archive.comment:
        return f"a comment of {len(archive.comment)} bytes"
    archive.fp.seek(-END_BYTES, io.SEEK_END)
    return "" if archive.fp.read(4) == END else "bytes behind the table of contents"


def _require_configs(names: dict[str, int], place: str) -> None:
    if not any(re.fullmatch(r"configs/[^/]+\.json", name, re.IGNORECASE) for name in names):
        raise BundleError(
            f"{place}: no configs/inference.json, nor any other config; give the folder or the ZIP of a bundle"
        )


def _problems(member: zipfile.ZipInfo) -> Iterator[tuple[str, str]]:
    """What is wrong with one entry of an archive: (what, why)."""
    name = member.orig_filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        yield name, "points outside the bundle"
    if "\\" in name or not name.isprintable() or len(name) > LONGEST_NAME:
        yield name, "means another path to other readers, or none"
    if member.flag_bits & 0x1:
        yield name, "encrypted: cannot be looked into"
    if member.compress_type not in METHODS:
        yield f"method {member.compress_type}", "compressed in a way that bundles are not"
    if _is_bomb(member.compress_size, member.file_size):
        yield f"{member.compress_size:,} -> {member.file_size:,} bytes", "shrinks too far for weights: a bomb"


def _is_bomb(packed: int, unpacked: int) -> bool:
    return unpacked > RATIO_BYTES and unpacked > RATIO * max(packed, 1)


def _folded(member: zipfile.ZipInfo) -> str:
    """Name as file systems see it that do not tell upper from lower case."""
    return unicodedata.normalize("NFC", member.filename.rstrip("/")).casefold()
