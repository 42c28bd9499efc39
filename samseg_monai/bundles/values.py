"""From a running config back to settings: the values it has, and what in it no settings can describe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from samseg_monai.bundles.build import METHODS, PICKERS, SIDES
from samseg_monai.choices import Optimizer, Picker
from samseg_monai.settings import NOTHING, PLACES, BundleSettings, RunSettings, dump_settings

KEYS = tuple(RunSettings.model_fields)
TASK_KEYS = ("scans", "classes", "mirrored_classes", "label_values", "trained_spacing")
_METHODS = {f"samseg_monai.strategies.{kind}": name for name, kind in METHODS.items()}
_SIDES = {f"samseg_monai.adapters.{kind}": name for name, kind in SIDES.items()}
_PICKERS = {f"{PICKERS}.{kind.__name__}" for kind in Picker.__origin__.__args__}  # type: ignore[attr-defined]
_OPTIMIZERS = {f"torch.optim.{name}" for name in Optimizer.model_fields["name"].annotation.__args__}  # type: ignore[union-attr]
_ABSENT = object()


def effective_settings(config: dict[str, Any], built: BundleSettings) -> dict[str, Any]:
    """The settings of ``built`` with the values of the running ``config``, not checked; there is no demo.

    Parts of a user's own (``custom_parts``) keep the value of ``built``.
    """
    config = with_nulls(config)
    value = {**copy.deepcopy(dump_settings(built)), "demo": None}
    own = custom_parts(config)
    for key in KEYS:
        if key in config and not (key == "prompt" and not isinstance(config[key], dict)):
            value["run"][key] = _taken(value["run"][key], config[key], key)
    if "image_size" in own:
        value["run"]["image_size"] = built.run.image_size
    for group in ("slices", "validation"):
        if f"{group}::picker" in own:
            value["run"][group]["picker"] = dump_settings(built)["run"][group]["picker"]
    optimizer = config.get("train", {}).get("optimizer", {}) if isinstance(config.get("train"), dict) else {}
    if optimizer and "train::optimizer" not in own:
        decay = optimizer.get("weight_decay", value["run"]["optimizer"]["weight_decay"])
        name = optimizer["_target_"].rpartition(".")[2]
        value["run"]["optimizer"] = {"name": name, "weight_decay": decay}
    if isinstance(config.get("strategy"), dict) and not own & {"strategy", "strategy::side"}:
        value["strategy"]["method"] = _method(config["strategy"])
    if value["strategy"]["network"] is not None and "network_def" not in own:
        value["strategy"]["network"] = _network(value["strategy"]["network"], config["network_def"])
    _take_task(value["task"], config)
    return value


def prompt_problems(config: dict[str, Any], *, evaluating: bool) -> list[str]:
    """Files of prompts in a running config that its source of prompts does not take, so that nobody would read them."""
    prompt = config.get("prompt")
    if not isinstance(prompt, dict):
        return []
    source = prompt.get("source")
    files = {"prompts": (config.get("prompts"), "masks", "mask"), "boxes": (config.get("boxes"), "boxes", "json")}
    files["prompt::boxes"] = (prompt.get("boxes"), "boxes", "json")
    given = {name: rest for name, (value, *rest) in files.items() if value not in (None, NOTHING)}
    if evaluating and "boxes" in given:
        how = "an evaluation takes those of a file by prompt::boxes, with prompt::source 'json'"
        return [f"boxes: are those of a prediction; {how}"]
    return [
        f"{name}: {what} are given, but prompt::source is {source!r}; set prompt::source to {wanted!r}, or leave them"
        for name, (what, wanted) in given.items()
        if source != wanted
    ]


def with_nulls(value: Any) -> Any:
    """A copy of a config with None for what an override has set to it."""
    if isinstance(value, dict):
        return {key: with_nulls(item) for key, item in value.items()}
    return [with_nulls(item) for item in value] if isinstance(value, list) else None if value == NOTHING else value


def _taken(before: Any, now: Any, name: str) -> Any:
    """The value of a key: of a group each member but places; of a choice its class by name."""
    if isinstance(now, dict) and "_target_" in now:
        return {
            "name": str(now["_target_"]).rpartition(".")[2],
            **{k: v for k, v in now.items() if not k.startswith("_")},
        }
    if not isinstance(now, dict) or not isinstance(before, dict) or name == "loss::class_weights":
        return now
    members = {k: v for k, v in now.items() if f"{name}::{k}" not in PLACES}
    return {**before, **{k: _taken(before.get(k), v, f"{name}::{k}") for k, v in members.items()}}


def _method(component: dict[str, Any]) -> dict[str, Any]:
    name = _METHODS[component["_target_"]]
    left_out = {"_target_", "side_weights"}
    given = {("label" if key == "name" else key): value for key, value in component.items() if key not in left_out}
    if isinstance(given.get("side"), dict):
        side = {key: value for key, value in given["side"].items() if key != "_target_"}
        given["side"] = {"name": _SIDES[component["side"]["_target_"]], **side}
    return {"name": name, **given}


def _network(before: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    net = {key: value for key, value in definition.get("net", {}).items() if key in before and key != "name"}
    around = {key: value for key, value in definition.items() if key in before and key != "name"}
    return {**before, **net, **around}


def _take_task(task: dict[str, Any], config: dict[str, Any]) -> None:
    """Scans and classes of the run; words about others would not be true."""
    before = {key: task[key] for key in TASK_KEYS}
    for key in TASK_KEYS:
        value = config.get(key, task[key])
        if not (isinstance(value, str) and value.startswith("$")):  # looked up in the datalist
            task[key] = value
    if task["scans"] != before["scans"]:
        task["channels"] = None
    if task["classes"] != before["classes"] and isinstance(task["classes"], list):
        named = ", ".join(map(str, task["classes"]))
        task |= {"title": f"Segmentation of {named}", "text": f"Classes: {named}."}
        pairs = task["mirrored_classes"]
        task["mirrored_classes"] = pairs and [pair for pair in pairs if set(pair) <= set(task["classes"])]


def custom_parts(config: dict[str, Any]) -> set[str]:
    """Ids of components of a user's own, which no settings describe."""
    known = {
        "strategy": _METHODS,
        "strategy::side": _SIDES,
        "slices::picker": _PICKERS,
        "validation::picker": _PICKERS,
        "train::optimizer": _OPTIMIZERS,
    }
    found = set()
    for name, targets in known.items():
        value: Any = config
        for key in name.split("::"):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict) and "_target_" in value and value["_target_"] not in targets:
            found.add(name)
    definition = config.get("network_def")
    if isinstance(definition, dict):
        net = definition.get("net")
        target = net.get("_target_", "") if isinstance(net, dict) else ""
        if not str(definition.get("_target_")).startswith("samseg_monai.networks.") or (
            target and not str(target).startswith(("monai.networks.nets.", "samseg_monai.networks."))
        ):
            found.add("network_def")
    if "network_def" in found:  # SAM's rules for it do not bind another network
        found |= {"image_size"} & config.keys()
    return found


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Ids and values of ``now`` that differ from ``before``, as deep within as the two are built alike."""
    pairs: list[tuple[Any, Any, Any]]
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() <= now.keys():
        pairs = [(key, before.get(key, _ABSENT), value) for key, value in now.items()]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(index, old, new) for index, (old, new) in enumerate(zip(before, now, strict=True))]
    else:
        if before != now:
            yield name, now
        return
    for key, old, new in pairs:
        yield from differences(old, new, f"{name}::{key}" if name else str(key))
