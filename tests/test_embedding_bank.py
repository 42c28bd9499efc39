"""Banks of embeddings on disk: whatever happens to a process or a file, a row read is the row written."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from samseg_monai.data import embedding_bank
from samseg_monai.data.bank_files import MARK, human
from samseg_monai.data.embedding_bank import EmbeddingBank
from samseg_monai.errors import CacheError

KEY = {"network": {"weights": "abc", "image_size": 32, "autocast": None}, "seed": 3}
ROWS, SHAPE = 13, (2, 3, 4, 4)
Usage = namedtuple("Usage", "total used free")
FORK = multiprocessing.get_context("fork")


def values(rows: list[int]) -> torch.Tensor:
    """What the encoder makes of a row: the same in every process, and no two alike."""
    return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)) for row in rows])


def bank_in(folder: Path, rows: int = ROWS, key: dict = KEY, shape: tuple = SHAPE) -> EmbeddingBank:
    return EmbeddingBank(folder, key, rows, shape)


def filled(folder: Path) -> EmbeddingBank:
    bank = bank_in(folder)
    assert bank.fill(values, 4, progress=False) == ROWS
    return bank


def contents(bank: EmbeddingBank) -> tuple[bytes, bytes, dict]:
    files = bank.files
    return files.data.read_bytes(), files.marks.read_bytes(), json.loads(files.header.read_text())


class Recorder:
    """``values``, and which rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, rows: list[int]) -> torch.Tensor:
        self.rows += rows
        return values(rows)


def run(target, *args) -> int:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def test_rows_come_back_rounded_to_bf16_in_any_order_and_from_another_object(tmp_path):
    bank = bank_in(tmp_path)
    assert bank.missing() == list(range(ROWS)) and bank.bytes == ROWS * 2 * 3 * 4 * 4 * 2
    for row in (5, 0, 12):
        bank.write(row, values([row])[0])
    assert bank.missing() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    for reader in (bank, bank_in(tmp_path), pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        for row in (12, 5, 0, -1):
            expected = values([row % ROWS])[0].to(torch.bfloat16)
            assert reader.read(row).dtype == torch.bfloat16 and torch.equal(reader.read(row), expected)
    assert len(pickle.dumps(bank)) < 1000
    with pytest.raises(CacheError, match=r"row 3 of .* is missing"):
        bank.read(3)
    with pytest.raises(IndexError):
        bank.read(ROWS)


def test_what_a_reader_does_to_a_row_stays_with_the_reader(tmp_path):
    bank = filled(tmp_path)
    bank.read(0).zero_()
    assert torch.equal(bank.read(0), values([0])[0].to(torch.bfloat16))


def test_special_numbers_and_other_types_survive(tmp_path):
    bank = bank_in(tmp_path, rows=2, shape=(4,))
    bank.write(0, torch.tensor([float("inf"), float("-inf"), -0.0, 1e38]))
    assert torch.equal(bank.read(0), torch.tensor([float("inf"), float("-inf"), -0.0, 1e38]).bfloat16())
    assert torch.signbit(bank.read(0)[2])
    bank.write(1, torch.arange(8.0).double()[::2])
    assert bank.read(1).tolist() == [0, 2, 4, 6]
    bank.write(1, torch.ones(4).half())
    assert bank.read(1).tolist() == [1, 1, 1, 1]


def test_an_empty_bank_is_full(tmp_path):
    for bank in (bank_in(tmp_path, rows=0), bank_in(tmp_path, rows=0)):
        assert (bank.bytes, bank.missing()) == (0, [])
        assert pickle.loads(pickle.dumps(bank)).fill(values, 4) == 0


def test_every_part_of_the_key_makes_another_bank_and_its_order_none(tmp_path):
    names = {
        bank_in(tmp_path, rows, key).files.data.name
        for rows, key in [
            (ROWS, KEY),
            (ROWS + 1, KEY),
            (ROWS, {**KEY, "seed": 4}),
            (ROWS, {**KEY, "network": {**KEY["network"], "weights": "abd"}}),
        ]
    }
    assert len(names) == 4
    assert bank_in(tmp_path, key=dict(reversed(KEY.items()))).files.data.name in names
    assert bank_in(tmp_path, key={**KEY, "scale": float("nan")}).missing() == list(range(ROWS))
    assert bank_in(tmp_path, key={**KEY, "scale": float("nan")}).missing() == list(range(ROWS))  # NaN is not NaN


def test_a_bank_is_found_by_its_key_alone(tmp_path):
    assert EmbeddingBank.stored(tmp_path / "absent", KEY, ROWS) is None
    filled(tmp_path)
    found = EmbeddingBank.stored(tmp_path, KEY, ROWS)
    assert found.row_shape == SHAPE and found.missing() == []


def test_rows_computed_to_see_their_shape_are_not_computed_again(tmp_path):
    compute = Recorder()
    bank, rest = EmbeddingBank.for_rows(tmp_path, KEY, ROWS, compute, [0, 1, 2, 3])
    bank.fill(rest, 4, progress=False)
    assert compute.rows == list(range(ROWS))
    bank, rest = EmbeddingBank.for_rows(tmp_path, KEY, ROWS, compute, [0, 1, 2, 3])
    assert bank.fill(rest, 4) == 0 and compute.rows == list(range(ROWS))


def killed_in_compute(folder: Path) -> None:
    def compute(rows: list[int]) -> torch.Tensor:
        if 8 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return values(rows)

    bank_in(folder).fill(compute, 4, progress=False)


def killed_between_the_two_files(folder: Path) -> None:
    opened: list[Path] = []

    def counting(path, *args, **kwargs):
        opened.append(path)
        if len(opened) == 6:  # the second file of the third batch
            os.kill(os.getpid(), signal.SIGKILL)
        return open(path, *args, **kwargs)

    embedding_bank.open = counting
    bank_in(folder).fill(values, 4, progress=False)


def killed_in_the_middle_of_a_row(folder: Path) -> None:
    bank = bank_in(folder)

    def compute(rows: list[int]) -> torch.Tensor:
        if 8 in rows:
            with open(bank.files.data, "r+b") as file:
                file.seek(8 * bank._row_bytes)
                file.write(b"half a row")
            os.kill(os.getpid(), signal.SIGKILL)
        return values(rows)

    bank.fill(compute, 4, progress=False)


def killed_before_the_files_are_whole(folder: Path) -> None:
    bank = bank_in(folder)
    bank.files.data.unlink()
    bank.files.marks.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("victim", "done"),
    [
        (killed_in_compute, 8),
        (killed_between_the_two_files, 8),
        (killed_in_the_middle_of_a_row, 8),
        (killed_before_the_files_are_whole, 0),
    ],
)
def test_after_a_kill_only_the_missing_rows_are_computed_and_the_bank_is_the_same(tmp_path, victim, done):
    assert run(victim, tmp_path / "killed") == -signal.SIGKILL
    compute = Recorder()
    bank = bank_in(tmp_path / "killed")
    assert bank.fill(compute, 4, progress=False) == ROWS - done
    assert compute.rows == list(range(done, ROWS))
    assert contents(bank) == contents(filled(tmp_path / "whole"))


def fill_and_tell(folder: Path, barrier, log: Path) -> None:
    def compute(rows: list[int]) -> torch.Tensor:
        with open(log, "a") as file:
            file.write("".join(f"{row}\n" for row in rows))
        time.sleep(0.05)  # long enough for the other one to want the same rows
        return values(rows)

    barrier.wait()
    bank = bank_in(folder)
    barrier.wait()
    bank.fill(compute, 2, progress=False)
    assert bank.missing() == [] and torch.equal(bank.read(7), values([7])[0].bfloat16())


def test_two_processes_that_fill_at_once_compute_every_row_once(tmp_path):
    barrier = FORK.Barrier(2)
    pair = [FORK.Process(target=fill_and_tell, args=(tmp_path / "b", barrier, tmp_path / "log")) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(ROWS))


def hold(bank: EmbeddingBank, ready) -> None:
    with bank.files.locked():
        ready.set()
        signal.pause()


def test_who_waits_is_told_and_a_dead_process_keeps_no_lock(tmp_path, caplog):
    bank, ready = bank_in(tmp_path), FORK.Event()
    process = FORK.Process(target=hold, args=(bank, ready))
    process.start()
    assert ready.wait(30)

    class Killer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "another process writes" in record.getMessage()
            process.kill()

    log, killer = logging.getLogger("samseg_monai.data.bank_files"), Killer()
    log.addHandler(killer)
    with caplog.at_level(logging.INFO):
        bank.write(0, values([0])[0])
    log.removeHandler(killer)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL and "waiting for it" in caplog.text
    assert bank.missing() == list(range(1, ROWS))


@pytest.mark.parametrize("size", ["shorter", "longer", "gone"])
def test_rows_of_a_file_of_another_length_are_verified_and_the_lost_ones_built_anew(tmp_path, caplog, size):
    bank = filled(tmp_path)
    whole, data = contents(bank), bank.files.data
    damaged = 3 if size != "gone" else None
    if size == "gone":
        data.unlink()
    else:
        os.truncate(data, bank._row_bytes * 9 + 10 if size == "shorter" else bank.bytes + 5)
        flip(data, bank._row_bytes * damaged)
    lost = {"shorter": [3, 9, 10, 11, 12], "longer": [3], "gone": list(range(ROWS))}[size]
    mended = bank_in(tmp_path)
    assert mended.missing() == lost and "verifying" in caplog.text
    compute = Recorder()
    mended.fill(compute, 4, progress=False)
    assert compute.rows == lost and contents(mended) == whole


@pytest.mark.parametrize("size", [0, 5 * MARK.itemsize + 3, (ROWS + 2) * MARK.itemsize])
def test_marks_of_another_length_cost_no_more_than_the_rows_they_lack(tmp_path, size):
    bank = filled(tmp_path)
    whole = contents(bank)
    os.truncate(bank.files.marks, size)
    mended = bank_in(tmp_path)
    assert mended.missing() == list(range(min(ROWS, size // MARK.itemsize), ROWS))
    mended.fill(values, 4, progress=False)
    assert contents(mended) == whole


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_row_is_named_and_built_anew_at_the_next_start(tmp_path):
    whole = contents(filled(tmp_path))
    bank = bank_in(tmp_path)
    flip(bank.files.data, bank._row_bytes * 7 + 11)
    assert torch.equal(bank.read(6), values([6])[0].bfloat16())
    with pytest.raises(CacheError, match=rf"row 7 of .*{bank.files.data.name} is damaged; start again"):
        bank.read(7)
    compute = Recorder()
    again = bank_in(tmp_path)
    assert again.fill(compute, 4, progress=False) == 1 and compute.rows == [7]
    assert contents(again) == whole and torch.equal(bank.read(7), values([7])[0].bfloat16())


def test_the_checksum_is_that_of_zlib_over_the_rows_bytes(tmp_path):
    """What the files hold, read without any of our code."""
    bank = filled(tmp_path)
    marks = np.fromfile(bank.files.marks, np.dtype([("done", "u1"), ("unused", "u1", 3), ("crc", "<u4")]))
    rows = np.fromfile(bank.files.data, np.uint16).reshape(ROWS, -1)
    bits = (values(list(range(ROWS))).bfloat16().view(torch.int16).numpy().view(np.uint16)).reshape(ROWS, -1)
    assert np.array_equal(rows, bits) and marks["done"].all()
    assert [int(c) for c in marks["crc"]] == [zlib.crc32(row.tobytes()) for row in rows]


@pytest.mark.parametrize("harm", ["absent", "unreadable", "no header", "key", "row_shape", "rows", "format"])
def test_foreign_files_are_refused_with_a_way_out_and_left_alone(tmp_path, harm):
    bank = filled(tmp_path)
    path = bank.files.header
    header = json.loads(path.read_text())
    other = {"key": {"seed": 1}, "row_shape": [2, 3, 4, 5], "rows": ROWS + 1, "format": 0}
    if harm == "absent":
        path.unlink()
    elif harm == "unreadable":
        path.write_text('{"format": 1, "ke')
    else:
        path.write_text("[]" if harm == "no header" else json.dumps({**header, harm: other[harm]}))
    before = bank.files.data.read_bytes()
    with pytest.raises(CacheError, match=r"delete .*\.\* to have the embeddings built anew, or choose another folder"):
        bank_in(tmp_path)
    if harm in other:
        with pytest.raises(CacheError, match=rf"\({harm} differ\)"):
            bank_in(tmp_path)
    assert bank.files.data.read_bytes() == before
    for file in tmp_path.glob(f"{path.stem}.*"):
        file.unlink()
    assert bank_in(tmp_path).missing() == list(range(ROWS))


def test_a_disk_too_small_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    bank = bank_in(tmp_path, rows=10)
    for row in range(4):
        bank.write(row, values([row])[0])
    needed = 6 * bank._row_bytes  # the data file has its full length, but only four rows of it exist

    def disk(free: int):
        return lambda path: Usage(10**12, 0, free) if Path(path) == tmp_path else shutil.disk_usage(path)

    monkeypatch.setattr(embedding_bank.shutil, "disk_usage", disk(needed + embedding_bank.RESERVE - 1))
    compute = Recorder()
    with pytest.raises(CacheError) as caught:
        bank.fill(compute, 4, progress=False)
    for part in (human(bank.bytes), human(needed), "64 MB are free", str(tmp_path), "another disk", "fewer variants"):
        assert part in str(caught.value)
    assert compute.rows == [] and bank.missing() == [4, 5, 6, 7, 8, 9]
    monkeypatch.setattr(embedding_bank.shutil, "disk_usage", disk(needed + embedding_bank.RESERVE))
    assert bank.fill(compute, 4, progress=False) == 6
    monkeypatch.setattr(embedding_bank.shutil, "disk_usage", disk(0))
    assert bank.fill(compute, 4, progress=False) == 0  # a full bank needs no room


def test_the_reserve_grows_with_what_is_to_be_written(tmp_path, monkeypatch):
    bank = bank_in(tmp_path, rows=1, shape=(10,))
    monkeypatch.setattr(bank, "_row_bytes", 10**11)
    for free, fits in ((101 * 10**9, True), (101 * 10**9 - 1, False)):
        monkeypatch.setattr(embedding_bank.shutil, "disk_usage", lambda path, f=free: Usage(0, 0, f))
        if fits:
            bank._check_room(1)
        else:
            with pytest.raises(CacheError, match="1 GB stay in reserve"):
                bank._check_room(1)


def test_a_full_disk_while_writing_is_an_error_of_ours_and_costs_no_row(tmp_path, monkeypatch):
    bank = bank_in(tmp_path)
    bank.write(0, values([0])[0])
    real = open

    def failing(path, mode="r", *args, **kwargs):
        if path == bank.files.data and "+" in mode:
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(CacheError, match=r"cannot be written .*No space left on device.*free some space"):
        bank.fill(values, 4, progress=False)
    assert bank.missing() == list(range(1, ROWS))


def test_size_is_told_before_the_start_and_the_bar_goes_to_stderr(tmp_path, caplog, capsys):
    bank = bank_in(tmp_path, rows=6, shape=(1000, 100))
    seen: list[str] = []

    def compute(rows: list[int]) -> torch.Tensor:
        seen.append(caplog.text)
        return torch.zeros(len(rows), 1000, 100)

    with caplog.at_level(logging.INFO):
        bank.fill(compute, 4, label="Embedding training slices")
    assert "Embedding training slices: 1.2 MB, of which 1.2 MB to compute" in seen[0]
    shown = capsys.readouterr()
    assert shown.out == "" and "Embedding training slices (1.2 MB): 100%" in shown.err and "6/6" in shown.err
    bank.fill(compute, 4)
    assert capsys.readouterr().err == ""


def test_rows_of_another_shape_are_refused(tmp_path):
    bank = bank_in(tmp_path)
    with pytest.raises(CacheError, match=r"\(2, 3, 4, 4\) each, got \(1, 2, 3, 4, 5\).*pad"):
        bank.write(0, torch.zeros(2, 3, 4, 5))
    with pytest.raises(CacheError, match="4 rows"):
        bank.fill(lambda rows: values(rows)[:-1], 4, progress=False)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be made.*choose another folder"):
        bank_in(tmp_path / "file" / "bank")


class Rows(Dataset):
    def __init__(self, bank: EmbeddingBank) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return self.bank.rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.bank.read(row)


def test_workers_read_what_was_written(tmp_path):
    """Forked ones; tests/test_banked_slices.py spawns one."""
    loader = DataLoader(Rows(filled(tmp_path)), batch_size=5, num_workers=2, persistent_workers=True)
    for _ in range(2):
        read = torch.cat(list(loader))
        assert read.dtype == torch.bfloat16 and torch.equal(read, values(list(range(ROWS))).bfloat16())


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (64_000_000, "64 MB"),
        (2.5e9, "2.5 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes_as_people_say_them(size, text):
    assert human(size) == text
