"""Paths of a command line, looked at before anything large is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from samseg_monai.errors import DataError, raise_all


def check_places(command: str, given: Mapping[str, Path | None], expected: str = "") -> None:
    """Refuse paths that lead nowhere.

    Args:
        command: name of the command, for the message.
        given: argument or option -> its path; None was not given.
        expected: what may be given, for the message.

    Raises:
        DataError: no such file or folder; all are listed.
    """
    problems = []
    for name, path in given.items():
        if path is not None and not os.path.exists(path):  # no error for a name that no file can have
            where = "" if path.is_absolute() else f" ({path.absolute()})"
            problems.append(f"{name}: {path}: no such file or folder{where}")
    raise_all(problems, DataError, f"{command}: paths that lead nowhere{expected}")
