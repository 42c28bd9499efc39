"""Errors that a user can act on: what went wrong, what was got, how to mend it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

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


def own_cause(error: BaseException) -> SamsegError | None:
    """The error of ours behind whatever a library has wrapped it in, perhaps ``error`` itself; None without one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SamsegError):
        cause = cause.__cause__ or cause.__context__
    return cause


def raise_all(problems: Sequence[str], error: type[SamsegError], heading: str, *, most: int = MOST_LINES) -> None:
    """Raise one ``error`` that lists every problem, or return when there is none.

    Args:
        problems: one line each, in the order to be shown; further lines of one are moved in.
        error: class to raise.
        heading: first line; the number of problems is put behind it.
        most: problems to be shown; fewer where the heading tells the reason and the rest would hide it.
    """
    if problems:
        shown = [problem.replace("\n", "\n    ") for problem in problems[:most]]
        if len(shown) < len(problems):
            shown.append(f"... and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  - {problem}" for problem in shown)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise error(f"{heading} ({count}):\n{lines}")
