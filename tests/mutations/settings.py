"""Settings: recipes of tasks and strategies, ``settings.json``, values that a command line sets otherwise.

The rules of ``settings.py`` and ``*choices.py``, said again key by key, for the keys of the recipes that are mutated.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from samseg_monai import __version__
from samseg_monai.bundles import running
from samseg_monai.bundles.build import build_bundle, compose, read_recipe
from samseg_monai.settings import dump_settings, read_settings
from tests.mutations.harness import Trial
from tests.mutations.json_values import depth, mutated, parsed, written

Rule = Callable[[Any], bool]
WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
LABEL = r"[A-Za-z0-9][A-Za-z0-9_.()+-]*( [A-Za-z0-9_.()+-]+|/[A-Za-z0-9(][A-Za-z0-9_.()+-]*)*"


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number; ``above``, ``below``: without the end."""
    return lambda v: type(v) in (int, float) and math.isfinite(v) and (low < v if above else low <= v) and (
        v < high if below else v <= high)  # fmt: skip


def whole(low: int, high: int) -> Rule:
    """A whole number, written as one."""
    return lambda v: type(v) is int and low <= v <= high


def text(form: str, most: int) -> Rule:
    """A text of this form."""
    return lambda v: isinstance(v, str) and len(v) <= most and re.fullmatch(form, v, re.DOTALL) is not None


def one(*values: Any) -> Rule:
    """One of these, of the same type."""
    return lambda v: any(type(v) is type(value) and v == value for value in values)


def many(rule: Rule, low: int, high: int) -> Rule:
    """A list."""
    return lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(rule, v))


def nothing_or(rule: Rule) -> Rule:
    """null, too."""
    return lambda v: v is None or rule(v)


def group(rules: dict[str, Rule], *needed: str) -> Rule:
    """An object of these keys and no other."""
    return lambda v: (
        isinstance(v, dict) and set(needed) <= set(v) <= set(rules) and all(rules[k](x) for k, x in v.items())
    )


def choice(**kinds: Rule) -> Rule:
    """An object whose name says which other keys it has."""
    return lambda v: (
        isinstance(v, dict) and isinstance(v.get("name"), str) and v["name"] in kinds and kinds[v["name"]](v)
    )


BOOL = one(True, False)
NAME, CLASS, SENTENCE = text(WORD, 64), text(LABEL, 64), text(r"[A-Za-z0-9\"'(].*", 4000)
COUNT, SEED = whole(1, 10**6), whole(0, 2**32 - 1)
PATTERN = text(r"[A-Za-z0-9*][A-Za-z0-9_.*-]*|<norm>|<attention>", 200)
WEIGHT = number(0, 1e6)
PICKER = choice(
    AllSlices=group({"name": NAME}), MaxArea=group({"name": NAME}), EveryNth=group({"name": NAME, "n": COUNT}, "n"),
    Foreground=group({"name": NAME, "min_voxels": COUNT}),
    RandomN=group({"name": NAME, "n": COUNT, "min_voxels": whole(0, 10**6)}, "n"),
    Patches=group({"name": NAME, "n": COUNT}),
)  # fmt: skip
SIDES = many(number(0, 1000, above=True), 2, 2)
COMPUTE = group({"int8": BOOL, "tf32": BOOL, "compile": BOOL, "attention": one("auto", "plain")})
RUN: dict[str, Rule] = {
    "sam_variant": one("vit_b", "vit_l", "vit_h", "vit_t", "medsam", "pico", "tiny", "tiny_t", None),
    "stretch": BOOL, "image_size": whole(16, 2048), "patch": many(whole(8, 512), 3, 3),
    "crop_mm": nothing_or(many(number(0, 10_000, above=True), 2, 2)), "crop_size": nothing_or(many(whole(1, 8192), 2,
    2)),
    "resample": BOOL, "batch_size": whole(1, 4096), "seed": SEED, "rectangular": BOOL, "checkpointing": BOOL,
    "autocast": one("bf16", "bf16_all", None), "low_res_training": one(True, False, "corners"),
    "masks": one("single", "best"),
    "compute": lambda v: COMPUTE(v) and not (v.get("int8") and v.get("compile")),
    "store_size": nothing_or(whole(16, 1024)),
    "scan_mode": one("mean_logits", "mean_probabilities", "majority", "union", "channels", "neighbours"),
    "input_scale": one("zscore", "unit", "slice", "sam"), "min_component_mm3": nothing_or(number(0, 1e9, above=True)),
    "prompt": group({
        "source": one("label", "json", "mask", "image", "none"), "loosen": many(number(0, 10), 2, 2),
        "tight": number(0, 1), "shift": number(0, 0.5), "shrink": number(0, 0.5, below=True), "seed": SEED,
        "per_component": BOOL, "kind": one("box", "points", "both"), "inside": whole(1, 100), "outside": whole(0, 100),
        "propagate": whole(0, 8192), "carried_loosen": number(0, 1),
        "carried_stop": number(0, 1), "carried_most": number(1, 1000),
        "mask_values": nothing_or(many(whole(1, 65535), 1, 256))}),
    "embeddings": group({"variants": nothing_or(whole(1, 1000))}), "epochs": whole(1, 100_000),
    "steps_per_epoch": nothing_or(COUNT), "training_cases": nothing_or(COUNT),
    "lr": number(0, 100, above=True), "val_interval": whole(0, 100_000), "keep_last": BOOL,
    "val_batch_size": whole(1, 4096), "early_stop": nothing_or(whole(1, 100_000)), "accumulation_steps": whole(1, 4096),
    "clip_norm": nothing_or(number(0, 1e6, above=True)), "ema": nothing_or(number(0, 1, below=True)),
    "augmentation": NAME,
    "learning_rates": group({
        "layer_decay": nothing_or(number(0, 1, above=True)), "weight_decay_matrices_only": BOOL,
        "scale": many(lambda v: many(lambda x: PATTERN(x) or number(0, 1e9, above=True)(x), 2, 2)(v), 0, 100)}),
    "optimizer": group({"name": one("Adam", "AdamW", "SGD"), "weight_decay": nothing_or(number(0, 10))}),
    "schedule": group({"warmup": whole(0, 10**7), "decay": one("poly", "cosine", "constant"),
                       "power": number(0, 100, above=True), "epochs": nothing_or(whole(1, 100_000))}),
    "loss": group({
        **dict.fromkeys(("dice", "ce", "focal", "boundary"), WEIGHT), "focal_gamma": number(0, 100),
        "class_weights": lambda v: v is None or text(WORD + r"[ =,A-Za-z0-9_.+-]*", 4000)(v) or (isinstance(v,
        dict) and all(
            CLASS(k) and number(0, 1e9, above=True)(x) for k, x in v.items())),
        "batch": BOOL, "squared_pred": BOOL, "smooth_nr": number(0, 1), "smooth_dr": number(0, 1)}),
    "slices": group({"picker": PICKER, "cache": one("memory", "disk"), "num_workers": whole(0, 64),
                     "volume_cache_rate": nothing_or(number(0, 1))}),
    "validation": group({"picker": nothing_or(PICKER)}),
    "section": one("testing", "validation", "training"), "allow_seen": BOOL, "policy": one("honest", "transunet"),
    "regions": lambda v: v is None or v == "brats" or (isinstance(v, dict) and all(
        CLASS(k) and many(CLASS, 1, 10**6)(x) for k, x in v.items())),
    "lesion_wise": BOOL, "lesions": group({"dilation": whole(1, 20), "ignored_mm3": number(0, 1e6),
                                           "penalty_mm": number(0, 1e5, above=True)}),
    "calibration": BOOL, "save_predictions": BOOL, "num_workers": whole(0, 64),
}  # fmt: skip
TASK: dict[str, Rule] = {
    "name": NAME, "kind": one("volumes", "images"), "dataset": NAME, "scans": many(NAME, 1, 16),
    "channels": nothing_or(many(CLASS, 1, 16)), "classes": many(CLASS, 1, 253), "labels": one("named", "foreground"),
    "modality": NAME, "orientation": nothing_or(text("[RLAPIS]{3}", 3)),
    "intensity": group({
        "window": nothing_or(many(number(-1e6, 1e6), 2, 2)), "percentiles": many(number(0, 100), 2, 2), "nonzero": BOOL,
        "after_crop": BOOL}),
    "label_values": lambda v: v is None or (isinstance(v, dict) and all(
        re.fullmatch("-?[0-9]{1,9}", k) and CLASS(x) for k, x in v.items())),
    "trained_spacing": nothing_or(group({"median": SIDES, "min": SIDES, "max": SIDES}, "median", "min", "max")),
    "mirrored_classes": nothing_or(many(many(CLASS, 2, 2), 0, 10**6)), "title": SENTENCE, "text": SENTENCE,
    "data_text": SENTENCE, "data_source": SENTENCE, "data_license": many(SENTENCE, 1, 20),
    "references": many(SENTENCE, 0, 50), "prepare": many(SENTENCE, 0, 10), "phantoms": many(SENTENCE, 0, 10),
}  # fmt: skip
LORA = group({
    "name": one("lora"), "rank": whole(1, 1024), "alpha": nothing_or(number(0, 1e6, above=True)),
    "targets": many(one("q", "k", "v", "proj", "lin1", "lin2"), 1, 6), "blocks": nothing_or(many(whole(0, 255), 1,
    256)),
    "dropout": number(0, 1, below=True), "rank_stabilised": BOOL,
    "decoder": one(True, False, "lora", "samed", "hierarchical", "h_sam"),
    "dora": BOOL, "last": nothing_or(number(0, 1, above=True))})  # fmt: skip
LADDER = group({
    "name": one("ladder"), "side": nothing_or(group({"name": one("resnet"), "width": whole(1, 512)})),
    "mix": one("gate", "side", "sam"), "decoder": one("upscaling", "masks", "full",
    "hierarchical"), "masks": one("random", "sam")})  # fmt: skip
STRATEGY: dict[str, Rule] = {
    "name": NAME, "method": choice(lora=LORA, ladder=LADDER), "network": one(None), "title": SENTENCE,
    "text": many(SENTENCE, 1, 10), "description": SENTENCE, "references": many(SENTENCE, 0, 50),
}  # fmt: skip
DEMO = {"run": None, "method": lambda v: isinstance(v, dict) and all(
    NAME(k) and (type(x) in (bool, int) or NAME(x)) for k, x in v.items()), "network": lambda v: v == {}}  # fmt: skip
NEEDED = ("dataset", "scans", "classes", "modality", "title", "text", "data_text", "data_source", "data_license")


def rule_of(value: Any) -> str:
    """Why a whole of settings is refused; "" for nothing."""
    if depth(value) > 31 or len(json.dumps(value)) > 10**6:
        return "too much"
    if problem := unsafe(value):
        return problem
    extra = set(value) - {"format", "engine", "name", "task", "strategy", "run", "demo"}
    if extra or value.get("format", 1) != 1 or type(value.get("format", 1)) is not int or not NAME(value.get("engine")):
        return f"keys {extra}, format, engine"
    task, strategy, run = (value.get(key) for key in ("task", "strategy", "run"))
    told = ("name", "method", "title", "text", "description")
    for part, rules, needed in ((task, TASK, ("name", *NEEDED)), (strategy, STRATEGY, told), (run, RUN, ())):
        if not isinstance(part, dict) or set(needed) - set(part):
            return f"no object with {needed}"
        wrong = [key for key in part if key not in rules or not rules[key](part[key])]
        if wrong:
            return f"{wrong[0]} = {part[wrong[0]]!r:.60}"
    if not NAME(value.get("name")):
        return f"name {value.get('name')!r:.80}"
    if problem := misfit(task, strategy, run):
        return problem
    return _demo(value)


def _demo(value: dict[str, Any]) -> str:
    demo = value.get("demo")
    if demo is None:
        return ""
    if not isinstance(demo, dict) or set(demo) - set(DEMO):
        return "a demo of other keys"
    part = demo.get("run", {})
    if not isinstance(part, dict) or "optimizer" in part:
        return "a demo's run that is none"
    wrong = [key for key, item in part.items() if key not in RUN or not (item is None or RUN[key](item))]
    if wrong or not DEMO["method"](demo.get("method", {})) or not DEMO["network"](demo.get("network", {})):
        return f"demo {wrong}"
    whole_ = together({**value, "demo": None}, {"run": part, "strategy": {"method": demo.get("method", {})}})
    return rule_of(whole_)


def together(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``value`` with ``changes``: group by group, a choice of another name as a whole."""
    result = dict(value)
    for key, new in changes.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) == old.get("name")
        result[key] = together(old, new) if both else new  # type: ignore[arg-type]
    return result


def unsafe(value: Any, key: bool = False) -> str:
    """What no settings may hold."""
    if isinstance(value, dict):
        return next(filter(None, (unsafe(k, True) or unsafe(v) for k, v in value.items())), "")
    if isinstance(value, list):
        return next(filter(None, map(unsafe, value)), "")
    if not isinstance(value, str):
        return ""
    bad = (
        value != value.strip() or value[:1] in ("$", "@", "%") or (key and value[:1] in ("_", "+"))
        or any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in value)
        or re.search("[@%](#|::)", value) or "../" in value or "..\\" in value
    )  # fmt: skip
    return f"{value!r:.60} is unsafe" if bad else ""


def misfit(task: dict[str, Any], strategy: dict[str, Any], run: dict[str, Any]) -> str:
    """What does not go together."""
    classes, scans, method = task["classes"], task["scans"], strategy["method"]
    prompt, loss = run.get("prompt", {}), {"dice": 0.5, "ce": 0.5, "focal": 0.0, **run.get("loss", {})}
    words = f"{task['title']} {task['text']}".lower()
    kind, orientation = task.get("kind", "volumes"), task.get("orientation", "RAS")
    loosen = prompt.get("loosen", [0.0, 0.0])
    intensity = task.get("intensity", {})
    pairs = [intensity.get("window"), intensity.get("percentiles", [0.5, 99.5])]
    source = prompt.get("source", "label")
    second = method.get("decoder") in ("hierarchical", "h_sam")
    checks = {
        "names twice": len(set(classes)) < len(classes) or len(set(scans)) < len(scans),
        "background": {"background", "ignore", "ignored", "void"} & set(classes),
        "channels": task.get("channels") is not None and len(task["channels"]) != len(scans),
        "text": not all(word in words for name in classes for word in name.lower().replace("_", " ").split()),
        "foreground": task.get("labels", "named") == "foreground" and len(classes) > 1,
        "orientation": (orientation is None) != (kind == "images"),
        "axes": orientation and len({"RLAPIS".index(c) // 2 for c in orientation}) < 3,
        "mirrored": {n for pair in task.get("mirrored_classes") or () for n in pair} - set(classes),
        "variant": run.get("sam_variant", "vit_b") is None, "size": run.get("image_size", 1024) % 16,
        "channels of colour": run.get("scan_mode") == "channels" and len(scans) != 3,
        "neighbours": run.get("scan_mode") == "neighbours" and (len(scans) != 1 or kind == "images"),
        "best": run.get("masks") == "best" and (len(classes) > 1 or second),
        "boxes": source != "none" and (run.get("low_res_training", False) or second),
        "second decoder": second and method.get("mix") == "side",
        "propagate": prompt.get("propagate", 0) > 0
        and (source == "none" or kind == "images" or method.get("depth", 1) > 1),
        "mask": source == "mask" and kind == "images",
        "clicks": prompt.get("kind", "box") != "box"
        and (kind != "images" or method["name"] == "ladder" or source not in ("label", "json")),
        "validation": run.get("validation", {}).get("picker") is not None and kind == "images",
        "patches": any((run.get(g, {}).get("picker") or {}).get("name") == "Patches" for g in ("slices", "validation")),
        "loosen": loosen[0] > loosen[1],
        "loss": not (loss["dice"] or loss["ce"] or loss["focal"]),
        "pairs": any(pair is not None and not pair[0] < pair[1] for pair in pairs),
        "blocks twice": method.get("blocks") is not None and method.get("last") is not None,
        "side": method["name"] == "ladder" and (method.get("side", 0) is None) != (method.get("mix") == "sam"),
    }  # fmt: skip
    return next((name for name, wrong in checks.items() if wrong), "")


def lost(given: Any, kept: Any, where: str = "") -> str:
    """What of the given settings is not in those that were read."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return next(filter(None, (lost(v, kept.get(k), f"{where}::{k}") for k, v in given.items())), "")
    return "" if given == kept else f"{where}: {given!r:.60} became {kept!r:.60}"


def make_recipes(folder: Path) -> Any:
    """Recipes of tasks and strategies, with and without one that they extend."""
    bases = {(kind, name): read_recipe(kind, name) for kind, names in
             (("tasks", ("meningioma", "abdomen")), ("strategies", ("lora", "ladder"))) for name in names}  # fmt: skip
    path = folder / "mine.json"
    extends = [None, "mine", str(path), "nobody", "a\0", 3, ["lora"], "x" * 300, "../lora", "lora"]

    def trial(rng: random.Random) -> Trial:
        (kind, name), base = rng.choice(sorted(bases.items()))
        told, value = mutated(base, rng)
        parent: Any = None
        if rng.random() < 0.4:
            parent = name if rng.random() < 0.7 else rng.choice(extends)
            value = {**value, "extends": parent}
        how, content = written(value, rng)
        path.write_bytes(content)
        rule, value = parsed(content)
        other = rng.choice([n for k, n in bases if k != kind])
        names = (str(path), other) if kind == "tasks" else (other, str(path))
        expected: dict[str, Any] = {}
        rule = rule or _recipe_rule(value, kind, name, bases, other, expected)
        return Trial(f"{kind} {name} with {other}, extends {parent!r:.20}: {told} {how}", lambda: compose(*names), rule,
                     lambda found: lost(expected, dump_settings(found)))  # fmt: skip

    return trial


def _recipe_rule(
    value: dict[str, Any], kind: str, name: str, bases: dict[Any, dict[str, Any]], other: str, expected: dict[str, Any]
) -> str:
    value = {k: v for k, v in value.items() if not k.startswith("//")}
    parent = value.pop("extends", None)
    known = {n: recipe for (k, n), recipe in bases.items() if k == kind}
    for part in ("run", "demo"):
        if not isinstance(value.get(part, {}), (dict, type(None))):
            return f"{part} is no object"
        if part in value and value[part] is None:
            del value[part]
    inner = (value.get("demo") or {}).get("run", {})
    if not isinstance(inner, (dict, type(None))):
        return "demo::run is no object"
    if parent is not None:
        if not isinstance(parent, str) or parent not in known:
            return f"extends {parent!r:.30}"
        value = together(known[parent], value)
    mine, theirs = {**value, "name": "mine"}, {**bases["strategies" if kind == "tasks" else "tasks", other]}
    what, how = (mine, theirs) if kind == "tasks" else (theirs, mine)
    what, how = copy.deepcopy(what), copy.deepcopy(how)
    run = together(what.pop("run", {}), how.pop("run", {}))
    demo = together(what.pop("demo", {}), how.pop("demo", {}))
    if demo:
        demo = together({"run": {"sam_variant": "pico"}}, demo)
    if how.get("network") is not None:
        return "a network that is none"
    name = f"{what['name']}_segmentation_{how['name']}"
    parts = {"task": what, "strategy": how, "run": run, "demo": demo or None}
    whole_ = {"engine": __version__, "name": name, **parts}
    expected |= {key: whole_[key] for key in ("task", "strategy", "run")}
    return rule_of(whole_)


def make_settings(folder: Path) -> Any:
    """``settings.json`` of a bundle, every default written out."""
    bases = [dump_settings(compose(*names)) for names in (("meningioma", "lora"), ("abdomen", "ladder"))]

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(rng.choice(bases), rng)
        rule = rule_of(value)
        return Trial(told, lambda: read_settings(value, "x"), rule, lambda found: lost(value, dump_settings(found)))

    return trial


VALUES = [None, True, False, 0, 1, -1, 2, 16, 0.5, 1.5, 1e9, float("nan"), "", "x", "none", "label", "mask", "json",
          "image", "[1]", [1, 2], [0.2, 0.1], [0.1, 0.2], [16, 16], {}, {"name": "x"}, "bf16", "single", "best", 512,
          500,
          "training", "channels", "sam", "3", "disk", ["a"], "1e-3", "True"]  # fmt: skip


def make_overrides(folder: Path) -> Any:
    """Values set on a command line of ``monai.bundle run`` for one bundle, as its guard sees them before it starts."""
    root = build_bundle("meningioma", "lora", folder)
    base = json.loads((root / "configs" / "train.json").read_text("utf-8"))
    data, out = folder / "data", folder / "out"
    data.mkdir()
    (data / "datalist.json").write_text("{}")  # the guard only looks whether it is there
    built = dump_settings(compose("meningioma", "lora"))
    groups = ("prompt", "loss", "schedule", "slices", "lesions", "learning_rates")
    keys = [key for key in built["run"] if key in base and not isinstance(base[key], dict)]
    keys += [f"{g}::{k}" for g in groups if g in base for k in base[g] if k in built["run"][g] and k != "picker"]
    keys += ["epohcs", "promt", "loss::dyce", "strategy::rank", "strategy::dropout", "strategy::targets"]

    def trial(rng: random.Random) -> Trial:
        given = {key: _near(built["run"], key, rng) for key in rng.sample(keys, rng.choice((1, 1, 2)))}
        parser = ConfigParser({**copy.deepcopy(base), "dataset_dir": str(data), "output_dir": str(out)})
        value = copy.deepcopy(built)
        unknown = ""
        for key, new in given.items():
            parser[key] = new
            *way, last = key.split("::")
            part = value["strategy"]["method"] if way == ["strategy"] else value["run"]
            for name in [] if way == ["strategy"] else way:
                part = part[name]
            unknown = unknown or ("" if last in part else f"no key {key}")
            part[last] = None if new == "$None" else copy.deepcopy(new)
        value["demo"] = None
        return Trial(f"{given}", lambda: _guarded(root, parser), unknown or rule_of(value), lambda found: "")

    return trial


def _near(run: dict[str, Any], key: str, rng: random.Random) -> Any:
    """Any value, or one of the type of that which is there."""
    value: Any = run
    for name in key.split("::"):
        value = value.get(name) if isinstance(value, dict) else None
    if type(value) in (int, float) and rng.random() < 0.7:
        return type(value)(value + rng.choice((-1, 1, 16, 0.1, 0.01)))
    return not value if type(value) is bool and rng.random() < 0.7 else rng.choice(VALUES)


def _guarded(root: Path, parser: ConfigParser) -> None:
    kept = running.running
    running.running = lambda trace=None: running.Running((root / "configs").resolve(), parser)
    try:
        running.guard()
    finally:
        running.running = kept
