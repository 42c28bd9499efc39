"""The files of a bundle from elsewhere, folder or ZIP, read where they lie: nothing is unpacked, no link is followed.

Python's ``zipfile`` believes the table of contents at a ZIP's end; other readers go by the headers before each member.
What the two could read differently is refused here: a ZIP is its members, one after the other, then one table, then its
end (format: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5).
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from samseg_monai.errors import BundleError, raise_all, visible
from samseg_monai.faults import OF_WRITING, writing
from samseg_monai.files import hash_stream, open_regular, parse_json, remember_hash
from samseg_monai.zips import DAMAGED, TOTAL_BYTES, collisions, is_bomb, is_left_behind, member_problems, name_problem

SUMS = "SHA256SUMS"
TEXT_BYTES = 8 << 20  # no text of a bundle is longer
KEPT_BYTES = 1 << 20  # nor a config
MOST_MEMBERS = 1000
# zip64; then times, and the owners that Info-ZIP and macOS write with them
EXTRA_FIELDS = (0x0001, 0x000A, 0x5455, 0x5855, 0x7855, 0x7875)
_BUNDLE = re.compile(r"((?:[^/]+/){0,2})configs/[^/]+\.json", re.IGNORECASE)
_EXPECTED = "give the folder or the ZIP of a bundle"


class BundleFiles:
    """The regular files of a bundle.

    Attributes:
        place: where they are, for messages.
        name: of the bundle's folder.
        sizes: bytes of each file by its path in the bundle, with ``/`` between the parts. What operating systems leave
            behind is not among them.
        problems: what is wrong with folder or ZIP as such, ``path: why``.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.name = place.stem if place.suffix.lower() == ".zip" else place.absolute().name
        self.sizes: dict[str, int] = {}
        self.problems: list[str] = []
        self._texts: dict[str, bytes] = {}
        self._hashes: dict[str, str] = {}

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises BundleError, as all that follow do."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what is held open."""

    def read(self, name: str, most: int) -> bytes:
        """Content of a file of at most ``most`` bytes; of a config the one that was hashed, whoever changes it then."""
        if self.sizes[name] > most:
            raise BundleError(f"{self.place}: {name}: {self.sizes[name]:,} bytes, expected at most {most:,}")
        if name in self._texts:
            return self._texts[name]
        with self._reading(name) as stream:
            content = stream.read(self.sizes[name] + 1)
        if name.startswith("configs/") and len(content) <= KEPT_BYTES:
            self._texts[name] = content
        return content

    def copy(self, name: str, target: Path) -> Path:
        """Write a file's content to ``target``; ``sha256`` and ``changed`` then judge what was written."""
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with writing(target), self._reading(name) as stream, target.open("wb") as copy:
            while block := stream.read(1 << 20):
                digest.update(block)
                copy.write(block)
        self._hashes[name] = digest.hexdigest()
        return target

    def bring(self, name: str, folder: Path) -> Path:
        """A file of the bundle below ``folder``, at its own path: copied from a ZIP, linked to from a folder."""
        return self.copy(name, folder / name)

    def json(self, name: str, fix: str = "get the bundle again") -> dict[str, Any]:
        """Content of a JSON file that holds an object; nothing of it is evaluated."""
        return parse_json(self.read(name, TEXT_BYTES), BundleError, f"{self.place}: {name}", fix)

    def sha256(self, name: str) -> str:
        """Hexadecimal sha256 of a file."""
        if name in self._hashes:
            return self._hashes[name]
        if self.sizes[name] <= KEPT_BYTES:
            return hashlib.sha256(self.read(name, KEPT_BYTES)).hexdigest()
        with self._reading(name) as stream:
            return hash_stream(stream)

    def changed(self) -> list[str]:
        """Files that are missing or are not the ones listed in ``SHA256SUMS``; nothing where a bundle has no sums."""
        found = []
        for name, expected in self.sums().items():
            if name not in self.sizes:
                found.append(f"{visible(name)}: missing")
            elif self.sha256(name) != expected:
                found.append(f"{name}: changed since it was packed")
        return found

    def sums(self) -> dict[str, str]:
        """Expected sha256 of each file that ``SHA256SUMS`` lists; a line that is none of ``sha256sum`` never fits."""
        lines = self.read(SUMS, TEXT_BYTES).decode("utf-8", "replace").splitlines() if SUMS in self.sizes else []
        return {line[66:]: line[:64] for line in lines}

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with self.open(name) as stream:
                yield stream
        except DAMAGED as error:
            if isinstance(error, OSError) and error.errno in OF_WRITING:
                raise  # of the machine that it is copied to
            problem = f"{name}: cannot be read ({visible(str(error))}); get the bundle again"
            raise BundleError(f"{self.place}: {problem}") from error


class Folder(BundleFiles):
    """A bundle's folder, or a folder that holds nothing else of that kind than one."""

    def __init__(self, path: Path) -> None:
        inner = [sub for sub in sorted(path.iterdir()) if sub.is_dir()]
        found = [path] if _is_bundle(path) else [sub for sub in inner if _is_bundle(sub)]
        if len(found) != 1:
            raise BundleError(f"{path}: {len(found)} folders with configs/inference.json in it; {_EXPECTED}")
        if found[0] != path and found[0].is_symlink():
            raise BundleError(f"{path}: its folder {found[0].name} is a link, which can lead anywhere; {_EXPECTED}")
        super().__init__(found[0])
        folders = [""]
        while folders:
            folders += self._enter(folders.pop())

    def _enter(self, prefix: str) -> list[str]:
        """Take down the files of one folder and return the folders in it, each with ``/`` at its end."""
        folders = []
        try:
            for entry in os.scandir(self.place / prefix):
                name = prefix + entry.name
                if entry.is_symlink():
                    self.problems.append(f"{visible(name)}: a link, which can lead out of the bundle")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif is_left_behind(name):
                    continue
                elif not entry.is_file(follow_symlinks=False):
                    self.problems.append(f"{visible(name)}: no regular file: reading it may wait for ever")
                elif problem := name_problem(name):
                    self.problems.append(f"{visible(name)}: {problem}")
                else:
                    self.sizes[name] = entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            self.problems.append(f"{visible(prefix)}: cannot be read ({error.strerror}), so it cannot be judged")
        return folders

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return open_regular(self.place / name)

    def bring(self, name: str, folder: Path) -> Path:
        """A link below ``folder`` to a file of the bundle: weights may be large."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to((self.place / name).resolve())
        return target


class Archive(BundleFiles):
    """A ZIP that holds one bundle's folder, or that folder within another one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._held: dict[str, Path] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise BundleError(f"{path}: not a ZIP ({visible(str(error))}); {_EXPECTED}") from error
        try:
            self._take_members()
        except DAMAGED as error:  # a name of no letters, for one
            self.close()
            raise BundleError(f"{path}: damaged ({visible(str(error))}); get the bundle again") from error
        except BaseException:
            self.close()
            raise

    def _take_members(self) -> None:
        members = self._zip.infolist()
        if len(members) > MOST_MEMBERS:
            raise BundleError(f"{self.place}: holds {len(members):,} members, a bundle at most {MOST_MEMBERS:,}")
        files = [m for m in members if not m.is_dir() and not is_left_behind(m.filename)]
        roots = {match[1] for m in files if (match := _BUNDLE.fullmatch(m.filename))}
        depth = min((root.count("/") for root in roots), default=0)
        roots = {root for root in roots if root.count("/") == depth}
        if len(roots) != 1:
            raise BundleError(f"{self.place}: holds {len(roots)} bundles with a folder configs, expected one")
        root = roots.pop()
        self.name = root.rstrip("/").rpartition("/")[2] or self.name
        self._members = {m.filename.removeprefix(root): m for m in files if m.filename.startswith(root)}
        self.sizes = {name: member.file_size for name, member in self._members.items()}
        outside = (m.filename for m in files if not m.filename.startswith(root))
        self.problems += [f"{visible(name)}: lies outside the bundle's folder" for name in outside]
        self.problems += [f"{visible(m.orig_filename)}: {why}" for m in members for why in member_problems(m)]
        self.problems += collisions(members)
        total = sum(member.file_size for member in members)
        size = self.place.stat().st_size
        if total > TOTAL_BYTES or is_bomb(size, total):
            self.problems.append(f"{size:,} -> {total:,} bytes: unpacks to more than any bundle, a bomb")
        try:
            with self.place.open("rb") as stream:
                self.problems += _layout_problems(stream, members, self._zip.start_dir, size)
        except DAMAGED as error:
            self.problems.append(f"damaged ({visible(str(error))}); get the bundle again")

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()

    def open(self, name: str) -> IO[bytes]:
        """Open a member for reading; its check sum is compared at its end."""
        return self._zip.open(self._members[name])

    def hold(self, name: str, folder: Path) -> None:
        """Copy to ``folder`` now what ``bring`` moves later: a large file is read once, to be judged and to be used."""
        self._held[name] = self.copy(name, folder / name)

    def bring(self, name: str, folder: Path) -> Path:
        """A file of the bundle below ``folder``, for reading alone: it may stay on the disk while it is in use."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in self._held:
            self._held.pop(name).rename(target)
        else:
            self.copy(name, target)
        if os.name != "nt":  # where nothing can be deleted that is in use
            target.chmod(0o400)
        remember_hash(target, self.sha256(name))
        return target

    def unpack(self, folder: Path) -> Path:
        """Write the bundle's files below ``folder``, which is returned.

        Raises:
            BundleError: the ZIP has problems, all of which are listed, or is damaged.
        """
        raise_all(self.problems, BundleError, f"{self.place} does not unpack to what it shows; do not use it")
        for name in self.sizes:
            self.copy(name, folder / name)
        return folder


class Within(BundleFiles):
    """A folder within a bundle that is a bundle of its own: the record of a run."""

    def __init__(self, files: BundleFiles, folder: str) -> None:
        super().__init__(files.place / folder)
        self._files, self._folder = files, folder
        self.sizes = {name.removeprefix(folder): n for name, n in files.sizes.items() if name.startswith(folder)}

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return self._files.open(self._folder + name)

    def bring(self, name: str, folder: Path) -> Path:
        """A file of the bundle below ``folder``."""
        return self._files.bring(self._folder + name, folder)


def open_files(path: str | Path) -> BundleFiles:
    """The files of the bundle at ``path``, to be closed by the caller.

    Raises:
        BundleError: there is no such file or folder, or it is no bundle.
    """
    path = Path(path)
    if not os.path.isdir(path) and not os.path.isfile(path):  # neither raises, whatever the path
        raise BundleError(f"there is no bundle {path}; {_EXPECTED}")
    return Folder(path) if path.is_dir() else Archive(path)


def _is_bundle(folder: Path) -> bool:
    try:
        return any(re.fullmatch(r"(?i)[^.].*\.json", path.name) for path in (folder / "configs").iterdir())
    except OSError:
        return False


def _layout_problems(stream: IO[bytes], members: list[zipfile.ZipInfo], table: int, size: int) -> Iterator[str]:
    """Bytes of a ZIP that belong to no member, and headers before members that do not repeat the table of contents.

    Args:
        stream: the ZIP.
        members: entries of its table of contents.
        table: where that begins.
        size: bytes of the ZIP.
    """
    position = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = visible(member.orig_filename)
        if member.header_offset != position:
            yield f"{name}: " + ("overlaps another member, as in a bomb" if member.header_offset < position
                                 else "bytes before it that belong to no member")  # fmt: skip
        stream.seek(member.header_offset)
        head = struct.unpack("<4s5H3L2H", stream.read(30))
        stored = stream.read(head[9]).decode("utf-8" if head[2] & 0x800 else "cp437")
        extra = stream.read(head[10])
        sizes = (member.CRC, member.compress_size, member.file_size)
        open_ended = bool(head[2] & 0x8)  # check sum and sizes follow the data
        same = open_ended or (head[6], *_wide(head[8], head[7], extra)) == (sizes[0], sizes[2], sizes[1])
        if (head[0], head[2], head[3], stored, same) != (
            b"PK\x03\x04", member.flag_bits, member.compress_type, member.orig_filename, True,
        ):  # fmt: skip
            yield f"{name}: the header before its data says something else than the table of contents"
        if fields := sorted({*_fields(extra), *_fields(member.extra)} - set(EXTRA_FIELDS)):
            yield f"{name}: extra fields that other readers may follow: {', '.join(f'0x{f:04x}' for f in fields)}"
        position = stream.tell() + member.compress_size
        if open_ended:
            stream.seek(position)
            length = _descriptor(stream.read(24), sizes)
            position += length
            if not length:
                yield f"{name}: no sizes behind its data, though its header says so"
    if position != table:
        yield "bytes behind the last member that belong to none"
    if not _ends(stream, table, len(members), size):
        yield "bytes within or behind the table of contents that belong to nothing, a comment, or an end that names " \
            "another table"  # fmt: skip


def _fields(extra: bytes) -> Iterator[int]:
    """Ids of the extra fields of a header; -1 for what is none."""
    while extra:
        kind, length = struct.unpack_from("<HH", extra) if len(extra) >= 4 else (-1, 0)
        yield kind if len(extra) >= 4 + length else -1
        extra = extra[4 + length :]


def _wide(unpacked: int, packed: int, extra: bytes) -> tuple[int, int]:
    """The two sizes of a header before a member, those in its zip64 field in place of what is too large; -1: none."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        wide = extra[4 : 4 + length] if kind == 0x0001 else wide
        extra = extra[4 + length :]
    values = [value[0] for value in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8])]
    return tuple(size if size < 0xFFFFFFFF else (values.pop(0) if values else -1) for size in (unpacked, packed))  # type: ignore[return-value]


def _descriptor(found: bytes, sizes: tuple[int, int, int]) -> int:
    """Length of the check sum and sizes that follow a member's data; 0 where they do not."""
    forms = [mark + struct.pack(form, *sizes) for mark in (b"PK\x07\x08", b"") for form in ("<LLL", "<LQQ")
             if form == "<LQQ" or max(sizes) < 1 << 32]  # fmt: skip
    return next((len(form) for form in forms if found.startswith(form)), 0)


def _ends(stream: IO[bytes], table: int, count: int, size: int) -> bool:
    """Whether behind ``count`` entries without comments there are only the records of a ZIP's end, and they say so.

    Readers differ in which of the two records they believe, so what one says the other has to say, or leave to it.
    """
    stream.seek(table)
    for _ in range(count):
        entry = struct.unpack("<4s24x3H12x", stream.read(46))
        if entry[0] != b"PK\x01\x02" or entry[3]:
            return False
        stream.seek(entry[1] + entry[2], os.SEEK_CUR)
    end = stream.tell()
    truth = (count, count, end - table, table)
    mark, wide = stream.read(4), False
    if mark == b"PK\x06\x06":  # zip64: its record of the end, and where that is
        record, locator = struct.unpack("<Q2H2L4Q", stream.read(52)), struct.unpack("<4sLQL", stream.read(20))
        wide = (record[0], *record[3:]) == (44, 0, 0, *truth) and locator == (b"PK\x06\x07", 0, end, 1)
        if not wide:
            return False
        mark = stream.read(4)
    disks, values, comment = (
        struct.unpack("<2H", stream.read(4)),
        struct.unpack("<2H2L", stream.read(12)),
        stream.read(2),
    )
    fits = all(
        value == true or (wide and value == most)
        for value, true, most in zip(values, truth, (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True)
    )
    return mark == b"PK\x05\x06" and disks == (0, 0) and fits and comment == b"\0\0" and stream.tell() == size
