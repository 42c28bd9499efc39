"""Shell lines that make a page again, from the data on: what prepares the data, trains and evaluates each row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samseg_monai.errors import BundleError, DataError
from samseg_monai.files import hash_file, read_json
from samseg_monai.report.runs import RunResult
from samseg_monai.sam.weights import RANDOM
from samseg_monai.workflow import from_here, shell_command

_EVALUATION = "evaluation"
_ASKED = ("section", "allow_seen", "policy", "lesion_wise", "regions", "min_component_mm3", "save_predictions")
_RECORD = "bundle"  # beside a run: the bundle with all the values that the run had


def prepare_lines(prepare: Sequence[str], dataset_dir: Path, datalists: Sequence[Path]) -> list[str]:
    """How the data come to their datalist: the recipe's line for the folder, with the split and the coding of labels
    that the datalist records; of other datalists which file it is."""
    own = dataset_dir / "datalist.json"
    found = []
    for path in dict.fromkeys(datalists):
        if path.is_file() and (path != own or not prepare):
            found.append(f"# {path}: sha256 {hash_file(path)}")
    if own in datalists and own.is_file():
        datalist = read_json(own, DataError, "datalist")
        found += [_as_recorded(_placed(line, dataset_dir), datalist) for line in prepare]
        found.append(f"# {own}: sha256 {hash_file(own)}" if prepare else "")
    return [line for line in found if line]


def _placed(line: str, dataset_dir: Path) -> str:
    """A recipe's line, whose folder is data/NAME, for another folder."""
    return re.sub(r"(?<=[\s=])data/[\w.-]+", lambda m: shlex.quote(str(dataset_dir)), line)


def _as_recorded(line: str, datalist: Any) -> str:
    """A line of ``samseg prepare`` with the options that make the split and the coding of the datalist, in place of its
    own; a split file is named without its folder, which is not recorded."""
    made = datalist.get("split")
    made = made if isinstance(made, dict) else {}
    parts = {key: ",".join(f"{part:g}" for part in made.get(key) or ()) for key in ("fractions", "counts")}
    given = {"--fractions": parts["fractions"] or None, "--split": parts["counts"] or None}
    given |= {"--split-file": made.get("file"), "--validation": made.get("validation"), "--seed": made.get("seed")}
    if "validation" in made:  # of Synapse, where it is btcv13 by default
        given["--label-coding"] = datalist.get("label_coding")
    for option, value in given.items():
        if value is not None:
            line = re.sub(rf" {option} \S+", "", line) + f" {option} {shlex.quote(str(value))}"
    return line + " --by-name" * (made.get("order") == "name" and "counts" not in made)


def recorded(run: RunResult) -> tuple[Path, dict[str, Any]]:
    """Folder of the run whose evaluation this is, and the task of the bundle that it has left there (empty: none)."""
    folder = run.folder.parent if run.folder.name == _EVALUATION else run.folder
    settings = folder / _RECORD / "configs" / "settings.json"
    task = read_json(settings, BundleError, "settings").get("task") if settings.is_file() else {}
    return folder, task if isinstance(task, dict) else {}


def data_folder(run: RunResult) -> Path:
    """Where the bundle of a run expects its data."""
    return Path("data", str(recorded(run)[1].get("dataset") or run.fact("dataset")))


def report_commands(runs: Sequence[RunResult], dataset_dir: Path | None) -> list[str]:
    """Lines for the rows of a page whose bundles lie beside them, as every run leaves its own, into the folder
    ``again``; of others a remark. A file of boxes is named as the card does, without its folder.

    Args:
        runs: rows.
        dataset_dir: folder of the data; None: where the bundles expect them.
    """
    found: list[str] = []
    folders = []
    for run in runs:
        folder, task = recorded(run)
        configs = folder / _RECORD / "configs"
        if not (configs / "evaluate.json").is_file():
            found.append(f"# {run.title}: no bundle beside {run.folder}")
            continue
        data = dataset_dir or data_folder(run)
        found += prepare_lines(task.get("prepare") or [], data, [data / "datalist.json"])
        folders.append(Path("again", folder.name))
        given = {"output_dir": str(folders[-1])} | ({} if dataset_dir is None else {"dataset_dir": str(dataset_dir)})
        given |= {"sam_checkpoint": RANDOM} if run.fact("base_sha256") == RANDOM else {}
        given |= {"prompt::boxes": boxes} if (boxes := run.fact("settings.prompt.boxes")) else {}
        if run.trainable != 0 and (configs / "train.json").is_file():
            found.append(shell_command([configs / "train.json"], given))
        settings = run.fact("settings") or {}
        asked = {key: settings[key] for key in _ASKED if settings.get(key) is not None}
        found.append(shell_command([configs / "inference.json", configs / "evaluate.json"], {**given, **asked}))
    words = ["samseg", "report", *map(str, folders), "--output", "again/report.html"]
    words += [] if dataset_dir is None else ["--dataset-dir", str(dataset_dir)]
    page = [shlex.join(words)] if folders else []
    return [from_here(line) for line in dict.fromkeys([*found, *page])]
