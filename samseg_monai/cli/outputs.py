"""What a command writes: where, checked before its work, which would be lost otherwise; and how much it tells."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

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


FIGURES = Annotated[
    Path | None,
    typer.Option("--figures", callback=folder_to_write, help="folder that also gets every figure as SVG and PNG"),
]


@contextmanager
def briefly() -> Iterator[None]:
    """Tell on stderr how far a run is and what this package warns of, and of the libraries their errors alone."""
    import monai.bundle  # noqa: F401  its loggers have handlers of their own

    from samseg_monai.data.files.case_list import PROGRESS

    def wanted(record: logging.LogRecord) -> bool:
        least = logging.WARNING if record.name.partition(".")[0] == "samseg_monai" else logging.ERROR
        return record.levelno >= least or record.name == PROGRESS.name

    console = logging.StreamHandler()
    console.setFormatter(_Brief())
    console.addFilter(wanted)
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    levels = {logger: logger.level for logger in [*known, PROGRESS]}
    for logger in known:
        if logger.handlers and logger.name.partition(".")[0] != "samseg_monai":
            logger.setLevel(logging.ERROR)
    PROGRESS.setLevel(logging.INFO)
    others = [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]
    for handler in others:  # of a workflow that ran before in this process
        logging.root.removeHandler(handler)
    logging.root.addHandler(console)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.removeHandler(console)
        for handler in others:
            logging.root.addHandler(handler)
        for logger, level in levels.items():
            if logger.level != level:  # each change makes logging forget what it knows of all loggers
                logger.setLevel(level)


class _Brief(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = record.getMessage()
        return told if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {told}"
