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
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import plan as plans
import records
from pages import insert, markdown, short_table

from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import write_json
from samseg_monai.handlers.provenance import plain
from samseg_monai.metrics import rows as scores
from samseg_monai.metrics.rows import Interval, holm

ROOT = plans.HERE.parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "does_fine_tuning_help.md"
LAWS = ("tight", "loose", "unseen")
# "later": all folds, but no candidates of the primary comparison, which was fixed before they were tried
ROLES = ("zero-shot", "fine-tuned", "later", "without SAM")
MEASURES = ("dice", "hd95_px", "nsd_1px", "nsd_2px")


def t_interval(values: Sequence[float] | pd.Series) -> Interval:
    """Student's own t interval (95 %) of a mean, with n - 1 degrees of freedom: that of the published numbers."""
    return scores.t_interval(values, margin=0, least=2)


def block_means(values: Mapping[str, float] | pd.Series, blocks: Mapping[str, str]) -> list[float]:
    """Mean of the slices of each block, in the order of block names; slices without a value are left out."""
    return pd.Series(values, dtype=float).dropna().groupby(blocks).mean().tolist()


class Results:
    """Rows of slices of the four folds, looked up by row of the plan."""

    def __init__(self, rows: pd.DataFrame, facts: Iterable[records.Row], plan: Mapping[str, Any]) -> None:
        self.rows, self.transfer = rows[rows["fold"] != "all"], rows[rows["fold"] == "all"]
        self.facts = [one for one in facts if one["fold"] != "all"]
        self.plan = plan
        self.blocks = plans.block_names()
        parts = self.rows.groupby(["row", "section", "boxes", "weights"])
        # mean over seeds of each slice, in the order of the files
        self._means = {key: part.groupby("case", sort=False).mean(numeric_only=True) for key, part in parts}

    def slices(
        self, name: str, law: str, weights: str = "best", *, section: str = "testing", measure: str = "dice"
    ) -> pd.Series:
        """Mean over seeds by case. Rows that nothing trains have the weights "none", rows without boxes the same
        numbers for every law."""
        keys = product((name,), (section,), (law, "none"), (weights, "none"))
        found = [self._means[key].get(measure, pd.Series(dtype=float)).dropna() for key in keys if key in self._means]
        return pd.concat(found) if found else pd.Series(dtype=float)

    def _chosen(self, name: str, section: str) -> pd.DataFrame:
        """Rows with loose boxes and the weights of the epoch that validation chose."""
        boxes, weights = self.rows["boxes"].isin(("loose", "none")), self.rows["weights"].isin(("best", "none"))
        return self.rows[(self.rows["row"] == name) & (self.rows["section"] == section) & boxes & weights]

    def seeds(self, name: str) -> list[float]:
        """Mean loose-box Dice of each seed that has all slices."""
        by_seed = self._chosen(name, "testing").groupby("seed")["dice"]
        return by_seed.mean()[by_seed.size() == len(self.blocks)].tolist()

    def validation(self, name: str) -> float:
        """Mean over folds of the mean loose-box Dice of the validation slices (epoch chosen there, mean of seeds)."""
        return float(self._chosen(name, "validation").groupby("fold")["dice"].mean().mean())

    def complete(self, name: str) -> bool:
        """Whether every slice of the folds was tested with loose boxes."""
        return len(self.slices(name, "loose")) == len(self.blocks)

    def unfinished(self) -> list[str]:
        """Runs of the folds that the plan has and the results have not; rows that only draw curves do not count."""
        there = set(self.rows[["row", "fold", "seed"]].itertuples(index=False, name=None))
        runs = (run for run in plans.runs_of(self.plan) if run.fold != "all" and run.row["role"] in ROLES)
        return [run.file for run in runs if (run.name, str(run.fold), run.seed) not in there]

    def difference(self, name: str, other: str, law: str = "loose") -> Interval:
        """Dice of ``name`` minus ``other``, paired by slice: t interval over means of blocks."""
        return t_interval(block_means(self.slices(name, law) - self.slices(other, law), self.blocks))


def line_of(results: Results, row: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of one row of the table."""
    name = row["name"]
    line: dict[str, Any] = {"row": name, "title": row["title"], "role": row["role"]}
    facts = [one for one in results.facts if one["row"] == name]
    line["slices"] = len(results.slices(name, "loose"))
    line["validation_dice"] = results.validation(name)
    for law in LAWS:
        for measure in MEASURES:
            line[f"{measure}_{law}"] = _mean(results.slices(name, law, measure=measure))
        # nothing predicted: its distance is the image's diagonal, which weighs heavily in the mean
        line[f"empty_{law}"] = int((results.slices(name, law, measure="empty_prediction") > 0).sum())
        dice = results.slices(name, law)
        line[f"blocks_{law}"] = t_interval(block_means(dice, results.blocks))._asdict()
        line[f"over_slices_{law}_too_narrow"] = t_interval(dice)._asdict()
        if row.get("training"):
            line[f"dice_{law}_last_epoch"] = _mean(results.slices(name, law, "last"))
    seeds = pd.Series(results.seeds(name), dtype=float)
    line |= {"seeds": len(seeds), "sd_of_seeds": float(seeds.std())}
    minutes = pd.Series([one["minutes"] for one in facts], dtype=float)
    line |= {"runs": len(facts), "minutes_per_run": float(minutes.mean()), "minutes": float(minutes.sum())}
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
            line[f"{measure}_{law}"] = _mean(results.slices(source, law, measure=f"ellipse_{measure}"))
        values = results.slices(source, law, measure="ellipse_dice")
        line[f"blocks_{law}"] = t_interval(block_means(values, results.blocks))._asdict()
    return line


def comparisons(results: Results) -> dict[str, Any]:
    """The comparison that the plan fixed, its criteria, and all others with Holm's correction.

    The gain has to be reached against the baseline that validation chose and against the one that is best on the test
    slices. Rows with slices missing take no part and are listed.
    """
    primary = results.plan["primary"]
    every = [row["name"] for row in results.plan["rows"] if row["role"] in ROLES]
    done = [name for name in every if results.complete(name)]
    candidates = [name for name in primary["candidates"] if name in done]
    baselines = [name for name in primary["baselines"] if name in done]
    missing = [name for name in every if name not in done]
    if not candidates or not baselines:
        return {"missing": missing}
    chosen = max(candidates, key=results.validation)
    baseline = max(baselines, key=results.validation)
    hardest = max(baselines, key=lambda name: _mean(results.slices(name, "loose")))
    dice = _mean(results.slices(chosen, "loose"))
    gains = {name: dice - _mean(results.slices(name, "loose")) for name in (baseline, hardest)}
    main = results.difference(chosen, baseline)
    pairs = [(chosen, baseline, law) for law in ("tight", "unseen")]
    pairs += [(name, baseline, "loose") for name in done if name not in (chosen, baseline)]
    pairs += [(chosen, name, "loose") for name in primary["controls"] if name in done]
    pairs += [(a, b, "loose") for a, b in primary["pairs"] if a in done and b in done]
    pairs += [(chosen, hardest, "loose")] if hardest != baseline else []
    intervals = [results.difference(*pair) for pair in pairs]
    adjusted = holm([one.p for one in intervals])
    exploratory = [
        {"row": a, "minus": b, "boxes": law, **one._asdict(), "p_holm": p}
        for (a, b, law), one, p in zip(pairs, intervals, adjusted, strict=True)
    ]
    criteria = {
        f"Dice at least {primary['least_dice']}": dice >= primary["least_dice"],
        f"gain of at least {primary['least_gain']} on the mean of slices": min(gains.values()) >= primary["least_gain"],
        "interval over blocks above 0": main.low > 0,
    }
    named = {"chosen": chosen, "baseline": baseline, "best_baseline_on_test": hardest, "dice": dice, "gains": gains}
    return {**named, "primary": main._asdict(), "criteria": criteria, "exploratory": exploratory, "missing": missing}


def one_fold_lines(results: Results) -> list[dict[str, Any]]:
    """Fold 0 with seed 0: rows that were run there alone, beside those of all folds that learn from the same boxes."""
    rows = results.rows[(results.rows["fold"] == "0") & (results.rows["seed"] == 0)]
    facts = {one["row"]: one for one in results.facts if (str(one["fold"]), one["seed"]) == ("0", 0)}
    here, lines = Results(rows, facts.values(), results.plan), []
    for row in results.plan["rows"]:
        name = row["name"]
        if row["role"] not in ("one fold", "later", "fine-tuned", "zero-shot") or name not in facts:
            continue
        line = {"row": name, "title": row["title"], "role": row["role"]}
        line["validation_dice"] = here.validation(name)
        line |= {f"dice_{law}": _mean(here.slices(name, law)) for law in LAWS}
        line["trained_values"] = facts[name]["trainable_parameters"]
        line["epoch_chosen"] = (facts[name].get("best") or {}).get("epoch")
        line["slices"] = len(here.slices(name, "loose"))
        lines.append(line)
    return lines if any(line["role"] == "one fold" for line in lines) else []


def transfer_lines(results: Results) -> list[dict[str, Any]]:
    """Mean Dice of each row on the other kinds of tumour, after the mean over seeds of each slice; intervals are over
    slices (patients are unknown)."""
    lines, rows = [], results.transfer
    for name in rows["row"].unique():
        for kind in plans.KINDS[1:]:
            line = {"row": name, "kind": kind}
            of_kind = rows[(rows["row"] == name) & rows["case"].str.startswith(kind)]
            for law in LAWS:
                values = of_kind[of_kind["boxes"].isin((law, "none"))].groupby("case")["dice"].mean()
                line |= {f"dice_{law}": _mean(values), f"over_slices_{law}_too_narrow": t_interval(values)._asdict()}
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
    there = set(results.rows["row"])
    lines = [line_of(results, row) for row in by_role(plan["rows"]) if row["name"] in there]
    ellipse = ellipse_line(results)
    lines += [ellipse] if ellipse["slices"] else []
    compared = {**comparisons(results), "slices": len(results.blocks), "unfinished": results.unfinished()}
    content = {"weights": plan["weights"], "rows": lines, "comparisons": compared, "transfer": transfer_lines(results)}
    content["one_fold"] = one_fold_lines(results)
    return content, markdown(content)


def by_role(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of the plan as they are shown: those of one role together, runs for curves alone left out."""
    return sorted((row for row in rows if row["role"] in ROLES), key=lambda row: ROLES.index(row["role"]))


def _mean(values: pd.Series) -> float:
    return float(values.mean())


def rates(folder: Path) -> str:
    """Mean validation Dice of every learning rate that was tried, best epoch and last epoch."""
    found = records.read(folder / "search").groupby(["row", "weights"])["dice"].mean()
    return "\n".join(f"{name:32}{weights:6}{dice:.4f}" for (name, weights), dice in found.items())


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
