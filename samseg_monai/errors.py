"""Errors that a user can act on: what went wrong, what was got, how to mend it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest


class SamsegError(Exception):
    """Base of every error that this package raises on purpose; its text is all a user needs to see."""


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


def own_cause(error: BaseException) -> SamsegError | None:
    """The error of ours behind whatever a library has wrapped it in, perhaps ``error`` itself; None without one.

    Of an error in a process of a DataLoader torch hands on the traceback as a text: the error is made of that again.
    """
    cause: BaseException | None = error
    while cause is not None:
        found = _OF_WORKER.search(str(cause)) if "in DataLoader worker process" in str(cause) else None
        kind = globals().get(found[1]) if found else None
        if found and isinstance(kind, type) and issubclass(kind, SamsegError):
            return kind(found[2].strip())
        if isinstance(cause, SamsegError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


MOST_LINES = 10  # of a list of tensors: what follows tells no more


def in_turn(*kinds: Sequence[str]) -> list[str]:
    """Problems of several kinds, one of each in turn: a list that is cut shows some of every kind."""
    return [problem for row in zip_longest(*kinds) for problem in row if problem is not None]


def raise_all(problems: Sequence[str], error: type[SamsegError], heading: str, *, most: int | None = None) -> None:
    """Raise one ``error`` that lists every problem, or return when there is none.

    Args:
        problems: one line each, in the order to be shown.
        error: class to raise.
        heading: first line; the number of problems is put behind it.
        most: lines to be shown where the heading tells the reason and the rest would hide it; None shows all.
    """
    if problems:
        shown = list(problems if most is None else problems[:most])
        if len(shown) < len(problems):
            shown.append(f"... and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  - {problem}" for problem in shown)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise error(f"{heading} ({count}):\n{lines}")
