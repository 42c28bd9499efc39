"""Networks with the interface that MONAI's trainers and evaluators expect: SAM with a strategy, and plain ones."""

from __future__ import annotations

from samseg_monai.networks.common import EMPTY_LOGIT
from samseg_monai.networks.plain import BoxEllipse, PlainSegmenter
from samseg_monai.networks.segmenter import SamSegmenter, disable_adapter

__all__ = ["EMPTY_LOGIT", "BoxEllipse", "PlainSegmenter", "SamSegmenter", "disable_adapter"]
