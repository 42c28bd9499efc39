"""Checks of options that say where a command writes: before its work, which would be lost otherwise."""

from __future__ import annotations

from pathlib import Path

from samseg_monai.errors import ConfigError
from samseg_monai.faults import output_problem


def file_to_write(path: Path | None) -> Path | None:
    """Callback of an option that names a file. Raises ConfigError where none can be written there."""
    return _checked(path, folder=False)


def folder_to_write(path: Path | None) -> Path | None:
    """Callback of an option that names a folder. Raises ConfigError where nothing can be written into it."""
    return _checked(path, folder=True)


def _checked(path: Path | None, *, folder: bool) -> Path | None:
    problem = None if path is None else output_problem(path, folder=folder)
    if problem:
        raise ConfigError(f"output: {problem}")
    return path
