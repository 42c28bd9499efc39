"""One evaluated run as the report sees it: its card, its metrics and its rows per case, read from files only.

A run folder holds ``run_card.json`` (provenance), ``metrics.json`` (aggregates and definitions), one CSV of cases
(one row per case and class) and, when something was trained, ``history.csv`` (epoch, iteration, name, value).
Facts that a card does not record are shown as "not recorded", never guessed.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samseg_monai.errors import BundleError, raise_all
from samseg_monai.metrics import read_rows
from samseg_monai.report.labels import BOX_ELLIPSE, LADDER, LORA, NOT_RECORDED, SIDES, STRATEGIES, prompt_text, sam_text

CARD_FILE = "run_card.json"
METRICS_FILE = "metrics.json"
CASES_FILE = "cases.csv"
HISTORY_FILE = "history.csv"
_HOW = "run the bundle's evaluate.json (python -m monai.bundle run --config_file ...) with output_dir set to {folder}"


@dataclass(frozen=True)
class RunResult:
    """One strategy evaluated on one task.

    Args:
        folder: where the files were read from.
        name: key of the run in tables, figures and JSON; unique on a page.
        card: contents of ``run_card.json``.
        metrics: contents of ``metrics.json``.
        rows: one mapping per case and class, as ``samseg_monai.metrics.read_rows`` gives them.
        history: curve name -> list of (epoch, iteration, value); empty when nothing was trained.
        training: contents of the training's ``run_card.json``, which lies beside its curves; empty likewise.
        label: how the run is called on the page; made from ``name`` and the card when None.
    """

    folder: Path
    name: str
    card: Mapping[str, Any]
    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    history: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        name: str | None = None,
        cases: str | Path | None = None,
        history: str | Path | None = None,
        label: str | None = None,
    ) -> RunResult:
        """Read one run.

        Args:
            folder: run folder.
            name: key of the run; the card's strategy when None. ``"box_ellipse"`` marks the row without a network.
            cases: CSV of cases, relative to ``folder`` or absolute; the card's ``cases_file``, then ``cases.csv``.
            history: CSV of curves, likewise; when None, ``history.csv`` there or one folder up (where a training leaves
                it), and nothing if there is none. A ``run_card.json`` beside it is that of the training.
            label: how the run is called on the page.

        Raises:
            BundleError: naming every missing or unreadable file and how to make it; a CSV without cases, or with two
                rows of one case and class.
            DataError: the CSV of cases is not one (columns, numbers).
        """
        folder = Path(folder)
        problems: list[str] = []
        card = _read_json(folder / CARD_FILE, problems)
        metrics = _read_json(folder / METRICS_FILE, problems)
        cases_path = folder / (cases or card.get("cases_file") or CASES_FILE)
        history_path = folder / history if history is not None else _find_history(folder)
        if not cases_path.is_file():
            problems.append(f"{cases_path}: no such file (the metrics of each case); {_HOW.format(folder=folder)}")
        if history_path is not None and not history_path.is_file():
            problems.append(f"{history_path}: no such file (curves); run the bundle's train.json to make it")
        raise_all(problems, BundleError, f"{folder}: run cannot be reported")
        rows = read_rows(cases_path)
        _check_rows(rows, cases_path, folder)
        name = name or _strategy_name(card) or folder.name
        curves: dict[str, list[tuple[float, float, float]]] = {}
        training: dict[str, Any] = {}
        if history_path is not None and name != BOX_ELLIPSE:
            curves = read_history(history_path)
            training_card = history_path.parent / CARD_FILE
            if training_card.is_file() and training_card.resolve() != (folder / CARD_FILE).resolve():
                training = _read_json(training_card, problems)
                raise_all(problems, BundleError, f"{folder}: run cannot be reported")
        return cls(folder, name, card, metrics, rows, curves, training, label)

    @property
    def title(self) -> str:
        """Label of the run for people, e.g. ``LoRA, rank 4``."""
        if self.label:
            return self.label
        base = STRATEGIES.get(self.name, self.name.replace("_", " "))
        side = str(self.fact("strategy.arguments.side") or "").rpartition(".")[2]
        if self.name == LADDER and side:
            built = self.fact("side_arguments") or {}
            words = [f"{key} {value}" for key, value in built.items() if isinstance(value, (bool, int, float, str))]
            return f"Ladder ({', '.join([SIDES.get(side, side), *words])} beside SAM)"
        rank = self.fact("strategy.arguments.rank")
        if self.name not in (LORA, "dora") or rank is None:
            return base
        return f"{base}, rank {rank}" + (" + decoder" if self.fact("strategy.arguments.decoder") else "")

    @property
    def has_network(self) -> bool:
        """Whether a network made the predictions (the box ellipse needs none)."""
        return self.name != BOX_ELLIPSE

    @property
    def is_pico(self) -> bool:
        """Whether the numbers come from pico, the small stand-in of the demo and the tests."""
        return str(self.fact("sam_variant")).startswith("pico")

    @property
    def is_phantom(self) -> bool:
        """Whether the card says that the cases are phantoms."""
        return bool(self.fact("phantoms")) or "phantom" in str(self.fact("dataset")).lower()

    @property
    def variant(self) -> str:
        """SAM variant of the run: ``pico, not SAM`` where it is pico; of MobileSAM, which file."""
        return sam_text(str(self.fact("sam_variant") or NOT_RECORDED), self.fact("base_sha256"))

    @property
    def sam(self) -> str:
        """Which SAM, for the table: every row of a pico run says so, that of the ellipse too."""
        return self.variant if self.has_network else f"no network (run: {self.variant})"

    @property
    def gate(self) -> float | None:
        """Share g of SAM in the ladder's mix, 0 to 1; None where the strategy has no gate."""
        value = self.fact("gate")
        return None if value is None else float(value)

    @property
    def split(self) -> str:
        """Which part of the data was evaluated and how the parts were made, as far as recorded."""
        made_by = self.fact("split.by", "split")
        parts = [str(part) for part in (self.fact("settings.section"), made_by) if part]
        return ", ".join(parts) or NOT_RECORDED

    @property
    def prompt_source(self) -> str:
        """Where the boxes came from, spelt out, with the law that they were drawn by or the file that they stand in."""
        source = self.fact("prompt_source")
        if source is None:
            return NOT_RECORDED
        loosen = self.fact("prompt_loosen", "settings.prompt.loosen")
        settings = {**(self.fact("settings.prompt") or {}), "loosen": loosen}
        return prompt_text(str(source), settings, self.fact("boxes_sha256"))

    @property
    def trainable(self) -> int | None:
        """Number of trainable parameters; 0 where no network is, None when not recorded."""
        count = self.fact("trainable_parameters")
        return 0 if not self.has_network else None if count is None else int(count)

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of the evaluation's run; None when not recorded, or when there was no network."""
        value = self.fact("seconds")
        return float(value) if self.has_network and value is not None else None

    @property
    def training_seconds(self) -> float | None:
        """Wall-clock seconds of the training's run; None when nothing was trained or it is not recorded."""
        value = self.training.get("seconds")
        return None if value is None else float(value)

    @property
    def warnings(self) -> list[str]:
        """What its cards say against the run: it did not complete, or predicted a class empty everywhere."""
        found = []
        for what, card in (("evaluation", self.card), ("training", self.training)):
            if card.get("status", "completed") != "completed":
                reason = card.get("error") or card.get("stop_reason")
                found.append(f"{self.title}: {what} is {card['status']}" + (f" ({reason})" if reason else ""))
            if card.get("collapsed_classes"):
                names = ", ".join(map(str, card["collapsed_classes"]))
                found.append(f"{self.title}: predicted empty everywhere in {what}: {names}")
        return found

    @property
    def classes(self) -> list[str]:
        """Classes in the order of the CSV."""
        return list(dict.fromkeys(str(row["class"]) for row in self.rows))

    def fact(self, *paths: str) -> Any:
        """First of the dotted ``paths`` that the card, then ``metrics.json``, records; None when none does."""
        for source in (self.card, self.metrics):
            for path in paths:
                value: Any = source
                for part in path.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                if value is not None:
                    return value
        return None


def _find_history(folder: Path) -> Path | None:
    """Curves in the run's own folder, or one folder up: an evaluation lies below its training."""
    found = (place / HISTORY_FILE for place in (folder, folder.absolute().parent))
    return next((path for path in found if path.is_file()), None)


def read_history(path: str | Path) -> dict[str, list[tuple[float, float, float]]]:
    """Curves of one training: name -> (epoch, iteration, value) in the order of the file; values that are no finite
    number are left out of the curve.

    Raises:
        BundleError: the file has other columns, or a cell is no number.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = {"epoch", "iteration", "name", "value"} - set(reader.fieldnames or ())
        if missing:
            raise BundleError(f"{path}: column {', '.join(sorted(missing))} is missing; train again to write it")
        for line, row in enumerate(reader, start=2):
            try:
                point = (float(row["epoch"] or "nan"), float(row["iteration"] or "nan"), float(row["value"]))
            except (TypeError, ValueError) as error:
                raise BundleError(f"{path}, line {line}: {error}; train again to write it") from error
            if math.isfinite(point[2]):
                curves.setdefault(row["name"], []).append(point)
    return curves


def check_runs(runs: Sequence[RunResult]) -> None:
    """Raise BundleError unless there is a run and every run has its own name."""
    if not runs:
        raise BundleError("no run to report; evaluate a bundle first and pass its output folder")
    names = [run.name for run in runs]
    doubled = sorted({name for name in names if names.count(name) > 1})
    raise_all(
        [
            f"{name}: {names.count(name)} runs; give each its own with RunResult.load(folder, name=...)"
            for name in doubled
        ],
        BundleError,
        "runs on one page need different names",
    )


def _strategy_name(card: Mapping[str, Any]) -> str | None:
    """Strategy of a card: a name, a mapping with ``name``, or one with ``_target_`` (``ZeroShot`` -> ``zero_shot``)."""
    strategy = card.get("strategy")
    if isinstance(strategy, Mapping):
        strategy = strategy.get("name") or str(strategy.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", str(strategy)).lower() if strategy else None


def _check_rows(rows: Sequence[Mapping[str, Any]], path: Path, folder: Path) -> None:
    """Raise BundleError for no rows, or for rows that would count one case and class twice."""
    if not rows:
        raise BundleError(f"{path}: holds no case; {_HOW.format(folder=folder)}")
    counts = Counter((row["case"], row["class"]) for row in rows)
    problems = [f"case {case}, class {name}: {count} rows" for (case, name), count in counts.items() if count > 1]
    raise_all(problems, BundleError, f"{path} counts cases twice; evaluate again into an empty folder")


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, or {} with one line added to ``problems``."""
    if not path.is_file():
        problems.append(f"{path}: no such file; {_HOW.format(folder=path.parent)}")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path}: not JSON ({error}); {_HOW.format(folder=path.parent)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path}: holds a {type(value).__name__}, not an object; {_HOW.format(folder=path.parent)}")
        return {}
    return value
