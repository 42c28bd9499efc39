"""``samseg info``: what a bug report needs, and what a newcomer wants to know before the first command."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import typer


def info() -> None:
    """Show versions, devices, SAM's weights on this machine, and the cache. Nothing is downloaded."""
    for line in _lines():
        typer.echo(line)


def _lines() -> Iterator[str]:
    import torch

    import samseg_monai
    from samseg_monai.handlers.provenance import hardware, versions
    from samseg_monai.sam.weights import ENVIRONMENT, KNOWN, cache_folder, weights_folders

    found = versions()
    yield f"samseg-monai {samseg_monai.__version__} in {Path(samseg_monai.__file__).parent}"
    yield "versions: " + ", ".join(f"{name} {number or 'not installed'}" for name, number in found.items())
    machine = hardware()
    yield f"processor: {machine['cpu']}, {machine['cpu_cores']} cores, {machine['system']}"
    for number, name in enumerate(machine["gpus"]):
        yield f"GPU cuda:{number}: {name}, {torch.cuda.get_device_properties(number).total_memory / 1e9:.0f} GB"
    if not machine["gpus"]:
        yield f"GPU: none that PyTorch can use ({torch.__version__}); everything runs on the processor, slowly"
    yield "weights (hashes are checked when they are loaded):"
    for variant, file in KNOWN.items():
        place = next((folder / file.name for folder in weights_folders() if (folder / file.name).is_file()), None)
        told = f"{place}{_size(place, file.size)}" if place else f"not here; {file.name}, {file.size / 1e6:,.0f} MB"
        yield f"  {variant:8} {told}"
    yield "  pico     in the package (a toy of 2 million parameters for demos and tests)"
    yield f"{ENVIRONMENT}: {os.environ.get(ENVIRONMENT) or 'not set'}"
    cache = cache_folder()
    yield f"cache: {cache}, {_used(cache) / 1e6:,.0f} MB used, {_free(cache) / 1e9:,.0f} GB free"
    yield "shell completion: samseg --install-completion"


def _size(path: Path, expected: int) -> str:
    size = path.stat().st_size
    return "" if size == expected else f" ({size:,} bytes, but the published file has {expected:,}: it is refused)"


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free(folder: Path) -> int:
    """Bytes free where ``folder`` is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
