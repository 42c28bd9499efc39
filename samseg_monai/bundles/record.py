"""Keep, beside a run's results, the bundle that made them: its files with the values of this run written in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from samseg_monai.bundles.running import current_workflow
from samseg_monai.sam.weights import RANDOM

RECORD = "bundle"
# components that a reader calls settings
CHOICES = ("samseg_monai.strategies.", "samseg_monai.adapters.", "samseg_monai.data.slices.")
MAIN_CONFIGS = ("train.json", "evaluate.json", "inference.json")
# where data and results lie on the machine of the run is nobody else's business, and wiring stays as built
LOCAL = {
    "_meta_", "bundle_root", "checkpoint", "datalist", "dataset_dir", "device", "finalize", "imports", "initialize",
    "is_rank0", "mlflow", "network", "output_dir", "results_dir", "run", "sam_checkpoint", "train", "validate",
}  # fmt: skip
PLACES = {"embeddings": "cache_dir", "slices": "cache_dir", "strategy": "side_weights"}  # likewise, within settings


def with_values(config: dict[str, Any], original: dict[str, Any], effective: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the top-level values that a run changed.

    Args:
        config: a config file of the bundle.
        original: the config file the run was started with, as it lies in the bundle.
        effective: what the run really used, overlays and overrides included.

    A value is taken over where ``config`` had the same one as ``original``: the two meant the same thing. Places are
    not: a file or folder that a run named stays as it is in ``config``.
    """
    changed = {
        key: effective[key]
        for key in config
        if key not in LOCAL and key in original and key in effective and config[key] == original[key]
    }
    for key, place in PLACES.items():
        if isinstance(changed.get(key), dict) and changed[key].get(place) not in (None, RANDOM):
            changed[key] = {**changed[key], place: config[key].get(place)}
    return {**config, **changed}


def settings() -> dict[str, Any]:
    """Return the running config's values that a reader of a card wants: every public key but places and wiring."""
    workflow = current_workflow()
    config = {} if workflow is None else workflow.parser.get()
    wanted = (int, float, str, bool, list, dict, type(None))
    return {
        key: value
        for key, value in config.items()
        if key not in LOCAL and isinstance(value, wanted) and not _is_wiring(value)
    }


def _is_wiring(value: Any) -> bool:
    """Tell whether a value is a component, a list of components or an expression, rather than a setting."""
    if isinstance(value, dict):
        component = not str(value.get("_target_", CHOICES[0])).startswith(CHOICES)
        return component or any(map(_is_wiring, value.values()))
    if isinstance(value, list):
        return any(map(_is_wiring, value))
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def facts(datalist: str) -> dict[str, Any]:
    """Return what a run card says beside its settings: which bundle ran, how prompts were made, on which data."""
    workflow = current_workflow()
    found: dict[str, Any] = {}
    if workflow is not None:
        config = workflow.parser.get()
        found["bundle"] = bundle_name(Path(workflow.config_root_path))
        found["bundle_version"] = config.get("_meta_", {}).get("version")
        found["prompt_loosen"] = config.get("prompt", {}).get("loosen")
    content = json.loads(Path(datalist).read_text(encoding="utf-8"))
    found["dataset"] = content.get("name")
    found["phantoms"] = bool(content.get("phantoms", False))
    found["split"] = content.get("split")
    found["split_sizes"] = {s: len(content[s]) for s in ("training", "validation", "testing") if s in content}
    return found


def bundle_name(configs: Path) -> str:
    """Return the bundle's name: that of its folder, or the recorded one for a copy beside a run's results."""
    root = configs.resolve().parent
    record = root / "name.txt"
    return record.read_text(encoding="utf-8").strip() if record.is_file() else root.name


def record_bundle(output_dir: str, *, keep: bool = False) -> None:
    """Copy the running bundle to ``<output_dir>/bundle`` with this run's values in its configs; rank 0 only.

    Args:
        output_dir: folder of the run.
        keep: leave an earlier record alone: an evaluation must not forget how its training was set.

    Outside a workflow nothing is recorded. ``pack_bundle`` works from this copy, so that a packed bundle runs without
    the overlays and overrides its training was started with.
    """
    workflow = current_workflow()
    if workflow is None or idist.get_rank() > 0:
        return
    configs = Path(workflow.config_root_path).resolve()
    target = Path(output_dir) / RECORD
    if configs == (target / "configs").resolve() or (
        keep and (Path(output_dir) / "adapter.safetensors").is_file() and target.is_dir()
    ):
        return
    shutil.rmtree(target, ignore_errors=True)
    (target / "configs").mkdir(parents=True)
    effective = workflow.parser.get()
    started_with = next((n for n in MAIN_CONFIGS if (configs / n).is_file() and _is_from(effective, configs / n)), None)
    original = json.loads((configs / started_with).read_text(encoding="utf-8")) if started_with else {}
    for path in sorted(configs.iterdir()):
        if path.name in MAIN_CONFIGS and original:
            config = with_values(json.loads(path.read_text(encoding="utf-8")), original, effective)
            text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
            (target / "configs" / path.name).write_text(text, encoding="utf-8")
        elif path.is_file() and path.name != "demo.json":  # the demo's values are in the others now, or not wanted
            shutil.copy(path, target / "configs" / path.name)
    (target / "name.txt").write_text(bundle_name(configs) + "\n", encoding="utf-8")
    for name in ("docs", "LICENSE", "large_files.yml"):
        source = configs.parent / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.is_file():
            shutil.copy(source, target / name)


def _is_from(effective: dict[str, Any], path: Path) -> bool:
    """Tell whether every top-level key of the file at ``path`` is part of the running config."""
    return set(json.loads(path.read_text(encoding="utf-8"))) <= set(effective)
