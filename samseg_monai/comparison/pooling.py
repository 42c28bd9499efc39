"""What several seeds and folds of one row tell together.

Cases are what varies in every interval of a table; seeds are kept apart from them. A row's score of a case is its mean
over the seeds, so that differences stay paired by case; beside it stands how much the seeds' means differ. How sure the
order of rows is says a bootstrap over cases and seeds (Efron and Tibshirani 1993, chapter 6).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samseg_monai.data.datalists import case_hash
from samseg_monai.errors import DataError
from samseg_monai.metrics.rows import FLAGS, LABELS, case_means, mean_of
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import dice_column

DRAWS = 2000
RISE, FALL = 0.005, 0.05  # of validation Dice, and of the loss as a part of it, that count as learning still


@dataclass(frozen=True)
class Pooled:
    """A row of a comparison.

    Attributes:
        result: its runs as one: scores of a case are means over the seeds, folds are put together.
        seeds: seed -> Dice of each case (mean over its classes).
        validation: mean of the runs' best validation scores; None where nothing was chosen.
        minutes: mean minutes of a training; None where nothing was trained.
        memory: largest peak of a training or else an evaluation, in MB; None where no card tells it.
        training_cases: how many cases a training learnt from (of several folds the median); None where no card tells.
        ends: how each training ended, see `last_third`.
    """

    result: RunResult
    seeds: Mapping[int, Mapping[str, float]]
    folds: int
    validation: float | None
    minutes: float | None
    memory: float | None
    training_cases: int | None
    ends: Sequence[Mapping[str, Any]]

    @property
    def converged(self) -> list[bool]:
        """Of each training that tells enough, whether it had stopped learning."""
        return [one["converged"] for one in self.ends if one["converged"] is not None]

    @property
    def means(self) -> dict[int, float]:
        """Seed -> mean Dice over the cases."""
        return {seed: mean_of([*dice.values()]) for seed, dice in self.seeds.items()}

    @property
    def spread(self) -> float:
        """Standard deviation (sample) of the seeds' means; NaN of one seed."""
        values = list(self.means.values())
        return statistics.stdev(values) if len(values) > 1 else math.nan


def pooled(name: str, title: str | None, runs: Mapping[tuple[int, int | None], RunResult]) -> Pooled:
    """The row of ``runs``: (seed, fold) -> its result.

    Raises:
        DataError: folds share cases, or seeds have different ones.
    """
    by_seed: dict[int, list[RunResult]] = {}
    for (seed, _), run in sorted(runs.items(), key=lambda pair: (pair[0][0], pair[0][1] or 0)):
        by_seed.setdefault(seed, []).append(run)
    rows = {seed: _joined(name, its) for seed, its in by_seed.items()}
    first = next(iter(by_seed.values()))[0]
    column = dice_column(first)
    results = list(runs.values())
    merged = _averaged(name, rows)
    seconds = [run.training_seconds for run in results if run.training_seconds is not None]
    card = {**first.card, "cases": _met(results)}
    if len(by_seed) > 1:
        card["seed"] = ", ".join(map(str, by_seed))
    training = {**first.training, **({"seconds": mean_of(seconds)} if seconds else {})}
    others = [run.folder for run in results if run is not first]
    result = replace(first, name=name, label=title, rows=merged, card=card, training=training, others=others)
    if len(by_seed) > 1:
        result = replace(result, label=f"{result.title}, mean of {len(by_seed)} seeds")
    return Pooled(
        result=result,
        seeds={seed: case_means(its, column) for seed, its in rows.items()},
        folds=len({fold for _, fold in runs}),
        validation=_best(results),
        minutes=mean_of(seconds) / 60 if seconds else None,
        memory=_memory(results),
        training_cases=_learnt_from(results),
        ends=[last_third(run.history) for run in results if run.history],
    )


def last_third(history: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """How a training ended: what a straight line through the last third of its epochs says.

    Args:
        history: name of a curve -> epoch -> value.

    Returns:
        ``dice``: change of the validation Dice over that third; ``loss``: that of the training loss as a part of its
        mean there; None where the third has fewer than three points. ``converged``: the Dice rises by no more than
        0.005 or twice its standard error, whichever is more; without enough validations the loss falls by no more than
        5 % or twice that.
    """
    dice = next((history[name] for name in ("picked_val_dice", "val_dice") if name in history), {})
    loss = history.get("train_loss", {})
    begin = 2 / 3 * max([0, *dice, *loss])
    found: dict[str, Any] = {"dice": None, "loss": None, "converged": None}
    for name, curve, least in (("loss", loss, FALL), ("dice", dice, RISE)):  # the Dice has the last word
        points = np.array([[epoch, value] for epoch, value in sorted(curve.items()) if epoch > begin])
        if len(points) < 3:
            continue
        x, y = points.T
        slope = np.cov(x, y)[0, 1] / x.var(ddof=1)
        scatter = y - y.mean() - slope * (x - x.mean())
        error = math.sqrt(scatter @ scatter / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
        scale = (x[-1] - x[0]) / (abs(y.mean()) or 1.0 if name == "loss" else 1.0)
        change, unsure = float(slope * scale), 2 * error * scale
        found[name] = change
        found["converged"] = bool((change if name == "dice" else -change) <= max(least, unsure))
    return found


def few_shot(rows: Sequence[tuple[str, Pooled]]) -> list[dict[str, Any]]:
    """Dice over the number of training cases, of rows that were trained on several numbers of them.

    Args:
        rows: name that rows of one strategy share, and a row.

    Returns:
        {"row", "n": training cases, "mean": of the seeds' mean Dice, "sd": sample, None of one seed}, by row and n.
    """
    known = [(name, row) for name, row in rows if row.training_cases is not None]
    several = {name for name, row in known if len({r.training_cases for n, r in known if n == name}) > 1}
    found = [
        {
            "row": name,
            "n": row.training_cases,
            "mean": mean_of([*row.means.values()]),
            "sd": None if math.isnan(row.spread) else row.spread,
        }
        for name, row in known
        if name in several
    ]
    return sorted(found, key=lambda one: (str(one["row"]), one["n"]))


def _learnt_from(runs: Sequence[RunResult]) -> int | None:
    records = [run.training.get("cases") for run in runs]
    known = [len(one["training"]) for one in records if isinstance(one, Mapping) and one.get("training")]
    return int(statistics.median(known)) if known and len(known) == len(runs) else None


def _joined(name: str, folds: Sequence[RunResult]) -> list[Mapping[str, Any]]:
    rows = [row for run in folds for row in run.rows]
    keys = [(row["case"], row["class"]) for row in rows]
    if len(set(keys)) < len(keys):
        twice = sorted({case for case, klass in keys if keys.count((case, klass)) > 1})
        raise DataError(f"{name}: {len(twice)} cases are tested in several folds, first {twice[0]}; use disjoint folds")
    return rows


def _averaged(name: str, seeds: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows with the mean over seeds of every score; a flag is set where it is for any seed."""
    indexed = [{(row["case"], row["class"]): row for row in rows} for rows in seeds.values()]
    first = indexed[0]
    for seed, other in zip(seeds, indexed, strict=True):
        if different := sorted(first.keys() ^ other.keys()):
            case, klass = different[0]
            raise DataError(f"{name}: seed {seed} has other cases than the first, such as {case}, {klass}")
    found = []
    for key, row in first.items():
        its = [rows[key] for rows in indexed]
        merged: dict[str, Any] = {label: row[label] for label in LABELS}
        for column in row:
            if column in FLAGS:
                merged[column] = any(one[column] for one in its)
            elif column not in LABELS:
                merged[column] = mean_of([float(one[column]) for one in its])
        found.append(merged)
    return found


def _met(runs: Sequence[RunResult]) -> dict[str, list[str]]:
    """Hashes of evaluated cases that the very weights which they were evaluated with have met: folds learn from each
    other's cases, which is as it should be."""
    return {
        part: sorted({case_hash(case) for run in runs for case in run.seen.get(part, [])})
        for part in ("training", "validation")
    }


def _best(runs: Sequence[RunResult]) -> float | None:
    found = [run.training.get("best") for run in runs]
    values = [one["metric"] for one in found if isinstance(one, Mapping) and isinstance(one.get("metric"), float)]
    return mean_of(values) if values and len(values) == len(runs) else None


def _memory(runs: Sequence[RunResult]) -> float | None:
    cards = [run.training or run.card for run in runs]
    peaks = [card.get("peak_memory_mb") for card in cards]
    values = [max(one.values()) for one in peaks if isinstance(one, Mapping) and one]
    return max(values) if values else None


def rank_shares(rows: Sequence[Pooled], *, draws: int = DRAWS, seed: int = 0) -> dict[str, list[float]]:
    """How often each row is first, second, ... by mean Dice when cases and seeds are drawn again, with replacement.

    Args:
        rows: with at least one case in common; only cases that all rows have are drawn.
        draws: of the bootstrap.
        seed: of its random numbers.

    Returns:
        Row's name -> share of the draws at each rank, the best first; rows with equal means share the better rank.
    """
    cases = sorted(set.intersection(*({*dice} for row in rows for dice in row.seeds.values())))
    if not cases:
        return {row.result.name: [math.nan] * len(rows) for row in rows}
    tables = [np.array([[dice[case] for case in cases] for dice in row.seeds.values()]) for row in rows]
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(rows), len(rows)))
    for _ in range(draws):
        drawn = rng.integers(len(cases), size=len(cases))
        means = np.array([table[rng.integers(len(table), size=len(table))].mean(0)[drawn].mean() for table in tables])
        ranks = (means[None, :] > means[:, None]).sum(1)
        counts[np.arange(len(rows)), ranks] += 1
    return {row.result.name: (counts[index] / draws).tolist() for index, row in enumerate(rows)}
