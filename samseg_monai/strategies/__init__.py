"""Strategies: how SAM learns. In JSON the dotted path of the class is the registry, in Python its short name is."""

from __future__ import annotations

from typing import Any

from samseg_monai.strategies.adapter import Adapter
from samseg_monai.strategies.base import Scratch, Segmenter, Strategy, ZeroShot
from samseg_monai.strategies.fact import FacT
from samseg_monai.strategies.ladder import Ladder
from samseg_monai.strategies.lora import LoRA
from samseg_monai.strategies.selective import Selective
from samseg_monai.strategies.ssf import SSF

PROMPTS = ["sam.prompt_encoder"]
# name -> class and what is not its default, as in the recipes of the same names (where LoRA has rank 64)
STRATEGIES: dict[str, tuple[type[Strategy], dict[str, Any]]] = {
    "zero_shot": (ZeroShot, {}),
    "lora": (LoRA, {}),
    "lora_late_50": (LoRA, {"last": 0.5}),
    "lora_late_25": (LoRA, {"last": 0.25}),
    "lora_late_8": (LoRA, {"last": 0.08}),
    "samed": (LoRA, {"decoder": "samed"}),
    "h_sam": (LoRA, {"rank": 5, "decoder": "hierarchical"}),
    "adapter": (Adapter, {}),
    "adaptformer": (Adapter, {"place": "parallel", "scale": 0.1}),
    "medsa": (Adapter, {"place": "both", "scale": 0.1, "depth": 4}),
    "ssf": (SSF, {}),
    "fact": (FacT, {}),
    "ladder": (Ladder, {}),
    "ladder_paper": (Ladder, {"decoder": "upscaling", "masks": "random"}),
    "cnn_only": (Ladder, {"mix": "side", "decoder": "upscaling", "masks": "random"}),
    "sam_only": (Ladder, {"mix": "sam", "decoder": "upscaling", "masks": "random"}),
    "full": (Selective, {"patterns": ["sam"], "frozen": PROMPTS, "name": "full"}),
    "decoder": (Selective, {"patterns": ["sam.mask_decoder"], "name": "decoder"}),
    "attention": (Selective, {"patterns": ["<attention>"], "name": "attention"}),
    "norm": (Selective, {"patterns": ["<norm>"], "frozen": PROMPTS, "name": "norm"}),
    "bias": (Selective, {"patterns": ["*.bias"], "frozen": PROMPTS, "name": "bias"}),
}

__all__ = [
    "SSF",
    "STRATEGIES",
    "Adapter",
    "FacT",
    "Ladder",
    "LoRA",
    "Scratch",
    "Segmenter",
    "Selective",
    "Strategy",
    "ZeroShot",
]
