"""The three files of an embedding bank: their names and header, how they are made, told apart and mended."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from samseg_monai.data.slice_cache import fingerprint
from samseg_monai.errors import CacheError

logger = logging.getLogger(__name__)

FORMAT = 1
# 8 bytes, so that no mark lies across two pages, between which a kill could fall
MARK = np.dtype([("done", "u1"), ("unused", "u1", 3), ("crc", "<u4")])


class BankFiles:
    """``.json``, ``.bank`` and ``.rows`` of one bank, and ``.lock`` beside them; see ``EmbeddingBank``.

    Args:
        folder: where the files lie, made if need be.
        key: JSON values that the rows depend on.
        rows, row_bytes: number of rows, and the size of each.
        row_shape: goes into the header.
    Raises: CacheError if a file of that name is another bank's, or the files cannot be made.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], rows: int, row_shape: tuple[int, ...], row_bytes: int
    ) -> None:
        base = folder / bank_name(key, rows)
        self.header, self.data, self.marks = (_sibling(base, s) for s in ("json", "bank", "rows"))
        self._lock = _sibling(base, "lock")
        self.rows, self.row_bytes = rows, row_bytes
        self._expected = {"format": FORMAT, "key": dict(key), "rows": rows, "row_shape": list(row_shape)}
        if not (self._is_ours() and self._is_whole()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with self.locked():
                    self._make()
            except OSError as error:
                raise CacheError(f"{self.data} cannot be made ({error}); choose another folder") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing; a process that dies lets go.

        Raises: CacheError if the folder cannot be written.
        """
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process writes %s; waiting for it", self.data)
            lock.acquire()
        except OSError as error:
            raise CacheError(f"{self._lock} cannot be made ({error}); choose a folder that can be written") from error
        try:
            yield
        finally:
            lock.release()

    def _is_ours(self) -> bool:
        header = read_header(self.header)
        if header is None:
            return False
        wrong = [k for k, value in self._expected.items() if _text(header.get(k)) != _text(value)]
        if wrong:
            raise CacheError(f"{self.header} is of other embeddings ({', '.join(wrong)} differ); {fix(self.header)}")
        return True

    def _is_whole(self) -> bool:
        return all(path.is_file() and path.stat().st_size == size for path, size in self._sizes())

    def _sizes(self) -> list[tuple[Path, int]]:
        return [(self.data, self.rows * self.row_bytes), (self.marks, self.rows * MARK.itemsize)]

    def _make(self) -> None:
        """Make what is absent and mend what has another length; another process may just have done so."""
        if not self._is_ours():
            part = self.header.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(self._expected), encoding="utf-8")
            part.replace(self.header)
        if self._is_whole():
            return
        self.data.touch()
        if self.marks.is_file():
            self._verify()
        for path, size in self._sizes():
            with open(path, "ab") as file:
                file.truncate(size)

    def _verify(self) -> None:
        """Unmark the rows whose data is not what it was; only then the files may get their length back."""
        wanted, got = self.rows * self.row_bytes, self.data.stat().st_size
        logger.warning("%s has %s of %s bytes, or its .rows has another length; verifying it", self.data, got, wanted)
        with open(self.data, "rb") as data, open(self.marks, "r+b") as marks:
            raw = marks.read(self.rows * MARK.itemsize)
            stored = np.frombuffer(raw[: len(raw) // MARK.itemsize * MARK.itemsize], MARK).copy()
            for row in np.flatnonzero(stored["done"]).tolist():
                data.seek(row * self.row_bytes)
                values = data.read(self.row_bytes)
                if len(values) < self.row_bytes or zlib.crc32(values) != stored["crc"][row]:
                    stored[row] = 0
            marks.seek(0)
            marks.write(stored.tobytes())
            marks.truncate()  # half a mark would come back with another checksum


def bank_name(key: Mapping[str, Any], rows: int) -> str:
    """What the files of a bank are called, less their suffixes."""
    return fingerprint(FORMAT, json.loads(_text(dict(key))), rows)


def read_header(path: Path) -> dict[str, Any] | None:
    """Content of a ``.json``; None if no file of this bank exists.

    Raises: CacheError if it is absent while others exist, cannot be read, or is no header.
    """
    others = [path.with_suffix(suffix) for suffix in (".bank", ".rows")]
    # the header is made first, so it is looked for last: another process may be making the files right now
    found = [other for other in others if other.exists()]
    if not path.is_file():
        if found:
            raise CacheError(f"{path} is absent, so nobody knows what {found[0].name} holds; {fix(path)}")
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read ({type(error).__name__}); {fix(path)}") from error
    if not isinstance(header, dict) or not isinstance(header.get("row_shape"), list):
        raise CacheError(f"{path} is not the header of an embedding bank; {fix(path)}")
    return header


def fix(path: Path) -> str:
    """What a user can do about a file that is not as it should be."""
    return f"delete {path.with_suffix('.*')} to have the embeddings built anew, or choose another folder"


def human(size: float) -> str:
    """A number of bytes as people say it: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _sibling(base: Path, suffix: str) -> Path:
    return base.with_name(f"{base.name}.{suffix}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # NaN equals itself only as text
