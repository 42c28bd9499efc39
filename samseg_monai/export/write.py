"""Export a network: refuse what cannot be, write, read back, compare, and only then hand the files out."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samseg_monai.adapters.lora import merge_all
from samseg_monai.checkpoints import Network
from samseg_monai.errors import ConfigError
from samseg_monai.export import card, programs
from samseg_monai.export.limits import FORMATS, mergeable, refuse
from samseg_monai.export.official import official_sam, official_state
from samseg_monai.export.parity import (
    TOLERANCE,
    Difference,
    compare_networks,
    compare_parts,
    compare_predictor,
    require,
)
from samseg_monai.export.parts import parts_of
from samseg_monai.export.source import Source
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.weights import load_sam_weights, sha256_of

SUFFIX = {"torch": "pt2", "onnx": "onnx"}


@dataclass(frozen=True)
class Exported:
    """Files that were written, the card among them, and how far each is from its network."""

    files: list[Path]
    differences: list[Difference]


def export_network(source: Source, fmt: str, output: str | Path, *, size: tuple[int, int] | None = None) -> Exported:
    """Write ``source`` in one format, checked.

    Everything is written to a temporary folder, read back and compared with the network in float32 on the CPU; only
    files that pass are moved to ``output``. ``source.network`` stays as it is.

    Args:
        fmt: "pth": ``sam_<variant>.pth``, plain SAM in the official layout. "torch": one .pt2 per part. "onnx": one
            .onnx per part. ``export.json`` beside them says what they are and how to use them.
        output: folder; files of the same names are replaced.
        size: height and width of the slices of a rectangular network (torch, onnx).

    Raises:
        BundleError: the format cannot hold this network (all reasons), or the files do not compute the same.
        ConfigError: unknown format, a size that does not fit, or an output that is a file.
    """
    if fmt not in FORMATS:
        raise ConfigError(f"format: got {fmt!r}; choose one of {', '.join(FORMATS)}")
    refuse(source.network, fmt)
    if fmt == "pth" and size is not None:
        raise ConfigError(f"size: got {size}, but the official layout has none; leave it out")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    network = _exact(source.network)
    known = card.facts(source)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as temporary:
        folder = Path(temporary)
        if isinstance(network, SamSegmenter) and fmt == "pth":
            described, differences = _write_pth(source, network, folder)
        else:
            described, differences = _write_parts(network, fmt, folder, known, size)
        require(differences)
        _write_card(source, fmt, folder, known, described, differences)
        files = []
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
            files.append(output / path.name)
    return Exported(files, differences)


def _exact(network: Network) -> Network:
    """A copy as files are compared with: on the CPU, in evaluation mode, in float32 throughout, without gradients."""
    exact = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    if isinstance(exact, SamSegmenter):
        exact.autocast = None
    return exact


def _write_pth(source: Source, network: SamSegmenter, folder: Path) -> tuple[dict[str, Any], list[Difference]]:
    spec, allowed = network.spec, TOLERANCE["pth"]
    path = folder / f"sam_{spec.name}.pth"
    torch.save(official_state(network, source.base), path)
    sam = official_sam(spec, path)  # strictly: other names or shapes would raise here
    if network.image_size == spec.image_size:
        differences = [compare_predictor(network, sam, allowed)]
    else:
        again = SamSegmenter(
            spec,
            image_size=network.image_size,
            scans=network.scans,
            scan_mode=network.scan_mode,  # type: ignore[arg-type]
            input_scale=network.input_scale,  # type: ignore[arg-type]
            prompt=network.prompt,  # type: ignore[arg-type]
            rectangular=network.sam.rectangular,
        )
        load_sam_weights(again.sam, path)
        what = f"read back at image_size {network.image_size}"
        differences = [compare_networks(network, again, what, allowed)]
    return {path.name: {"use": card.use_of_pth(source)}}, differences


def _write_parts(
    network: Network, fmt: str, folder: Path, known: dict[str, Any], size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[Difference]]:
    plain = network
    if mergeable(network):
        plain = copy.deepcopy(network)
        merge_all(plain)
    parts = parts_of(plain, size)
    texts = card.as_texts(known)
    calls = {}
    for part in parts:
        path = folder / f"{part.name}.{SUFFIX[fmt]}"
        program = programs.to_program(part)
        if fmt == "torch":
            programs.write_program(program, path, texts)
            calls[part.name] = programs.read_program(path)
        else:
            programs.write_onnx(program, part, path, texts)
            calls[part.name] = programs.read_onnx(path)
    return card.parts_table(parts, SUFFIX[fmt]), compare_parts(network, parts, calls, TOLERANCE[fmt])


def _write_card(
    source: Source,
    fmt: str,
    folder: Path,
    known: dict[str, Any],
    described: dict[str, Any],
    differences: Sequence[Difference],
) -> None:
    files = {
        path.name: {"sha256": sha256_of(path), **described.get(path.name, {})} for path in sorted(folder.iterdir())
    }
    content = {
        "format_version": 1,
        "format": fmt,
        **known,
        "torch": str(torch.__version__),
        "files": files,
        "preprocessing": card.preprocessing(source),
        "postprocessing": card.postprocessing(source),
        "parity": [asdict(difference) for difference in differences],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / programs.CARD).write_text(text, encoding="utf-8")
