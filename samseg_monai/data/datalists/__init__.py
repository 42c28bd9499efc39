"""Lists of cases in the style of the Medical Segmentation Decathlon: read, write, check.

A datalist is a JSON object with the sections ``training``, ``validation`` and ``testing``; an item is
``{"case", "image": [one file per scan] or file, "label", "reference", "patient"}``, paths relative to a data folder.
``reference`` names the label a second time: the copy that no crop ever touches, against which metrics are computed.
``labels`` says what the numbers in the label files mean, ``label_coding`` how that table is called (``own``: it has no
name). Files are never rewritten: ``RecodeLabeld`` maps their numbers to classes when they are loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samseg_monai.data import IMAGES
from samseg_monai.data.datalists.label_maps import CODINGS, VALUE, labels_in
from samseg_monai.data.datalists.splits import SECTIONS, in_two_sections
from samseg_monai.data.files.boxes import VOLUME_BOXES, by_case, is_number, read_boxes, read_table, volume_prompts
from samseg_monai.data.files.coarse_masks import CoarseMasks
from samseg_monai.data.files.dicom import holds_series, is_dicom, read_any_grid
from samseg_monai.data.files.volumes import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    image_stem,
    refuse_foreign,
    spacing_in_plane,
    stem_of,
)
from samseg_monai.errors import DataError, PromptError, raise_all
from samseg_monai.files import read_json, write_json

LOG = logging.getLogger(__name__)
UNITS = ("mm", "px")
_FILE_KEYS = ("image", "label", "reference")
LABELS = ("label", "seg", "gtv")  # what the label of a case has been called when it was hashed


def case_hash(case: str) -> str:
    """What cards keep of a case's name: the first 16 digits of its sha256, which tell nobody an id."""
    return hashlib.sha256(case.encode()).hexdigest()[:16]


def patient_of(case: str) -> str:
    """Patient of a BraTS case id: the id without its time point (``BraTS-MEN-00004-001`` -> ``BraTS-MEN-00004``,
    ``BraTS-MEN-RT-0001-1`` -> ``BraTS-MEN-RT-0001``)."""
    return re.sub(r"-\d{3}$|(?<=-RT-\d{4})-\d$", "", case)


def read_datalist(path: str | Path) -> dict[str, Any]:
    """Read and check a datalist file; items get the keys they lack (``case``, ``patient``, ``reference``).

    Raises:
        DataError: no such file, not JSON, or as ``check_datalist``.
    """
    datalist = read_json(path, DataError, "datalist", "'samseg prepare' or 'samseg phantom' makes one")
    for section in SECTIONS:
        items = datalist.setdefault(section, [])
        if isinstance(items, list):
            datalist[section] = [_complete(item, datalist.get("kind")) for item in items]
    check_datalist(datalist, name=str(path))
    return datalist


def write_datalist(datalist: Mapping[str, Any], path: str | Path) -> None:
    """Check a datalist and write it whole."""
    check_datalist(datalist, name=str(path))
    write_json(path, datalist)


def check_datalist(datalist: Mapping[str, Any], *, name: str = "datalist") -> None:
    """Check structure, not files.

    Raises:
        DataError: facts of another type, labels that are not those of the label coding, every item without an image,
            with another number of scans than ``scans`` says or with names that are none, every case listed twice and
            every patient in two sections, all at once; of images also an unknown unit of distances or a spacing that is
            no size.
    """
    heading = f"{name}: not a usable datalist"
    raise_all(_header_problems(datalist), DataError, heading)  # what is wrong here would break the checks below
    problems = [*_label_problems(datalist), *_unit_problems(datalist)]
    scans = ["image"] if datalist.get("kind") == IMAGES else datalist.get("scans")
    seen: Counter[str] = Counter()
    homes: dict[str, list[str]] = {}
    for section in SECTIONS:
        items = datalist.get(section, [])
        if not isinstance(items, list):
            problems.append(f"{section}: expected a list of items, got a {type(items).__name__}")
            continue
        for number, item in enumerate(items):
            if problem := _item_problem(item, scans):
                problems.append(f"{section}[{number}]: {problem}")
                continue
            seen[item["case"]] += 1
            homes.setdefault(item.get("patient") or patient_of(item["case"]), []).append(section)
    problems += [f"case {case} is listed {count} times" for case, count in seen.items() if count > 1]
    fix = ": scores would be too good; keep all time points of a patient together"
    problems += [problem + fix for problem in in_two_sections(homes, "patient")]
    raise_all(problems, DataError, heading)


def load_datalist(
    path: str | Path,
    dataset_dir: str | Path,
    section: str = "training",
    *,
    scans: Sequence[str] | None = None,
    boxes: str | Path | None = None,
    prompts: str | Path | None = None,
    prompts_from: str | None = None,
) -> list[dict[str, Any]]:
    """Items of one section with absolute paths, ready for ``LoadImaged``.

    Args:
        path, dataset_dir: datalist file, and the folder that its paths are relative to.
        section: ``training``, ``validation`` or ``testing``.
        scans: names of the scans wanted, in this order; None takes all as they are listed.
        boxes: file of boxes or clicks (see ``boxes``): every item gets its ``boxes``, of images rows of floats.
        prompts: masks of volumes (see ``CoarseMasks``): every item gets its ``prompt``, a file.
        prompts_from: bundle that has found the ``boxes``: where it found nothing nothing is looked for, with a warning.

    Returns: items as they stand in the datalist, with absolute paths and, where the datalist has a hash of the case,
        "recorded": {"sha256", "files": name -> path}, which ``LoadCased`` compares when it reads these files.

    Raises:
        DataError: unknown or empty section, scans that the datalist does not have, no such folder; all at once, files
            that are missing, are no images or would have another file read in their place; all cases of the section
            without a box; or as ``read_datalist``.
        PromptError: as ``boxes.read_boxes``, of volumes ``boxes.volume_prompts``; all cases without a mask.
    """
    if section not in SECTIONS:
        raise DataError(f"unknown datalist section {section!r}; choose one of {', '.join(SECTIONS)}")
    datalist, root = read_datalist(path), Path(dataset_dir)
    if not root.is_dir():
        raise DataError(f"dataset_dir {root} is not a folder; set it to the folder that holds the cases of {path}")
    if not datalist[section]:
        filled = ", ".join(f"{s} {len(datalist[s])}" for s in SECTIONS)
        raise DataError(f"{path}: section {section!r} has no cases ({filled}); prepare it with another split")
    root = root.resolve()
    hashes = datalist.get("hashes") or {}
    recorded = {item["case"]: _recorded(item, datalist.get("scans"), root) for item in datalist[section]}
    items, problems = [], []
    for stored in _select_scans(datalist, scans, name=str(path))[section]:
        item = dict(stored)
        for key in _FILE_KEYS:
            files = stored.get(key)
            if files is None:
                continue
            paths = [str(root / file) for file in ([files] if isinstance(files, str) else files)]
            if key != "reference" or files != stored.get("label"):
                found = (_file_problem(Path(file), datalist.get("kind")) for file in paths)
                problems += [f"{item['case']}: {problem}" for problem in found if problem]
            item[key] = paths[0] if isinstance(files, str) else paths
        if item["case"] in hashes:
            item["recorded"] = {"sha256": hashes[item["case"]], "files": recorded[item["case"]]}
        items.append(item)
    heading = f"{path}: files of section {section!r} are missing or refused; is dataset_dir right"
    raise_all(problems, DataError, heading, cases=len(items))
    if prompts is not None:
        _add_masks(items, CoarseMasks(prompts))
    return items if boxes is None else _with_boxes(items, datalist, Path(boxes), prompts_from, name=str(path))


def first_cases(items: list[dict[str, Any]], count: int | None, *, seed: int) -> list[dict[str, Any]]:
    """The first ``count`` (1 or more) items of an order of their cases that the seed draws, whatever their own is:
    of one seed the first case is among the first five. They stay in their own order; None: all.

    Raises:
        DataError: there are fewer.
    """
    if count is None:
        return items
    if count > len(items):
        raise DataError(f"training_cases: there are {len(items)} training cases, not the {count} asked for")
    by_draw = {hashlib.sha256(f"{seed} {item['case']}".encode()).digest(): item["case"] for item in items}
    wanted = {by_draw[key] for key in sorted(by_draw)[:count]}
    return [item for item in items if item["case"] in wanted]


def case_hashes(hashes: Mapping[str, str]) -> list[str]:
    """The sha256 of a case, from those of its files by name: of the lines ``<name> <sha256>``, in their order.

    What lists name "label" is called "seg" or "gtv" by BraTS: the first hash is with the names as they are, the others
    with these.
    """
    ways = [{(own if name == "label" else name): value for name, value in hashes.items()} for own in LABELS]
    texts = ("".join(f"{name} {value}\n" for name, value in way.items()) for way in ways)
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _recorded(item: Mapping[str, Any], scans: Sequence[str] | None, root: Path) -> dict[str, str]:
    """Every file of a case by the name that its hash was made with, those of scans that are not used as well."""
    image = item["image"]
    files = {"image": image} if isinstance(image, str) else dict(zip(scans or ["image"], image, strict=False))
    files |= {"label": item["label"]} if item.get("label") else {}
    return {name: str(root / file) for name, file in files.items()}


def _file_problem(path: Path, kind: str | None) -> str:
    """Why a file must not be given to MONAI's readers, which try whatever format a name or a content may mean."""
    if len(os.fsencode(path.name)) > 255:
        return f"no file {path}"
    if path.is_dir() and kind != IMAGES:
        return "" if holds_series(path) else f"no file {path}, and no DICOM series in the folder of that name"
    if not os.path.isfile(path):  # which raises for no name, however long
        return f"no file {path}"
    known = (image_stem if kind == IMAGES else stem_of)(path) is not None or is_dicom(path)
    if path.suffix and not known:
        return f"{path.name}: is no image; expected one of {', '.join(IMAGE_SUFFIXES if kind == IMAGES else SUFFIXES)}"
    try:
        refuse_foreign(path)
    except (DataError, OSError) as error:
        return str(error)
    return ""


def unit_of(path: str | Path) -> str:
    """Unit of distances in a datalist's images: ``px`` where nobody knows their pixel size, else ``mm``."""
    return str(read_datalist(path).get("distance_unit") or "mm")


def spacing_of(path: str | Path) -> float | None:
    """Pixel size in mm that a person gave for a datalist's images; None: the files' own, if they state one."""
    spacing = read_datalist(path).get("spacing_mm")
    return None if spacing is None else float(spacing)


def trained_spacing(
    path: str | Path, dataset_dir: str | Path, orientation: str, count: int | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """In-plane spacing in mm of the training cases of a datalist of volumes, by the headers of their first files.

    Args:
        path, dataset_dir: as of ``load_datalist``.
        orientation: axcodes that the volumes are turned to; their first two axes are the plane.
        count, seed: of the cases that train, as of ``first_cases``.

    Returns: "median", "min" and "max", each along the first and second axis.

    Raises:
        DataError: as ``load_datalist``; headers that cannot be read, all at once.
    """
    found, problems = [], []
    for item in first_cases(load_datalist(path, dataset_dir, "training"), count, seed=seed):
        try:
            image = item["image"]
            _, affine = read_any_grid(image if isinstance(image, str) else image[0])
            found.append(spacing_in_plane(affine, orientation))
        except DataError as error:
            problems.append(f"{item['case']}: {error}")
    raise_all(problems, DataError, f"{path}: the spacing of the training cases is not known")
    return {name: getattr(np, name)(found, axis=0).tolist() for name in ("median", "min", "max")}


def labels_of(path: str | Path, *, needed: bool = True) -> dict[str, str]:
    """What the numbers in the label files of a datalist mean: ``{"0": "background", "1": "spleen", ...}``.

    A name of ``choices.IGNORE_NAMES`` stands for voxels that nobody has judged.

    Args:
        path: datalist file.
        needed: refuse a datalist without; else they are an empty table.

    Raises:
        DataError: the datalist has no ``labels``, or as ``read_datalist``.
    """
    labels = read_datalist(path).get("labels")
    if not labels and needed:
        raise DataError(
            f'{path}: has no "labels", so that nobody knows what its numbers mean; add {{"0": "background", '
            '"1": "<name>", ...}, or let \'samseg prepare\' make the datalist'
        )
    return dict(labels or {})


def too_few_to_choose(datalist: Mapping[str, Any]) -> list[str]:
    """A warning where a single case, or a single patient, is all there is to choose the epoch by."""
    items = datalist.get("validation", [])
    owners = {item.get("patient") or patient_of(item["case"]) for item in items}
    what = "one case" if len(items) == 1 else f"{len(items)} cases of one patient" if len(owners) == 1 else ""
    advice = "its chance decides which epoch is kept; validate on more, or keep the last epoch (val_interval 0)"
    return [f"validation has {what}: {advice}"] if what else []


def _add_masks(items: list[dict[str, Any]], masks: CoarseMasks) -> None:
    problems = []
    for item in items:
        try:
            item["prompt"] = os.path.abspath(masks.of(item["case"]))
        except PromptError as error:
            problems.append(f"{item['case']}: {error}")
    raise_all(problems, PromptError, f"prompts {masks.place}: not every case has a mask", cases=len(items))


def _with_boxes(
    items: list[dict[str, Any]], datalist: Mapping[str, Any], boxes: Path, made_by: str | None, *, name: str
) -> list[dict[str, Any]]:
    images = datalist.get("kind") == IMAGES
    table = read_boxes(boxes, datalist.get("sizes"), made_by=made_by) if images else read_table(boxes, VOLUME_BOXES)
    cases = {item["case"] for section in SECTIONS for item in datalist[section]}
    table = by_case(table, cases)
    if unknown := sorted(set(table) - cases):
        LOG.warning("boxes %s: %d names are no case of %s: %s", boxes, len(unknown), name, ", ".join(unknown[:10]))
    missing = [item["case"] for item in items if item["case"] not in table]
    raise_all(missing, DataError, f"boxes {boxes}: cases of {name} without a box")
    found = [] if images else [(item["case"], _box_problem(table[item["case"]], item, made_by)) for item in items]
    wrong = [f"{case}: {problem}" for case, problem in found if problem]
    raise_all(wrong, PromptError, f"boxes {boxes}: not those of the volumes of {name}", cases=len(items))
    if unfound := [item["case"] for item in items if not table[item["case"]]]:
        what = f"{made_by} found nothing in {len(unfound)} of {len(items)} cases, which count as empty predictions"
        LOG.warning("%s: %s", what, ", ".join(unfound))
    return [{**item, "boxes": table[item["case"]]} for item in items]


def _box_problem(given: Any, item: Mapping[str, Any], made_by: str | None) -> str:
    """What is wrong with the prompts of a volume, by the header of its first file; empty if nothing is."""
    if given == [] and made_by is not None:
        return ""
    try:
        image = item["image"]
        shape, _ = read_any_grid(image if isinstance(image, str) else image[0])
        volume_prompts(given, shape)
    except (DataError, PromptError) as error:
        return str(error)
    return ""


def _select_scans(datalist: dict[str, Any], scans: Sequence[str] | None, *, name: str) -> dict[str, Any]:
    """Keep the files of the named scans, in that order; a datalist that names no scans is returned as it is."""
    stored = datalist.get("scans")
    if scans is None or not stored or list(scans) == list(stored):
        return datalist
    if datalist.get("kind") == IMAGES:
        raise DataError(
            f"{name}: its images have the channels {', '.join(stored)}, the network wants "
            f"{', '.join(scans)}; set scans to {list(stored)!r}, or save the images anew"
        )
    if any(isinstance(item["image"], str) for section in SECTIONS for item in datalist[section]):
        raise DataError(
            f"{name}: one file of a case holds {', '.join(stored)}; the network wants {', '.join(scans)}; set scans to "
            f"{list(stored)!r}, or save each scan as a file of its own"
        )
    absent = [scan for scan in scans if scan not in stored]
    raise_all(absent, DataError, f"{name}: scans that it does not have (it has {', '.join(stored)})")
    chosen = [stored.index(scan) for scan in scans]
    sections = {s: [{**item, "image": [item["image"][i] for i in chosen]} for item in datalist[s]] for s in SECTIONS}
    return {**datalist, **sections}


def _complete(item: Any, kind: str | None) -> Any:
    """Decathlon files name neither case nor patient: derive them from the image's name."""
    if not isinstance(item, dict) or not item.get("image"):
        return item
    image = item["image"]
    if not isinstance(image, str) and not (isinstance(image, list) and all(isinstance(file, str) for file in image)):
        return item
    stems = [
        stem_of(str(f)) or image_stem(str(f)) or Path(f).name for f in ([image] if isinstance(image, str) else image)
    ]
    case = stems[0]
    while not all(stem.startswith(case) for stem in stems):
        case = re.sub(r"[-_]?[^-_]*$", "", case)  # drop the last word: where names differ is the scan
    item = {"case": case or stems[0], **item}
    case = str(item["case"])
    item.setdefault("patient", case if kind == IMAGES else patient_of(case))
    if item.get("label"):
        item.setdefault("reference", item["label"])
    return item


def _label_problems(datalist: Mapping[str, Any]) -> list[str]:
    labels, coding = datalist.get("labels"), datalist.get("label_coding")
    if labels is None:
        return []
    values = labels if isinstance(labels, Mapping) else {"?": "?"}
    if not all(VALUE.fullmatch(str(value)) and isinstance(text, str) for value, text in values.items()):
        return [f'labels: expected {{"0": "background", "1": "<name>", ...}}, got {labels!r}']
    if not isinstance(coding, str) or coding not in CODINGS:
        return []
    stored, expected = ({str(v): str(n) for v, n in table.items()} for table in (labels, labels_in(coding)))
    differing = sorted({v for v, _ in stored.items() ^ expected.items()}, key=int)
    return [
        f"labels: {value} is {stored.get(value, 'absent')!r}, but {expected.get(value, 'absent')!r} in {coding}"
        for value in differing
    ]


def _unit_problems(datalist: Mapping[str, Any]) -> list[str]:
    unit, spacing = datalist.get("distance_unit", "mm"), datalist.get("spacing_mm")
    problems = []
    if unit not in UNITS:
        problems.append(f"distance_unit: expected one of {', '.join(UNITS)}, got {unit!r}")
    if spacing is not None and (not is_number(spacing) or not 0 < spacing < 1e6):
        problems.append(f"spacing_mm: expected a size in mm above 0, or null, got {spacing!r}")
    elif spacing is not None and unit == "px":
        problems.append(f"distance_unit: is px although spacing_mm is {spacing}; one of them is wrong")
    return problems


def _item_problem(item: Any, scans: Sequence[str] | None) -> str:
    if not isinstance(item, Mapping):
        return f"expected an object with case, image, label, got {item!r:.200}"
    image, case = item.get("image"), item.get("case")
    files = [image] if isinstance(image, str) else image
    if not case or not files or not isinstance(files, list) or not all(isinstance(f, str) for f in files):
        return f"needs a case and an image (file name or list of them), got {dict(item)!r:.200}"
    if not _is_text(case) or "/" in case or "\\" in case:
        return f"case must be a name, got {case!r:.80}"
    others = {key: item[key] for key in ("label", "reference", "patient") if item.get(key) is not None}
    if wrong := [f"{key} {value!r:.80}" for key, value in others.items() if not _is_text(value)]:
        return f"case {case}: expected a text, got {' and '.join(wrong)}"
    if wrong := [repr(file)[:80] for file in files if not _is_text(file)]:
        return f"case {case}: no names of files: {', '.join(wrong)}"
    if scans and not isinstance(image, str) and len(files) != len(scans):
        return f"case {case}: {len(files)} image files for {len(scans)} scans ({', '.join(scans)})"
    return ""


def _is_text(value: Any) -> bool:
    """A text that can be the name of a file: not empty, not too long, printable."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and not re.search("[\x00-\x1f\x7f\ud800-\udfff]", value)


def _header_problems(datalist: Mapping[str, Any]) -> list[str]:
    """Facts above the sections that have another type than the one they are used as."""

    def strings(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(_is_text, (*value, *value.values())))

    def scans(value: Any) -> bool:
        return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value) > 0

    def sizes(value: Any) -> bool:
        pairs = value.values() if isinstance(value, Mapping) else [None]
        whole = (
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair) for pair in pairs
        )
        return all(whole)

    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "kind": ("images or volumes", lambda value: value in (IMAGES, "volumes")),
        "name": ("a text", lambda value: isinstance(value, str)),
        "modality": ("a text", lambda value: isinstance(value, str) or strings(value)),
        "scans": ("names of scans, each once", scans),
        "sizes": ('{"<case>": [rows, columns], ...}', sizes),
        "hashes": ('{"<case>": "<sha256>", ...}', strings),
        "split": ("an object", lambda value: isinstance(value, (Mapping, str))),
    }
    given = {key: datalist[key] for key in rules if datalist.get(key) is not None}
    return [
        f"{key}: expected {rules[key][0]}, got {value!r:.80}"
        for key, value in given.items()
        if not rules[key][1](value)
    ]
