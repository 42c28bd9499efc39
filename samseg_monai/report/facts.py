"""Provenance of the report: facts of the runs' cards side by side, one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samseg_monai.report.runs import NOT_RECORDED, RunResult

# Heading on the page -> where a card (or metrics.json) keeps it, dotted; the first that is there counts.
_FACTS: dict[str, tuple[str, ...]] = {
    "status": ("status",),
    "bundle": ("bundle",),
    "bundle version": ("bundle_version",),
    "strategy": ("strategy",),
    "SAM variant": ("sam_variant",),
    "SAM weights (sha256)": ("base_sha256",),
    "image size": ("image_size",),
    "prompt source": ("prompt_source",),
    "boxes drawn from labels: enlarged by (fraction of a side)": ("prompt_loosen", "settings.prompt.loosen"),
    "empty masks (policy)": ("policy", "settings.policy"),
    "smallest component kept (mm^3)": ("settings.min_component_mm3",),
    "seed": ("seed", "seeds"),
    "split": ("split",),
    "cases per split": ("split_sizes",),
    "data": ("dataset",),
    "data hash": ("data_hash",),
    "config hash": ("config_hash",),
    "commit": ("git_commit", "commit"),
    "versions": ("versions",),
    "hardware": ("hardware",),
    "peak memory (MB)": ("peak_memory_mb",),
    "started": ("started",),
    "file of cases": ("cases_file",),
}
# Without these nobody can repeat a run, so their absence is shown too.
_ALWAYS = {"SAM variant", "prompt source", "empty masks (policy)", "seed", "data hash", "commit", "versions"}
_OF_TRAINING = {
    "training: status": "status",
    "training: started": "started",
    "training: seed": "seed",
    "training: data hash": "data_hash",
    "training: config hash": "config_hash",
    "training: commit": "git_commit",
    "training: epochs": "epochs",
    "training: best validation": "best",
    "training: peak memory (MB)": "peak_memory_mb",
}
_LONGEST = 300  # characters of a fact in the table; the whole card stands below it


def facts(runs: Sequence[RunResult]) -> list[tuple[str, list[str]]]:
    """Heading -> one text per run, in a fixed order; facts that no card records are left out, the vital ones never."""
    found = []
    for heading, paths in _FACTS.items():
        values = [run.fact(*paths) for run in runs]
        if heading in _ALWAYS or any(value is not None for value in values):
            found.append((heading, [fact_text(value) for value in values]))
    for heading, key in _OF_TRAINING.items():
        if any(run.training for run in runs):
            found.append((heading, [fact_text(run.training.get(key)) if run.training else "-" for run in runs]))
    return found


def fact_text(value: Any) -> str:
    """A fact on one line: mappings as ``key value, key value``, cut where it gets long."""
    text = _spelt(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _spelt(value: Any) -> str:
    if value is None:
        return NOT_RECORDED
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_spelt(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_spelt(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
