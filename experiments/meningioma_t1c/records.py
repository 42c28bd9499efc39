"""The experiment's result files: a CSV with a row per slice and a JSON with facts and curves for each run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser

from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.files import write_text, write_whole
from samseg_monai.handlers.provenance import plain, read_json
from samseg_monai.metrics import read_history

Row = dict[str, Any]
TEXTS = ("row", "case", "block", "section", "boxes", "weights", "fold")
CURVES = ("train_loss", "val_loss", "val_dice", "lr")
FACTS = ("trainable_parameters", "peak_memory_mb", "hardware", "versions", "git_commit", "strategy", "base_sha256")
OF_TRAINING = ("best", "epochs", "seconds")


def write(rows: Sequence[Row], facts: Mapping[str, Any], path: Path) -> None:
    """Write ``path`` (CSV) and the JSON of the same name, each whole or not at all; the CSV last: it says done."""
    write_text(path.with_suffix(".json"), json.dumps(facts) + "\n")
    write_whole(path, lambda temporary: pd.DataFrame(list(rows)).to_csv(temporary, index=False, lineterminator="\n"))


def read(folder: Path) -> pd.DataFrame:
    """All rows of all CSV files of a folder (not those below it): names and fold as text, the others as numbers."""
    files = [pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str)) for path in sorted(folder.glob("*.csv"))]
    return pd.concat(files, ignore_index=True) if files else pd.DataFrame(columns=[*TEXTS, "seed", "dice"])


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
    recorded = ConfigParser(card.get("settings", {}))  # places and wiring are none: what is absent does not count
    found = {key: recorded.get(key, plain(wanted)) for key, wanted in settings.items()}
    others = [
        f"{key}: {found[key]!r} there, {wanted!r} in the plan"
        for key, wanted in settings.items()
        if found[key] != plain(wanted)
    ]
    raise_all(others, ConfigError, f"{folder}: is a training with other settings; move it away")
    return bool(card.get("status") == "completed")


def curves_of(path: Path) -> dict[str, dict[str, float]]:
    """Curve -> epoch -> value from a training's ``history.csv``; empty where nothing was trained."""
    curves: dict[str, dict[str, float]] = {}
    points = read_history(path)[0] if path.is_file() else {}
    for (epoch, name), (_, value) in points.items():
        if name in CURVES:
            curves.setdefault(name, {})[str(epoch)] = short(value)
    return curves


def short(value: Any) -> Any:
    """A number with five decimals, which is more than a pixel of any tumour here changes."""
    return round(value, 5) if isinstance(value, float) else value
