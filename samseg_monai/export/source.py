"""What is exported: the network of a bundle or of a run, with its trained weights, and what is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from samseg_monai.bundles import find_checkpoint, verify_sums
from samseg_monai.bundles.record import RECORD, bundle_name
from samseg_monai.checkpoints import CARD, Network, load_trained, read_card
from samseg_monai.errors import BundleError, WeightsError
from samseg_monai.sam.weights import RANDOM, find_weights, sha256_of

TRANSFORMS = ("orient_transforms", "volume_transforms", "store_transforms", "resize_transforms")


@dataclass(frozen=True)
class Source:
    """A trained network and what is known of it.

    Args:
        network: with its weights, on the CPU.
        name: of the bundle.
        base_sha256: of SAM's weights that the training started from; "random", or None where nothing tells.
        base: that file, where it is at hand.
        classes, scans: names, in the order of the network's maps and channels.
        transforms: JSON of the transforms between file and network, with the bundle's values in place.
        intended_use: as the bundle states it.
        loaded: one line saying which files the weights came from.
    """

    network: Network
    name: str = "network"
    base_sha256: str | None = None
    base: Path | None = None
    classes: tuple[str, ...] = ()
    scans: tuple[str, ...] = ()
    transforms: list[dict[str, Any]] = field(default_factory=list)
    intended_use: str | None = None
    loaded: str = ""

    @property
    def warning(self) -> str | None:
        """What must be said wherever these weights go: that they are not SAM's."""
        if self.base_sha256 == RANDOM and self.network.spec.name != "no SAM":
            return "random base weights: predictions are noise"
        return "pico, not SAM" if self.network.spec.name == "pico" else None


def read_source(folder: str | Path, *, sam_checkpoint: str | None = None) -> Source:
    """Build the network of a bundle or run and load its weights.

    Args:
        folder: of a bundle (``models/model.pt``, else SAM's base weights where nothing was trained), or ``output_dir``
            of a run (its adapter on SAM's base weights).
        sam_checkpoint: base weights, where they are not found by name (see ``find_weights``).

    Raises:
        BundleError: neither of the two.
        CheckpointError, WeightsError: nothing was trained, or weights are absent or do not fit.
    """
    folder = Path(folder)
    root = folder / RECORD if (folder / RECORD).is_dir() else folder
    path = root / "configs" / "inference.json"
    if not path.is_file():
        raise BundleError(
            f"{folder}: no configs/inference.json in it; give the folder of a bundle, or output_dir of a run"
        )
    verify_sums(root)
    parser = ConfigParser()
    parser.read_config(str(path))
    network = parser.get_parsed_content("network_def")
    checkpoint = find_checkpoint(str(folder), str(root))
    loaded = load_trained(network, checkpoint=checkpoint, sam_checkpoint=sam_checkpoint)
    base_sha256 = network.base_sha256
    if checkpoint is not None and Path(checkpoint).is_file():  # a full model: the card beside it knows its base
        models = Path(checkpoint).parent
        base_sha256 = read_card(models).get("base_sha256") if (models / CARD).is_file() else None
    config, metadata = parser.get(), _metadata(path)
    return Source(
        network,
        name=bundle_name(path.parent),
        base_sha256=base_sha256,
        base=_base_file(network, sam_checkpoint, base_sha256),
        classes=tuple(config.get("classes", ())),
        scans=tuple(config.get("scans", ())),
        transforms=[t for key in TRANSFORMS for t in _described(parser, key, config.get(key, []))],
        intended_use=metadata.get("intended_use"),
        loaded=loaded,
    )


def _metadata(config: Path) -> dict[str, Any]:
    path = config.with_name("metadata.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _base_file(network: Network, sam_checkpoint: str | None, sha256: str | None) -> Path | None:
    """The file with this hash, if it is where base weights are looked for; nothing is downloaded."""
    if sha256 in (None, RANDOM):
        return None
    try:
        path = find_weights(network.spec.name, sam_checkpoint, download=False)
    except WeightsError:
        return None
    return path if path.is_file() and sha256_of(path) == sha256 else None


def _described(parser: ConfigParser, name: str, transforms: list[Any]) -> list[dict[str, Any]]:
    """The transforms of a config as components with their values; those of ours that choose one tell which."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate(transforms):
        transform = parser.get_parsed_content(f"{name}::{number}")
        own = getattr(transform, "described", None)
        found += [_resolved(parser, f"{name}::{number}", value)] if own is None else own
    return found


def _resolved(parser: ConfigParser, name: str, value: Any) -> Any:
    """``value``, found in a config at ``name``, with expressions evaluated."""
    if isinstance(value, dict):
        return {k: _resolved(parser, f"{name}::{k}", v) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(parser, f"{name}::{i}", v) for i, v in enumerate(value)]
    if isinstance(value, str) and value.startswith(("$", "@")):
        found = parser.get_parsed_content(name)
        return found if isinstance(found, (bool, int, float, str, list, tuple, dict, type(None))) else str(found)
    return value
