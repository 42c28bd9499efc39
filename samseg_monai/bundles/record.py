"""Keep, beside a run's results, the bundle that made them: built anew from the values that the run really had."""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from samseg_monai import __version__, checkpoints
from samseg_monai.bundles.build import CONFIGS, SETTINGS, config_text, write_bundle
from samseg_monai.bundles.running import Running, running
from samseg_monai.bundles.values import KEYS, TASK_KEYS, custom_parts, differences, effective_settings, with_nulls
from samseg_monai.checkpoints import remember_base
from samseg_monai.choices import SECOND
from samseg_monai.data.datalists import case_hash, read_datalist, too_few_to_choose
from samseg_monai.data.files.coarse_masks import CoarseMasks
from samseg_monai.errors import BundleError, DataError, raise_all
from samseg_monai.files import read_json, write_json, write_text
from samseg_monai.sam.weights import RANDOM, sha256_of
from samseg_monai.settings import PLACES, read_settings

logger = logging.getLogger(__name__)
RECORD = "bundle"
SEEN = {"training": "were trained on", "validation": "chose the epoch"}
NAME = "name.txt"  # in every record: the name of the bundle that ran
PARTS = "parts.json"  # in place of settings: what this version wrote, and ids of the parts that no settings describe
# what belongs to the machine of the run, or to the way it was started
LOCAL = {
    "_meta_", "bundle_root", "checkpoint", "datalist", "dataset_dir", "device", "finalize", "imports", "initialize",
    "is_rank0", "mlflow", "network", "output_dir", "predictions_dir", "results_dir", "run", "sam_checkpoint", "boxes",
    "prompts", "prompts_from",
}  # fmt: skip
PUBLIC = {*KEYS, *TASK_KEYS, "strategy"}
UNAIDED = ("ZeroShot", "LoRA", "Adapter", "SSF", "Selective")  # with SAM alone, which is made for prompts


def overridden(found: Running) -> dict[str, Any]:
    """Ids of the wiring that a run changed, and their values: no settings, no places, nothing of several processes."""
    original = _original(found)
    changed = {}
    for name, value in differences(original, with_nulls(found.config)):
        top = name.split("::")[0]
        if top not in LOCAL and top not in PUBLIC and not _names_a_place(value):
            changed[name] = value
    return changed


def _original(found: Running) -> dict[str, Any]:
    """The config as it lies in the bundle, with the overlay for several processes where that was used."""
    names = ("inference", "evaluate") if found.kind == "evaluate" else (found.kind,)
    paths = [found.configs / f"{name}.json" for name in names]
    if not all(path.is_file() for path in paths):
        return copy.deepcopy(found.config)
    config = ConfigParser.load_config_files([str(path) for path in paths])
    overlay = found.configs / f"multi_gpu_{found.kind}.json"
    changes = read_json(overlay, BundleError, "config") if overlay.is_file() else {}
    parser = ConfigParser(config)
    if changes and changes.get("is_rank0") == found.config.get("is_rank0"):
        for key, value in changes.items():
            merge_kv(parser, key, value)
    return dict(parser.get())


def _names_a_place(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_names_a_place, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and Path(value).is_absolute()


def settings() -> dict[str, Any]:
    """Return the running config's values that a reader of a card wants: every setting but places.

    What was overridden elsewhere is there under its whole id.
    """
    found = running()
    if found is None:
        return {}
    public = {key: copy.deepcopy(value) for key, value in found.config.items() if key in PUBLIC}
    looked_up = [key for key in TASK_KEYS if isinstance(public.get(key), str)]
    public = {key: value for key, value in public.items() if key not in looked_up}
    boxes = public.get("prompt", {}).get("boxes") if isinstance(public.get("prompt"), dict) else None
    if boxes:
        public["prompt"]["boxes"] = Path(boxes).name  # its hash is among the facts
    for name in PLACES:
        group, _, key = name.partition("::")
        if key and name != "prompt::boxes" and isinstance(public.get(group), dict) and public[group].get(key):
            public[group][key] = public[group][key] if public[group][key] == RANDOM else Path(public[group][key]).name
    return {**public, **overridden(found)}


def note_cases(network: Any, training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> None:
    """Let a network know, by hashes, which cases train it and which choose its epoch: its adapter's card keeps them."""
    sections = {"training": training, "validation": validation}
    network.cases = {name: sorted(case_hash(item["case"]) for item in items) for name, items in sections.items()}


def seen_cases(
    network: Any, items: Sequence[Mapping[str, Any]], *, allow: bool = False, section: str | None = None
) -> dict[str, list[str]]:
    """Of the cases to be evaluated those that the network has learnt from, or that chose its epoch.

    Args:
        section: of the datalist that is evaluated: "validation" is there to choose by, so that cases which chose the
            epoch may be in it, and are told.

    Raises:
        DataError: there are others, and they are not allowed; all are named.
    """
    seen = checkpoints.seen_cases(network, [item["case"] for item in items])
    told = {
        part: f"{len(names)} of {len(items)} cases to be evaluated {what}: {', '.join(names[:20])}"
        + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        for part, what in SEEN.items()
        if (names := seen.get(part, []))
    }
    fix = "prepare the split that the training had, or evaluate them nevertheless with --allow_seen True"
    if not allow:
        wrong = [line for part, line in told.items() if part != section or part == "training"]
        raise_all(wrong, DataError, f"the adapter has seen cases of this evaluation; {fix}")
    for part, line in told.items():
        where = f"section {part}: " if part == section else ""
        logger.warning("%s%s. These scores say nothing of new cases", where, line)
    return seen


def facts(datalist: str, *, seen: Mapping[str, list[str]] | None = None) -> dict[str, Any]:
    """Return what a run card says beside its settings: which bundle ran, how prompts were made, on which data.

    Args:
        seen: what ``seen_cases`` found, for an evaluation.
    """
    found = running()
    known: dict[str, Any] = {}
    if found is not None:
        prompt = found.config.get("prompt", {})
        known["bundle"] = bundle_name(found.configs)
        known["bundle_version"] = found.config.get("_meta_", {}).get("version")
        known["prompt_loosen"] = prompt.get("loosen")
        if prompt.get("boxes") and Path(prompt["boxes"]).is_file():
            known["boxes_sha256"] = sha256_of(Path(prompt["boxes"]))
            known |= {"prompts_from": name} if (name := found.config.get("prompts_from")) else {}
        if found.config.get("prompts"):
            section = found.config.get("section", "testing")
            known |= _of_masks(Path(found.config["prompts"]), read_datalist(datalist)[section])
    content = read_json(datalist, BundleError, "datalist")
    known["dataset"] = content.get("name")
    known["phantoms"] = bool(content.get("phantoms", False))
    known["split"] = content.get("split")
    if content.get("kind") == "images":  # predictions are images with the values of these labels
        known["label_values"] = content.get("labels")
    known["seen_cases"] = seen
    if found is not None:
        known["warnings"] = _doubts(found)
        if found.kind == "train" and found.parser.get_parsed_content("val_interval"):
            known["warnings"] += too_few_to_choose(read_datalist(datalist))
        for text in known["warnings"]:
            logger.warning("%s", text)
    known["split_sizes"] = {s: len(content[s]) for s in ("training", "validation", "testing") if s in content}
    return known


def _of_masks(place: Path, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells the masks of the evaluated cases from others, and which bundle has predicted them where its run says
    so."""
    masks = CoarseMasks(place)
    files = sorted({masks.of(item["case"]) for item in items})
    lines = "".join(f"{path.relative_to(place)} {sha256_of(path)}\n" for path in files)
    card = place.parent / "run_card.json"
    made_by = read_json(card, BundleError, "run card").get("bundle") if card.is_file() else None
    return {"boxes_sha256": hashlib.sha256(lines.encode()).hexdigest(), "prompts_from": made_by}


def _doubts(found: Running) -> list[str]:
    """A warning where SAM, which is made for prompts, gets none and has no network beside it that was made for that,
    and one where nothing learns of random weights."""
    strategy, prompt = found.config.get("strategy"), found.config.get("prompt")
    kind = str(strategy.get("_target_", "")).rpartition(".")[2] if isinstance(strategy, dict) else ""
    told = []
    promptless = isinstance(strategy, dict) and strategy.get("decoder") in SECOND  # is made for no prompts
    if isinstance(prompt, dict) and prompt.get("source") == "none" and kind in UNAIDED and not promptless:
        told.append(f"{kind} without boxes: this task has none (prompt::source none), SAM segments the image alone")
    if kind == "ZeroShot" and found.config.get("sam_checkpoint") == RANDOM:
        told.append("ZeroShot on random weights (sam_checkpoint random): nothing learns, its scores are those of noise")
    return told


def bundle_name(configs: Path) -> str:
    """Return the bundle's name: that of its folder, or the recorded one for a copy beside a run's results."""
    root = configs.resolve().parent
    record = root / NAME
    return record.read_text(encoding="utf-8").strip() if record.is_file() else root.name


def record_bundle(output_dir: str, *, keep: bool = False) -> None:
    """Write the running bundle with this run's values to ``<output_dir>/bundle``; rank 0 only.

    Args:
        output_dir: folder of the run.
        keep: leave an earlier record alone: an evaluation must not forget how its training was set.

    Outside a workflow nothing is recorded. ``pack_bundle`` works from this copy, so that a packed bundle runs without
    the overlays and overrides its training was started with. Places are not recorded, and there is no demo in it; where
    SAM's weights lie a training writes beside it.

    Raises:
        BundleError: there is a folder of that name, and no run has written it.
    """
    found = running()
    if found is None or idist.get_rank() > 0:
        return
    target = Path(output_dir) / RECORD
    base = found.config.get("sam_checkpoint")
    if found.kind == "train" and isinstance(base, str) and base != RANDOM and not base.startswith(("$", "@")):
        remember_base(output_dir, base)
    if found.configs == (target / "configs").resolve() or (
        keep and (Path(output_dir) / "adapter.safetensors").is_file() and target.is_dir()
    ):
        return
    write_record(found, target)


def write_record(found: Running, target: Path) -> None:
    """Write the bundle of a running config with its values into ``target``, which is emptied."""
    built = found.settings()
    changes = dict(overridden(found))
    name = bundle_name(found.configs)
    _empty(target, name)
    if built is None:
        _copy(found.configs, target)
        original = _original(found)
        changes |= {
            key: found.config[key] for key in PUBLIC & found.config.keys() if found.config[key] != original.get(key)
        }
    else:
        value = {**effective_settings(found.config, built), "name": name}
        write_bundle(read_settings(value, "this run"), target)
        changes |= _custom(found)
    _patch(target / "configs", changes)


def _custom(found: Running) -> dict[str, Any]:
    """Parts of the user's own by their ids, with their values in the running config."""
    parser = ConfigParser(copy.deepcopy(found.config))
    return {name: parser[name] for name in custom_parts(found.config)}


def _copy(configs: Path, target: Path) -> None:
    """Copy a bundle that has no settings; the demo's values are in the other configs now, or not wanted."""
    leave = shutil.ignore_patterns("demo.json")
    shutil.copytree(configs, target / "configs", ignore=leave)
    for name in ("docs", "LICENSE", "large_files.yml", PARTS):
        source = configs.parent / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.is_file():
            shutil.copy(source, target / name)


def _patch(configs: Path, changes: Mapping[str, Any]) -> None:
    """Put changed wiring into every config that has it; where predictions depend on it, settings do not tell all."""
    for name in CONFIGS:
        path = configs / f"{name}.json"
        if not path.is_file():
            continue
        before = read_json(path, BundleError, "config")
        parser = ConfigParser(copy.deepcopy(before))
        for key, value in changes.items():
            parent = key.rpartition("::")[0]
            if key in parser or (parent and parent in parser and isinstance(parser[parent], dict)):
                parser[key] = copy.deepcopy(value)
        after = parser.get()
        if after == before:
            continue
        write_text(path, config_text(after))
        if name == "inference" and (configs / SETTINGS).is_file():
            (configs / SETTINGS).unlink()
            write_json(configs.parent / PARTS, {"engine": __version__, "parts": list(changes)})
            logger.warning(
                "This run has parts of its own (%s), which no settings describe: a bundle packed from it is predicted "
                "with only where its receiver trusts its configs.",
                ", ".join(changes),
            )


def _empty(target: Path, name: str) -> None:
    """Make the folder of a record, or empty it; the file that marks it is there at any moment, whatever interrupts."""
    marker = target / NAME
    if target.exists() and not marker.is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise BundleError(
            f"{target} is not the record of a run, and would be replaced by one; choose another output_dir"
        )
    target.mkdir(parents=True, exist_ok=True)
    marker.write_text(name + "\n", encoding="utf-8")
    for old in target.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old != marker:
            old.unlink()
