"""Adapter layers: small trainable parts that share the frozen tensors of the layer they take over.

Layers only: they know torch and nothing of SAM, strategies or files.
"""

from __future__ import annotations

from samseg_monai.adapters.ladder import FeatureMap, GatedSide, ResNetSide
from samseg_monai.adapters.lora import DoRALinear, LoRALinear, merge_all

__all__ = ["DoRALinear", "FeatureMap", "GatedSide", "LoRALinear", "ResNetSide", "merge_all"]
