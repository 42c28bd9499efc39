"""Colours of strategies, the same on every figure, and figures as inline SVG that follow the page's colour scheme.

Hues are those of Okabe and Ito (2008, "Color universal design"), which people with a colour-vision deficiency can tell
apart; each was darkened or lightened until it has a contrast of at least 3 : 1 on the page (WCAG 2.2, 1.4.11).
Strategies also differ in marker and dash, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SURFACES = {"light": "#ffffff", "dark": "#17191c"}
# Text and lines of a figure are drawn in these stand-ins, which `to_svg` turns into the page's CSS variables.
INK, MUTED, GRID, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn: colours on the ``light`` and ``dark`` page and over a grey image, marker, dash."""

    light: str
    dark: str
    overlay: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


_BLUE = Look("#0072b2", "#56b4e9", "#56b4e9", "o", (0, (5, 2)))
_VERMILION = Look("#d55e00", "#ff8433", "#ff8433", "s", "solid")
_OLIVE = Look("#7d6b00", "#f0e442", "#f0e442", "^", (0, (1, 1.4)))
_PURPLE = Look("#a84f86", "#dd94bd", "#dd94bd", "D", (0, (6, 2, 1, 2)))
_GREEN = Look("#00805e", "#25c795", "#25c795", "v", (0, (3, 1)))
_BLACK = Look("#4a4a4a", "#c9c9c9", "#ffffff", "P", (0, (8, 2)))
_KNOWN = {"zero_shot": _BLUE, "lora": _VERMILION, "box_ellipse": _OLIVE}
_OTHERS = (_PURPLE, _GREEN)


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look per strategy; the three of the demo always keep theirs, others take the rest in turn."""
    free = [look for name, look in _KNOWN.items() if name not in names]
    order = [*_OTHERS, *free, _BLACK]  # the last resort: its outline is as white as that of the reference
    unknown = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN[name] if name in _KNOWN else order[unknown.index(name) % len(order)] for name in names}


def css_variables(names: Sequence[str], scheme: str) -> str:
    """CSS declarations ``--c0: ...`` with the colour of each strategy, in the order of ``names``."""
    chosen = looks(names)
    return " ".join(f"--c{index}: {getattr(chosen[name], scheme)};" for index, name in enumerate(names))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two ``#rrggbb`` colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@contextmanager
def figure_style() -> Iterator[None]:
    """Settings of all figures, undone afterwards: text stays text, ids do not change from run to run."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "samseg",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "image.interpolation": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def to_svg(figure: Figure, prefix: str, *, title: str, names: Sequence[str] = ()) -> str:
    """A figure as one ``<svg>`` element for a page: scales with its column, no namespace, no address, ids of its own.

    Args:
        figure: drawn within ``figure_style``, strategies in their light colours.
        prefix: put before every id; two figures of a page need two prefixes.
        title: text alternative.
        names: strategies, whose light colours become the CSS variables of `css_variables`.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    for stand_in, variable in _PAGE.items():
        text = text.replace(stand_in, variable)
    chosen = looks(names)
    for index, name in enumerate(names):
        text = text.replace(chosen[name].light, f"var(--c{index})")
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"(<svg [^>]*>)", lambda match: f"{match.group(1)}<title>{label}</title>", text, count=1)


def _luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
