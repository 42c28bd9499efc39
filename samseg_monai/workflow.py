"""Run a bundle's workflow in this process and show the command that does the same from a shell."""

from __future__ import annotations

import gc
import os
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from samseg_monai.errors import BundleError

_COLLECTING = gc.get_threshold()


def import_quickly() -> None:
    """Let Python look through all objects for what nobody holds a hundred times less often, until a workflow runs.

    Importing MONAI and PyTorch makes two million objects, all of which stay: looking through them again and again is a
    quarter of its time.
    """
    gc.set_threshold(*_COLLECTING[:2], 100 * _COLLECTING[2])


def shell_command(configs: Sequence[str | Path], overrides: dict[str, Any]) -> str:
    """Return the ``python -m monai.bundle run`` line for config files (later ones override) and override values."""
    names = ",".join(f"'{config}'" for config in configs)
    files = shlex.quote(str(configs[0])) if len(configs) == 1 else f'"[{names}]"'
    words = ["python", "-m", "monai.bundle", "run", "--config_file", files]
    for key, value in overrides.items():
        words += [f"--{key}", shlex.quote(value if isinstance(value, str) else repr(value))]
    return " ".join(words)


def from_here(line: str) -> str:
    """A shell line whose paths below the current folder are relative to it, since pages travel."""
    return line.replace(f"{Path.cwd()}{os.sep}", "")


def run_workflow(
    configs: Sequence[str | Path], overrides: dict[str, Any], *, echo: bool = True, logs: bool = True
) -> str:
    """Run config files of a bundle with ``overrides`` and return the equivalent shell command.

    ``evaluate.json`` changes the ``inference.json`` beside it, which is run before it. Without ``logs`` the bundle's
    ``logging.conf`` is left out: the caller says what is logged.

    Raises:
        BundleError: a config file does not exist.
        ConfigError: overrides of what the configs do not have.
        SamsegError: what our code raised, wherever MONAI wrapped it.
    """
    files = config_files(configs)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise BundleError(f"no such config: {', '.join(missing)}; give the folder of a bundle")
    from samseg_monai.bundles.door import literal, own_errors
    from samseg_monai.bundles.running import configured
    from samseg_monai.settings import PLACES

    overrides = {key: literal(value, place=key in PLACES) for key, value in overrides.items()}
    configured(files, overrides)
    command = shell_command(files, overrides)
    if echo:
        typer.echo(f"$ {command}", err=True)
    from monai.bundle import run

    gc.set_threshold(*_COLLECTING)
    with own_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="parsing config_file")  # "only from a source you trust": from us
        how: dict[str, Any] = {} if logs else {"logging_file": False}
        run(config_file=[str(file) for file in files], **how, **overrides)
    return command


def config_files(configs: Sequence[str | Path]) -> list[Path]:
    """The files that ``monai.bundle run`` is given for ``configs``: before evaluate.json, what it changes."""

    def with_base(config: Path) -> list[Path]:
        base = config.with_name("inference.json")
        alone = config.name == "evaluate.json" and base not in map(Path, configs)
        return [base, config] if alone else [config]

    return [part for config in configs for part in with_base(Path(config))]
