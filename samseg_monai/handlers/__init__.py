"""Handlers for MONAI's trainers and evaluators: guards against silent failure, records, saving and resuming.

All can be written in JSON as ``{"_target_": "samseg_monai.handlers.NAME", ...}`` and have ``attach(engine)``. Files are
written by rank 0 only; attach them on every rank nevertheless, since those that stop a training must stop all ranks.
"""

from __future__ import annotations

from samseg_monai.handlers.ema import EMA
from samseg_monai.handlers.flow import GradientFlow
from samseg_monai.handlers.guards import CollapseDetector, NonFiniteGuard
from samseg_monai.handlers.keeping import BestAdapter, LastAdapter
from samseg_monai.handlers.records import CaseTable, CurveLog
from samseg_monai.handlers.run_card import RunCard
from samseg_monai.handlers.saving import ResumeSaver
from samseg_monai.handlers.seeding import EpochSeeder
from samseg_monai.handlers.stepping import GradientClip
from samseg_monai.handlers.stopping import EarlyStop
from samseg_monai.handlers.tracking import Tracking
from samseg_monai.handlers.validation_loss import ValidationLoss
from samseg_monai.handlers.worst_case import WorstCaseImage

__all__ = [
    "EMA",
    "BestAdapter",
    "CaseTable",
    "CollapseDetector",
    "CurveLog",
    "EarlyStop",
    "EpochSeeder",
    "GradientClip",
    "GradientFlow",
    "LastAdapter",
    "NonFiniteGuard",
    "ResumeSaver",
    "RunCard",
    "Tracking",
    "ValidationLoss",
    "WorstCaseImage",
]
