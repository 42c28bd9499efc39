"""The experiment's result files: a CSV with a row per slice and a JSON with facts and curves for each run."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.cli.story import ABSENT, recorded
from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.files import write_whole
from samseg_monai.handlers.provenance import plain, read_json

Row = dict[str, Any]
TEXTS = ("row", "case", "block", "section", "boxes", "weights")
CURVES = ("train_loss", "val_loss", "val_dice", "lr")
FACTS = ("trainable_parameters", "peak_memory_mb", "hardware", "versions", "git_commit", "strategy", "base_sha256")
OF_TRAINING = ("best", "epochs", "seconds")


def write(rows: Sequence[Row], facts: Mapping[str, Any], path: Path) -> None:
    """Write ``path`` (CSV) and the JSON of the same name, each whole or not at all; the CSV last: it says done."""

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(
                stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path.with_suffix(".json"), lambda p: p.write_text(json.dumps(facts) + "\n", encoding="utf-8"))
    write_whole(path, write_csv)


def read(folder: Path) -> list[Row]:
    """All rows of all CSV files of a folder (not those below it): scores as float, fold as text, seed as int."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as stream:
            rows += [_parsed(row) for row in csv.DictReader(stream)]
    return rows


def read_facts(folder: Path) -> list[Row]:
    """The facts of each run that has both of its files."""
    paths = [path.with_suffix(".json") for path in sorted(folder.glob("*.csv"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def facts_of(folder: Path, results: Path, *, trained: bool, **own: Any) -> Row:
    """Facts of a run, from the card of its training in ``folder``, else its evaluation in ``results``, and ``own``."""
    card = read_json((folder if trained else results) / "run_card.json")
    keys = (*FACTS, *OF_TRAINING) if trained else FACTS
    return {**own, **{key: card.get(key) for key in keys}, "history": curves_of(folder / "history.csv")}


def is_trained(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a completed training with these settings.

    Raises:
        ConfigError: it holds one with others, such as of an earlier plan, whose weights are not this plan's.
    """
    card = read_json(folder / "run_card.json")
    if not card:
        return False
    others = []
    for key, wanted in settings.items():
        was = recorded(card.get("settings", {}), key)
        if was is not ABSENT and was != plain(wanted):
            others.append(f"{key}: {was!r} there, {wanted!r} in the plan")
    raise_all(others, ConfigError, f"{folder}: is a training with other settings; move it away")
    return bool(card.get("status") == "completed")


def curves_of(path: Path) -> dict[str, dict[str, float]]:
    """Curve -> epoch -> value from a training's ``history.csv``; empty where nothing was trained."""
    curves: dict[str, dict[str, float]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["name"] in CURVES:
                curves.setdefault(row["name"], {})[row["epoch"]] = short(float(row["value"]))
    return curves


def short(value: Any) -> Any:
    """A number with five decimals, which is more than a pixel of any tumour here changes."""
    return round(value, 5) if isinstance(value, float) else value


def _parsed(row: Mapping[str, str]) -> Row:
    numbers = {key: float({"True": "1", "False": "0", "": "nan"}.get(text, text))
               for key, text in row.items() if key not in (*TEXTS, "fold", "seed")}  # fmt: skip
    return {**{key: row[key] for key in TEXTS}, "fold": row["fold"], "seed": int(row["seed"]), **numbers}
