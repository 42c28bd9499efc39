"""Scores of whole volumes: one case, lesion by lesion, tables of many (``rows``), inside MONAI's engines."""

from __future__ import annotations

from samseg_monai.metrics.case import POLICIES, dice_of, score_case, score_columns
from samseg_monai.metrics.engine import CaseScores, mean_dice, merge_rows
from samseg_monai.metrics.lesions import LesionRules, score_lesions
from samseg_monai.metrics.rows import aggregate, case_means, paired_difference, read_history, read_rows, write_rows

__all__ = [
    "POLICIES",
    "CaseScores",
    "LesionRules",
    "aggregate",
    "case_means",
    "dice_of",
    "mean_dice",
    "merge_rows",
    "paired_difference",
    "read_history",
    "read_rows",
    "score_case",
    "score_columns",
    "score_lesions",
    "write_rows",
]
