"""How every part of the package reads and writes files: whole or not at all, and one sentence for what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from samseg_monai.errors import BundleError, SamsegError, raise_all
from samseg_monai.faults import writing

if TYPE_CHECKING:
    from torch import nn

MOST_LEVELS = 100  # of JSON: nobody writes deeper, and whoever walks through it would run out of stack
MOST_DIGITS = 300  # of a whole number in JSON: as a float it would be too large
StrPath = str | os.PathLike[str]


def write_whole(path: StrPath, write: Callable[[Path], Any], *, shared: bool = False) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and move it there: a reader never meets half a file.

    Args:
        path: target; its folder is made if need be.
        write: called with the temporary path.
        shared: several processes may write ``path`` at the same time, so each has a temporary file of its own. Else
            its name is always the same, and what a killed write left behind is replaced by the next one.

    Raises:
        OSError: that names ``path``, whatever a library has made of what the disk said.
    """
    path = Path(path)
    own = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # nothing is there, nor can be, where the folder itself is none
                temporary.unlink(missing_ok=True)


def write_bytes(path: StrPath, content: bytes, *, shared: bool = False) -> None:
    """Write bytes that are on the disk when this returns, all of them; see ``write_whole``.

    Raises:
        OSError: the disk is full, or the like; ``path`` is as it was.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if (size := temporary.stat().st_size) != len(content):
            raise OSError(errno.ENOSPC, f"{size} of {len(content)} bytes were written")

    write_whole(path, write, shared=shared)


def append_bytes(path: StrPath, content: bytes) -> None:
    """Put bytes behind those of an existing file; they are on the disk when this returns, all of them.

    Raises:
        OSError: no such file, the disk is full, or the like; ``path`` is as it was, where it can still be shortened.
    """
    with writing(path), Path(path).open("r+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(content) != len(content):
                raise OSError(errno.ENOSPC, "not all was written")
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(size)
            raise


def write_text(path: StrPath, text: str) -> None:
    """Write a text as UTF-8; see ``write_whole``."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: StrPath, value: Any) -> None:
    """``torch.save`` through a stream of Python's: torch's own does not say that the disk is full."""
    import torch  # seconds, which who reads and writes JSON need not wait

    with writing(path), Path(path).open("wb") as stream:
        torch.save(value, stream)


def write_json(path: StrPath, value: Any, *, indent: int = 2) -> None:
    """Write a value as JSON with a newline at its end.

    Raises:
        ValueError: NaN or an infinity in it, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def open_regular(path: StrPath) -> IO[bytes]:
    """Open a file of a folder from elsewhere for reading; OSError for a link, and for what could wait for ever."""
    found = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
                    | getattr(os, "O_BINARY", 0))  # fmt: skip
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(found, "rb")


def foreign_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """One line for each of ``names`` in a folder from elsewhere that leads out of it or is no file or folder."""
    found = []
    for name in names:
        path = folder / name
        if path.is_symlink():
            found.append(f"{name}: a link, which can lead out of the folder")
        elif path.exists() and not path.is_file() and not path.is_dir():
            found.append(f"{name}: no regular file: reading it may wait for ever")
    return found


def read_json(path: StrPath, error: type[SamsegError], what: str, fix: str = "get the file again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: file, UTF-8, with or without a byte order mark.
        error: class to raise.
        what: what the file is, for the message ("datalist", "card", ...).
        fix: what the user can do about it.

    Raises:
        ``error``: the file is absent or unreadable, is not JSON, holds no object, or has a key twice (one of its two
            values would be lost without a word).
    """
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise OSError(errno.EINVAL, "no regular file: reading it may wait for ever")
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise error(f"{what} {path}: cannot be read ({problem.strerror}); {fix}") from problem
    except ValueError as problem:
        raise error(f"{what} {path}: is not JSON ({problem}); {fix}") from problem
    return parse_json(text, error, f"{what} {path}", fix)


def parse_json(
    text: str | bytes, error: type[SamsegError], what: str, fix: str = "get the file again"
) -> dict[str, Any]:
    """The JSON object that a text holds; see ``read_json``."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
        return found

    try:
        value = json.loads(text, object_pairs_hook=collect, parse_int=_whole)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what}: is not JSON ({problem}); {fix}") from problem
    raise_all(twice, error, f"{what}: keys given twice; keep one of each")
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object, got a {type(value).__name__}; {fix}")
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        groups = [group.values() if isinstance(group, dict) else group for group in level]
        level = [item for group in groups for item in group if isinstance(item, (dict, list))]
    if level:
        raise error(f"{what}: more than {MOST_LEVELS} levels of lists and objects; {fix}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:  # no file, log or table could hold it
        raise error(f"{what}: a text with half of a character ({problem.object[problem.start]!a}); {fix}") from problem
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def hash_file(path: StrPath) -> str:
    """Hexadecimal sha256 of an existing file, read anew each time."""
    with Path(path).open("rb") as stream:
        return hash_stream(stream)


def known_hash(path: StrPath) -> str:
    """Hexadecimal sha256 of an existing file; computed again only when its size or time of change is another."""
    key = _stamp(path)
    if key not in _HASHES:
        _HASHES[key] = hash_file(path)
    return _HASHES[key]


def remember_hash(path: StrPath, sha256: str) -> None:
    """Let ``known_hash`` know the hash of a file that this process has hashed as it wrote it."""
    _HASHES[_stamp(path)] = sha256


@contextmanager
def kept_hashes(path: StrPath) -> Iterator[None]:
    """Within, ``known_hash`` knows what an earlier process has left in the file ``path``, and leaves there what it has
    learnt: a file whose size and time of change are as they were is not read again by the next process.

    Raises:
        BundleError: ``path`` is no such file.
    """
    fix = f"delete {path}"
    stored = read_json(path, BundleError, "hashes", fix) if Path(path).is_file() else {}
    try:
        before = {(Path(name), int(size), int(time)): str(sha) for name, (size, time, sha) in stored.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"hashes {path}: expected size, time and sha256 of each file; {fix}") from error
    _HASHES.update({**before, **_HASHES})
    yield
    now = {str(name): [size, time, sha] for (name, size, time), sha in _HASHES.items()}
    if now != stored:
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(now), encoding="utf-8"), shared=True)


def _stamp(path: StrPath) -> tuple[Path, int, int]:
    """Path, size and time of change, in ns: a copy that keeps the time of modification is a change, too."""
    path = Path(path).resolve()
    status = path.stat()
    return path, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


_HASHES: dict[tuple[Path, int, int], str] = {}


def hash_stream(stream: IO[bytes]) -> str:
    """Hexadecimal sha256 of what is left of an open file."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_name(text: str, end: str = "") -> str:
    """``text``, such as the name of a case, and ``end`` as a name that any system takes for one file in its folder."""
    plain = "".join(c if c.isprintable() and c not in '\\/:*?"<>|' else "_" for c in text).strip(" .")[:150]
    device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", plain + end, re.IGNORECASE)
    return f"{'_' if device or not plain else ''}{plain}{end}"


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel`` or ``DataParallel``; any other as it is."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    return network.module if isinstance(network, (DistributedDataParallel, DataParallel)) else network
