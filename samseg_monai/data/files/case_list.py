"""The cases of one prediction: those that are good, those that are not and why, and the run over the good ones."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.errors import DataError, behind, by_reason, raise_all
from samseg_monai.faults import output_problem
from samseg_monai.files import file_name

LOG = logging.getLogger(__name__)
PROGRESS = logging.getLogger("samseg_monai.progress")  # what a run without anything odd tells
PICTURE = "_overlay.png"  # ends the name of what is no result
SHOWN = 20  # names of one line in the log
_LOST = "no result of it was written"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no other case can be written either


@dataclass
class CaseList:
    """Cases of one prediction run.

    Attributes:
        good: items ``{"case", "image": path or [one path per scan]}``, with ``"boxes"`` (list) or ``"prompt"`` (file)
            when prompts were given; sorted by case. A path is a file, or the folder of a DICOM series.
        bad: case -> why it cannot be predicted.
        files: case -> one path per scan, or the single path that holds them all.
        passed: reason -> names of entries that are no cases.
        full: whether a result could not be written as the disk is full or read-only.
        notes: case -> what was warned of while it was worked on.
        watch: called with the name of a case that turns out bad in the run, and with None when the run is over.
        lost: why the table of the results is not there, or empty.
    """

    bad: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)
    passed: dict[str, list[str]] = field(default_factory=dict)
    full: bool = False
    notes: dict[str, list[str]] = field(default_factory=dict)
    watch: Callable[[str | None], None] | None = None
    lost: str = ""
    _items: list[dict[str, Any]] = field(default_factory=list)
    _called: dict[str, str] = field(default_factory=dict)  # what names of a case's files begin with -> case
    _failed: set[str] = field(default_factory=set)  # of the items those that turned out bad since they were asked for

    @property
    def good(self) -> list[dict[str, Any]]:
        if self._failed:
            self.good = [item for item in self._items if item["case"] not in self._failed]
        return self._items

    @good.setter
    def good(self, items: list[dict[str, Any]]) -> None:
        self._items, self._failed = items, set()

    def add(self, case: str, paths: list[Path]) -> None:
        """Add a case; a second one whose files have the same names would overwrite the first one's result, so it is
        refused."""
        case = case_name(case)
        other = self._called.setdefault(file_name(case, "_"), case)
        if other in self.files:
            same = "another case is called {} too" if other == case else "its results would be called like those of {}"
            self.bad[f"{paths[0].parent.name}/{case}"] = f"{same.format(other)} ({self.files[other][0]}); rename one"
        else:
            self.files[case] = paths

    def pass_over(self, reason: str, names: Iterable[str]) -> None:
        """Note entries that are no cases."""
        for name in names:
            self.passed.setdefault(reason, []).append(name)

    def note(self, case: str, notes: Iterable[str]) -> None:
        """Note warnings of a case, each once."""
        self.notes[case] = list(dict.fromkeys([*self.notes.get(case, ()), *notes]))

    def sort(self, results: Mapping[str, dict[str, Any] | str]) -> None:
        """Take what the check of each case gave, an item or a reason; DataError if no case is good."""
        for reason, names in self.passed.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            LOG.warning("passed over, %s: %s%s", reason, ", ".join(names[:SHOWN]), more)
        self.good = [result for result in results.values() if not isinstance(result, str)]
        self.bad |= {case: result for case, result in results.items() if isinstance(result, str)}
        if not self.good:
            self.refuse("no case can be predicted")
        for line in by_reason([f"{case}: {reason}" for case, reason in sorted(self.bad.items())], len(results)):
            LOG.error("will be skipped: %s", line)

    def run(self, evaluator: Any, folder: str | Path) -> None:
        """Let ``evaluator``, which tells of cases that fail (``handlers.CaseEvaluator``), predict the good cases.

        Args:
            evaluator: writes ``<case>...`` into ``folder``.
            folder: of the results, made if need be. A good case without a new file in it is bad.

        Raises:
            DataError: nothing can be written into ``folder``; told before the first case.
        """
        folder = Path(folder)
        if problem := output_problem(folder):
            raise DataError(f"no results can be written: {problem}")
        folder.mkdir(parents=True, exist_ok=True)
        before = _stamps(folder)
        try:
            evaluator.run()
            now = _stamps(folder)
            written = [name for name, stamp in now.items() if stamp != before.get(name) and not name.endswith(PICTURE)]
            names = {file_name(item["case"], "_") for item in self.good}
            found = {_owner(result, names) for result in written}
            for item in self.good:
                if file_name(item["case"], "_") not in found:
                    self._set_aside(item["case"], "not tried, as nothing more can be written" if self.full else _LOST)
        finally:
            if self.watch is not None:
                self.watch(None)

    def fail(self, case: str, reason: str, error: BaseException | None = None) -> bool:
        """Move a case to the bad ones, when it turns out in the run that it cannot be predicted.

        Returns: whether others can still be written: ``error`` is not that of a disk that is full or read-only.
        """
        self._set_aside(case, reason)
        causes = [] if error is None else behind(error, handled=False)
        self.full = self.full or any(isinstance(cause, OSError) and cause.errno in _FULL for cause in causes)
        if self.watch is not None:
            self.watch(case)
        return not self.full

    def _set_aside(self, case: str, reason: str) -> None:
        LOG.error("%s is not predicted: %s", case, reason)
        self._failed.add(case)
        self.bad[case] = reason

    def finish(self) -> None:
        """Tell how many cases are done; DataError naming every bad case, or without the table of the results.

        To be called last, when the good ones are done.
        """
        total, bad = len(self.good) + len(self.bad), sorted(self.bad)
        if bad:
            named = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
            raise DataError(
                f"{len(bad)} of {total} cases were not predicted, the others are done; why is told above: {named}"
            )
        if self.lost:
            raise DataError(f"the cases ({total}) were predicted, but {self.lost}")
        PROGRESS.info("%d of %d cases were predicted", len(self.good), total)

    def refuse(self, heading: str) -> None:
        """Raise DataError naming every bad case, if there is one."""
        problems = [f"{case}: {reason}" for case, reason in sorted(self.bad.items())]
        raise_all(problems, DataError, heading, cases=len(self.good) + len(self.bad))


def case_name(text: str) -> str:
    """``text``, of a file, folder or tag, as the name of a case: as it is where it is printable and no path."""
    return "".join(c if c.isprintable() and c not in "\\/" else "_" for c in text) or "_"


@contextmanager
def noted(case: str) -> Iterator[list[str]]:
    """Collect what this package warns of in this thread, without the name of the case in front.

    Whatever turns out about a case, wherever it does, stands beside its result then; the log tells it all the same.
    """
    _OURS.addHandler(_COLLECTOR)  # once: it stays, as other threads may be in its midst
    _HERE.case, _HERE.texts = case, []
    try:
        yield _HERE.texts
    finally:
        _HERE.texts = None


class _Collector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if (texts := getattr(_HERE, "texts", None)) is not None:
            texts.append(record.getMessage().removeprefix(f"{_HERE.case}: "))
        if logging.lastResort is not None and not logging.root.handlers and _OURS.handlers == [self]:
            logging.lastResort.handle(record)  # as logging does by itself where there is no handler at all


_OURS, _COLLECTOR, _HERE = logging.getLogger("samseg_monai"), _Collector(logging.WARNING), threading.local()


def _owner(result: str, names: Collection[str]) -> str:
    """The longest of ``names``, which end with _, that a result begins with; that of case a_b begins like one of a."""
    begins = (result[:end] for end in range(len(result), 0, -1) if result[end - 1] == "_")
    return next((begin for begin in begins if begin in names), "")


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """File -> its inode and time of change."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}
