"""Faults of the machine: a full disk, a folder that may not be written, no memory, a process that is ended.

No code is at fault, so each ends a command with one line, which says what can be done, and without a traceback.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from samseg_monai.errors import behind, own_cause, visible_lines

INTERRUPTED, TERMINATED = 130, 143  # 128 + the number of the signal, as shells count
TRIAL = bytes(1 << 16)  # more than a full disk takes in

_FULL = "free some space, or choose a folder on another disk"
_ALLOWED = "choose another place, or ask whose it is to allow it (ls -ld shows that)"
_FIXES = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("your share of the disk is used up", _FULL),
    errno.EFBIG: ("the file is larger than may be written here", "raise the limit (ulimit -f), or choose another disk"),
    errno.EROFS: ("the disk can only be read", "choose a folder on another disk"),
    errno.EACCES: ("no permission", _ALLOWED),
    errno.EPERM: ("no permission", _ALLOWED),
    errno.ENOENT: ("no such file or folder", "look for a mistake in its name"),
    errno.ENOTDIR: ("a file is where a folder is wanted", "move it away, or choose another place"),
    errno.EEXIST: ("a file is where a folder is wanted", "move it away, or choose another place"),
    errno.EISDIR: ("a folder is where a file is wanted", "give the name of a file"),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "choose a shorter one"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 4096), or use fewer num_workers"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs, or use fewer num_workers"),
    errno.EIO: ("the disk, or the way to it, has failed", "look at the system's log, or choose another disk"),
}
OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|bad_alloc",
    re.IGNORECASE,
)
_ON_GPU = re.compile(r"cuda|cublas|cudnn|hip |mps ", re.IGNORECASE)
_SHARED = re.compile(r"bus error|shared memory|/torch_\d+|shm", re.IGNORECASE)
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)"
)
_ERRNO = re.compile(r"\(os error (\d+)\)")  # as programs in Rust tell it, such as safetensors
_IN_WORKER = re.compile(r"^\w*Error: \[Errno (\d+)\] .*?(?:: '(.*)')?$", re.MULTILINE)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, by which schedulers and ``kill`` end a process."""


@dataclass(frozen=True)
class Told:
    """What a person reads of an error in place of a traceback, and the exit code."""

    text: str
    code: int = 1


def end_like_ctrl_c() -> None:
    """Let SIGTERM interrupt this process as Ctrl-C does, so that it writes what it must; a second one ends it at once.

    Where somebody else has a handler already, and outside the main thread, nothing changes. Forked processes end at
    once, as they would have done.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def save_memory(on_gpu: bool) -> str:
    """What to do where the memory did not suffice and no setting is known that would help."""
    return (
        f"end other programs{', or work on the processor (--device cpu)' if on_gpu else ''}, or take a larger machine"
    )


def explain(
    error: BaseException, *, resumable: bool = False, memory: Callable[[bool], str] = save_memory
) -> Told | None:
    """What to tell of an error that ended a command; None for one that nobody has foreseen, whose traceback is needed.

    Args:
        error: as it was caught, wrapped by MONAI, Typer or a process of a DataLoader or not.
        resumable: the same command goes on with what was interrupted.
        memory: what to do where the memory did not suffice, for that of the GPU (True) and of the machine (False).
    """
    stop = next((e for e in behind(error) if isinstance(e, KeyboardInterrupt)), None)
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == INTERRUPTED and stop):
        again = "; the same command goes on behind the last epoch that was finished" if resumable else ""
        ended = isinstance(stop, Terminated)
        return Told(f"interrupted{' by SIGTERM' if ended else ''}{again}", TERMINATED if ended else INTERRUPTED)
    if isinstance(error, SystemExit):
        return None
    if own := own_cause(error):
        return Told(f"{type(own).__name__}: {own}")
    for cause in behind(error, handled=False):  # causes alone: an error that was being handled explains nothing
        if text := _of_processes(cause, memory) or _of_memory(cause, memory) or _of_files(cause):
            return Told(visible_lines(text))
    return None


def _of_processes(error: BaseException, memory: Callable[[bool], str]) -> str | None:
    """A process of a DataLoader that is gone; such a one tells nothing itself."""
    found = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    who = f"a process that reads data (of num_workers; DataLoader worker {found[1]})"
    if _SHARED.search(str(error)):
        return f"{who} has died: the shared memory is full; use fewer num_workers, or more of it (docker --shm-size=8g)"
    if found[2] == "Terminated":
        return f"{who} was ended by SIGTERM; start the same command again"
    how = f"was killed ({found[2].strip()})" if found[2] else "ended without a word"
    return f"{who} {how}, most likely by the system, as the memory was used up; {memory(False)}"


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of the GPU did not suffice."""
    return any(_of_memory(cause, save_memory) for cause in behind(error, handled=False))


def free_memory() -> float:
    """Bytes that programs can have without others being put out to disk; infinite where the system does not tell."""
    return 1024.0 * found if (found := _kilobytes("/proc/meminfo", "MemAvailable")) else math.inf


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    if found := _kilobytes("/proc/self/status", "VmHWM"):  # getrusage's would include that of the process before it
        return 1024 * found
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(file: str, name: str) -> int:
    """A line ``<name>: <n> kB`` of a file of Linux's; 0 where there is none."""
    try:
        found = re.search(rf"(?m)^{name}:\s*(\d+) kB$", Path(file).read_text("ascii", "replace"))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _of_memory(error: BaseException, memory: Callable[[bool], str]) -> str | None:
    text = next((line.strip() for line in reversed(str(error).splitlines()) if _OUT_OF_MEMORY.search(line)), "")
    if not isinstance(error, MemoryError) and not (isinstance(error, (RuntimeError, OSError)) and text):
        return None
    on_gpu = bool(_ON_GPU.search(text))
    where = "the GPU has not enough memory" if on_gpu else "not enough memory"
    return f"{where} ({(text or str(error) or type(error).__name__)[:200]}); {memory(on_gpu)}"


def _of_files(error: BaseException) -> str | None:
    if "in DataLoader worker process" in str(error) and (found := _IN_WORKER.search(str(error))):
        error = OSError(int(found[1]), os.strerror(int(found[1])), *[found[2]][: bool(found[2])])
    if not isinstance(error, OSError):
        return None
    if error.errno is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{type(error).__name__}: {what_failed(error)}"


def what_failed(error: OSError) -> str:
    """``<file>: what is wrong with it; what to do``."""
    name = error.filename if error.filename is not None else f"a file (temporary ones lie in {tempfile.gettempdir()})"
    reason, fix = _FIXES.get(error.errno or 0, (error.strerror or str(error), "look at this file and at its disk"))
    return f"{os.fsdecode(name) if isinstance(name, (str, bytes)) else name}: {reason}; {fix}"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what goes wrong with the disk as an OSError that names ``path``.

    A write that fails names no file, torch and safetensors raise errors of their own, and the temporary name of a file
    means nothing to anybody.
    """
    try:
        yield
    except Exception as error:
        number = None if own_cause(error) else _errno(error, Path(path))
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _errno(error: BaseException, path: Path) -> int | None:
    for cause in behind(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            another = isinstance(cause.filename, (str, os.PathLike)) and Path(cause.filename).parent != path.parent
            return None if another else cause.errno
        if found := _ERRNO.search(str(cause)):
            return int(found[1])
    return None


def output_problem(path: str | os.PathLike[str], *, folder: bool = True) -> str | None:
    """Why results cannot be written to ``path``, or None: so that nothing is computed in vain. Nothing stays there.

    Args:
        path: of a folder, or of a file; it need not exist, and neither need those above it.
        folder: which of the two it is.
    """
    place = Path(path).absolute()
    try:
        if not folder and place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        parent = place if folder else place.parent
        there = next(p for p in (parent, *parent.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        try:
            with tempfile.TemporaryFile(dir=there) as trial:
                trial.write(TRIAL)
                trial.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(there)) from error
    except OSError as error:
        return what_failed(error)
    return None
