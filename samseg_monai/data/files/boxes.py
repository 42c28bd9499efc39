"""Boxes and clicks that a person gave: floats in the pixels of 2-D images, whole voxels of volumes.

The file of 2-D images is ``{"NAME": [[x0, y0, x1, y1], ...]}``: x runs along columns and y along rows, both from the
outer edge of the first pixel, so that a box around the pixels a to b of a row reads (a, b + 1). In place of a box may
stand ``{"box": [x0, y0, x1, y1], "inside": [[x, y], ...], "outside": [[x, y], ...]}``, clicks on one object and beside
it, in the same pixels (the middle of pixel a is a + 0.5), with or without a box. That of volumes is
``{"CASE": [{"slice": k, "box": [i0, j0, i1, j1]}, {"slices": [k0, k1], "box": ...}]}``: voxel indices along axes 0, 1
and (slices) 2 of the stored array, from 0, all ends included. In place of "box", or beside it, stand there, too,
``"inside": [[i, j], ...], "outside": [[i, j], ...]``, clicks on voxels of the slice. No pixel or voxel is
inside and outside of one object; it may be inside of one and outside of another. A DICOM series stores no array: of one
it is that of ``dicom.read_series``, where i is the column and j the row of a picture, and k the place of a slice along
the normal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from samseg_monai.errors import PromptError, raise_all
from samseg_monai.files import file_name, read_json, write_text

MOST_BOXES = 10_000  # of one image or volume
MOST_CLICKS = 1000  # on one object
_CLICKS = {"inside": 1, "outside": 0}  # and their labels
_FAR = 1e9  # pixels: no image is so large
_SMALLEST = 0.01  # pixels: what is left of a side must stay a side when large images are made small
IMAGE_BOXES = '{"NAME": [[x0, y0, x1, y1], ...]}'
VOLUME_BOXES = '{"CASE": [{"slice": 12, "box": [30, 40, 55, 70]}]}'
Rectangle = tuple[int, int, int, int]


def read_boxes(
    path: str | Path, sizes: Mapping[str, Sequence[int]] | None = None, *, made_by: str | None = None
) -> dict[str, list[list[float]]]:
    """Read and check the box file of a set of images: case -> rows as of ``as_floats``, at least one each.

    Args:
        path: JSON file.
        sizes: case -> (rows, columns); boxes of these must lie at least partly in the image.
        made_by: bundle that has found the boxes: a case without any is an answer of it, and not a slip.

    Raises:
        PromptError: the file cannot be read; every box that ``box_problem`` finds fault with, all at once.
    """
    table = read_table(path)
    problems = [
        f"{name}: {text}"
        for name, boxes in table.items()
        if boxes != [] or made_by is None
        for text in box_problems(boxes, (sizes or {}).get(name))
    ]
    raise_all(problems, PromptError, f"boxes {path}: expected {IMAGE_BOXES}, in pixels of the stored image")
    return {name: as_floats(boxes) for name, boxes in table.items()}


def read_table(path: str | Path, form: str = IMAGE_BOXES) -> dict[str, Any]:
    """The object in a box file of the given form, its boxes not yet checked; PromptError as ``read_json``."""
    table = read_json(path, PromptError, "boxes", f"expected {form}")
    many = [f"{name}: {len(boxes):,} boxes, at most {MOST_BOXES:,}" for name, boxes in table.items()
            if isinstance(boxes, list) and len(boxes) > MOST_BOXES]  # fmt: skip
    raise_all(many, PromptError, f"boxes {path}: more than anyone draws")
    return table


def by_case(table: Mapping[str, Any], cases: Collection[str]) -> dict[str, Any]:
    """A table of boxes by the names of ``cases``: one that was made of their masks has the names of these files."""
    called = {file_name(case): case for case in cases if case not in table and file_name(case) not in cases}
    return {called.get(name, name): boxes for name, boxes in table.items()}


def box_problems(boxes: Any, size: Sequence[int] | None = None) -> list[str]:
    """What is wrong with the boxes of one image, as they stand in the file, one sentence for each box.

    ``size`` is (rows, columns) of the image; None where it is not known.
    """
    if not isinstance(boxes, list) or not boxes:
        return [f"expected a list of boxes [[x0, y0, x1, y1], ...], got {boxes!r}"]
    if all(is_number(value) for value in boxes):
        return [f"expected a list of boxes, got the numbers {boxes}; put one more pair of brackets around them"]
    return [f"boxes[{n}] {problem}" for n, box in enumerate(boxes) if (problem := box_problem(box, size))]


def box_problem(box: Any, size: Sequence[int] | None = None) -> str:
    """What is wrong with one box: not four finite numbers, empty, reversed, outside, in fractions of the image in place
    of pixels, or too narrow for any network, or with its clicks; empty if nothing is."""
    if isinstance(box, dict):
        return _clicks_problem(box, size) or (box_problem(box["box"], size) if "box" in box else "")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        return f"must be four numbers [x0, y0, x1, y1], got {box!r}"
    if not all(math.isfinite(value) for value in box):
        return f"has numbers that are not finite: {box}"
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return f"must have x0 < x1 and y0 < y1, got {box}; is it [x, y, width, height]?"
    if min(box) >= 0 and max(box) <= 1 and any(value % 1 for value in box):
        return f"lies within the first pixel: {box}; are these fractions of the image? Give pixels"
    if size is not None:
        if x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]:
            return f"lies outside of the image of {size[1]} columns and {size[0]} rows: {box}"
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])
    if x1 - x0 < _SMALLEST or y1 - y0 < _SMALLEST:
        return f"is less than {_SMALLEST} pixels wide or high in the image: {box}"
    return ""


def _clicks_of(prompt: Mapping[str, Any], letters: str, *keys: str) -> list[Any] | str:
    """The clicks of a prompt, not yet checked, or what is wrong with their lists, and with its keys, others than
    ``keys``."""
    if strange := sorted(map(str, set(prompt) - {*keys, "box", *_CLICKS})):
        return f"has {', '.join(map(repr, strange))}; a prompt has {', '.join(keys + ('box', 'inside and outside'))}"
    clicks: list[Any] = []
    for key in _CLICKS:
        given = prompt.get(key, [])
        if not isinstance(given, (list, tuple)) or not all(isinstance(c, (list, tuple)) and len(c) == 2 for c in given):
            return f"{key} must be a list of clicks [[{', '.join(letters)}], ...], got {given!r}"
        clicks += given
    if len(clicks) > MOST_CLICKS:
        return f"has {len(clicks):,} clicks, at most {MOST_CLICKS:,}"
    if not prompt.get("inside") and "box" not in prompt:
        return f"needs a box or a click inside, got {prompt!r}"
    return clicks


def _contradiction(prompt: Mapping[str, Any]) -> str:
    """Which pixel or voxel of a prompt's checked clicks is clicked inside and outside; empty if none is."""
    inside, outside = ({(*map(math.floor, click),) for click in prompt.get(key, [])} for key in _CLICKS)
    both = sorted(inside & outside)
    return f"is clicked inside and outside at {list(both[0])}; keep one of the two clicks" if both else ""


def _clicks_problem(prompt: Mapping[str, Any], size: Sequence[int] | None) -> str:
    """What is wrong with the clicks of a prompt, and with its keys; empty if nothing is."""
    clicks = _clicks_of(prompt, "xy")
    if isinstance(clicks, str):
        return clicks
    if wrong := [c for c in clicks if not all(is_number(v) and abs(v) < _FAR for v in c)]:
        return f"has clicks that are no two finite numbers [x, y]: {wrong[0]!r}"
    if clicks and all(0 <= value <= 1 for click in clicks for value in click) and any(v % 1 for c in clicks for v in c):
        return f"has all clicks within the first pixel: {clicks[0]}; are these fractions of the image? Give pixels"
    if size is not None and (lost := [c for c in clicks if not (0 <= c[0] <= size[1] and 0 <= c[1] <= size[0])]):
        return f"has clicks outside of the image of {size[1]} columns and {size[0]} rows: {lost[0]}"
    return _contradiction(prompt)


def as_floats(boxes: Sequence[Any]) -> list[list[float]]:
    """Checked boxes with every number as a float, so that all of them collate alike.

    With clicks all are rows of 4 + 3 P numbers: the box, then x, y and 1 (inside) or 0 (outside) of each click. NaN
    stands for a box or a click that is not there.
    """
    rows: list[list[float]] = []
    for box in boxes:
        prompt = box if isinstance(box, dict) else {"box": box}
        row = list(prompt.get("box", [math.nan] * 4))
        for key, label in _CLICKS.items():
            row += [value for click in prompt.get(key, []) for value in (*click, label)]
        rows.append([float(value) for value in row])
    most = max(map(len, rows), default=4)
    return [row + [math.nan] * (most - len(row)) for row in rows]


def listed(given: Any) -> list[Any]:
    """The list of prompts that a file holds for a volume; PromptError, with its shape, for what is none."""
    if given == []:
        raise PromptError("no boxes are given for this case; add a list of them under its name")
    if isinstance(given, list) and any(isinstance(entry, Mapping) for entry in given):
        return given
    shape, inner = [], given
    while isinstance(inner, list) and inner:
        shape.append(len(inner))
        inner = inner[0]
    text = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:77]}..."
    size = f"an array of shape {tuple(shape)}: " if shape else ""
    expected = VOLUME_BOXES.partition(": ")[2].removesuffix("}")
    raise PromptError(f"its boxes must be a list {expected}, in voxels, got {size}{text}")


def volume_prompts(given: Any, shape: Sequence[int]) -> list[Any]:
    """The list of prompts that a file holds for a volume of ``shape``; raises as ``listed`` and ``volume_boxes``."""
    entries = listed(given)
    volume_boxes(entries, shape[:3], f"bad boxes for a volume of {tuple(shape[:3])} voxels")
    return entries


def volume_boxes(entries: Sequence[Any], shape: Sequence[int], heading: str) -> list[tuple[int, ...]]:
    """Boxes of a volume of ``shape`` as (i0, j0, i1, j1, k0, k1), all ends included; its clicks are checked, too.

    Raises: PromptError with ``heading`` and everything that is wrong.
    """
    problems = [f"boxes[{n}] {problem}" for n, entry in enumerate(entries) if (problem := _volume_box(entry, shape))]
    raise_all(problems, PromptError, heading)
    if clicked(entries) and (count := sum(len(_slices(entry)) for entry in entries)) > MOST_BOXES:
        raise PromptError(f"{heading}:\n  {count:,} prompts in all slices, at most {MOST_BOXES:,}")
    spans = [(entry["box"], _slices(entry)) for entry in entries if "box" in entry]
    return [tuple(int(n) for n in (*box, span[0], span[-1])) for box, span in spans]


def _volume_box(entry: Any, shape: Sequence[int]) -> str:
    """What is wrong with a prompt of a volume; empty if nothing is."""
    prompted = isinstance(entry, Mapping) and not {"box", *_CLICKS}.isdisjoint(entry)
    if not prompted or ("slice" in entry) == ("slices" in entry):
        return f'must have "box", or clicks "inside", and one of "slice" and "slices", got {entry!r}'
    has_clicks = not set(_CLICKS).isdisjoint(entry)
    clicks = _clicks_of(entry, "ij", "slice", "slices") if has_clicks else []
    if isinstance(clicks, str):
        return clicks
    span, box = entry["slices"] if "slices" in entry else [entry["slice"]] * 2, entry.get("box", [0] * 4)
    for value, count in ((span, 2), (box, 4), *((click, 2) for click in clicks)):
        whole = isinstance(value, (list, tuple)) and all(is_number(n) and float(n).is_integer() for n in value)
        if not whole or len(value) != count:
            more = ", clicks [i, j]" if has_clicks else ""
            return f"needs whole numbers: slice k or slices [k0, k1], box [i0, j0, i1, j1]{more}; got {entry!r}"
    if not 0 <= span[0] <= span[1] < shape[2]:
        return f"slices {list(span)} are not within 0 to {shape[2] - 1}, in order"
    limits = f"0 to {shape[0] - 1} and 0 to {shape[1] - 1}"
    if not (0 <= box[0] <= box[2] < shape[0] and 0 <= box[1] <= box[3] < shape[1]):
        return f"box {list(box)} is not [i0, j0, i1, j1] within {limits}, in order"
    if lost := [click for click in clicks if not (0 <= click[0] < shape[0] and 0 <= click[1] < shape[1])]:
        return f"has clicks that are not [i, j] within {limits}: {list(lost[0])}"
    return _contradiction(entry)


def _slices(entry: Mapping[str, Any]) -> range:
    first, last = entry["slices"] if "slices" in entry else [entry["slice"]] * 2
    return range(int(first), int(last) + 1)


def clicked(entries: Any) -> bool:
    """Whether any prompt in a list, of an image or volume as it stands in a file, has clicks."""
    return isinstance(entries, (list, tuple)) and any(
        isinstance(entry, Mapping) and any(entry.get(key) for key in _CLICKS) for entry in entries
    )


def volume_rows(entries: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[list[float]]]:
    """Slices and rows, as of ``as_floats``, of the checked prompts of a volume: x runs along axis 1, y along axis 0."""
    found: list[tuple[int, dict[str, Any]]] = []
    for entry in entries:
        prompt: dict[str, Any] = {key: [[j + 0.5, i + 0.5] for i, j in entry.get(key, [])] for key in _CLICKS}
        if "box" in entry:
            i0, j0, i1, j1 = entry["box"]
            prompt["box"] = [j0, i0, j1 + 1, i1 + 1]
        found += [(k, prompt) for k in _slices(entry)]
    return [k for k, _ in found], as_floats([prompt for _, prompt in found])


def rectangles(mask: np.ndarray, *, per_component: bool = False) -> list[Rectangle]:
    """Tight rectangles around a mask.

    Args:
        mask: (H, W) bool.
        per_component: one rectangle per 8-connected component, largest first, instead of one around everything.
    Returns: (x0, y0, x1, y1) each, upper ends exclusive; an empty list for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    if not per_component:
        return [(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)]
    return [rectangle for _, rectangle in components(mask)[1]]


def components(mask: np.ndarray) -> tuple[np.ndarray, list[tuple[int, Rectangle]]]:
    """The 8-connected components of a mask (H, W): the number of each pixel's, 0 where there is none; and of each its
    number and rectangle (as of ``rectangles``), largest first."""
    numbered = sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)), True)
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(numbered)
    found = [(shapes.GetNumberOfPixels(label), *shapes.GetBoundingBox(label), label) for label in shapes.GetLabels()]
    found.sort(key=lambda entry: (-entry[0], entry[2], entry[1]))
    rectangles = [(label, (x, y, x + width, y + height)) for _, x, y, width, height, label in found]
    return sitk.GetArrayFromImage(numbered), rectangles


def write_boxes(path: str | Path, table: Mapping[str, Sequence[Any]]) -> None:
    """Write a box file, one box a line: case -> boxes as ``read_boxes`` or ``volume_boxes`` take them."""
    cases = []
    for case, boxes in table.items():
        lines = ",\n".join(f"    {json.dumps(box)}" for box in boxes)
        cases.append(f"  {json.dumps(case, ensure_ascii=False)}: [\n{lines}\n  ]")
    write_text(path, "{\n" + ",\n".join(cases) + "\n}\n")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number and no truth value: files and command lines also give texts."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
