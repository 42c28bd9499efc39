"""Cached cases on disk: whatever happens to a process or a file, a row read is the row written."""

from __future__ import annotations

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

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from samseg_monai.data.slices import cache
from samseg_monai.data.slices.cache import RESERVE, VERSIONS, CachedCase, human
from samseg_monai.errors import CacheError

KEY = {"network": {"weights": "abc", "image_size": 32, "autocast": None}, "seed": 3}
ROWS, SHAPE = 13, (2, 3, 4, 4)
ROW_BYTES = 2 * 3 * 4 * 4 * 2
CASES = 4
Usage = namedtuple("Usage", "total used free")
FORK = multiprocessing.get_context("fork")


def value(row: int) -> torch.Tensor:
    """What the encoder makes of a row: the same in every process, and no two alike."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)).bfloat16()


def blocks(case: int = 0, seen: list[int] | None = None):
    """The rows of a case, in blocks of four."""
    for start in range(0, ROWS, 4):
        rows = range(start, min(start + 4, ROWS))
        if seen is not None:
            seen += [case * ROWS + row for row in rows]
        yield {"embedding": torch.stack([value(case * ROWS + row) for row in rows])}


def case_in(folder: Path, case: int = 0, key: dict = KEY) -> CachedCase:
    return CachedCase(folder, {**key, "case": case})


def filled(folder: Path, case: int = 0) -> CachedCase:
    file = case_in(folder, case)
    assert file.ensure(lambda: blocks(case), ROWS) and not file.ensure(pytest.fail)
    return file


def fill_all(folder: Path, seen: list[int] | None = None) -> list[int]:
    """Make what is not there yet of all cases; returns which cases this process made."""
    files = [case_in(folder, case) for case in range(CASES)]
    return [c for c, file in enumerate(files) if not file.is_whole() and file.ensure(lambda c=c: blocks(c, seen), ROWS)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def run(target, *args) -> int:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def test_rows_come_back_in_any_order_and_from_another_object(tmp_path):
    file = filled(tmp_path)
    for reader in (file, case_in(tmp_path), pickle.loads(pickle.dumps(file))):
        for row in (12, 5, 0):
            found = reader.read(row)
            assert found.keys() == {"embedding"} and torch.equal(found["embedding"], value(row))
    assert len(pickle.dumps(file)) < 1000
    file.read(0)["embedding"].zero_()
    assert torch.equal(file.read(0)["embedding"], value(0))  # what a reader does to a row stays with the reader
    with pytest.raises(CacheError, match="is missing or damaged"):
        case_in(tmp_path, 1).read(3)


def test_rows_of_several_types_and_special_numbers_survive(tmp_path):
    file = CachedCase(tmp_path, "mixed")
    numbers = torch.tensor([[float("inf"), float("-inf"), -0.0, float("nan")]]).bfloat16()
    rows = {
        "label": torch.arange(3, dtype=torch.uint8)[None],
        "slice": torch.tensor([7]),
        "image": torch.full((1, 2, 1), 1e38),
        "numbers": numbers,
    }
    file.ensure(lambda: [rows])
    found = file.read(0)
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape[1:] for n, t in rows.items())
    assert torch.equal(found["numbers"].view(torch.int16), numbers[0].view(torch.int16))
    assert file.column("slice").tolist() == [7]
    assert torch.equal(found["label"], rows["label"][0]) and torch.equal(found["image"], rows["image"][0])


def test_a_case_without_rows_is_whole(tmp_path):
    file = CachedCase(tmp_path, "empty")
    file.ensure(lambda: [{"slice": torch.zeros(0, dtype=torch.int64), "image": torch.zeros(0, 1, 4, 4)}])
    assert file.is_whole() and file.column("slice").tolist() == []


def test_every_part_of_the_key_makes_another_file_and_its_order_none(tmp_path, monkeypatch):
    keys = [KEY, {**KEY, "seed": 4}, {**KEY, "network": {**KEY["network"], "weights": "abd"}}]
    names = {CachedCase(tmp_path, key).path.name for key in keys}
    assert len(names) == 3 and CachedCase(tmp_path, dict(reversed(KEY.items()))).path.name in names
    nan = {**KEY, "scale": float("nan")}
    assert CachedCase(tmp_path, nan).path == CachedCase(tmp_path, nan).path  # NaN is not NaN
    monkeypatch.setitem(VERSIONS, "torch", "0.1")
    assert CachedCase(tmp_path, KEY).path.name not in names


def test_the_file_is_read_without_any_of_our_code(tmp_path):
    file = filled(tmp_path)
    stored = load_file(file.path)
    assert torch.equal(stored["embedding"], torch.stack([value(row) for row in range(ROWS)]))
    raw = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in stored["embedding"]]
    assert stored["crc"].tolist() == [zlib.crc32(row) for row in raw]
    with cache.safe_open(file.path, "pt") as opened:
        versions, key = json.loads(opened.metadata()["key"])
    assert key == {**KEY, "case": 0} and versions["torch"] == torch.__version__


def killed_in_compute(folder: Path) -> None:
    def deadly():
        yield from list(blocks(2))[:2]
        os.kill(os.getpid(), signal.SIGKILL)

    for case in range(2):
        filled(folder, case)
    case_in(folder, 2).ensure(deadly, ROWS)


def killed_before_the_move(folder: Path) -> None:
    for case in range(2):
        filled(folder, case)
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    filled(folder, 2)


@pytest.mark.parametrize("victim", [killed_in_compute, killed_before_the_move])
def test_a_kill_costs_the_case_that_was_being_written_and_leaves_nothing_behind(tmp_path, victim):
    assert run(victim, tmp_path / "killed") == -signal.SIGKILL
    seen: list[int] = []
    assert fill_all(tmp_path / "killed", seen) == [2, 3]
    assert seen == list(range(2 * ROWS, 4 * ROWS))
    fill_all(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == set(contents(tmp_path / "whole"))


def fill_and_tell(folder: Path, barrier, log: Path) -> None:
    barrier.wait()
    for case in range(CASES):

        def slow(case: int = case):
            for block in blocks(case):
                with open(log, "a") as file:
                    file.write(f"{case}\n")
                time.sleep(0.01)  # long enough for the other one to want the same case
                yield block

        case_in(folder, case).ensure(slow, ROWS)
        assert torch.equal(case_in(folder, case).read(7)["embedding"], value(case * ROWS + 7))


def test_two_processes_that_fill_at_once_compute_every_case_once(tmp_path):
    barrier = FORK.Barrier(2)
    pair = [FORK.Process(target=fill_and_tell, args=(tmp_path / "b", barrier, tmp_path / "log")) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [str(case) for case in range(CASES) for _ in range(4)]


def hold(path: Path, ready) -> None:
    with FileLock(path):
        ready.set()
        signal.pause()


def test_who_waits_is_told_and_a_dead_process_keeps_no_lock(tmp_path, caplog):
    file, ready = case_in(tmp_path), FORK.Event()
    process = FORK.Process(target=hold, args=(file.path.with_suffix(".lock"), ready))
    process.start()
    assert ready.wait(30)

    class Killer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process writes" in record.getMessage():
                process.kill()

    log, killer = logging.getLogger(cache.__name__), Killer()
    log.addHandler(killer)
    with caplog.at_level(logging.INFO):
        assert file.ensure(blocks, ROWS)
    log.removeHandler(killer)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL and "waiting for it" in caplog.text and file.is_whole()


@pytest.mark.parametrize("harm", ["shorter", "longer", "empty", "no header", "of another case", "of another version"])
def test_truncated_and_foreign_files_are_told_and_built_again(tmp_path, caplog, harm):
    whole = filled(tmp_path).path.read_bytes()
    file = case_in(tmp_path)
    other = {"of another case": case_in(tmp_path, 1), "of another version": file}.get(harm)
    if other is not None:
        filled(tmp_path, 1)
        changed = case_in(tmp_path, 1).path.read_bytes()
        file.path.write_bytes(changed if harm == "of another case" else whole.replace(b'layout\\": 3', b'layout\\": 2'))
    else:
        broken = {"shorter": whole[:-5], "longer": whole + b"12345", "empty": b"", "no header": b"x" * len(whole)}
        file.path.write_bytes(broken[harm])
    assert file.path.read_bytes() != whole and not file.is_whole()
    assert file.path.name in caplog.text and caplog.text.count("is built again") == 1
    assert file.ensure(blocks, ROWS) and file.path.read_bytes() == whole


@pytest.mark.parametrize("position", [-1, -ROW_BYTES * 6])
def test_a_damaged_row_is_named_and_its_case_built_at_the_next_start(tmp_path, position):
    file = filled(tmp_path)
    whole = file.path.read_bytes()
    raw = bytearray(whole)
    raw[position] ^= 1
    file.path.write_bytes(raw)
    damaged = ROWS - 1 if position == -1 else ROWS - 6
    assert torch.equal(file.read(1)["embedding"], value(1))
    with pytest.raises(CacheError, match=rf"row {damaged} of .*{file.path.name} is damaged; start again"):
        file.read(damaged)
    assert not file.is_whole()
    assert file.ensure(blocks, ROWS) and file.path.read_bytes() == whole


def test_a_disk_too_small_is_told_before_the_second_batch(tmp_path, monkeypatch):
    file = case_in(tmp_path)
    needed = 2 * ROWS * (ROW_BYTES + 8)  # of two cases, with a checksum for each row

    def disk(free: int):
        return lambda path: Usage(10**12, 0, free) if Path(path) == tmp_path else shutil.disk_usage(path)

    monkeypatch.setattr(cache.shutil, "disk_usage", disk(needed + RESERVE - 1))
    seen: list[int] = []
    with pytest.raises(CacheError) as caught:
        file.ensure(lambda: blocks(0, seen), ROWS, planned=2 * ROWS)
    for part in (human(needed), "64 MB are free", str(tmp_path), "another disk", "fewer variants"):
        assert part in str(caught.value)
    assert seen == [0, 1, 2, 3] and not file.is_whole() and contents(tmp_path) == {}
    monkeypatch.setattr(cache.shutil, "disk_usage", disk(needed + RESERVE))
    assert file.ensure(blocks, ROWS, planned=2 * ROWS)


def test_the_reserve_grows_with_what_is_to_be_written(tmp_path, monkeypatch):
    file = CachedCase(tmp_path, "large")
    rows, planned = [{"a": torch.zeros(1, 99_992, dtype=torch.uint8)}], 10**6
    for free, fits in ((101 * 10**9, True), (101 * 10**9 - 1, False)):
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path, f=free: Usage(0, 0, f))
        if fits:
            assert file.ensure(lambda: rows, planned=planned)
            file.path.unlink()
        else:
            with pytest.raises(CacheError, match="1 GB stay in reserve"):
                file.ensure(lambda: rows, planned=planned)


def test_a_full_disk_while_writing_is_an_error_of_ours_and_leaves_nothing(tmp_path, monkeypatch):
    filled(tmp_path, 1)
    real = open

    def failing(path, mode="r", *args, **kwargs):
        if "w" in mode and str(path).endswith(".tmp"):
            real(path, mode).close()
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(CacheError, match=r"cannot be written .*No space left on device.*free some space"):
        case_in(tmp_path).ensure(blocks, ROWS)
    monkeypatch.undo()
    assert list(contents(tmp_path)) == [case_in(tmp_path, 1).path.name] and not list(tmp_path.glob("*.tmp"))


def test_the_size_of_all_is_told_before_the_second_batch(tmp_path, caplog):
    told: list[str] = []

    def rows():
        for _ in range(2):
            told.append(caplog.text)
            yield {"a": torch.zeros(3, 1000, 100, dtype=torch.bfloat16)}

    with caplog.at_level(logging.INFO):
        CachedCase(tmp_path, "a").ensure(rows, 6, planned=12)
    assert told[0] == "" and f"2.4 MB are to be written to {tmp_path}" in told[1]


def test_rows_of_another_shape_or_number_are_refused(tmp_path):
    def growing():
        yield {"embedding": torch.zeros(1, 2, 3)}
        yield {"embedding": torch.zeros(1, 2, 4)}

    with pytest.raises(CacheError, match=r"\(2, 3\)\)\} and .*\(2, 4\).*pad"):
        case_in(tmp_path).ensure(growing, 2)
    with pytest.raises(CacheError, match="was to hold 14 rows, got 13"):
        case_in(tmp_path).ensure(blocks, 14)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be made.*choose another folder"):
        case_in(tmp_path / "file" / "cache").ensure(blocks, ROWS)


class Rows(Dataset):
    def __init__(self, file: CachedCase) -> None:
        self.file = file

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.file.read(row)["embedding"]


def test_workers_read_what_was_written(tmp_path):
    """Forked ones; tests/data/test_banked_slices.py spawns one."""
    loader = DataLoader(Rows(filled(tmp_path)), batch_size=5, num_workers=2, persistent_workers=True)
    for _ in range(2):
        read = torch.cat(list(loader))
        assert read.dtype == torch.bfloat16 and torch.equal(read, torch.stack([value(row) for row in range(ROWS)]))


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
