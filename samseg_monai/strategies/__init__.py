"""Strategies: how SAM learns. The dotted path of the class in JSON is the registry."""

from __future__ import annotations

from samseg_monai.strategies.base import Scratch, Segmenter, Strategy, ZeroShot
from samseg_monai.strategies.ladder import Ladder
from samseg_monai.strategies.lora import LoRA
from samseg_monai.strategies.selective import Selective

__all__ = ["Ladder", "LoRA", "Scratch", "Segmenter", "Selective", "Strategy", "ZeroShot"]
