"""Report of a few runs: one self-contained HTML page, the same table as text and JSON, all from the runs' files."""

from __future__ import annotations

from samseg_monai.report.figures import curves_svg, dice_svg
from samseg_monai.report.html import banner, headline, write_report
from samseg_monai.report.montage import OverlayCase, display, display_box, pick_cases
from samseg_monai.report.organs import OrganTable, organ_table, organs_json
from samseg_monai.report.organs_view import organs_markdown, organs_text
from samseg_monai.report.published import ORGANS, PUBLISHED, Quoted
from samseg_monai.report.runs import RunResult, read_history
from samseg_monai.report.tables import differences, results_json, table_lines
from samseg_monai.report.text import table_text

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
    "display",
    "display_box",
    "headline",
    "organ_table",
    "organs_json",
    "organs_markdown",
    "organs_text",
    "pick_cases",
    "read_history",
    "results_json",
    "table_lines",
    "table_text",
    "write_report",
]
