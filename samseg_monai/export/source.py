"""What is exported: the network of a bundle or of a run, with its trained weights, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from samseg_monai.bundles.door import literal, open_bundle, own_errors
from samseg_monai.checkpoints import Network, load_trained
from samseg_monai.errors import BundleError, WeightsError
from samseg_monai.files import read_json
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
        kind: of the prompts that it was trained with: box, points, both.
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
    kind: str = "box"

    @property
    def warning(self) -> str | None:
        """What must be said wherever these weights go: that they are not SAM's."""
        if self.base_sha256 == RANDOM and self.network.spec.name != "no SAM":
            return "random base weights: predictions are noise"
        return "pico, not SAM" if self.network.spec.name == "pico" else None


def read_source(path: str | Path, *, sam_checkpoint: str | None = None, trust: bool = False) -> Source:
    """Build the network of a bundle or run and load its weights.

    Args:
        path: folder or ZIP of a bundle (its own weights, else SAM's base weights where nothing was trained), or
            ``output_dir`` of a run (its adapter on SAM's base weights).
        sam_checkpoint: base weights, where they are not found by name (see ``find_weights``).
        trust: see ``open_bundle``, whose errors this raises, too.

    Raises:
        CheckpointError, WeightsError: nothing was trained, or weights are absent or do not fit.
    """
    with open_bundle(path, trust=trust) as opened:
        opened.check()
        parser = opened.parser()
        with own_errors():
            network: Network = parser.get_parsed_content("network_def")
        loaded = load_trained(network, checkpoint=opened.checkpoint, sam_checkpoint=sam_checkpoint)
        base_sha256 = network.base_sha256
        if opened.checkpoint is not None and opened.checkpoint.is_file():  # a full model: its card knows its base
            known = opened.card.get("base_sha256")
            base_sha256 = known if isinstance(known, str) else None
        if opened.checkpoint is not None:  # whose card tells the spacing that was trained on
            parser["checkpoint"] = literal(str(opened.checkpoint))
        config, metadata = parser.get(), opened.config("metadata")
        uses = read_json(metadata, BundleError, "metadata").get("intended_use") if metadata.is_file() else None
        return Source(
            network,
            name=opened.name,
            base_sha256=base_sha256,
            base=_base_file(network, sam_checkpoint, base_sha256),
            classes=tuple(config.get("classes", ())),
            scans=tuple(config.get("scans", ())),
            transforms=[t for key in TRANSFORMS for t in _described(parser, key, config.get(key))],
            intended_use=uses,
            kind="box" if opened.settings is None else opened.settings.run.prompt.kind,
            loaded=loaded.replace(f"{opened.root}/", f"{path}: "),
        )


def _base_file(network: Network, sam_checkpoint: str | None, sha256: str | None) -> Path | None:
    """The file with this hash, if it is where base weights are looked for; nothing is downloaded."""
    if sha256 in (None, RANDOM):
        return None
    try:
        path = find_weights(network.spec.name, sam_checkpoint, download=False)
    except WeightsError:
        return None
    return path if path.is_file() and sha256_of(path) == sha256 else None


def _described(parser: ConfigParser, name: str, transforms: Any) -> list[dict[str, Any]]:
    """The transforms of a config as components with their values; those of ours that choose one tell which."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate(transforms if isinstance(transforms, list) else ()):
        transform = parser.get_parsed_content(f"{name}::{number}")
        own = getattr(transform, "described", None)
        if transform is not None:  # it is None where a sender's JSON has it switched off
            found += [_resolved(parser, f"{name}::{number}", value)] if own is None else own
    return found


def _resolved(parser: ConfigParser, name: str, value: Any) -> Any:
    """``value``, found in a config at ``name``, with expressions evaluated."""
    if isinstance(value, dict):
        return {k: _resolved(parser, f"{name}::{k}", v) for k, v in value.items() if k != "_disabled_"}
    if isinstance(value, list):
        return [_resolved(parser, f"{name}::{i}", v) for i, v in enumerate(value)]
    if isinstance(value, str) and value.startswith(("$", "@")):
        found = parser.get_parsed_content(name)
        return found if isinstance(found, (bool, int, float, str, list, tuple, dict, type(None))) else str(found)
    return value
