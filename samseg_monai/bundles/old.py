"""Settings of bundles of samseg-monai 0.1.0, which had none: read from the literal values of their configs.

Nothing is evaluated: a value that should be a literal and is an expression, and wiring that settings do not describe,
are errors. Expressions that 0.1.0 itself wrote, such as ``$len(@scans)``, are known and passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samseg_monai.errors import BundleError, raise_all
from samseg_monai.settings import RunSettings

VERSION = "0.1.0"
SCALING = "samseg_monai.transforms.ScaleGreysd"
METHODS = {"ZeroShot": "zero_shot", "LoRA": "lora", "Ladder": "ladder", "Selective": "selective", "Scratch": "scratch"}
PLACES = {"cache_dir", "boxes", "side_weights", "random_masks"}  # the receiver's, or no longer there
FOLLOWS = {"spatial_dims", "in_channels", "out_channels"}  # of networks: from scans and classes
KEYS = {"keys": "image", "_disabled_": None, "channel_wise": True, "clip": True, "b_min": 0.0, "b_max": None}
CROP = {"keys": ["image", "label", "prompt"], "allow_missing_keys": True, "_disabled_": None, "spatial_size": None}
# transforms of 0.1.0: arguments that settings hold, and those that always were the same (None: an expression)
TRANSFORMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "NormalizeIntensityd": ({"nonzero": "nonzero"}, KEYS),
    "ScaleIntensityRanged": ({"a_min": "window", "a_max": "window"}, KEYS),
    "ScaleIntensityRangePercentilesd": ({"lower": "percentiles", "upper": "percentiles"}, KEYS),
    "ResizeWithPadOrCropd": ({}, CROP),
    SCALING: ({}, {**KEYS, "top": None}),
    "Orientationd": ({"axcodes": "orientation"}, {**CROP, "labels": None}),
}


def old_settings(name: str, configs: Mapping[str, Any], metadata: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
    """Settings of a bundle of 0.1.0, as JSON values that have still to go through ``read_settings``.

    Args:
        name: of the bundle.
        configs: content of its config files by name (``inference``; ``train``, ``evaluate`` where there are any).
        metadata: content of metadata.json.
        card: content of the run card among its metrics; empty where there is none.

    Raises:
        BundleError: the configs hold wiring that settings do not describe; all of it is named.
    """
    inference = configs["inference"]
    problems: list[str] = []
    task, _, strategy = name.partition("_segmentation_")
    run = _run(configs, card)
    method, network = _method(inference, run, problems)
    classes = inference.get("classes")
    data = str(metadata.get("data_source", ""))
    orientation, intensity = _transforms(inference, problems)
    if "ResizeWithPadOrCropd" not in str(inference.get("volume_transforms")):
        run["crop_size"] = None
    images = "spacing_mm" in inference
    raise_all(
        problems, BundleError, f"{name}: more than the settings of a bundle tell; --trust runs what its maker wrote"
    )
    text = f"{metadata.get('task')} ({', '.join(map(str, classes or ()))})"
    return {
        "engine": VERSION,
        "name": name,
        "task": {
            "name": task or name,
            "kind": "images" if images else "volumes",
            "dataset": str(inference.get("dataset_dir", task)).rpartition("/")[2] or task,
            "scans": inference.get("scans"),
            "classes": classes,
            "channels": _channels(metadata),
            "labels": "foreground" if "AsDiscreted" in str(inference.get("load_transforms")) else "named",
            "modality": _image(metadata).get("modality", "OT"),
            "orientation": None if images else orientation,
            "intensity": intensity,
            "label_values": inference.get("label_values"),
            "mirrored_classes": configs.get("train", {}).get("mirrored_classes"),
            "title": str(metadata.get("task", name)),
            "text": text,
            "data_text": data or "Not told.",
            "data_source": data or "Not told.",
            "data_license": ["See docs/data_license.txt of the bundle as it came."],
        },
        "strategy": {
            "name": strategy or "unnamed",
            "method": method,
            "network": network,
            "title": str(metadata.get("name", name)),
            "text": [str(metadata.get("description", name))],
            "description": str(metadata.get("description", name)),
        },
        "run": run,
    }


def _run(configs: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the public keys: of the prediction before those of the training, the evaluation and the run card."""
    inference, train, evaluate = (configs.get(name, {}) for name in ("inference", "train", "evaluate"))
    run: dict[str, Any] = {}
    for source in (card.get("settings") or {}, evaluate, train, inference):
        run |= {key: value for key, value in source.items() if key in RunSettings.model_fields}
    prompts = [(card.get("settings") or {}).get("prompt"), evaluate.get("prompt"), train.get("prompt")]
    prompt = inference.get("prompt")
    if isinstance(prompt, dict) and prompt.get("source") == "image":  # the place of the prompts that a person gives
        known = [value for value in prompts if isinstance(value, dict)]
        prompt = {"source": "label", **({} if not known else known[-1]), **_without(prompt, {"source"})}
    run["prompt"] = _without(prompt, PLACES)
    run["embeddings"] = _without(run.get("embeddings", {}), PLACES)
    run["slices"] = _without(run.get("slices", {}), PLACES)
    if isinstance(run["slices"], dict) and "picker" in run["slices"]:
        run["slices"]["picker"] = _named(run["slices"]["picker"], "samseg_monai.data.slices.")
    parts = train.get("train", {})
    loss = parts.get("loss", {}).get("loss", {})
    more = {key: loss[key] for key in ("batch", "squared_pred", "smooth_nr", "smooth_dr") if key in loss}
    run["loss"] = {**run.get("loss", {}), **more}
    if optimizer := parts.get("optimizer"):
        run["optimizer"] = _named(_without(optimizer, {"params", "lr"}), "torch.optim.")
    return run


def _method(inference: Mapping[str, Any], run: dict[str, Any], problems: list[str]) -> tuple[Any, Any]:
    """Strategy and network; literal values within ``network_def`` win over those of the keys."""
    strategy = _named(inference.get("strategy"), "samseg_monai.strategies.")
    if isinstance(strategy, dict):
        kind = strategy.get("name")
        strategy = _without(strategy, PLACES)
        own = (inference.get("strategy") or {}).get("name")
        strategy |= {"name": METHODS.get(str(kind), kind), **({} if own is None else {"label": own})}
        if isinstance(strategy.get("side"), dict):
            strategy["side"] = {**_without(strategy["side"], {"_target_"}), "name": "resnet"}
            if inference["strategy"]["side"].get("_target_") != "samseg_monai.adapters.ResNetSide":
                problems.append(f"strategy::side::_target_: {inference['strategy']['side'].get('_target_')!r}")
    definition = inference.get("network_def") or {}
    target = definition.get("_target_")
    literal = {key: value for key, value in definition.items()
               if key not in ("_target_", "net") and not str(value).startswith(("$", "@"))}  # fmt: skip
    if target == "samseg_monai.networks.SamSegmenter":
        problems += [f"network_def::{key}: {value!r}" for key, value in literal.items() if key not in run]
        run |= literal
        return strategy, None
    if target != "samseg_monai.networks.PlainSegmenter":
        problems.append(f"network_def::_target_: {target!r}")
        return strategy, None
    run["sam_variant"] = None
    ellipse = definition.get("net", {}).get("_target_") == "samseg_monai.networks.BoxEllipse"
    prefix = "samseg_monai.networks." if ellipse else "monai.networks.nets."
    network = _named(_without(definition.get("net"), FOLLOWS), prefix)
    return strategy, {**network, **_without(literal, {"boxes"} if ellipse else set())}


def _transforms(inference: Mapping[str, Any], problems: list[str]) -> tuple[Any, dict[str, Any]]:
    """Orientation and intensity, as the transforms have them."""
    found: dict[str, Any] = {}
    order: list[str] = []
    for key in ("orient_transforms", "volume_transforms"):
        transforms = inference.get(key)
        if not isinstance(transforms, list):
            problems.append(f"{key}: {transforms!r}")
            continue
        for index, transform in enumerate(transforms):
            where = f"{key}::{index}"
            target = str(transform.get("_target_")) if isinstance(transform, dict) else ""
            if target not in TRANSFORMS:
                problems.append(f"{where}: {transform!r}")
                continue
            settings, fixed = TRANSFORMS[target]
            order.append(target)
            for name, value in transform.items():
                if name in settings:
                    found.setdefault(settings[name], []).append(value)
                elif name != "_target_" and not _as_built(value, fixed, name):
                    problems.append(f"{where}::{name}: {value!r}")
    crop = order.index("ResizeWithPadOrCropd") if "ResizeWithPadOrCropd" in order else len(order)
    scaling = order.index("NormalizeIntensityd") if "NormalizeIntensityd" in order else len(order)
    intensity: dict[str, Any] = {key: found[key] for key in ("window", "percentiles") if key in found}
    intensity |= {"nonzero": found["nonzero"][0]} if "nonzero" in found else {}
    return (found.get("orientation") or [None])[0], {**intensity, "after_crop": crop < scaling}


def _as_built(value: Any, fixed: Mapping[str, Any], name: str) -> bool:
    """Whether an argument of a transform is the one that 0.1.0 wrote: its constant, or an expression."""
    if name not in fixed:
        return False
    expression = isinstance(value, str) and value.startswith(("$", "@"))
    return (value is None or expression) if fixed[name] is None else value == fixed[name]


def _named(component: Any, prefix: str) -> Any:
    """``{"_target_": <prefix>UNet, ...}`` as ``{"name": "UNet", ...}``; anything else as it is, for the schema."""
    if not isinstance(component, dict):
        return component
    rest = _without(component, {"_target_"})
    return {**rest, "name": str(component.get("_target_")).removeprefix(prefix)}


def _without(value: Any, keys: set[str]) -> Any:
    return {key: item for key, item in value.items() if key not in keys} if isinstance(value, dict) else value


def _image(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(metadata["network_data_format"]["inputs"]["image"])
    except (LookupError, TypeError, ValueError):
        return {}


def _channels(metadata: Mapping[str, Any]) -> list[Any] | None:
    channels = _image(metadata).get("channel_def")
    return list(channels.values()) if isinstance(channels, dict) else None
