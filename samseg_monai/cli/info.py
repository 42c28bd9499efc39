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
        told = f"not here; {file.name}, {file.size / 1e6:,.0f} MB"
        if place:
            size = place.stat().st_size
            wrong = f" ({size:,} bytes, but the published file has {file.size:,}: it is refused)"
            told = f"{place}{wrong if size != file.size else ''}"
        yield f"  {variant:8} {told}"
    yield "  pico     in the package (a toy of 2 million parameters for demos and tests)"
    yield f"{ENVIRONMENT}: {os.environ.get(ENVIRONMENT) or 'not set'}"
    cache = cache_folder()
    used = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    disk = next(place for place in (cache, *cache.parents) if place.exists())
    yield f"cache: {cache}, {used / 1e6:,.0f} MB used, {shutil.disk_usage(disk).free / 1e9:,.0f} GB free"
    yield "shell completion: samseg --install-completion"
