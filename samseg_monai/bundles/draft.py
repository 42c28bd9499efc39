"""A recipe for a task of one's own, made of what is measured in its data; each choice says why it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from samseg_monai.bundles.build import compose_recipes, read_recipe, recipe_names, without_comments
from samseg_monai.data.datalists.label_maps import check_names
from samseg_monai.errors import ConfigError
from samseg_monai.files import write_text
from samseg_monai.settings import DemoSettings, RunPatch, TaskSettings

if TYPE_CHECKING:
    from samseg_monai.data.datalists.measure import Measured

# DICOM's abbreviation -> how a text calls it, and the words by which data sets name it
MODALITIES = {
    "CT": ("CT", {"ct", "cbct"}),
    "MR": ("MRI", {"mr", "mri", "t1", "t2", "t1w", "t2w", "t1c", "t1gd", "flair", "adc", "dwi", "swi"}),
    "PT": ("PET", {"pet", "pt"}),
    "US": ("ultrasound", {"us", "ultrasound"}),
    "DX": ("X-ray images", {"dx", "cr", "xr", "xray", "radiograph", "radiography"}),
}
OTHER = "OT"
_AIR_HU = -900  # air is -1000 HU; MRI has no values like this
_BRAIN_ONLY = 0.25  # fraction of zeros: nnU-Net leaves them out of its statistics, too, where a quarter can be cut off
_COARSE = 1.5  # an axis with voxels so many times as long as the next one's is the one between the slices
# axis between the slices (right-left, back-front, bottom-top) -> its name, and axes of the volume that show slices as
# radiologists do: rows run to the back or down, columns to the patient's left or to the back
_VIEWS = (("sagittal", "IPR"), ("coronal", "ILA"), ("axial", "PLS"))
_AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
_DEMO_SLICES = 1000
_STEP_PIXELS = 2 << 20  # of a training step: two slices of 1024 pixels, eight of 512, 32 of 256
_SIDES = {"left": "right", "l": "r", "lt": "rt", "lh": "rh"}


@dataclass(frozen=True)
class Choice:
    """One setting of a recipe: its id (``run::image_size``), its value, and why."""

    key: str
    value: Any
    why: str


def draft_task(measured: Measured, modality: str | None = None) -> list[Choice]:
    """Settings of a task, in the order of the file.

    Args:
        measured: what is known of the data.
        modality: as DICOM abbreviates it; None: that of the datalist, else what the intensities look like.

    Raises:
        ConfigError: class names that no settings may hold, all at once.
    """
    check_names({name: name for name in measured.classes})
    found, reason = _modality(measured, modality)
    return [*_data(measured, found, reason), *_texts(measured, found), *_run(measured, found)]


def write_task(name: str, choices: Sequence[Choice], folder: Path) -> Path:
    """Write ``<folder>/<name>.json``, each value below a comment that explains it.

    Raises:
        BundleError: the choices make no task.
    """
    task = {**without_comments(json.loads(_text(choices))), "name": name}
    compose_recipes(task, read_recipe("strategies", "zero_shot"), f"task {name}")
    path = folder / f"{name}.json"
    write_text(path, _text(choices))
    return path


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a new task cannot have, and say which it can."""
    longest = 64 - len("_segmentation_") - max(map(len, recipe_names("strategies")))
    if name in recipe_names("tasks"):
        raise ConfigError(f"{name} is a task that comes with samseg-monai; give yours another name, such as my_{name}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name.lower().endswith(".json"):
        raise ConfigError(
            f"{name!r} is no name of a task: it takes letters, digits, _ . and -, begins with a letter or digit, and "
            "has no folder and no .json (--output names the folder)"
        )
    if len(name) > longest:
        raise ConfigError(f"{name!r} has {len(name)} characters; {longest} fit into the names of bundles")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a task's recipe, for editors: with comments; what it extends may hold what is required."""
    parts: dict[str, Any] = {
        "extends": (str, ""),
        "run": (RunPatch, RunPatch()),
        "demo": (DemoSettings, DemoSettings()),
    }
    schema = create_model("TaskRecipe", __base__=TaskSettings, **parts).model_json_schema()
    del schema["properties"]["name"]  # the file's own
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            part["patternProperties"] = {"^//": {"description": "A comment."}}
    required = [name for name in schema.pop("required") if name != "name"]
    return {**schema, "if": {"required": ["extends"]}, "else": {"required": required}}


def _modality(measured: Measured, given: str | None) -> tuple[str, str]:
    if given is not None:
        return given, "as given"
    words = set(re.split(r"[^a-z0-9]+", measured.modality.lower().replace("x-ray", "xray")))
    named = [short for short, (_, known) in MODALITIES.items() if words & known]
    if len(named) == 1:
        return named[0], f"the datalist says {measured.modality!r}"
    if not measured.images and measured.lowest <= _AIR_HU:
        return (
            "CT",
            f"a guess: the lowest intensities are {measured.lowest:g}, as of air in CT; --modality says otherwise",
        )
    return OTHER, "nobody says what it is; give --modality MR, CT, US, XC ... as DICOM abbreviates it"


def _data(measured: Measured, modality: str, reason: str) -> Iterator[Choice]:
    if measured.images:
        yield Choice("kind", "images", "2-D images, read upright; volumes are cut into slices")
    yield Choice("dataset", _name(measured.dataset), "folder of the data; data/<dataset> unless --dataset_dir is given")
    several = len(measured.scans) > 1
    yield Choice(
        "scans",
        list(measured.scans),
        "channels of the network, in this order; leave out what is not wanted"
        if several and not measured.images
        else "channels of the network, as the datalist has them",
    )
    if not several and modality != OTHER:
        yield Choice("channels", [modality.lower()], "what they show, for readers of the bundle")
    yield Choice(
        "classes",
        list(measured.classes),
        "as the datalist names the values of the labels; one that is left out is background, and text has to name each",
    )
    yield Choice("modality", modality, reason)
    yield _orientation(measured)
    yield _intensity(measured, modality)
    if not measured.images:
        yield _mirrored(measured.classes)


def _through(measured: Measured) -> tuple[int, bool]:
    """Axis between the slices of volumes (0 right-left, 1 back-front, 2 bottom-top), and whether it is a coarse one."""
    sides = measured.spacings_mm
    longest = max(range(3), key=lambda axis: sides[axis])
    coarse = all(sides[longest] >= _COARSE * sides[axis] for axis in range(3) if axis != longest)
    return (longest if coarse else 2), coarse


def _orientation(measured: Measured) -> Choice:
    if measured.images:
        return Choice("orientation", None, "2-D images have none")
    size = " x ".join(f"{side:g}" for side in measured.spacings_mm)
    axis, coarse = _through(measured)
    name, codes = _VIEWS[axis]
    why = "the axis between slices is the coarse one" if coarse else "no axis is much coarser than the others"
    return Choice(
        "orientation",
        codes,
        f"{name} slices, upright: voxels have {size} mm (right-left, back-front, "
        f"bottom-top), {why}; nothing is resampled",
    )


def _window(measured: Measured, modality: str) -> list[float] | None:
    """Of CT: what holds the labelled voxels, in steps of 5 HU, and half of its width more at either end."""
    if modality != "CT" or measured.inside is None or _colour(measured):
        return None
    low, high = measured.inside
    margin = (high - low) / 2
    window = [5.0 * round((low - margin) / 5), 5.0 * round((high + margin) / 5)]
    return window if window[0] < window[1] else None


def _intensity(measured: Measured, modality: str) -> Choice:
    window = _window(measured, modality)
    if window and measured.inside:
        why = (
            f"99 % of the labelled voxels lie from {measured.inside[0]:.0f} to {measured.inside[1]:.0f} (training "
            f"cases read: {measured.read}); half as much again at either end keeps what is around them"
        )
        return Choice("intensity", {"window": window}, why)
    if not measured.images and measured.zeros >= _BRAIN_ONLY:
        return Choice(
            "intensity",
            {"nonzero": True},
            f"{100 * measured.zeros:.0f} % of the voxels are exactly 0, as "
            "outside of a skull-stripped brain: they do not count for mean and deviation",
        )
    return Choice(
        "intensity", {}, f"values lie from {measured.lowest:g} to {measured.highest:g}: no window, all pixels count"
    )


def _mirrored(classes: Sequence[str]) -> Choice:
    pairs, alone = [], []
    for name in classes:
        to_right, to_left = _mirror_of(name, _SIDES), _mirror_of(name, {right: left for left, right in _SIDES.items()})
        if to_right != name and to_right in classes:
            pairs.append([name, to_right])
        elif to_right != name or (to_left != name and to_left not in classes):
            alone.append(name)
    if alone:
        why = "tell a side and have no partner: say what a mirror makes of them before you use augmentation strong"
        return Choice("mirrored_classes", None, f"{', '.join(alone)} {why}")
    why = "change places in a mirror, by their names" if pairs else "no name tells a side: a mirror changes none"
    return Choice("mirrored_classes", pairs, f"{why} (augmentation strong)")


def _mirror_of(name: str, sides: dict[str, str]) -> str:
    def other(word: str) -> str:
        new = sides.get(word.lower(), word)
        return new if word.islower() or new == word else new.upper() if word.isupper() else new.capitalize()

    return "".join(other(part) for part in re.split(r"([ _.-])", name))


def _texts(measured: Measured, modality: str) -> Iterator[Choice]:
    classes, data = list(measured.classes), _name(measured.dataset)
    shown = MODALITIES[modality][0] if modality in MODALITIES else "images" if measured.images else "volumes"
    listed = f"{', '.join(classes[:-1])} and {classes[-1]}" if len(classes) > 1 else classes[0]
    capital = listed[0].upper() + listed[1:]
    how = "is" if len(classes) == 1 else "are"
    title = f"{capital if len(classes) <= 3 else f'{len(classes)} classes'} on {shown}"
    step = "2-D images" if measured.images else shown
    mine = "yours to replace before you hand a bundle on"
    yield Choice("title", title, "heading of the bundle's page")
    yield Choice(
        "text", f"{capital} {how} segmented on {step}.", "it has to name every class; boxes and numbers are added"
    )
    yield Choice("data_text", f"Data set {data}; its datalist is written by `samseg prepare`.", mine)
    yield Choice("data_source", f"Data set {data}", f"{mine}: where the data are from")
    yield Choice("data_license", ["Its terms are not told here."], f"{mine}: who may use what was learnt from them")


def _run(measured: Measured, modality: str) -> Iterator[Choice]:
    longest = max(map(max, _slices(measured)))
    size = next((side for side in (256, 512) if side >= 2 * longest), 1024)
    prompted = len(measured.classes) == 1
    yield Choice(
        "run::image_size",
        size,
        f"slices have up to {longest} pixels; 1024, at which SAM was trained, takes most "
        "memory, and less than twice the slice loses detail in SAM's patches of 16",
    )
    yield _crop(measured)
    yield Choice("run::batch_size", _STEP_PIXELS // size**2, "two million pixels a step; less if memory runs out")
    if _colour(measured):
        yield Choice("run::input_scale", "sam", "colours from 0 to 255, as SAM's own training had them")
        yield Choice("run::scan_mode", "channels", "red, green and blue are one picture, not three scans")
    elif _window(measured, modality):
        yield Choice("run::input_scale", "unit", "the window of intensity becomes 0 to 1")
    else:
        yield Choice("run::input_scale", "zscore", "mean 0 and deviation 1 in each image: its numbers have no unit")
    if prompted:
        why = "one class: a box around it is the prompt, drawn from the label, its sides moved out by 0 to 30 %"
        yield Choice("run::prompt", {"source": "label", "loosen": [0.0, 0.3]}, f"{why}; source none goes without")
        yield Choice("run::slices", {"picker": {"name": "Foreground"}}, "learn from all slices that have a box")
    else:
        yield Choice("run::prompt", {"source": "none"}, "several classes: a box would not say which is meant")
        yield Choice(
            "run::slices", {"picker": {"name": "AllSlices"}}, "without boxes empty slices have to be learnt, too"
        )
    yield _demo(measured, prompted)


def _demo(measured: Measured, prompted: bool) -> Choice:
    """Small, few slices, one look at each: what pico encodes in two minutes on two cores."""
    cases = max(1, measured.cases.get("training", 1))
    run: dict[str, Any] = {"image_size": 128, "embeddings": {"variants": 1}}
    few = "slices are small"
    if prompted:
        count = min(8, max(1, _DEMO_SLICES // cases))
        run["slices"] = {"picker": {"name": "RandomN", "n": count, "min_voxels": 1}}
        few = f"{count} small slices of each case per epoch"
    elif not measured.images:
        depth = max(shape[_through(measured)[0]] for shape in measured.shapes)
        step = min(-(-cases * depth // _DEMO_SLICES), max(1, depth // 4))  # some of every case, whatever their number
        run["slices"] = {"picker": {"name": "EveryNth", "n": step}}
        few = f"one small slice of {step}"
    return Choice("demo", {"run": run}, f"for a try in minutes with demo.json: pico, a toy SAM; {few}")


def _slices(measured: Measured) -> list[tuple[int, ...]]:
    """Distinct sizes of slices in pixels, rows first."""
    if measured.images:
        return list(measured.shapes)
    rows, columns = (_AXES[code] for code in _VIEWS[_through(measured)[0]][1][:2])
    return sorted({(shape[rows], shape[columns]) for shape in measured.shapes})


def _crop(measured: Measured) -> Choice:
    sizes = _slices(measured)
    largest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    if not measured.images and len(sizes) > 1 and max(largest) <= 2 * min(max(size) for size in sizes):
        why = (
            f"{len(sizes)} sizes, up to {largest[0]} x {largest[1]}: all are filled up to one, and so seen at one "
            "scale; nothing is cut"
        )
        return Choice("run::crop_size", [16 * -(-side // 16) for side in largest], f"slices have {why}")
    others = f" and {len(sizes) - 1} other sizes" if len(sizes) > 1 else ""
    brains = not measured.images and measured.zeros >= _BRAIN_ONLY
    more = "; samseg bbox measures a crop that holds every brain" if brains else ""
    return Choice("run::crop_size", None, f"slices are seen whole ({sizes[-1][0]} x {sizes[-1][1]}{others}){more}")


def _colour(measured: Measured) -> bool:
    return measured.images and len(measured.scans) == 3


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-")[:64] or "data"


def _text(choices: Sequence[Choice]) -> str:
    """The recipe as JSON: above each key its comment, which nothing reads."""
    note = "keys that begin with // are comments; samseg task schema writes a schema with all keys for your editor"
    top = [("//", note)]
    run: list[tuple[str, Any]] = []
    for choice in choices:
        group, _, key = choice.key.rpartition("::")
        (run if group else top).extend([(f"//{key}", choice.why), (key, choice.value)])
    demo = top.index(("//demo", choices[-1].why))
    rows = [f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in top]
    inner = [f"        {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in run]
    rows.insert(demo, '    "run": {\n' + ",\n".join(inner) + "\n    }")
    return "{\n" + ",\n".join(rows) + "\n}\n"
