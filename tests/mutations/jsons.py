"""Lists and cards in JSON: datalists, ``dataset.json``, split files, cards of adapters and runs, boxes."""

from __future__ import annotations

import json
import math
import os.path
import random
import re
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np

from samseg_monai.checkpoints import CARD, load_adapter, save_adapter, seen_cases, spacing_of
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist, unit_of
from samseg_monai.data.datalists import spacing_of as pixel_of
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.label_maps import ABDOMEN
from samseg_monai.data.datalists.splits import choose_splits
from samseg_monai.data.files.boxes import listed, read_boxes, read_table, volume_boxes, volume_rows
from samseg_monai.networks import SamSegmenter
from samseg_monai.report.facts import facts
from samseg_monai.report.runs import RunResult
from samseg_monai.strategies import LoRA
from tests.mutations.harness import Trial
from tests.mutations.json_values import is_number, is_text, mutated, parsed, written

SECTIONS = ("training", "validation", "testing")


def write_cases(folder: Path) -> None:
    """Four cases in the two folders of the Decathlon."""
    for n in range(4):
        for sub, array in (("imagesTr", np.arange(8) + n), ("labelsTr", np.arange(8) % 3)):
            (folder / sub).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array.reshape(2, 2, 2).astype(np.uint8), np.eye(4)), folder / sub / f"c{n}.nii.gz")


def make_datalists(folder: Path) -> Any:
    """A datalist of two training cases, one to validate and one to test."""
    write_cases(folder)
    path = folder / "d.json"
    prepare_folders(folder, path, labels={"1": "a", "2": "b"}, fractions=(0.5, 0.25, 0.25), progress=False)
    base = json.loads(path.read_text("utf-8"))

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(base, rng)
        how, content = written(value, rng)
        path.write_bytes(content)
        rule, value = parsed(content)
        return Trial(f"{told} {how}", lambda: _read_datalist(path, folder), rule or _datalist_rule(value, folder),
                     lambda found: _wrong_items(found, value))  # fmt: skip

    return trial


def _read_datalist(path: Path, folder: Path) -> Any:
    found = read_datalist(path)
    items = {section: load_datalist(path, folder, section, scans=["image"]) for section in SECTIONS}
    return found, items, labels_of(path), unit_of(path), pixel_of(path)


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
DATALIST = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["images", "volumes", None]}, "name": {"type": ["string", "null"]},
        "modality": {"anyOf": [{"type": ["string", "null"]}, STRINGS]}, "split": {"type": ["object", "string", "null"]},
        "scans": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}, "uniqueItems": True,
                                               "minItems": 1}]},
        "hashes": {"anyOf": [{"type": "null"}, STRINGS]}, "distance_unit": {"enum": ["mm", "px"]},
        "labels": {"type": "object", "propertyNames": {"pattern": "^-?[0-9]{1,6}$"}, "minProperties": 1,
                   "additionalProperties": {"type": "string"}},
        **{section: {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["image"], "properties": {
                "image": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]},
                "case": {"type": "string"}, "label": {"type": ["string", "null"]},
                "reference": {"type": ["string", "null"]}, "patient": {"type": ["string", "null"]},
            }}} for section in SECTIONS},
    },
    "required": ["labels", *SECTIONS],
}  # fmt: skip


def _datalist_rule(value: dict[str, Any], folder: Path) -> str:
    if errors := [error.message[:100] for error in jsonschema.Draft202012Validator(DATALIST).iter_errors(value)]:
        return errors[0]
    scans, images = value.get("scans"), value.get("kind") == "images"
    texts = [*(scans or []), *(x for pair in (value.get("hashes") or {}).items() for x in pair)]
    if isinstance(value.get("modality"), dict):
        texts += [x for pair in value["modality"].items() for x in pair]
    if not all(map(is_text, texts)):
        return "a name that is none"
    if (scans and "image" not in scans) or (images and scans and scans != ["image"]):
        return f"scans {scans}"
    sizes = value.get("sizes")
    if sizes is not None and not (isinstance(sizes, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
        for pair in sizes.values())):  # fmt: skip
        return "sizes that are none"
    spacing = value.get("spacing_mm")
    if spacing is not None and not (is_number(spacing) and 0 < spacing < 1e6):
        return "a spacing that is none"
    if spacing is not None and value.get("distance_unit") == "px":
        return "pixels of a size in mm"
    coding = value.get("label_coding")
    if isinstance(coding, str) and coding in ABDOMEN:
        return "labels of another coding"
    return _sections_rule(value, folder, images, 1 if images else len(scans or []))


def _sections_rule(value: dict[str, Any], folder: Path, images: bool, count: int) -> str:
    cases, homes = [], {}
    for section in SECTIONS:
        for item in value[section]:
            files = [item["image"]] if isinstance(item["image"], str) else item["image"]
            stem = PurePosixPath(files[0]).name.removesuffix(".nii.gz")
            case = item.get("case", stem)
            names = [
                case,
                *files,
                *(item[key] for key in ("label", "reference", "patient") if item.get(key) is not None),
            ]
            if not all(map(is_text, names)) or "/" in case or "\\" in case:
                return f"a name that is none: {names}"[:200]
            if count and isinstance(item["image"], list) and len(files) != count:
                return "files for another number of scans"
            if len(files) > 1 and not value.get("scans"):
                pass  # a datalist that names no scans is taken as it is
            cases.append(case)
            patient = item.get("patient") or re.sub(r"-\d{3}$", "", case)
            if homes.setdefault(patient, section) != section:
                return f"{patient} in two sections"
            used = [*files, *(item[key] for key in ("label", "reference") if item.get(key))]
            if not all(os.path.isfile(folder / file) and file.endswith(".nii.gz") for file in used):
                return "a file that is not there"
    return "a case twice" if len(set(cases)) < len(cases) else ""


def _wrong_items(found: Any, value: dict[str, Any]) -> str:
    _read, items, labels, unit, spacing = found
    if labels != value["labels"] or unit != value.get("distance_unit", "mm") or spacing != value.get("spacing_mm"):
        return f"{labels} {unit} {spacing}"
    for section in SECTIONS:
        for item, stored in zip(items[section], value[section], strict=True):
            files = item["image"] if isinstance(item["image"], list) else [item["image"]]
            wanted = stored["image"] if isinstance(stored["image"], list) else [stored["image"]]
            if not all(
                Path(file).is_absolute() and file.endswith(name) for file, name in zip(files, wanted, strict=True)
            ):
                return f"{files} for {wanted}"
    return ""


def make_tables(folder: Path) -> Any:
    """The Decathlon's ``dataset.json``."""
    write_cases(folder)
    pairs = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(4)]
    base = {
        "name": "x", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": pairs,
        "channel_names": {"0": "T1"}, "numTraining": 4,
    }  # fmt: skip
    path = folder / "dataset.json"

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(base, rng)
        how, content = written(value, rng)
        path.write_bytes(content)
        rule, value = parsed(content)

        def read() -> Any:
            prepare_folders(folder, folder / "d.json", fractions=(0.5, 0.25, 0.25), num_threads=1, progress=False)
            return json.loads((folder / "d.json").read_text("utf-8"))

        return Trial(
            f"{told} {how}", read, rule or _table_rule(value, folder), lambda found: _wrong_table(found, value)
        )

    return trial


LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.()+-]*( [A-Za-z0-9_.()+-]+|/[A-Za-z0-9(][A-Za-z0-9_.()+-]*)*")


def _table_rule(value: dict[str, Any], folder: Path) -> str:
    table = value.get("labels")
    if not isinstance(table, dict) or not table:
        return "no labels"
    if all(type(v) is int for v in table.values()) and len(set(table.values())) == len(table):
        table = {str(v): name for name, v in table.items()}
    if not all(re.fullmatch("-?[0-9]{1,6}", v) and isinstance(name, str) for v, name in table.items()):
        return f"labels {table}"
    table = {str(int(v)): name for v, name in table.items()}
    if not all(LABEL.fullmatch(name) and len(name) <= 64 for name in table.values()):
        return f"names {table}"[:200]
    if not {"1", "2"} <= set(table):
        return "values that nobody names"
    if table.get("0", "background") != "background":
        pass  # whatever 0 is called, it is no class of its own
    channels = value.get("channel_names") or value.get("modality")
    if isinstance(channels, dict) and len(channels) > 1:
        return "channels of a file that has one"
    listed = value.get("training")
    if isinstance(listed, list) and listed:
        stems = []
        for entry in listed:
            image, label = (entry.get(k) if isinstance(entry, dict) else None for k in ("image", "label"))
            if label is None and isinstance(image, str) and is_text(image) and not image.startswith(("/", "..")):
                continue  # left out: nobody reads it
            if not isinstance(image, str) or not re.fullmatch(r"\./imagesTr/c\d\.nii\.gz", image):
                return f"image {image!r}"[:100]
            if label is not None and (
                not isinstance(label, str) or not re.fullmatch(r"\./labelsTr/c\d\.nii\.gz", label)
            ):
                return f"label {label!r}"[:100]
            stems.append(image)
        return "a case twice" if len(set(stems)) < len(stems) else "too few cases" if len(stems) < 3 else ""
    return ""


def _wrong_table(found: dict[str, Any], value: dict[str, Any]) -> str:
    listed = value.get("training")
    wanted = (
        [e["image"][11:13] for e in listed if e.get("label")] if isinstance(listed, list) and listed else list("0123")
    )
    cases = [item["case"] for section in SECTIONS for item in found[section]]
    return "" if len(cases) == len(wanted) else f"{cases} for {wanted}"


def make_splits(folder: Path) -> Any:
    """A split of six cases of three patients, by case and by patient."""
    cases = {f"c{n}": f"p{n // 2}" for n in range(6)}
    base = {"training": ["c0", "p1"], "validation": [], "testing": [{"case": "c4"}]}
    path = folder / "s.json"
    names = ["c0", "c1", "c5", "p0", "p2", "c9", " c0", "C0", {"case": "c1"}, {"case": 3}, 0]

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(base, rng, [None, True, -1, 1e400, "", "x", [], ["c1"], {}, *names, *names])
        how, content = written(value, rng)
        path.write_bytes(content)
        rule, value = parsed(content)
        expected: dict[str, list[str]] = {}
        rule = rule or _split_rule(value, cases, expected)
        return Trial(f"{told} {how}", lambda: choose_splits(cases, cases, split_file=path)[0][0].sections, rule,
                     lambda found: "" if found == expected else f"{found} for {expected}")  # fmt: skip

    return trial


def _split_rule(value: dict[str, Any], cases: dict[str, str], expected: dict[str, list[str]]) -> str:
    if not any(section in value for section in SECTIONS):
        return "no section"
    homes: dict[str, str] = {}
    for section in SECTIONS:
        entries = value.get(section, [])
        if not isinstance(entries, list):
            return f"{section} is no list"
        expected[section] = []
        for entry in entries:
            name = entry.get("case") if isinstance(entry, dict) else entry
            if not isinstance(name, str):
                return f"{entry!r} is no name"
            members = [name] if name in cases else [case for case, patient in cases.items() if patient == name]
            if not members:
                return f"unknown {name}"
            if homes.setdefault(cases[members[0]], section) != section:
                return f"{name} in two sections"
            expected[section] += [case for case in members if case not in expected[section]]
    return ""


MUST_AGREE = (
    "sam_variant", "base_sha256", "num_classes", "image_size", "scans", "scan_mode", "input_scale", "prompt",
    "boxes", "crop_margin", "crop_size",
)  # fmt: skip


def make_cards(folder: Path) -> Any:
    """The card of an adapter of low rank."""
    network = SamSegmenter("tiny", LoRA(rank=2), image_size=32)
    network.load_base("random")
    network.scan_names, network.cases = ["t1"], {"training": ["0" * 16], "validation": []}  # type: ignore[assignment]
    save_adapter(network, folder)
    base = json.loads((folder / CARD).read_text("utf-8"))
    base["spacing"] = {"median": [0.9, 0.9], "min": [0.8, 0.8], "max": [1.0, 1.0]}

    def read() -> Any:
        card = load_adapter(network, folder)
        return card, spacing_of(folder), seen_cases(network, ["a", "b"])

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(base, rng)
        how, content = written(value, rng)
        (folder / CARD).write_bytes(content)
        rule, value = parsed(content)
        return Trial(
            f"{told} {how}", read, rule or _card_rule(value, base), lambda found: "" if found[0] == value else "?"
        )

    return trial


def _card_rule(value: dict[str, Any], base: dict[str, Any]) -> str:
    if value.get("format_version") != 1:
        return "another format"
    strategy = value.get("strategy")
    if not isinstance(strategy, dict) or not isinstance(strategy.get("arguments", {}), dict):
        return "no strategy"
    theirs, ours = (
        {k: v for k, v in s.get("arguments", {}).items() if k != "dropout" and v is not None}
        for s in (strategy, base["strategy"])
    )
    if theirs != ours or strategy.get("_target_") != base["strategy"]["_target_"]:
        return "another strategy"
    for key in MUST_AGREE:
        if value.get(key) != base.get(key):
            return f"{key} differs"
    if value.get("scan_names") is not None and value["scan_names"] != base["scan_names"]:
        return "other scans"
    if value.get("adapter_sha256") != base["adapter_sha256"]:
        return "another file"
    if type(value.get("values", 0)) is not int or not isinstance(value.get("base_file"), (str, type(None))):
        return "values that are none"
    pair = {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
    }
    spacing = {"type": "object", "additionalProperties": False, "required": ["median", "min", "max"],
               "properties": dict.fromkeys(("median", "min", "max"), pair)}  # fmt: skip
    ids = {"type": ["array", "null"], "items": {"type": "string"}}
    schema = {"type": "object", "properties": {
        "spacing": {"anyOf": [{"type": "null"}, spacing]},
        "cases": {"type": ["object", "null"], "additionalProperties": ids}}}  # fmt: skip
    errors = [error.message[:100] for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]
    sides = (value.get("spacing") or {}).values() if isinstance(value.get("spacing"), dict) else ()
    errors += (
        ["no number"]
        if any(math.isnan(n) for side in sides if isinstance(side, list) for n in side if is_number(n))
        else []
    )
    return errors[0] if errors else ""


def make_runs(folder: Path) -> Any:
    """Card and metrics of a run, whose curves and cases are whole."""
    rows = ["case,class,dice,excluded,empty_prediction,empty_reference,prediction_ml,reference_ml"]
    rows += [f"c{n},tumour,0.{n + 1},False,False,False,1.0,2.0" for n in range(7)]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    (folder / "history.csv").write_text("epoch,iteration,name,value\n1,5,loss,0.5\n2,10,loss,0.25\n")
    base = {
        "strategy": {"_target_": "samseg_monai.strategies.LoRA", "arguments": {"rank": 4, "decoder": True}},
        "sam_variant": "vit_t", "base_sha256": "0" * 64, "prompt_source": "label", "prompt_loosen": [0.0, 0.3],
        "settings": {"section": "testing", "prompt": {"loosen": [0.0, 0.3], "shift": 0.1, "tight": 0.5,
        "boxes": "b.json"}},
        "cases": {"training": ["0" * 16], "validation": ["1" * 16]}, "cases_file": "cases.csv", "policy": "honest",
        "collapsed_classes": ["tumour"], "trainable_parameters": 12, "gate": 0.5, "seconds": 2.5, "seed": 0,
        "status": "completed", "dataset": "x", "split": {"by": "patient"}, "versions": {"torch": "2"}, "phantoms": True,
        "side_arguments": {"width": 4}, "voxel_mm": 1.5,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps({"policy": "honest"}))

    def read() -> Any:
        run = RunResult.load(folder)
        told = [
            run.title,
            run.warnings,
            run.seen,
            run.boxes,
            run.prompt_source,
            run.variant,
            run.sam,
            run.gate,
            run.split,
        ]
        return run, [
            *told,
            run.trainable,
            run.seconds,
            run.held_out,
            run.is_phantom,
            run.training_seconds,
            facts([run]),
        ]

    def trial(rng: random.Random) -> Trial:
        told, value = mutated(base, rng)
        how, content = written(value, rng)
        (folder / "run_card.json").write_bytes(content)
        rule, value = parsed(content)
        return Trial(
            f"{told} {how}", read, rule or _run_rule(value, folder), lambda found: "" if found[0].card == value else "?"
        )

    return trial


NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}
RUN_CARD = {
    "type": "object",
    "properties": {
        "base_sha256": {"type": ["string", "null"]},
        "settings": {"type": ["object", "null"], "properties": {
            "section": {"type": ["string", "null"]},
            "prompt": {"type": ["object", "null"], "properties": {
                **{key: {"type": ["number", "null"]} for key in ("tight", "shift", "shrink")},
                "loosen": {"anyOf": [{"type": "null"}, NUMBERS]}}}}},
        "cases": {"type": ["object", "null"], "properties": {key: {"type": ["array", "null"]} for key in ("training",
        "validation")}},
        "policy": {"type": ["string", "null"]}, "cases_file": {"type": ["string", "null"]},
        "collapsed_classes": {"type": ["array", "null"]}, "side_arguments": {"type": ["object", "null"]},
        "trainable_parameters": {"type": ["integer", "null"]}, "gate": {"type": ["number", "null"]},
        "voxel_mm": {"type": ["number", "null"]},
        "seconds": {"type": ["number", "null"]}, "prompt_loosen": {"anyOf": [{"type": "null"}, NUMBERS]},
    },
}  # fmt: skip


def _run_rule(value: dict[str, Any], folder: Path) -> str | None:
    if errors := [error.message[:100] for error in jsonschema.Draft202012Validator(RUN_CARD).iter_errors(value)]:
        return errors[0]
    if isinstance(value.get("trainable_parameters"), float):
        return "a fraction of parameters"
    file = value.get("cases_file") or "cases.csv"
    if not is_text(file) or len(file) > 255 or re.search(r"[/\\:]", file) or not (folder / file).is_file():
        return f"cases_file {file}"
    return ""


def make_boxes(folder: Path) -> Any:
    """Boxes of 2-D images of 40 rows and 60 columns, and of volumes of 30 x 20 x 10 voxels."""
    clicks = {"inside": [[12, 7.5], [0, 40]], "outside": [[60, 0]]}
    flat = {
        "a": [[1, 2, 30.5, 20], [5, 5, 9, 9]],
        "b": [[-3, -3, 70, 50]],
        "c": [clicks, {"box": [1, 2, 9, 9], **clicks}],
    }
    solid = {"a": [{"slice": 4, "box": [3, 4, 12, 13]}, {"slices": [0, 9], "box": [0, 0, 29, 19]}],
             "b": [{"slice": 2, "inside": [[29, 19]], "outside": [[0, 0], [3, 5]]},
                   {"slices": [0, 1], "box": [1, 2, 9, 9], "inside": [[4, 5]]}]}  # fmt: skip
    path = folder / "boxes.json"
    numbers = [0, -1, 0.5, 1, 9, 10, 20, 29, 30, 60, 1e9, 1e400, float("nan"), 1e-3, True, "3", None, [], {}, 10**400]

    def trial(rng: random.Random) -> Trial:
        volumes = rng.random() < 0.5
        told, value = mutated(solid if volumes else flat, rng, numbers)
        how, content = written(value, rng)
        path.write_bytes(content)
        rule, value = parsed(content)
        if volumes:
            return Trial(f"3-D {told} {how}", lambda: _read_solid(path), rule or _solid_rule(value), lambda found: "")
        sizes = {"a": (40, 60), "b": (40, 60), "c": (40, 60)}
        return Trial(f"2-D {told} {how}", lambda: read_boxes(path, sizes), rule or _flat_rule(value),
                     lambda found: "" if _plain(found) == _plain(value) else f"{found}")  # fmt: skip

    return trial


def _read_solid(path: Path) -> Any:
    table = read_table(path, "x")
    for case, boxes in table.items():
        volume_boxes(listed(boxes), (30, 20, 10), case)
        volume_rows(boxes)
    return table


def _flat_rule(value: dict[str, Any]) -> str:
    for name, boxes in value.items():
        if not isinstance(boxes, list) or not boxes:
            return "no boxes"
        for box in boxes:
            if isinstance(box, dict):
                if problem := _clicks_rule(box, name):
                    return problem
                if "box" not in box:
                    continue
                box = box["box"]
            if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
                return f"{box} is no box"
            if not all(abs(n) < 1e300 for n in box):
                return f"{box} is not finite"[:100]
            x0, y0, x1, y1 = box
            if x1 <= x0 or y1 <= y0 or (min(box) >= 0 and max(box) <= 1 and any(n % 1 for n in box)):
                return f"{box} is reversed or in fractions"
            if name in ("a", "b", "c"):
                if x1 <= 0 or y1 <= 0 or x0 >= 60 or y0 >= 40:
                    return f"{box} lies outside"
                x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, 60), min(y1, 40)
            if x1 - x0 < 0.01 or y1 - y0 < 0.01:
                return f"{box} is too narrow"
    return ""


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """Cases without clicks, whose rows are the boxes of the file."""
    return {case: rows for case, rows in table.items() if all(isinstance(r, list) and len(r) == 4 for r in rows)}


def _clicks_rule(prompt: dict[str, Any], name: str) -> str:
    inside, outside = prompt.get("inside", []), prompt.get("outside", [])
    if set(prompt) - {"box", "inside", "outside"} or not isinstance(inside, list) or not isinstance(outside, list):
        return f"{prompt} has other keys"
    clicks = [*inside, *outside]
    if not all(isinstance(c, list) and len(c) == 2 and all(is_number(n) and abs(n) < 1e9 for n in c) for c in clicks):
        return f"{clicks} are no clicks"[:100]
    if not inside and "box" not in prompt:
        return "nothing inside"
    numbers = [n for c in clicks for n in c]
    if numbers and min(numbers) >= 0 and max(numbers) <= 1 and any(n % 1 for n in numbers):
        return "fractions"
    if name in ("a", "b", "c") and not all(0 <= x <= 60 and 0 <= y <= 40 for x, y in clicks):
        return f"{clicks} lie outside"
    if {(x // 1, y // 1) for x, y in inside} & {(x // 1, y // 1) for x, y in outside}:
        return "inside and outside"
    return ""


def _solid_rule(value: dict[str, Any]) -> str:
    for boxes in value.values():
        if not isinstance(boxes, list) or not boxes:
            return "no boxes"
        for entry in boxes:
            if not isinstance(entry, dict) or ("slice" in entry) == ("slices" in entry):
                return f"{entry} is no box"
            clicked = "inside" in entry or "outside" in entry
            if not clicked and "box" not in entry:
                return f"{entry} is no box"
            rest = {key: value for key, value in entry.items() if key not in ("slice", "slices")}
            if clicked and (problem := _clicks_rule(rest, "solid")) and problem != "fractions":
                return problem
            clicks = [*entry.get("inside", []), *entry.get("outside", [])]
            span = entry["slices"] if "slices" in entry else [entry["slice"]] * 2
            box = entry.get("box", [0, 0, 0, 0])
            for numbers, count in ((span, 2), (box, 4), *((click, 2) for click in clicks)):
                if not isinstance(numbers, list) or len(numbers) != count:
                    return f"{numbers} are not {count}"
                if not all(is_number(n) and abs(n) < 1e6 and n == int(n) for n in numbers):
                    return f"{numbers} are not whole"[:100]
            i0, j0, i1, j1 = box
            if not all(0 <= i <= 29 and 0 <= j <= 19 for i, j in clicks):
                return f"{clicks} lie outside"
            if not 0 <= span[0] <= span[1] <= 9 or not 0 <= i0 <= i1 <= 29 or not 0 <= j0 <= j1 <= 19:
                return f"{entry} lies outside"
    return ""
