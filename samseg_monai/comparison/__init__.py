"""Comparisons: a plan of tasks, strategies, backbones, seeds and settings; its runs; what they tell together."""

from __future__ import annotations

from samseg_monai.comparison.performing import Outcome, perform
from samseg_monai.comparison.plan import Plan, Run, plan_names, read_plan
from samseg_monai.comparison.pooling import Pooled, pooled
from samseg_monai.comparison.results import write_comparison

__all__ = [
    "Outcome",
    "Plan",
    "Pooled",
    "Run",
    "perform",
    "plan_names",
    "pooled",
    "read_plan",
    "write_comparison",
]
