"""How strategies, prompt sources and the gate are called in tables and on the page."""

from __future__ import annotations

BOX_ELLIPSE = "box_ellipse"
ZERO_SHOT = "zero_shot"
LORA = "lora"
LADDER = "ladder"
NOT_RECORDED = "not recorded"
PICO_LABEL = "pico, not SAM"
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


def gate_text(gate: float) -> str:
    """The gate of the ladder, ``g * SAM + (1 - g) * CNN`` (Chai et al. 2023, equation 3), for readers."""
    return f"gate g = {gate:.2f} (1 = SAM alone, 0 = CNN alone)"
