"""Keep, beside a run's results, the bundle that made them: its files with the values of this run written in."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from samseg_monai.bundles.running import current_workflow
from samseg_monai.errors import BundleError
from samseg_monai.sam.weights import RANDOM, sha256_of

RECORD = "bundle"
NAME = "name.txt"  # in every record: the name of the bundle that ran
# components that a reader calls settings
CHOICES = ("samseg_monai.strategies.", "samseg_monai.adapters.", "samseg_monai.data.slices.")
MAIN_CONFIGS = ("train.json", "evaluate.json", "inference.json")
SECTIONS = ("train", "validate")  # wiring, of which a run's record has what was overridden
# where data and results lie on the machine of the run is nobody else's business, and the other wiring stays as built
LOCAL = {
    "_meta_", "bundle_root", "checkpoint", "datalist", "dataset_dir", "device", "finalize", "imports", "initialize",
    "is_rank0", "mlflow", "network", "output_dir", "results_dir", "run", "sam_checkpoint", "train", "validate",
}  # fmt: skip
_ABSENT = object()
# likewise, within settings
PLACES = {"embeddings": "cache_dir", "slices": "cache_dir", "strategy": "side_weights", "prompt": "boxes"}


def with_values(config: dict[str, Any], original: dict[str, Any], effective: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the values that a run changed: top-level ones, and those within ``SECTIONS``.

    Args:
        config: a config file of the bundle.
        original: the config file the run was started with, as it lies in the bundle; for a run of several processes
            with the overlay for them, which must not get into ``config``.
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
    parser = ConfigParser(copy.deepcopy({**config, **changed}))
    for name, value in overridden(original, effective).items():
        parent = name.rpartition("::")[0]
        if name in parser or (parent in parser and isinstance(parser[parent], dict)):  # else a part of the overlay
            parser[name] = copy.deepcopy(value)
    return dict(parser.get())


def overridden(original: dict[str, Any], effective: dict[str, Any]) -> dict[str, Any]:
    """Return the ids within ``SECTIONS`` that a run changed, and their values; absolute paths are left out."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        if section in original and section in effective:
            found.update(_differences(original[section], effective[section], section))
    return {name: value for name, value in found.items() if not _names_a_place(value)}


def _differences(before: Any, now: Any, name: str) -> dict[str, Any]:
    """Ids from ``name`` on whose values differ, as deep within as the two are built alike."""
    pairs: list[tuple[Any, Any, Any]]
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() <= now.keys():
        pairs = [(key, before.get(key, _ABSENT), value) for key, value in now.items()]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(index, old, new) for index, (old, new) in enumerate(zip(before, now, strict=True))]
    else:
        return {} if before == now else {name: now}
    found: dict[str, Any] = {}
    for key, old, new in pairs:
        found.update(_differences(old, new, f"{name}::{key}"))
    return found


def _names_a_place(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_names_a_place, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and Path(value).is_absolute()


def _started_with(configs: Path, effective: dict[str, Any]) -> dict[str, Any]:
    """The config file in ``configs`` that the running one is made from, with the overlay for several processes if used.

    Empty where there is none.
    """
    name = next((n for n in MAIN_CONFIGS if (configs / n).is_file() and _is_from(effective, configs / n)), None)
    if name is None:
        return {}
    original = json.loads((configs / name).read_text(encoding="utf-8"))
    overlay = configs / f"multi_gpu_{name}"
    if not overlay.is_file():
        return dict(original)
    changes = json.loads(overlay.read_text(encoding="utf-8"))
    parser = ConfigParser(original)
    if changes.get("is_rank0") == effective.get("is_rank0"):
        for key, value in changes.items():
            merge_kv(parser, key, value)
    return dict(parser.get())


def settings() -> dict[str, Any]:
    """Return the running config's values that a reader of a card wants: every public key but places and wiring.

    ``strategy`` is there whatever its parts are, and what was overridden within ``SECTIONS`` under its whole id.
    """
    workflow = current_workflow()
    if workflow is None:
        return {}
    config = workflow.parser.get()
    wanted = (int, float, str, bool, list, dict, type(None))
    public = {
        key: value
        for key, value in config.items()
        if key not in LOCAL and isinstance(value, wanted) and (key == "strategy" or not _is_wiring(value))
    }
    prompt: Any = public.get("prompt")
    if isinstance(prompt, dict) and prompt.get("boxes"):
        public["prompt"] = {**prompt, "boxes": Path(prompt["boxes"]).name}  # its hash is among the facts
    return {**public, **overridden(_started_with(Path(workflow.config_root_path), config), config)}


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
        boxes = config.get("prompt", {}).get("boxes")
        if boxes and Path(boxes).is_file():
            found["boxes_sha256"] = sha256_of(Path(boxes))
    content = json.loads(Path(datalist).read_text(encoding="utf-8"))
    found["dataset"] = content.get("name")
    found["phantoms"] = bool(content.get("phantoms", False))
    found["split"] = content.get("split")
    if content.get("kind") == "images":  # predictions are images with the values of these labels
        found["label_values"] = content.get("labels")
    found["split_sizes"] = {s: len(content[s]) for s in ("training", "validation", "testing") if s in content}
    return found


def bundle_name(configs: Path) -> str:
    """Return the bundle's name: that of its folder, or the recorded one for a copy beside a run's results."""
    root = configs.resolve().parent
    record = root / NAME
    return record.read_text(encoding="utf-8").strip() if record.is_file() else root.name


def record_bundle(output_dir: str, *, keep: bool = False) -> None:
    """Copy the running bundle to ``<output_dir>/bundle`` with this run's values in its configs; rank 0 only.

    Args:
        output_dir: folder of the run.
        keep: leave an earlier record alone: an evaluation must not forget how its training was set.

    Outside a workflow nothing is recorded. ``pack_bundle`` works from this copy, so that a packed bundle runs without
    the overlays and overrides its training was started with.

    Raises:
        BundleError: there is a folder of that name, and no run has written it.
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
    _empty(target, bundle_name(configs))
    (target / "configs").mkdir()
    effective = workflow.parser.get()
    original = _started_with(configs, effective)
    for path in sorted(configs.iterdir()):
        if path.name in MAIN_CONFIGS and original:
            config = with_values(json.loads(path.read_text(encoding="utf-8")), original, effective)
            text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
            (target / "configs" / path.name).write_text(text, encoding="utf-8")
        elif path.is_file() and path.name != "demo.json":  # the demo's values are in the others now, or not wanted
            shutil.copy(path, target / "configs" / path.name)
    for name in ("docs", "LICENSE", "large_files.yml"):
        source = configs.parent / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.is_file():
            shutil.copy(source, target / name)


def _empty(target: Path, name: str) -> None:
    """Make the folder of a record, or empty it; the file that marks it is there at any moment, whatever interrupts."""
    marker = target / NAME
    if target.exists() and not marker.is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise BundleError(f"{target} is not the record of a run, and would be replaced by one; choose another output_dir")
    target.mkdir(parents=True, exist_ok=True)
    marker.write_text(name + "\n", encoding="utf-8")
    for old in target.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old != marker:
            old.unlink()


def _is_from(effective: dict[str, Any], path: Path) -> bool:
    """Tell whether every top-level key of the file at ``path`` is part of the running config."""
    return set(json.loads(path.read_text(encoding="utf-8"))) <= set(effective)
