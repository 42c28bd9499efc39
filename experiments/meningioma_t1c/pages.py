"""The table as Markdown: whole for the page of the experiment, short for README, put between marks in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.errors import DataError

BEGIN, END = "<!-- results: written by experiments/meningioma_t1c/table.py -->", "<!-- end of results -->"


def parts(page: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the marks of a Markdown file.

    Raises:
        DataError: the marks are not there once each, in order.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    shown, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise DataError(f"{page.name}: needs the lines {BEGIN} and {END} once each, in this order")
    return before, shown.strip(), after


def insert(page: Path, text: str) -> None:
    """Replace what stands between the marks of a Markdown file; raises as ``parts``."""
    before, _, after = parts(page)
    page.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}", encoding="utf-8")


def markdown(content: Mapping[str, Any]) -> str:
    """The whole table, the comparisons and the transfer below it."""
    lines, compared = content["rows"], content["comparisons"]
    heads = ["", "Dice, loose boxes", "95 % over 9 blocks (mean of blocks)", "over slices (too narrow)", "tight"]
    heads += ["unseen", "last epoch, loose", "HD95 loose, px", "epochs chosen", "SD of seeds (n)", "trained values"]
    heads += ["minutes a run"]
    body = []
    for line in lines:
        block, slices = line["blocks_loose"], line.get("over_slices_loose_too_narrow")
        short = line["slices"] < compared.get("slices", 77)
        empty, values = line.get("empty_loose"), line.get("trained_values")
        epochs = [str(epoch) for epoch in line.get("epochs_chosen", []) if epoch]
        seeds = line.get("seeds", 0)
        body.append(
            [
                line["title"] + (f" ({line['slices']} slices so far)" if short else ""),
                number(line["dice_loose"]),
                f"{_range(block)} ({number(block['mean'])})",
                _range(slices) if slices else "-",
                number(line["dice_tight"]),
                number(line["dice_unseen"]),
                number(line.get("dice_loose_last_epoch")),
                number(line["hd95_px_loose"], 1) + (f" ({empty} empty, as the image's diagonal)" if empty else ""),
                ", ".join(epochs) or "-",
                f"{number(line.get('sd_of_seeds'), 4)} ({seeds})" if seeds > 1 else f"- ({seeds or 1})",
                "-" if values is None else f"{values:,}",
                number(line.get("minutes_per_run"), 1),
            ]
        )
    text = [f"{content['weights']}; test slices of four folds, weights of the epoch that validation chose.", ""]
    text += [*_table(heads, body), ""]
    return "\n".join(
        [*text, *_comparisons(compared), *_transfer(content["transfer"]), *_one_fold(content.get("one_fold", [])), ""]
    )


def short_table(content: Mapping[str, Any]) -> str:
    """SAM as it is, its control, the row that validation chose, and what needs no SAM."""
    compared, lines = content["comparisons"], {line["row"]: line for line in content["rows"]}
    shrunk = [name for name in ("zero_shot_shrunk_1024", "zero_shot_shrunk_512") if name in lines]
    names = [compared["baseline"], *shrunk[:1], compared["chosen"], "unet_crop", "unet_box", "unet", "ellipse"]
    whole = [lines[name] for name in [*names, "inscribed_ellipse"] if name in lines]
    body = [
        [line["title"], number(line["dice_loose"]), f"{_range(line['blocks_loose'])}", number(line["dice_tight"]),
         number(line["dice_unseen"])]
        for line in whole if line["slices"] == compared["slices"]
    ]  # fmt: skip
    heads = ["Dice, mean of 77 slices", "loose boxes", "95 % interval over nine blocks", "tight boxes", "unseen law"]
    main = compared["primary"]
    ours, theirs = lines[compared["chosen"]]["title"], lines[compared["baseline"]]["title"]
    told = (
        f"{ours} (chosen by validation) minus {theirs[0].lower()}{theirs[1:]}, loose boxes: {main['mean']:+.3f} Dice "
        f"as the mean of nine blocks (95 % {main['low']:+.3f} to {main['high']:+.3f}, p = {main['p']:.2g}), "
        f"{compared['gains'][compared['baseline']]:+.3f} as the mean of slices."
    )
    left = compared.get("unfinished")
    return "\n".join([*_table(heads, body), "", told + (f" {_provisional(left)[:-1]}." if left else "")])


def _one_fold(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Further strategies, on one fold only."""
    if not lines:
        return []
    heads = ["", "validation Dice, loose", "test Dice, loose", "tight", "unseen", "epoch chosen", "trained values"]
    body = [
        [line["title"] + " (this fold alone)" * (line["role"] == "one fold"), number(line["validation_dice"], 4),
         *(number(line[f"dice_{law}"]) for law in ("loose", "tight", "unseen")), str(line["epoch_chosen"] or "-"),
         "-" if line["trained_values"] is None else f"{line['trained_values']:,}"]
        for line in sorted(lines, key=lambda line: -line["validation_dice"])
    ]  # fmt: skip
    text = f"Further strategies on fold 0 with seed 0 alone ({lines[0]['slices']} test slices), by validation Dice:"
    return ["", text, "", *_table(heads, body)]


def _provisional(left: Sequence[str]) -> str:
    """What it means that runs of the plan are not there yet."""
    return f"Provisional: {len(left)} runs of the plan are missing; seeds differ, and another row may be chosen:"


def _comparisons(compared: Mapping[str, Any]) -> list[str]:
    if "primary" not in compared:
        return [f"Not compared yet; rows that lack slices: {', '.join(compared['missing'])}."]
    main = compared["primary"]
    text = [f"Primary comparison, loose boxes: {compared['chosen']} minus {compared['baseline']}, mean of blocks "
            f"{main['mean']:+.3f} ({main['low']:+.3f} to {main['high']:+.3f}, p = {main['p']:.2g}, n = {main['n']} "
            "blocks). Gain on the mean of slices: "
            + ", ".join(f"{gain:+.3f} over {name}" for name, gain in compared["gains"].items()) + "."]  # fmt: skip
    text += [f"- {name}: {'reached' if reached else 'not reached'}" for name, reached in compared["criteria"].items()]
    text += ["", "Exploratory: all other comparisons; intervals are not corrected, p is (Holm).", ""]
    body = [
        [one["row"], one["minus"], one["boxes"], f"{one['mean']:+.3f}", f"{one['low']:+.3f} to {one['high']:+.3f}",
         f"{one['p_holm']:.2g}"]
        for one in compared["exploratory"]
    ]  # fmt: skip
    text += _table(["row", "minus", "boxes", "difference of Dice", "95 % over blocks", "p (Holm)"], body)
    if left := compared.get("unfinished"):
        text += ["", f"{_provisional(left)} {', '.join(left)}."]
    if compared["missing"]:
        text += ["", f"Rows that lack slices and take no part: {', '.join(compared['missing'])}."]
    return text


def _transfer(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lines:
        return []
    body = [
        [line["row"], line["kind"], str(line["slices"]), number(line["dice_loose"]),
         _range(line["over_slices_loose_too_narrow"]), number(line["dice_tight"]), number(line["dice_unseen"])]
        for line in lines
    ]  # fmt: skip
    heads = ["row", "tumour", "n", "Dice, loose boxes", "95 % over slices (too narrow)", "tight", "unseen"]
    return ["", "Transfer: trained on all 77 meningiomas (or not at all), tested on the other tumours.", "",
            *_table(heads, body)]  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _range(interval: Mapping[str, float]) -> str:
    return f"{number(interval['low'])} to {number(interval['high'])}"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *body)]
