"""Run the command line in this process."""

import sys

import pytest

from samseg_monai import cli


def samseg(monkeypatch, *words: object) -> int:
    """Run ``samseg`` with these words and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)
