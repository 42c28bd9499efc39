"""Trained networks in other formats, kept only if they compute the same.

SAM's own ``.pth``, ``torch.export``, ONNX, SAMed's ``.pth``, an adapter of peft.
"""

from __future__ import annotations

from samseg_monai.export.official import official_sam, official_state
from samseg_monai.export.parts import Part, parts_of, run_parts
from samseg_monai.export.source import Source, read_source
from samseg_monai.export.write import FORMATS, Exported, export_network, obstacles

__all__ = [
    "FORMATS",
    "Exported",
    "Part",
    "Source",
    "export_network",
    "obstacles",
    "official_sam",
    "official_state",
    "parts_of",
    "read_source",
    "run_parts",
]
