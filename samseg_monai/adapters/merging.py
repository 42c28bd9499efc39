"""Adapters folded into the layers that they were put on."""

from __future__ import annotations

from torch import nn

from samseg_monai.adapters.bottleneck import BottleneckLinear, DepthBranch
from samseg_monai.adapters.lora import Factors, LoRALinear
from samseg_monai.adapters.scale_shift import ScaleShift
from samseg_monai.errors import AdapterError

ADAPTERS = (LoRALinear, BottleneckLinear, DepthBranch, ScaleShift)  # each has ``enabled``


def merge_all(module: nn.Module) -> int:
    """Fold every adapter below ``module`` into its plain layer; returns how many there were.

    Raises:
        AdapterError: there is one that no linear layer can take in, a bottleneck; nothing was changed.
    """
    if any(isinstance(layer, BottleneckLinear) for layer in module.modules()):
        raise AdapterError(
            "merge: got a network with bottleneck adapters, which no layer of SAM can take in; use save_model"
        )
    merged = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merge())
            elif isinstance(child, ScaleShift):
                child.merge(parent)
            elif isinstance(child, Factors):  # of layers that are merged now
                delattr(parent, name)
                continue
            else:
                continue
            merged += 1
    return merged
