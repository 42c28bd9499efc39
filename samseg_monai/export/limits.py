"""What cannot be exported, and why: all reasons of all formats at once."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from samseg_monai.checkpoints import Network
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.export.official import official_shapes
from samseg_monai.networks import SamSegmenter

FORMATS = ("pth", "torch", "onnx")
LEGACY = "ckpt_export"  # MONAI's command, not ours
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def obstacles(network: Network) -> dict[str, list[str]]:
    """Reasons why ``network`` cannot be exported, by format; an empty list means that it can.

    The formats are those of ``samseg export`` (pth, torch, onnx) and, as ``ckpt_export``, MONAI's TorchScript command.
    """
    parts, tracing, absent = _against_parts(network), [], []
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        absent = [f"packages {', '.join(missing)} are not installed: pip install 'samseg-monai[onnx]'"]
    if network.prompt != "none":
        tracing = [
            "box prompts: MONAI's ckpt_export traces a network with one random image, so boxes are no input of the "
            "result, and which slices have a box is decided in Python, which tracing does not record"
        ]
    return {"pth": _against_pth(network), "torch": parts, "onnx": parts + absent, LEGACY: tracing}


def refuse(network: Network, fmt: str) -> None:
    """Raise BundleError with all reasons against ``fmt`` and the formats that are possible instead."""
    found = obstacles(network)
    possible = [name for name in FORMATS if not found[name]]
    instead = f"possible: {', '.join(possible)}" if possible else "no other format is possible either"
    raise_all(found[fmt], BundleError, f"format {fmt} cannot hold this network; {instead}")


def mergeable(module: nn.Module) -> list[str]:
    """Names of the adapter layers below ``module`` that can be folded into a plain layer."""
    return [name for name, layer in module.named_modules() if name and callable(getattr(layer, "merge", None))]


def _against_pth(network: Network) -> list[str]:
    if not isinstance(network, SamSegmenter):
        return [f"{type(network.net).__name__}: there is no SAM in it, whose layout the file would have"]
    reasons = _against_best(network)
    if network.side is not None:
        side = type(getattr(network.side, "net", network.side)).__name__
        reasons.append(f"side network {side}: no layer of SAM can take in what it adds to SAM's embedding")
    if network.num_classes > 1:
        masks = network.channels_out
        fit = "would fit, but be taken for" if masks == 4 else "have other shapes than"
        reasons.append(
            f"{network.num_classes} classes: the {masks} masks, one per class and the background, {fit} SAM's 4 "
            "(one object, and three guesses at its parts)"
        )
        return reasons  # its tensors cannot be compared one by one
    folded = tuple(f"{name}." for name in mergeable(network.sam))
    foreign = [
        name for name in network.sam.state_dict().keys() - official_shapes(network.spec) if not name.startswith(folded)
    ]
    if foreign:
        reasons.append(
            f"{type(network.strategy).__name__}: {len(foreign)} tensors that SAM does not have and that cannot be "
            f"merged into its layers (first: {min(foreign)})"
        )
    return reasons


def _against_parts(network: Network) -> list[str]:
    if not isinstance(network, SamSegmenter):
        boxes = f"boxes '{network.boxes}': only networks without boxes, or with SAM, have a part that takes them"
        return [] if network.boxes == "none" else [boxes]
    reasons, taps = _against_best(network), tuple(getattr(network.side, "taps", ()))
    if taps:
        side = type(network.side).__name__
        reasons.append(f"side network {side}: it reads blocks {taps}, which the encoder does not hand out")
    return reasons


def _against_best(network: SamSegmenter) -> list[str]:
    best = "masks 'best': the file would give the single mask, not the one of highest quality; set masks to 'single'"
    return [] if network.masks == "single" else [best]
