"""Scores of whole volumes: one case (``case``), tables of many (``rows``), inside a MONAI engine (``engine``).

``lesions`` scores lesion by lesion, ``regions`` merges classes.
"""

from __future__ import annotations

from samseg_monai.metrics.case import POLICIES, score_case, score_columns
from samseg_monai.metrics.engine import CaseScores, merge_rows
from samseg_monai.metrics.lesions import LesionRules, score_lesions
from samseg_monai.metrics.rows import aggregate, case_means, paired_difference, read_rows, write_rows

__all__ = [
    "POLICIES",
    "CaseScores",
    "LesionRules",
    "aggregate",
    "case_means",
    "merge_rows",
    "paired_difference",
    "read_rows",
    "score_case",
    "score_columns",
    "score_lesions",
    "write_rows",
]
