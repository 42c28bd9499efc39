"""Adapter layers: small trainable parts that share the frozen tensors of the layer they take over.

Layers only: they know torch and nothing of SAM, strategies or files.
"""

from __future__ import annotations

from samseg_monai.adapters.bottleneck import BottleneckLinear
from samseg_monai.adapters.hierarchical import HierarchicalDecoder
from samseg_monai.adapters.ladder import FeatureMap, GatedSide, ResNetSide
from samseg_monai.adapters.lora import DoRALinear, FacTLinear, Factors, LoRALinear
from samseg_monai.adapters.merging import ADAPTERS, merge_all
from samseg_monai.adapters.scale_shift import ScaleShift

__all__ = [
    "ADAPTERS",
    "BottleneckLinear",
    "DoRALinear",
    "FacTLinear",
    "Factors",
    "FeatureMap",
    "GatedSide",
    "HierarchicalDecoder",
    "LoRALinear",
    "ResNetSide",
    "ScaleShift",
    "merge_all",
]
