"""Embeddings of a frozen encoder on disk: one fixed-size row of bf16 numbers per slice, mapped into memory.

A bank is three files that share a name: ``.json`` says what the rows depend on, ``.bank`` holds the rows and ``.rows``
says for each of them whether it is there, and its checksum. A row is marked only behind its data, so a process may be
killed at any moment.
"""

from __future__ import annotations

import logging
import math
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from samseg_monai.data.bank_files import MARK, BankFiles, bank_name, fix, human, read_header
from samseg_monai.errors import CacheError

logger = logging.getLogger(__name__)

RESERVE = 64_000_000  # bytes that stay free on the disk, or 1 % of what is to be written where that is more

Compute = Callable[[list[int]], torch.Tensor]


class EmbeddingBank:
    """Rows of bf16 numbers in a folder; any number of processes read it, one at a time fills it.

    Opening a bank creates it where there is none. A file of the wrong length is mended with a warning: its rows are
    verified, and the bad ones become missing. Forked processes share an open bank; pickling one sends where it lies.

    Args:
        folder: where the files lie, made if need be.
        key: JSON values: everything that the rows depend on. The files are named by its hash and the number of rows.
        rows: number of rows, 0 or more.
        row_shape: shape of a row.
    Raises: CacheError if a file of that name is not this bank, or the files cannot be made.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], rows: int, row_shape: Sequence[int]) -> None:
        self.folder, self.key, self.rows = Path(folder), dict(key), rows
        self.row_shape = tuple(int(side) for side in row_shape)
        self._row_bytes = 2 * math.prod(self.row_shape)
        self.files = BankFiles(self.folder, self.key, rows, self.row_shape, self._row_bytes)
        self._checked = np.zeros(rows, dtype=bool)
        self._data: np.ndarray[Any, Any] = np.empty(0)
        self._marks: np.ndarray[Any, Any] = np.empty(0, MARK)
        if self.bytes:
            # read-only maps: a full disk then is an error of write(), not a bus error that kills the process
            self._data = np.memmap(self.files.data, np.uint16, "r", shape=(rows, self._row_bytes // 2))
            self._marks = np.memmap(self.files.marks, MARK, "r", shape=(rows,))

    @classmethod
    def stored(cls, folder: str | Path, key: Mapping[str, Any], rows: int) -> EmbeddingBank | None:
        """The bank of this key that lies in ``folder``, whatever the shape of its rows; None where there is none.

        Raises: CacheError as above.
        """
        header = read_header(Path(folder) / f"{bank_name(key, rows)}.json")
        return None if header is None else cls(folder, key, rows, header["row_shape"])

    @classmethod
    def for_rows(
        cls, folder: str | Path, key: Mapping[str, Any], rows: int, compute: Compute, first: list[int]
    ) -> tuple[EmbeddingBank, Compute]:
        """The bank of this key, made if need be, when only ``compute`` knows the shape of a row.

        Returns: the bank and a ``compute`` for it, which does not run again for the rows ``first``, if they had to be
            computed to see their shape.
        """
        bank = cls.stored(folder, key, rows)
        if bank is not None:
            return bank, compute
        values = compute(first)
        return cls(folder, key, rows, values.shape[1:]), lambda batch: values if batch == first else compute(batch)

    @property
    def bytes(self) -> int:
        """Size of all rows, in bytes."""
        return self.rows * self._row_bytes

    def missing(self) -> list[int]:
        """Rows that nobody has written yet, ascending."""
        return self._absent(range(self.rows))

    def write(self, row: int, values: torch.Tensor) -> None:
        """Store one row, rounded to bf16, from any device and type.

        Raises: CacheError if it has another shape, or the disk does not take it.
        """
        with self.files.locked():
            self._store([row], values[None])

    def read(self, row: int) -> torch.Tensor:
        """A row as a new bf16 tensor on the CPU; its checksum is verified the first time in a process.

        Raises: CacheError naming file and row if the row is damaged (it becomes missing) or was never written.
        """
        row = range(self.rows)[row]
        if not self.bytes:
            return torch.empty(self.row_shape, dtype=torch.bfloat16)
        if self._marks["done"][row] != 1:
            raise CacheError(f"row {row} of {self.files.data} is missing; fill the bank before it is read")
        values = np.array(self._data[row])
        if not self._checked[row]:
            if zlib.crc32(values.data) != self._marks["crc"][row]:
                with suppress(OSError):  # a bank that may only be read is still reported
                    self._mark([row], [0], done=0)
                raise CacheError(
                    f"row {row} of {self.files.data} is damaged; start again to have this row built anew, "
                    f"or {fix(self.files.data)}"
                )
            self._checked[row] = True
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).reshape(self.row_shape)

    def fill(self, compute: Compute, batch_size: int, *, progress: bool = True, label: str = "Embedding slices") -> int:
        """Compute what is missing, while other processes that want to do the same wait; announces the size first.

        Args:
            compute: row numbers, ``batch_size`` of them or fewer, to their values (n, *row_shape).
            batch_size: at least 1.
            progress: show a progress bar on stderr.
            label: what the bar is called.
        Returns: how many rows this process computed.
        Raises: CacheError if the disk has no room for what is missing, or a row gets another shape.
        """
        todo = self.missing()
        if not todo:
            return 0
        left = human(len(todo) * self._row_bytes)
        logger.info("%s: %s, of which %s to compute, in %s", label, human(self.bytes), left, self.files.data)
        return self.ensure(todo, compute, batch_size, progress=progress, label=f"{label} ({left})")

    def ensure(
        self, rows: Sequence[int], compute: Compute, batch_size: int, *, progress: bool = False, label: str = ""
    ) -> int:
        """``fill`` for some rows only, without an announcement."""
        if not self._absent(rows):
            return 0
        with self.files.locked():
            todo = self._absent(rows)  # of those that were absent before the wait
            self._check_room(len(todo))
            with tqdm(total=len(todo), desc=label, unit="slice", disable=not progress) as bar:
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    self._store(batch, compute(batch))
                    bar.update(len(batch))
        return len(todo)

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingBank, (self.folder, self.key, self.rows, self.row_shape)

    def _absent(self, rows: Sequence[int]) -> list[int]:
        return [row for row in rows if self._marks["done"][row] != 1] if self.bytes else []

    def _store(self, rows: Sequence[int], values: torch.Tensor) -> None:
        if tuple(values.shape) != (len(rows), *self.row_shape):
            raise CacheError(
                f"{len(rows)} rows of {self.files.data} must have shape {self.row_shape} each, got "
                f"{tuple(values.shape)} for all; every slice must reach the encoder in the same size: pad it"
            )
        if not self.bytes:
            return
        plain = values.detach().as_subclass(torch.Tensor).to("cpu", torch.bfloat16).contiguous()
        block = plain.view(torch.int16).numpy().reshape(len(rows), -1)
        try:
            if any(self._marks["done"][row] for row in rows):
                self._mark(rows, [0] * len(rows), done=0)
            with open(self.files.data, "r+b") as file:
                for row, numbers in zip(rows, block, strict=True):
                    file.seek(row * self._row_bytes)
                    file.write(numbers.data)
            self._mark(rows, [zlib.crc32(numbers.data) for numbers in block], done=1)
        except OSError as error:
            raise CacheError(f"{self.files.data} cannot be written ({error}); free some space") from error

    def _mark(self, rows: Sequence[int], sums: Sequence[int], *, done: int) -> None:
        with open(self.files.marks, "r+b") as file:
            for row, crc in zip(rows, sums, strict=True):
                file.seek(row * MARK.itemsize)
                file.write(np.array((done, (0, 0, 0), crc), MARK).tobytes())
        self._checked[list(rows)] = False

    def _check_room(self, rows: int) -> None:
        needed = rows * self._row_bytes
        free, reserve = shutil.disk_usage(self.folder).free, max(RESERVE, needed // 100)
        if rows and free < needed + reserve:
            raise CacheError(
                f"embeddings of {human(self.bytes)}, {human(needed)} of them still to be written, do not fit on the "
                f"disk of {self.folder}: {human(free)} are free, and {human(reserve)} stay in reserve; "
                "choose a folder on another disk, or fewer variants or slices"
            )
