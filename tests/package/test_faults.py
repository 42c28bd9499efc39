"""Faults of the machine: each ends a command with one line that names the file, or the cause, and what to do."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._utils import ExceptionWrapper

from samseg_monai import cli, faults, files
from samseg_monai.bundles.archive import open_files
from samseg_monai.errors import BundleError, DataError, own_cause, reason_of
from tests.helpers.commands import samseg


def wrapped(cause: BaseException) -> RuntimeError:
    """As MONAI wraps what a transform or an expression raises, once per level."""
    error = RuntimeError("applying transform <samseg_monai.LoadCased object>")
    error.__cause__ = RuntimeError("Failed to evaluate")
    error.__cause__.__cause__ = cause
    return error


def of_worker(cause: BaseException) -> BaseException:
    """As the process of a DataLoader hands on an error, which MONAI has wrapped in it."""
    try:
        try:
            raise cause
        except BaseException as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError:
        box = ExceptionWrapper(where="in DataLoader worker process 0")
    try:
        box.reraise()
    except Exception as error:  # noqa: BLE001  whatever it has become
        return error


def of_typer(cause: BaseException) -> SystemExit:
    """As Typer leaves a command that was interrupted: without a word."""
    stop = SystemExit(130)
    stop.__context__ = RuntimeError("Exit")
    stop.__context__.__cause__ = cause
    return stop


def found(number: int, name: str | None = "runs/a/resume.pt") -> OSError:
    return OSError(number, os.strerror(number), *[name][: name is not None])


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB")


def big(what) -> Exception:
    try:
        what()
    except (MemoryError, RuntimeError) as error:
        return error
    raise AssertionError("this machine has a petabyte of memory")


PETABYTE = (1 << 50,)
WORKER = "a process that reads data (of num_workers; DataLoader worker"
TABLE = {
    "disk full": (found(errno.ENOSPC), "OSError: runs/a/resume.pt: the disk is full; free some space"),
    "disk full, no name": (found(errno.ENOSPC, None), "OSError: a file (temporary ones lie in "),
    "share of the disk": (found(errno.EDQUOT), "OSError: runs/a/resume.pt: your share of the disk is used up; free"),
    "too large": (found(errno.EFBIG), "OSError: runs/a/resume.pt: the file is larger than may be written here; raise"),
    "read-only": (found(errno.EROFS), "OSError: runs/a/resume.pt: the disk can only be read; choose a folder on"),
    "not allowed": (found(errno.EACCES), "PermissionError: runs/a/resume.pt: no permission; choose another place"),
    "file, not folder": (found(errno.ENOTDIR), "NotADirectoryError: runs/a/resume.pt: a file is where a folder is"),
    "file in the way": (found(errno.EEXIST), "FileExistsError: runs/a/resume.pt: a file is where a folder is wanted"),
    "folder, not file": (found(errno.EISDIR), "IsADirectoryError: runs/a/resume.pt: a folder is where a file is"),
    "absent": (found(errno.ENOENT), "FileNotFoundError: runs/a/resume.pt: no such file or folder; look for a mistake"),
    "too many files": (found(errno.EMFILE), "OSError: runs/a/resume.pt: too many files are open; raise the limit"),
    "disk broken": (found(errno.EIO), "OSError: runs/a/resume.pt: the disk, or the way to it, has failed; look"),
    "another": (found(errno.ESTALE), f"OSError: runs/a/resume.pt: {os.strerror(errno.ESTALE)}; look at this file"),
    "of a library": (OSError("12 requested and 3 written"), "OSError: 12 requested and 3 written"),
    "wrapped": (wrapped(found(errno.ENOSPC)), "OSError: runs/a/resume.pt: the disk is full"),
    "in a worker": (of_worker(found(errno.EMFILE)), "OSError: runs/a/resume.pt: too many files are open"),
    "in a worker, no name": (of_worker(found(errno.ENOSPC, None)), "OSError: a file (temporary ones lie in "),
    "ours": (wrapped(DataError("case 7: no label; get it")), "DataError: case 7: no label; get it"),
    "ours in a worker": (
        of_worker(DataError("case 7 (2 problems):\n  - a\n  - b")),
        "DataError: case 7 (2 problems):\n  - a\n  - b",
    ),
    "memory of the GPU": (cuda_error(), "the GPU has not enough memory (CUDA out of memory. Tried to allocate 2"),
    "memory of cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU has not enough"),
    "memory, torch": (big(lambda: torch.empty(PETABYTE)), "not enough memory ("),
    "memory, numpy": (wrapped(big(lambda: np.ones(PETABYTE))), "not enough memory (Unable to allocate 8.00 PiB"),
    "memory, Python": (MemoryError(), "not enough memory (MemoryError); end other programs"),
    "memory, fork": (found(errno.ENOMEM, None), "not enough memory ([Errno 12] Cannot allocate memory)"),
    "worker killed": (
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
        f"{WORKER} 71) was killed (Killed), most likely by the system, as the memory was used up; end other programs",
    ),
    "worker gone": (
        RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"),
        f"{WORKER} 71, 72) ended without a word, most likely by the system, as the memory was used up",
    ),
    "worker, shared memory": (
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that ..."),
        f"{WORKER} 71) has died: the shared memory is full; use fewer num_workers",
    ),
    "worker ended": (
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Terminated. "),
        f"{WORKER} 71) was ended by SIGTERM; start the same command again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_fault_is_told_in_one_line_with_what_to_do(name):
    error, expected = TABLE[name]
    told = faults.explain(error)
    assert told is not None and told.code == 1
    assert told.text.startswith(expected)
    assert "Traceback" not in told.text and (name == "ours in a worker" or "\n" not in told.text)


@pytest.mark.parametrize("wrap", [lambda error: error, of_typer])
@pytest.mark.parametrize(("error", "line", "code"), [
    (KeyboardInterrupt(), "interrupted", 130), (faults.Terminated(), "interrupted by SIGTERM", 143)
])  # fmt: skip
def test_an_interrupt_is_told_and_has_the_exit_code_of_its_signal(error, line, code, wrap):
    assert faults.explain(wrap(error)) == faults.Told(line, code)
    again = faults.explain(wrap(error), resumable=True)
    assert again.text == f"{line}; the same command goes on behind the last epoch that was finished"


def test_what_nobody_has_foreseen_keeps_its_traceback():
    bug = KeyError("x")
    bug.__context__ = found(errno.ENOENT)  # was being handled when the bug came to light
    for error in (bug, RuntimeError("size mismatch"), wrapped(ZeroDivisionError()), SystemExit(2), SystemExit(130)):
        assert faults.explain(error) is None


def commands(folder: Path):
    """Everything that writes through ``files`` or a library, into ``folder``: name -> (call, file to be named)."""
    tensor = {"x": torch.zeros(1_000_000)}
    return {
        "text": (lambda: files.write_text(folder / "a.html", "x" * 4_000_000), "a.html"),
        "json": (lambda: files.write_json(folder / "a.json", ["x" * 4_000_000]), "a.json"),
        "torch": (lambda: files.write_whole(folder / "a.pt", lambda to: files.write_tensors(to, tensor)), "a.pt"),
        "safetensors": (
            lambda: files.write_whole(folder / "a.safetensors", lambda to: save_file(tensor, to)),
            "a.safetensors",
        ),
    }


@pytest.fixture
def small_files():
    """No file of this process may be longer than 64 kB: what a full disk is to who writes it."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("what", ["text", "json", "torch", "safetensors"])
def test_a_write_that_fails_names_its_file_and_leaves_what_was_there(what, tmp_path, small_files):
    call, name = commands(tmp_path)[what]
    (tmp_path / name).write_text("before")
    with pytest.raises(OSError, match=name) as caught:
        call()
    told = faults.explain(caught.value)
    assert told.text.startswith(f"OSError: {tmp_path / name}: the file is larger than may be written here")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "before"


@pytest.mark.parametrize("what", ["text", "json", "torch", "safetensors"])
def test_a_file_in_place_of_the_folder_is_named(what, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError) as caught:
        commands(tmp_path / "runs" / "a")[what][0]()
    assert re.search(r"runs/a.*: a file is where a folder is wanted", faults.explain(caught.value).text)


def test_another_file_that_a_write_reads_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere/b"):
        files.write_whole(tmp_path / "a", lambda to: (tmp_path / "elsewhere" / "b").read_text())


def test_a_full_disk_while_a_bundle_is_unpacked_is_no_damage_of_the_bundle(tmp_path, monkeypatch):
    (tmp_path / "b" / "configs").mkdir(parents=True)
    (tmp_path / "b" / "configs" / "inference.json").write_text("{}")
    opened = open_files(tmp_path / "b")

    class Failing(io.BytesIO):
        def read(self, *_):
            raise ValueError("damaged")

        def write(self, *_):
            raise found(errno.ENOSPC, None)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"copy\.json"):
        patch.setattr(Path, "open", lambda *_: Failing())
        opened.copy("configs/inference.json", tmp_path / "copy.json")
    monkeypatch.setattr(opened, "open", lambda name: Failing())
    with pytest.raises(BundleError, match="cannot be read"):
        opened.copy("configs/inference.json", tmp_path / "copy.json")


def make(kind: str, folder: Path) -> Path:
    """A place that nothing can be written to; root may write where it is not allowed to, so that is no case here."""
    if kind == "a file":
        (folder / "out").write_text("")
        return folder / "out"
    if kind == "below a file":
        (folder / "out").write_text("")
        return folder / "out" / "a" / "b"
    if kind == "a dead link":
        (folder / "out").symlink_to(folder / "nowhere")
        return folder / "out"
    return Path("/proc/self/out")  # a file system that takes no files


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dead link", "a disk that takes none"])
def test_a_place_for_results_is_tried_beforehand_and_nothing_stays_there(kind, tmp_path):
    place = make(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    problem = faults.output_problem(place)
    assert problem and "; " in problem and "\n" not in problem
    assert faults.output_problem(place / "report.html", folder=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_good_place_has_no_problem_and_stays_as_it_is(tmp_path):
    assert faults.output_problem(tmp_path) is faults.output_problem(tmp_path / "a" / "b") is None
    assert faults.output_problem(tmp_path / "a" / "b.zip", folder=False) is None
    assert faults.output_problem(tmp_path, folder=False).endswith(
        "a folder is where a file is wanted; give the name of a file"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_by_the_trial(tmp_path, small_files):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert "larger than may be written here" in faults.output_problem(tmp_path / "out")


# command line -> what is a file, or a folder, where the other is wanted; nothing else of it exists, nor is it reached
LATE = {
    "report": ["report", "{absent}", "--output", "{folder}"],
    "prepare": ["prepare", "brats-men", "--src", "{absent}", "--output", "{file}/list.json"],
    "prepare, a folder": ["prepare", "folders", "--src", "{absent}", "--output", "{folder}"],
    "bbox": ["bbox", "{absent}", "--output", "{file}/box.json"],
    "boxes": ["boxes", "from-mask", "{absent}", "--output", "{folder}"],
    "task": ["task", "new", "mine", "--datalist", "{absent}", "--out", "{file}"],
    "compare": ["compare", "honours", "--dataset-dir", "{absent}", "--output", "{file}"],
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_command_tries_its_output_before_it_reads_anything(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {key: str(tmp_path / key) for key in ("absent", "file", "folder")}
    assert samseg(monkeypatch, *(word.format(**places) for word in LATE[name])) == 1
    told = capsys.readouterr().err
    assert re.match(r"ConfigError: output: .*: a (file is where a folder|folder is where a file) is wanted; ", told)
    assert told.count("\n") == 1 and "absent" not in told


@pytest.mark.parametrize(("error", "line", "code"), [
    (found(errno.ENOSPC), "OSError: runs/a/resume.pt: the disk is full", 1),
    (KeyboardInterrupt(), "interrupted", 130),
    (faults.Terminated(), "interrupted by SIGTERM", 143),
    (cuda_error(), "the GPU has not enough memory (CUDA", 1),
])  # fmt: skip
def test_the_command_line_tells_a_fault_in_its_only_line(error, line, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("samseg_monai.bundles.recipe_names", fail)
    assert samseg(monkeypatch, "bundle", "list") == code
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("samseg_monai.bundles.recipe_names", lambda *_: {}["bug"])
    monkeypatch.setattr(sys, "argv", ["samseg", "bundle", "list"])
    with pytest.raises(KeyError, match="bug"):
        cli.main()


def test_output_to_a_full_device_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "samseg_monai", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("OSError: a file (temporary ones lie in ") and "the disk is full" in done.stderr


SLEEPER = """
import os, signal, time
from samseg_monai.faults import Terminated, end_like_ctrl_c
end_like_ctrl_c()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
try:
    print("child", code, flush=True)  # here, so that the signal that answers it is caught
    time.sleep(60)
except Terminated:
    print("written", flush=True)
    time.sleep(60)
"""


def test_sigterm_interrupts_once_and_then_ends_and_ends_forked_processes_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == f"child {-signal.SIGTERM}\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert process.stderr.read() == ""


def test_a_handler_of_somebody_else_stays(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        faults.end_like_ctrl_c()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_chain_of_errors_that_is_a_ring_ends():
    first, second = RuntimeError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    second.__cause__ = second
    assert faults.explain(first) is None and own_cause(second) is None
    assert reason_of(second) == "ValueError: second"
