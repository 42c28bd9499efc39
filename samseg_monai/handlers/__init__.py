"""Handlers for MONAI's trainers and evaluators: guards against silent failure, records, saving and resuming.

All can be written in JSON as ``{"_target_": "samseg_monai.handlers.NAME", ...}`` and have ``attach(engine)``. Files are
written by rank 0 only; attach them on every rank nevertheless, since those that stop a training must stop all ranks.
"""

from __future__ import annotations

from samseg_monai.handlers.cases import CaseDataset, CaseEvaluator, PrepareGiven
from samseg_monai.handlers.keeping import EMA, BestAdapter, CollapseDetector, EarlyStop, LastAdapter
from samseg_monai.handlers.predictions import PredictionTable
from samseg_monai.handlers.records import CaseTable, CurveLog, RunCard
from samseg_monai.handlers.resume import EpochSeeder, ResumeSaver
from samseg_monai.handlers.steps import Accumulation, GradientClip, GradientFlow, NonFiniteGuard
from samseg_monai.handlers.tracking import Tracking
from samseg_monai.handlers.validation import SameBuffers, TensorBoard, ValidationLoss, WholeVolumes, WorstCaseImage

__all__ = [
    "EMA",
    "Accumulation",
    "BestAdapter",
    "CaseDataset",
    "CaseEvaluator",
    "CaseTable",
    "CollapseDetector",
    "CurveLog",
    "EarlyStop",
    "EpochSeeder",
    "GradientClip",
    "GradientFlow",
    "LastAdapter",
    "NonFiniteGuard",
    "PredictionTable",
    "PrepareGiven",
    "ResumeSaver",
    "RunCard",
    "SameBuffers",
    "TensorBoard",
    "Tracking",
    "ValidationLoss",
    "WholeVolumes",
    "WorstCaseImage",
]
