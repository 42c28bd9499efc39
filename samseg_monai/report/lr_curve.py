"""Curve of a learning-rate range test, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from samseg_monai.report.palette import INK, figure_style, looks

# of the light page: a PNG cannot follow the reader's scheme
MUTED, GRID = "#59626c", "#dfe3e8"


def write_lr_curve(
    path: str | Path, rates: Sequence[float], losses: Sequence[float], *, suggested: float | None, configured: float
) -> Path:
    """Draw the loss over the learning rate, with the suggested and the configured one marked.

    Args:
        path: PNG to write.
        rates: learning rates, rising, above 0.
        losses: smoothed loss of each step (no unit).
        suggested: rate where the loss falls most steeply; None draws no mark.
        configured: rate of the config.

    Returns: the path.
    """
    look = looks(["lora"])["lora"]
    with figure_style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=150)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color=look.light, lw=2)
        axes.axvline(configured, color=MUTED, lw=1.2, ls=(0, (2, 2)), label=f"config: lr {configured:.2g}")
        if suggested is not None:
            at = min(range(len(rates)), key=lambda i: abs(rates[i] - suggested))
            axes.plot(
                suggested, losses[at], color=INK, marker="o", ms=9, mfc="none", mew=1.8, ls="none",
                label=f"suggested: lr {suggested:.2g}, where the loss falls fastest",
            )  # fmt: skip
        axes.set(title="Learning-rate range test", xlabel="learning rate", ylabel="smoothed loss (no unit)")
        axes.set_ylim(*_limits(losses))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", linewidth=0.8, color=GRID)
        axes.set_axisbelow(True)
        figure.legend(frameon=False, fontsize=10, loc="outside lower left")
        figure.savefig(path)
    return Path(path)


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """Lower and upper end of the axis: a last step that diverged must not flatten what came before."""
    low, high = min(losses), max(losses[: max(1, int(0.9 * len(losses)))])
    room = max(high - low, 1e-6)
    return low - 0.1 * room, max(high + 0.15 * room, min(max(losses), high + 0.5 * room))
