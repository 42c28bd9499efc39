"""What a training needs besides MONAI's parts: losses, learning rates, and which tensors learn."""

from __future__ import annotations

from samseg_monai.training.losses import OnLogitGrid, SegmentationLoss
from samseg_monai.training.rates import parameter_groups, warmup_schedule

__all__ = ["OnLogitGrid", "SegmentationLoss", "parameter_groups", "warmup_schedule"]
