"""Expand recipes (engine, task, strategy) into one complete, self-contained MONAI bundle.

A recipe is a JSON object with a part per file of the bundle: ``base`` goes into every config, ``train``, ``evaluate``,
``inference``, ``demo``, ``metadata`` ... into the file of that name, ``docs`` into the text files. The engine holds the
wiring once; task and strategy only replace values, by MONAI ids such as ``"prompt::loosen"``, or extend a list or object
with ``"+id"``. An id that replaces nothing is an error. A recipe that ``"extends"`` another takes over the parts that it does
not have itself; a task that names an ``"engine"`` (``images``: 2-D images) has that recipe of the engine between the
engine's wiring and its own values.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from samseg_monai import __version__
from samseg_monai.errors import BundleError, raise_all

RECIPES = Path(str(files("samseg_monai") / "recipes"))
PLACEHOLDER = "REQUIRED"
CONFIGS = ("train", "evaluate", "inference")
ENGINES = ("images",)
OVERLAYS = ("multi_gpu_train", "multi_gpu_evaluate", "demo")


def read_json(path: Path) -> Any:
    """Read a JSON file; a duplicate key is an error, since one of the two values would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        raise_all(sorted({k for k in keys if keys.count(k) > 1}), BundleError, f"{path.name}: keys given twice")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error


def recipe_names(kind: str) -> list[str]:
    """List the recipes of ``kind`` ("tasks" or "strategies")."""
    return sorted(path.stem for path in (RECIPES / kind).glob("*.json"))


def _recipe(kind: str, name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".json") else RECIPES / kind / f"{name}.json"
    if not path.is_file():
        raise BundleError(
            f"{kind}: no recipe {name!r}; there are {', '.join(recipe_names(kind))}, or give the path of a .json file"
        )
    recipe = read_json(path)
    parent = recipe.pop("extends", None)
    return recipe if parent is None else {**_recipe(kind, parent), **recipe}


def merge(config: dict[str, Any], changes: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return ``config`` with the values of ``changes`` put at their MONAI ids.

    Raises:
        BundleError: ids that exist nowhere in ``config``; all are listed.
    """
    parser = ConfigParser(copy.deepcopy(config))
    unknown = [key for key in changes if key.lstrip("+") not in parser]
    raise_all(unknown, BundleError, f"{origin}: keys that override nothing")
    for key, value in changes.items():
        merge_kv(parser, key, copy.deepcopy(value))
    return parser.get()


def _placeholders(config: Any, where: str = "") -> list[str]:
    if config == PLACEHOLDER:
        return [where]
    items: Any = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [found for key, value in items for found in _placeholders(value, f"{where}::{key}".lstrip(":"))]


def _layer(task: dict[str, Any]) -> dict[str, Any]:
    """The engine's recipe for the kind of data that a task names; empty for volumes."""
    name = task.get("engine")
    path = RECIPES / "engine" / f"{name}.json"
    if name is None:
        return {}
    if name not in ENGINES:
        raise BundleError(f"task recipe: there is no engine {name!r}; leave it out for volumes, or use {ENGINES[0]!r}")
    return dict(read_json(path))


def expand(task: dict[str, Any], strategy: dict[str, Any], name: str) -> dict[str, Any]:
    """Build the config file ``name`` (train, evaluate, inference) from engine, task and strategy."""
    config = {**read_json(RECIPES / "engine" / "base.json"), **read_json(RECIPES / "engine" / f"{name}.json")}
    layer = _layer(task)
    for part in ("base", name):
        # wiring of another kind of data has keys of its own; what it changes within others has to be there
        own = {key: value for key, value in layer.get(part, {}).items() if key.isidentifier()}
        config = merge({**config, **own}, layer.get(part, {}), f"engine's recipe, {part}")
    for origin, recipe in (("task", task), ("strategy", strategy)):
        for part in ("base", name):
            config = merge(config, recipe.get(part, {}), f"{origin} recipe, {part}")
    raise_all(_placeholders(config), BundleError, f"{name}.json: keys that neither task nor strategy has set")
    return config


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def build_bundle(task: str, strategy: str, output: str | Path) -> Path:
    """Write the bundle ``<task>_segmentation_<strategy>`` below ``output``.

    Args:
        task, strategy: names of recipes, or paths of recipe files of your own.
        output: folder that will hold the bundle's folder; files of the same names are replaced.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: unknown recipes, ids that override nothing, or values left open.
    """
    task_recipe, strategy_recipe = _recipe("tasks", task), _recipe("strategies", strategy)
    name = f"{Path(task).stem}_segmentation_{Path(strategy).stem}"
    root = Path(output) / name
    wanted = strategy_recipe["configs"]
    for config in (c for c in CONFIGS if c in wanted):
        _write_json(root / "configs" / f"{config}.json", expand(task_recipe, strategy_recipe, config))
    for overlay in (o for o in OVERLAYS if o in wanted):
        path = RECIPES / "engine" / f"{overlay}.json"
        content = read_json(path) if path.is_file() else {}
        parts = {**task_recipe.get(overlay, {}), **strategy_recipe.get(overlay, {})}
        _write_json(root / "configs" / f"{overlay}.json", {**content, **parts})
    metadata = read_json(RECIPES / "engine" / "metadata.json")
    metadata["required_packages_version"]["samseg-monai"] = __version__
    layer = _layer(task_recipe)
    for origin, recipe in (("engine's", layer), ("task", task_recipe), ("strategy", strategy_recipe)):
        metadata = merge(metadata, recipe.get("metadata", {}), f"{origin} recipe, metadata")
    raise_all(_placeholders(metadata), BundleError, "metadata.json: keys that neither task nor strategy has set")
    _write_json(root / "configs" / "metadata.json", metadata)
    inference = expand(task_recipe, strategy_recipe, "inference")
    docs = {
        "has_sam": True,
        "embeddings": False,
        "images": bool(layer),
        "performance": "No results with SAM's official weights are published with this bundle yet.",
        **task_recipe["docs"],
        **strategy_recipe["docs"],
        "prompted": inference["prompt"]["source"] != "none",
        "variant": inference["sam_variant"],
    }
    _write_texts(root, name, metadata, docs, wanted)
    return root


def _write_texts(root: Path, name: str, metadata: dict[str, Any], docs: dict[str, Any], configs: list[str]) -> None:
    """Write what a bundle carries beside its configs: README, licences, logging, list of large files."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RECIPES / "engine"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown and plain text, not HTML
    )
    targets = {
        "README.md": "docs/README.md",
        "data_license.txt": "docs/data_license.txt",
        "LICENSE": "LICENSE",
        "large_files.yml": "large_files.yml",
        "logging.conf": "configs/logging.conf",
    }
    for template, target in targets.items():
        text = environment.get_template(f"{template}.jinja").render(
            name=name, metadata=metadata, configs=configs, weights=_weights_of(docs["variant"]), **docs
        )
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _weights_of(variant: str | None) -> Any:
    """Name, URL and hash of the published file of a SAM variant; without SAM those of vit_b, the engine's default."""
    from samseg_monai.sam.weights import KNOWN

    return KNOWN[variant or "vit_b"]
