"""Provenance: what the cards of runs record, as a table for people; a setting at its default shows the value it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samseg_monai.report.names import fact_text
from samseg_monai.report.runs import RunResult

# What a card, or metrics.json, records and the page shows; and how it is called there.
_FACTS = (
    "status", "bundle", "bundle_version", "strategy", "sam_variant", "base_sha256", "image_size", "precision",
    "prompt_source", "prompt_loosen", "policy", "settings.min_component_mm3", "seed", "split", "split_sizes",
    "dataset", "data_hash",
    "config_hash", "git_commit", "versions", "hardware", "peak_memory_mb", "started", "cases_file",
)  # fmt: skip
_NAMES = {
    "sam_variant": "SAM variant",
    "base_sha256": "SAM weights (sha256)",
    "prompt_loosen": "boxes drawn from labels: enlarged by (fraction of a side)",
    "policy": "empty masks (policy)",
    "settings.min_component_mm3": "smallest component kept (mm^3)",
    "split_sizes": "cases per split",
    "dataset": "data",
    "git_commit": "commit",
    "peak_memory_mb": "peak memory (MB)",
    "cases_file": "file of cases",
    "best": "best validation",
    "iterations": "batches",
}
# Without these nobody can repeat a run, so their absence is shown too.
_ALWAYS = {"sam_variant", "prompt_source", "policy", "seed", "data_hash", "git_commit", "versions"}
_OF_TRAINING = (
    "status", "started", "seed", "data_hash", "config_hash", "git_commit", "epochs", "iterations", "best",
    "peak_memory_mb",
)  # fmt: skip


def facts(runs: Sequence[RunResult]) -> list[tuple[str, list[str]]]:
    """Heading -> one text per run, in a fixed order; facts that no card records are left out, the vital ones never."""
    found = []
    for key in _FACTS:
        values = [_value(run, key) for run in runs]
        if key in _ALWAYS or any(value is not None for value in values):
            found.append((_NAMES.get(key, key.replace("_", " ")), [fact_text(value) for value in values]))
    for key in _OF_TRAINING if any(run.training for run in runs) else ():
        values = [fact_text(run.training.get(key)) if run.training else "-" for run in runs]
        found.append((f"training: {_NAMES.get(key, key.replace('_', ' '))}", values))
    return found


def _value(run: RunResult, key: str) -> Any:
    """A fact of a card; what a setting left to its default comes to, where the card has the settings."""
    value = run.fact(key, f"settings.{key}")
    if key == "strategy" and isinstance(value, Mapping) and isinstance(value.get("arguments"), Mapping):
        given = value["arguments"]
        default = {"alpha": given.get("rank"), **dict.fromkeys(("blocks", "last"), "all")}
        return {**value, "arguments": {k: default.get(k, "off") if v is None else v for k, v in given.items()}}
    if value is None and key == "settings.min_component_mm3" and run.fact("settings") is not None:
        return "off"
    return value
