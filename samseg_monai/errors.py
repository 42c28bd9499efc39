"""Errors that a user can act on: what went wrong, what was got, how to mend it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

FEW_TENSORS = 10  # lines of a list of tensors: those that follow tell no more
_MANY = 6  # cases with the same reason: fewer have a line each
MOST_LINES, LONGEST_LINE = 200, 4000  # of an error: beyond them its reason is told, and a sender could hide it


def visible(text: str, length: int = 200) -> str:
    """``text`` without anything that a terminal would obey, shortened to ``length`` characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: length + 1])
    return plain if len(plain) <= length else plain[: length - 3] + "..."


def visible_lines(text: str) -> str:
    """``text`` with its line breaks, each line ``visible``."""
    return "\n".join(visible(line, LONGEST_LINE) for line in text.split("\n"))


class SamsegError(Exception):
    """Base of every error that this package raises on purpose; its text is all a user needs to see.

    Names of files, tensors and keys in it may be anyone's: a terminal obeys none of it.
    """

    def __str__(self) -> str:
        return visible_lines(super().__str__())


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return visible_lines(super().getMessage())


def log_visibly() -> None:
    """Let no logger of this process write what a terminal would obey, whoever named what it tells."""
    logging.setLogRecordFactory(_Record)


class WeightsError(SamsegError):
    """SAM weights are absent, damaged or do not fit the network."""


class CheckpointError(SamsegError):
    """An adapter, model or resume file does not belong to this network."""


class AdapterError(SamsegError):
    """A strategy or adapter layer cannot be installed as asked."""


class DataError(SamsegError):
    """Images, labels or datalists are unreadable or contradict each other."""


class CacheError(SamsegError):
    """A cache on disk is damaged, foreign, or does not fit on the disk."""


class PromptError(SamsegError):
    """A prompt (box, mask) is malformed or does not fit its image."""


class ConfigError(SamsegError):
    """A configuration key or value is unknown or out of range."""


class BundleError(SamsegError):
    """A bundle cannot be built, packed or used."""


class TrainingError(SamsegError):
    """Training went wrong in a way that must not pass silently."""


# what a process of a DataLoader hands on of an error: the text of its traceback, its cause first
_OF_WORKER = re.compile(
    r"^samseg_monai\.errors\.(\w+): (.*?)(?=\n\nThe above exception was|\n\nDuring handling of|\Z)",
    re.MULTILINE | re.DOTALL,
)


def behind(error: BaseException, *, handled: bool = True) -> Iterator[BaseException]:
    """``error``, its cause (or with ``handled`` what was being handled), and so on; once each: chains may be rings."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (cause.__context__ if handled else None)


def own_cause(error: BaseException) -> SamsegError | None:
    """The error of ours behind whatever a library has wrapped it in, perhaps ``error`` itself; None without one.

    Of an error in a process of a DataLoader torch hands on the traceback as a text: the error is made of that again.
    """
    for cause in behind(error):
        found = _OF_WORKER.search(str(cause)) if "in DataLoader worker process" in str(cause) else None
        kind = globals().get(found[1]) if found else None
        if found and isinstance(kind, type) and issubclass(kind, SamsegError):
            return kind(found[2].strip())
        if isinstance(cause, SamsegError):
            return cause
    return None


def in_turn(*kinds: Sequence[str]) -> list[str]:
    """Problems of several kinds, one of each in turn: a list that is cut shows some of every kind."""
    return [problem for row in zip_longest(*kinds) for problem in row if problem is not None]


def reason_of(error: BaseException) -> str:
    """What went wrong first, in one line: libraries wrap the cause once per level."""
    chain = list(behind(error, handled=False))
    error = next((one for one in chain if isinstance(one, SamsegError)), chain[-1])
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text if isinstance(error, SamsegError) else f"{type(error).__name__}: {text}"


def by_reason(problems: Sequence[str], cases: int) -> list[str]:
    """Lines ``<case>: <reason>`` with those of one reason as a single line where they are many.

    Args:
        problems: the lines; the name of the case may be part of its reason, too.
        cases: number of cases that were looked at.
    """
    groups: dict[str, list[str]] = {}
    for line in problems:
        case, colon, reason = line.partition(": ")
        groups.setdefault(reason.replace(case, "CASE") if colon and case else line, []).append(line)
    told = []
    for reason, lines in groups.items():
        if len(lines) < _MANY:
            told += lines
        else:
            first = ", ".join(line.partition(": ")[0] for line in lines[:3])
            told.append(f"{len(lines)} of {cases} cases: {reason}; first: {first}")
    return told


def raise_all(
    problems: Sequence[str],
    error: type[SamsegError],
    heading: str,
    *,
    most: int = MOST_LINES,
    cases: int | None = None,
) -> None:
    """Raise one ``error`` that lists every problem, or return when there is none.

    Args:
        problems: one line each, in the order to be shown; further lines of one are moved in.
        error: class to raise.
        heading: first line; the number of problems is put behind it.
        most: problems to be shown; fewer where the heading tells the reason and the rest would hide it.
        cases: number of cases that were looked at. Lines are then ``<case>: <reason>``, and a reason that many cases
            share is told once (``by_reason``).
    """
    if problems:
        told = problems if cases is None else by_reason(problems, cases)
        shown = [problem.replace("\n", "\n    ") for problem in told[:most]]
        if len(shown) < len(told):
            shown.append(f"... and {len(told) - len(shown)} more")
        lines = "\n".join(f"  - {problem}" for problem in shown)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise error(f"{heading} ({count}):\n{lines}")
