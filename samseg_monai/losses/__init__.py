"""Losses: what MONAI lacks, and one weighted sum of those that it has."""

from __future__ import annotations

from samseg_monai.losses.grid import OnLogitGrid
from samseg_monai.losses.terms import SegmentationLoss
from samseg_monai.losses.weights import class_weights

__all__ = ["OnLogitGrid", "SegmentationLoss", "class_weights"]
