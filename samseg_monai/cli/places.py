"""Paths and pairs of a command line, looked at before anything large is imported."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.errors import ConfigError, DataError, raise_all

Overlay = Annotated[
    list[str] | None, typer.Option(help="further config of the bundle whose values count, such as demo.json")
]
BaseWeights = Annotated[str | None, typer.Option(help="base weights, if not found by name")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")]


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


def device_of(name: str | None) -> str | None:
    """The expression of a device for a config. Raises ConfigError where there is none of this name."""
    if name is None:
        return None
    import torch

    try:
        return f"$torch.device({str(torch.device(name))!r})"
    except RuntimeError as error:
        raise ConfigError(f"--device: got {name!r}; give cpu, cuda or cuda:1") from error


def overlays(configs: Path, names: Sequence[str]) -> list[Path]:
    """Files in the folder ``configs`` of a bundle that ``--overlay`` names, with ``.json`` or without.

    Raises:
        ConfigError: the bundle has no such config; all are listed.
    """
    known = {path.stem: path for path in sorted(configs.glob("*.json")) if path.stem not in ("metadata", "settings")}
    problems = [f"got {name!r}" for name in names if Path(name).stem not in known]
    raise_all(problems, ConfigError, f"--overlay: this bundle's configs are {', '.join(known)}")
    return [known[Path(name).stem] for name in names]


def scans_given(options: Sequence[str], *, text: bool = False) -> dict[str, str]:
    """Scan -> text of options ``--scan NAME=TEXT``.

    Args:
        options: as they were given.
        text: there must be one; else it may be left out, and is then empty.

    Raises:
        ConfigError: no such pair, or a name twice; all are listed.
    """
    pairs = [
        (name.strip(), equals, words.strip()) for name, equals, words in (given.partition("=") for given in options)
    ]
    names = [name for name, _, _ in pairs]
    problems = [
        f"{given!r} is no NAME=TEXT"
        for given, (name, equals, words) in zip(options, pairs, strict=True)
        if not name or ((text or equals) and not words)
    ]
    problems += [f"{name} is given twice" for name in sorted(set(names)) if names.count(name) > 1]
    raise_all(problems, ConfigError, "--scan: expected the name of a scan and a text, such as t1c=MPRAGE")
    return {name: words for name, _, words in pairs}


def overrides_of(words: Sequence[str]) -> dict[str, Any]:
    """``["--lr", "0.1", "--strategy::rank=4"]`` to ``{"lr": 0.1, "strategy::rank": 4}``; what is no value is text.

    Raises:
        ConfigError: a word that is neither a key nor the value of one.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or not (equals or rest):
            raise ConfigError(f"got {key!r}; overrides are pairs such as --batch_size 4")
        value = value if equals else rest.pop(0)
        try:
            found[key[2:]] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key[2:]] = value
    return found
