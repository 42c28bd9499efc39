"""Make the table of the experiment from the committed rows of slices: ``table.json`` and ``table.md`` beside them.

``python experiments/meningioma_t1c/table.py`` writes them into ``docs/does_fine_tuning_help.md`` and README, too.
Means are over all 77 slices, after the mean over seeds of each slice. The interval is Student's t over the means of
the nine blocks, so it is centred on the mean of blocks, which stands beside the mean of slices. Intervals over slices
are given, too; they are too narrow, since slices of one patient are alike and patients are unknown. Blocks are not
wholly independent either: those of one fold are scored by one model, and the folds' training parts overlap, so that
p-values and intervals over blocks are approximate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plan as plans
import records
from block_statistics import Interval, block_means, holm, t_interval
from pages import insert, markdown, short_table

from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import write_json
from samseg_monai.handlers.provenance import plain

ROOT = plans.HERE.parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "does_fine_tuning_help.md"
LAWS = ("tight", "loose", "unseen")
ROLES = ("zero-shot", "fine-tuned", "without SAM")
MEASURES = ("dice", "hd95_px", "nsd_1px", "nsd_2px")


class Results:
    """Rows of slices of the four folds, looked up by row of the plan."""

    def __init__(self, rows: Iterable[records.Row], facts: Iterable[records.Row], plan: Mapping[str, Any]) -> None:
        every = list(rows)
        self.rows = [row for row in every if row["fold"] != "all"]
        self.transfer = [row for row in every if row["fold"] == "all"]
        self.facts = [one for one in facts if one["fold"] != "all"]
        self.plan = plan
        self.blocks = plans.block_names()

    def slices(
        self, name: str, law: str, weights: str = "best", *, section: str = "testing", measure: str = "dice"
    ) -> dict[str, float]:
        """Case -> mean over seeds. Rows that nothing trains have the weights "none", rows without boxes the same
        numbers for every law."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            place = row["row"] == name and row["section"] == section and row["boxes"] in (law, "none")
            if place and row["weights"] in (weights, "none") and math.isfinite(row.get(measure, math.nan)):
                found.setdefault(row["case"], []).append(row[measure])
        return {case: float(np.mean(values)) for case, values in found.items()}

    def seeds(self, name: str) -> list[float]:
        """Mean loose-box Dice of each seed that has all slices."""
        by_seed: dict[int, list[float]] = {}
        for row in self.rows:
            wanted = row["section"] == "testing" and row["boxes"] in ("loose", "none")
            if row["row"] == name and wanted and row["weights"] in ("best", "none"):
                by_seed.setdefault(row["seed"], []).append(row["dice"])
        return [float(np.mean(v)) for _, v in sorted(by_seed.items()) if len(v) == len(self.blocks)]

    def validation(self, name: str) -> float:
        """Mean over folds of the mean loose-box Dice of the validation slices (epoch chosen there, mean of seeds)."""
        folds: dict[str, list[float]] = {}
        for row in self.rows:
            if row["row"] == name and row["section"] == "validation" and row["weights"] in ("best", "none"):
                folds.setdefault(row["fold"], []).append(row["dice"])
        return _mean([_mean(values) for values in folds.values()])

    def complete(self, name: str) -> bool:
        """Whether every slice of the folds was tested with loose boxes."""
        return len(self.slices(name, "loose")) == len(self.blocks)

    def unfinished(self) -> list[str]:
        """Runs of the folds that the plan has and the results have not; rows that only draw curves do not count."""
        there = {(row["row"], row["fold"], row["seed"]) for row in self.rows}
        runs = (run for run in plans.runs_of(self.plan) if run.fold != "all" and run.row["role"] in ROLES)
        return [run.file for run in runs if (run.name, str(run.fold), run.seed) not in there]

    def difference(self, name: str, other: str, law: str = "loose") -> Interval:
        """Dice of ``name`` minus ``other``, paired by slice: t interval over means of blocks."""
        ours, theirs = self.slices(name, law), self.slices(other, law)
        paired = {case: ours[case] - theirs[case] for case in ours if case in theirs}
        return t_interval(block_means(paired, self.blocks))


def line_of(results: Results, row: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of one row of the table."""
    name = row["name"]
    line: dict[str, Any] = {"row": name, "title": row["title"], "role": row["role"]}
    facts = [one for one in results.facts if one["row"] == name]
    line["slices"] = len(results.slices(name, "loose"))
    line["validation_dice"] = results.validation(name)
    for law in LAWS:
        for measure in MEASURES:
            line[f"{measure}_{law}"] = _mean(results.slices(name, law, measure=measure).values())
        # nothing predicted: its distance is the image's diagonal, which weighs heavily in the mean
        line[f"empty_{law}"] = sum(v > 0 for v in results.slices(name, law, measure="empty_prediction").values())
        of_blocks = t_interval(block_means(results.slices(name, law), results.blocks))
        line[f"blocks_{law}"] = vars(of_blocks)
        line[f"over_slices_{law}_too_narrow"] = vars(t_interval(list(results.slices(name, law).values())))
        if row.get("training"):
            line[f"dice_{law}_last_epoch"] = _mean(results.slices(name, law, "last").values())
    seeds = results.seeds(name)
    line |= {"seeds": len(seeds), "sd_of_seeds": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan}
    line["runs"] = len(facts)
    line["minutes_per_run"] = _mean([one["minutes"] for one in facts])
    line["minutes"] = sum(one["minutes"] for one in facts)
    line["trained_values"] = next((one["trainable_parameters"] for one in facts), None)
    line["epochs_chosen"] = [(one.get("best") or {}).get("epoch") for one in facts]
    return line


def ellipse_line(results: Results) -> dict[str, Any]:
    """The ellipse inscribed in the box, which every zero-shot evaluation scores beside the network."""
    line: dict[str, Any] = {"row": "inscribed_ellipse", "title": "Ellipse in the box", "role": "without SAM"}
    source = next((n for n in results.plan["primary"]["baselines"] if results.complete(n)), "")
    line["slices"] = len(results.slices(source, "loose", measure="ellipse_dice"))
    for law in LAWS:
        for measure in MEASURES[:2]:
            line[f"{measure}_{law}"] = _mean(results.slices(source, law, measure=f"ellipse_{measure}").values())
        values = results.slices(source, law, measure="ellipse_dice")
        line[f"blocks_{law}"] = vars(t_interval(block_means(values, results.blocks)))
    return line


def comparisons(results: Results) -> dict[str, Any]:
    """The comparison that the plan fixed, its criteria, and all others with Holm's correction.

    The gain has to be reached against the baseline that validation chose and against the one that is best on the test
    slices. Rows with slices missing take no part and are listed.
    """
    primary = results.plan["primary"]
    every = [row["name"] for row in results.plan["rows"] if row["role"] != "curve"]
    done = [name for name in every if results.complete(name)]
    candidates = [name for name in primary["candidates"] if name in done]
    baselines = [name for name in primary["baselines"] if name in done]
    missing = [name for name in every if name not in done]
    if not candidates or not baselines:
        return {"missing": missing}
    chosen = max(candidates, key=results.validation)
    baseline = max(baselines, key=results.validation)
    hardest = max(baselines, key=lambda name: _mean(results.slices(name, "loose").values()))
    dice = _mean(results.slices(chosen, "loose").values())
    gains = {name: dice - _mean(results.slices(name, "loose").values()) for name in (baseline, hardest)}
    main = results.difference(chosen, baseline)
    pairs = [(chosen, baseline, law) for law in ("tight", "unseen")]
    pairs += [(name, baseline, "loose") for name in done if name not in (chosen, baseline)]
    pairs += [(chosen, name, "loose") for name in primary["controls"] if name in done]
    pairs += [(a, b, "loose") for a, b in primary["pairs"] if a in done and b in done]
    pairs += [(chosen, hardest, "loose")] if hardest != baseline else []
    intervals = [results.difference(*pair) for pair in pairs]
    adjusted = holm([one.p for one in intervals])
    exploratory = [
        {"row": a, "minus": b, "boxes": law, **vars(one), "p_holm": p}
        for (a, b, law), one, p in zip(pairs, intervals, adjusted, strict=True)
    ]
    criteria = {
        f"Dice at least {primary['least_dice']}": dice >= primary["least_dice"],
        f"gain of at least {primary['least_gain']} on the mean of slices": min(gains.values()) >= primary["least_gain"],
        "interval over blocks above 0": main.low > 0,
    }
    named = {"chosen": chosen, "baseline": baseline, "best_baseline_on_test": hardest, "dice": dice, "gains": gains}
    return {**named, "primary": vars(main), "criteria": criteria, "exploratory": exploratory, "missing": missing}


def transfer_lines(results: Results) -> list[dict[str, Any]]:
    """Mean Dice of each row on the other kinds of tumour, after the mean over seeds of each slice; intervals are over
    slices (patients are unknown)."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in results.transfer):
        for kind in plans.KINDS[1:]:
            line = {"row": name, "kind": kind}
            for law in LAWS:
                found: dict[str, list[float]] = {}  # case -> one value per seed
                for r in results.transfer:
                    if r["row"] == name and r["case"].startswith(kind) and r["boxes"] in (law, "none"):
                        found.setdefault(r["case"], []).append(r["dice"])
                values = [_mean(seeds) for seeds in found.values()]
                line |= {f"dice_{law}": _mean(values), f"over_slices_{law}_too_narrow": vars(t_interval(values))}
            lines.append({**line, "slices": len(values)})
    return lines


def build(folder: Path) -> tuple[dict[str, Any], str]:
    """The table of a folder of results, as JSON values and as Markdown.

    Raises:
        DataError: results of other settings than the plan's.
    """
    plan, facts = plans.read("plan.json"), records.read_facts(folder)
    where = f"{folder.name}: not results of this plan; delete their CSV files and run them again"
    raise_all(plans.outdated(plan, facts), DataError, where)
    results = Results(records.read(folder), facts, plan)
    there = {row["row"] for row in results.rows}
    lines = [line_of(results, row) for row in by_role(plan["rows"]) if row["name"] in there]
    ellipse = ellipse_line(results)
    lines += [ellipse] if ellipse["slices"] else []
    compared = {**comparisons(results), "slices": len(results.blocks), "unfinished": results.unfinished()}
    content = {"weights": plan["weights"], "rows": lines, "comparisons": compared, "transfer": transfer_lines(results)}
    return content, markdown(content)


def by_role(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of the plan as they are shown: those of one role together, runs for curves alone left out."""
    return sorted((row for row in rows if row["role"] in ROLES), key=lambda row: ROLES.index(row["role"]))


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def rates(folder: Path) -> str:
    """Mean validation Dice of every learning rate that was tried, best epoch and last epoch."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in records.read(folder / "search"):
        found.setdefault((row["row"], row["weights"]), []).append(row["dice"])
    return "\n".join(f"{name:32}{weights:6}{_mean(dice):.4f}" for (name, weights), dice in sorted(found.items()))


def main(arguments: list[str] | None = None) -> None:
    """Write and print the table, or print the learning rates that were tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=plans.RESULTS)
    parser.add_argument("--search", action="store_true", help="only print how the learning rates did")
    options = parser.parse_args(arguments)
    if options.search:
        print(rates(options.results))
        return
    content, text = build(options.results)
    write_json(options.results / "table.json", plain(content))  # what does not exist is null
    (options.results / "table.md").write_text(text, encoding="utf-8")
    if options.results == plans.RESULTS:
        insert(PAGE, text)
        insert(README, short_table(content))
    print(text)


if __name__ == "__main__":
    main()
