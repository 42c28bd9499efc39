"""Report of a few runs: one self-contained HTML page, the same table as text and JSON, all from the runs' files."""

from __future__ import annotations

from samseg_monai.report.figures import curves_svg, dice_svg
from samseg_monai.report.montage import OverlayCase, display_box, overlay_cases, pick_cases
from samseg_monai.report.organs import (
    ORGANS,
    PUBLISHED,
    OrganTable,
    Quoted,
    organ_table,
    organs_json,
    organs_text,
)
from samseg_monai.report.page import banner, headline, write_report
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import differences, results_json, table_lines, table_text

__all__ = [
    "ORGANS",
    "PUBLISHED",
    "OrganTable",
    "OverlayCase",
    "Quoted",
    "RunResult",
    "banner",
    "curves_svg",
    "dice_svg",
    "differences",
    "display_box",
    "headline",
    "organ_table",
    "organs_json",
    "organs_text",
    "overlay_cases",
    "pick_cases",
    "results_json",
    "table_lines",
    "table_text",
    "write_report",
]
