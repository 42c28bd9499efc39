"""Errors that a user can act on: what went wrong, what was got, how to mend it."""

from __future__ import annotations

from collections.abc import Sequence


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


def own_cause(error: BaseException) -> SamsegError | None:
    """The error of ours behind whatever a library has wrapped it in, perhaps ``error`` itself; None without one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SamsegError):
        cause = cause.__cause__ or cause.__context__
    return cause


def reason_of(error: BaseException) -> str:
    """What went wrong first, in one line: libraries wrap the cause once per level."""
    while error.__cause__ is not None and not isinstance(error, SamsegError):
        error = error.__cause__
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text if isinstance(error, SamsegError) else f"{type(error).__name__}: {text}"


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
