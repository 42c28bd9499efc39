"""Box files of 2-D images: ``{"NAME": [[x0, y0, x1, y1], ...]}``, floats in pixels of the stored image.

x runs along columns and y along rows, both from the outer edge of the first pixel: a box around the pixels a to b of a
row reads (a, b + 1). Several boxes of an image are several prompts. Boxes of volumes have a format of their own, see
``cases.find_cases``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.errors import PromptError, raise_all

_SMALLEST = 0.01  # pixels: what is left of a side must stay a side when large images are made small
_FORMAT = '{"NAME": [[x0, y0, x1, y1], ...]}'


def read_boxes(
    path: str | Path, sizes: Mapping[str, Sequence[int]] | None = None, *, names: Sequence[str] | None = None
) -> dict[str, list[list[float]]]:
    """Read and check the box file of a set of images.

    Args:
        path: JSON file.
        sizes: case -> (rows, columns); boxes of these must lie at least partly in the image.
        names: all cases that the file may name; None accepts every name.

    Returns: case -> boxes of four floats, at least one box each.

    Raises:
        PromptError: the file cannot be read; every name that is not in ``names`` and every box that ``box_problem``
            finds fault with, all at once.
    """
    table = read_table(path)
    problems = [f"{name}: there is no such image" for name in table if names is not None and name not in names]
    for name, boxes in table.items():
        problems += [f"{name}: {text}" for text in box_problems(boxes, (sizes or {}).get(name))]
    raise_all(problems, PromptError, f"boxes {path}: expected {_FORMAT}, in pixels of the stored image")
    return {name: as_floats(boxes) for name, boxes in table.items()}


def read_table(path: str | Path) -> dict[str, Any]:
    """The object in a box file, its boxes not yet checked.

    Raises:
        PromptError: no such file, not JSON, not an object, or a name that stands twice.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        twice.extend(sorted({name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1}))
        return table

    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=collect)
    except (OSError, ValueError) as error:
        raise PromptError(f"boxes {path}: cannot be read as JSON ({error}); expected {_FORMAT}") from error
    raise_all(twice, PromptError, f"boxes {path}: names that stand in it more than once; keep one list of each")
    if not isinstance(table, dict):
        raise PromptError(f"boxes {path}: expected {_FORMAT}, got a {type(table).__name__}")
    return table


def box_problems(boxes: Any, size: Sequence[int] | None = None) -> list[str]:
    """What is wrong with the boxes of one image, one sentence for each box.

    Args:
        boxes: as they stand in the file.
        size: (rows, columns) of the image; None where it is not known.
    """
    if not isinstance(boxes, list) or not boxes:
        return [f"expected a list of boxes [[x0, y0, x1, y1], ...], got {boxes!r}"]
    if all(_is_number(value) for value in boxes):
        return [f"expected a list of boxes, got the numbers {boxes}; put one more pair of brackets around them"]
    return [f"boxes[{n}] {problem}" for n, box in enumerate(boxes) if (problem := box_problem(box, size))]


def box_problem(box: Any, size: Sequence[int] | None = None) -> str:
    """What is wrong with one box: not four finite numbers, empty, reversed, outside, in fractions of the image in place
    of pixels, or too narrow for any network; empty if nothing is."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
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


def as_floats(boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Checked boxes with every number as a float, so that all of them collate alike."""
    return [[float(value) for value in box] for box in boxes]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
