"""Mutated inputs: each goes to a reader of this package and to an oracle, which restates the written rules on its own.

A reader here is what makes one kind of input: it keeps a good one, and ``trial`` changes it in one or two places,
writes it, and says by the rules of the docstrings and ``docs/your_own_data.md`` what must come of it. Oracles parse
with other means than the package (struct, zlib, csv, jsonschema, pydicom, SimpleITK's own formats) and import none of
its checks. Each trial has a seed of its own, so that it can be repeated alone.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.errors import SamsegError

SECONDS, MEGABYTES, LONGEST = 5.0, 500, 60_000
GOOD = ("accepted", "refused", "left open")
BAD = ("accepted wrongly", "other content", "false alarm", "traceback", "raw output", "hang", "memory")


@dataclass
class Trial:
    """One mutated input.

    Attributes:
        what: the mutation, for a person.
        read: hands the input to the package.
        rule: why the written rules refuse it; "" where they allow it; None where they leave it open (damage that no
            check sum shows).
        wrong: what is wrong with what was read, by the oracle; "" for nothing.
    """

    what: str
    read: Callable[[], Any]
    rule: str | None
    wrong: Callable[[Any], str] = lambda found: ""


@dataclass
class Reader:
    """A kind of input: ``make(folder)`` writes a good one and gives what makes a trial of a random state."""

    name: str
    share: int
    make: Callable[[Path], Callable[[random.Random], Trial]]


@dataclass
class Found:
    """Counts of a reader, and the first of what is bad."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Hang(BaseException):
    pass


def _alarm(*_: Any) -> None:
    raise _Hang


class Silence:
    """Catches what a reader prints past the package's own words: both streams, those of C++ libraries, foreign logs."""

    def __init__(self) -> None:
        self.at = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        kept = [os.dup(1), os.dup(2)]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", buffering=1) as self.file:
            os.dup2(self.file.fileno(), 1)
            os.dup2(self.file.fileno(), 2)
            sys.stdout = sys.stderr = self.file
            try:
                yield
            finally:
                sys.stdout, sys.stderr = streams
                for number, old in enumerate(kept, 1):
                    os.dup2(old, number)
                    os.close(old)

    def new(self) -> str:
        """What was written since the last call."""
        self.file.flush()
        size = os.fstat(self.file.fileno()).st_size
        text = os.pread(self.file.fileno(), size - self.at, self.at).decode("utf-8", "replace")
        self.at = size
        return text.strip()


class _Quiet(logging.Handler):
    """In place of a program's own handler: the package's log is its own words; that of others stays what it is."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("samseg_monai") and record.levelno >= logging.WARNING:
            print(f"log of {record.name}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _alarms() -> Iterator[None]:
    """Alarms are this module's, and whoever else had set one gets it back."""
    handler, (left, _) = signal.signal(signal.SIGALRM, _alarm), signal.getitimer(signal.ITIMER_REAL)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - started)))


def _peak() -> int:
    """Peak memory of this process in kB since ``_reset``; 0 where the system does not tell."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
    return 0


def _reset() -> int:
    """Let the peak begin anew, where the system can; returns the memory that is in use."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _peak()


def judge(trial: Trial, silence: Silence) -> tuple[str, str]:
    """Run one trial: one of ``GOOD`` or ``BAD``, and what was seen."""
    before = _reset()
    outcome, detail, found = "", "", None
    hook, started = sys.excepthook, time.perf_counter()
    silence.new()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", append=True)  # what is ignored on purpose stays so
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            found = trial.read()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except SamsegError as error:
        outcome, detail = "refused", str(error)
    except _Hang:
        outcome = "hang"
    except Exception as error:  # noqa: BLE001  that is what is looked for
        outcome, detail = "traceback", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.excepthook = hook
    if time.perf_counter() - started > SECONDS:
        outcome = "hang"
    if (used := (_peak() - before) // 1000) > MEGABYTES:
        return "memory", f"{used} MB"
    if outcome in ("hang", "traceback"):
        return outcome, detail
    if raw := silence.new():
        return "raw output", raw[:600]
    if outcome == "refused":
        if len(detail) > LONGEST or not detail.strip():
            return "raw output", f"an error of {len(detail)} characters"
        return ("false alarm", detail) if trial.rule == "" else ("refused" if trial.rule else "left open", detail)
    if trial.rule:
        return "accepted wrongly", trial.rule
    wrong = trial.wrong(found)
    return ("other content", wrong) if wrong else ("accepted" if trial.rule == "" else "left open", "")


def run(
    readers: Sequence[Reader], count: int, seed: int, *, number: int | None = None, most: int = 12
) -> dict[str, Found]:
    """Run ``count`` trials, shared out over ``readers``; ``number`` is one trial of each alone."""
    total = sum(reader.share for reader in readers)
    results = {}
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [_Quiet()]
    try:
        for reader in readers:
            silence = Silence()
            found = results[reader.name] = Found()
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="mutations-") as folder, silence(), _alarms():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    make = reader.make(Path(folder))
                numbers = range(-(-count * reader.share // total)) if number is None else [number]
                for n in numbers:
                    trial = make(random.Random(f"{seed}/{reader.name}/{n}"))
                    outcome, detail = judge(trial, silence)
                    found.counts[outcome] += 1
                    if (outcome in BAD and len(found.bad) < most) or number is not None:
                        found.bad.append(f"{reader.name} {n}: {outcome}: {trial.what[:300]}\n    {detail[:2500]}")
            found.seconds = time.perf_counter() - started
    finally:
        root.handlers = handlers
    return results


def table(results: dict[str, Found]) -> str:
    """Counts per reader as Markdown."""
    names = [*GOOD, *BAD]
    lines = [f"| reader | inputs | {' | '.join(names)} | s |", f"|---|{'---|' * (len(names) + 2)}"]
    rows = {**results, "all": Found(sum((f.counts for f in results.values()), Counter()))}
    rows["all"].seconds = sum(f.seconds for f in results.values())
    for name, found in rows.items():
        counts = " | ".join(str(found.counts[key]) for key in names)
        lines.append(f"| {name} | {sum(found.counts.values())} | {counts} | {found.seconds:.1f} |")
    return "\n".join(lines)


def bad(results: dict[str, Found]) -> list[str]:
    """What must not be, of all readers."""
    return [text for found in results.values() for text in found.bad]


def pick(rng: random.Random, *values: Any) -> Any:
    """One of ``values``."""
    return rng.choice(values)


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A file as a bad disk or a broken copy leaves it: cut, empty, with other bytes, something else altogether."""
    kind = rng.randrange(7)
    if kind < 3 and content:
        at = rng.randrange(len(content))
        return f"cut at {at} of {len(content)}", content[:at]
    if kind == 3:
        text = pick(
            rng, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html><html>",
            b"\0" * len(content), b"PK\x03\x04" + content[4:], b"hello", b"%!PS-Adobe-3.0",
        )  # fmt: skip
        return f"replaced by {text[:20]!r}", text
    changed = bytearray(content)
    places = []
    for _ in range(rng.choice((1, 1, 4, 30))):
        at = rng.randrange(len(changed))
        changed[at] = (changed[at] ^ (1 << rng.randrange(8))) if rng.random() < 0.5 else rng.randrange(256)
        places.append(at)
    return f"bytes {places[:6]} changed", bytes(changed)
