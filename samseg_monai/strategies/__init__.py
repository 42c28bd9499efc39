"""Strategies: how SAM learns. In JSON the dotted path of the class is the registry, in Python its short name is."""

from __future__ import annotations

from typing import Any

from samseg_monai.strategies.base import Scratch, Segmenter, Strategy, ZeroShot
from samseg_monai.strategies.ladder import Ladder
from samseg_monai.strategies.lora import LoRA
from samseg_monai.strategies.selective import Selective

PROMPTS = ["sam.prompt_encoder"]
# name -> class and what is not its default, as in the recipes of the same names (where LoRA has rank 64)
STRATEGIES: dict[str, tuple[type[Strategy], dict[str, Any]]] = {
    "zero_shot": (ZeroShot, {}),
    "lora": (LoRA, {}),
    "ladder": (Ladder, {}),
    "ladder_paper": (Ladder, {"decoder": "upscaling", "masks": "random"}),
    "cnn_only": (Ladder, {"mix": "side", "decoder": "upscaling", "masks": "random"}),
    "sam_only": (Ladder, {"mix": "sam", "decoder": "upscaling", "masks": "random"}),
    "full": (Selective, {"patterns": ["sam"], "frozen": PROMPTS, "name": "full"}),
    "decoder": (Selective, {"patterns": ["sam.mask_decoder"], "name": "decoder"}),
    "norm": (Selective, {"patterns": ["<norm>"], "frozen": PROMPTS, "name": "norm"}),
    "bias": (Selective, {"patterns": ["*.bias"], "frozen": PROMPTS, "name": "bias"}),
}

__all__ = ["STRATEGIES", "Ladder", "LoRA", "Scratch", "Segmenter", "Selective", "Strategy", "ZeroShot"]
