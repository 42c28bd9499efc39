"""Write the committed inputs of the experiment: blocks, four folds, and three box files for each kind of tumour.

``python experiments/meningioma_t1c/make_inputs.py --data DIR`` (DIR holds ``cases.csv`` and ``labels/``) writes
``folds.json`` and ``boxes/*.json`` beside this file: names and numbers only, no part of an image. Every number depends
on the data and on the laws below alone, so that anybody who has the data can write the same files again.

Blocks: ids at most 12 apart are one block; a block stands in for a patient, whom the collection does not name.
Folds: whole blocks, of all ways to share them among four test parts that with the most even sizes. About ten slices of
each training part choose the epoch: whole blocks, too (neighbouring slices would tell on each other), as many blocks as
add up to ten, so that the choice hangs on no single patient.
Boxes: ``[x0, y0, x1, y1]`` in pixels, edges (pixels a to b read a, b + 1), clipped to the image.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
KINDS = ("meningioma", "glioma", "pituitary")
LAWS = ("tight", "loose", "unseen")
LARGEST_GAP = 12
FOLDS = 4
VALIDATION = 10
LOOSE = 0.3  # each side moves out by 0 to this share of the box
UNSEEN, SHIFT = 0.15, 0.1  # as above, then the whole box moves by up to SHIFT of its side along each axis


def blocks_of(cases: Sequence[str]) -> list[list[str]]:
    """Cases (``meningioma_0002``) in blocks: sorted by id, a new block where the id grows by more than 12."""
    ordered = sorted(cases, key=_number)
    starts = [i for i, case in enumerate(ordered) if i == 0 or _number(case) - _number(ordered[i - 1]) > LARGEST_GAP]
    return [ordered[a:b] for a, b in itertools.pairwise([*starts, len(ordered)])]


def fold_indices(sizes: Sequence[int]) -> list[dict[str, list[int]]]:
    """Share blocks of these sizes among the folds; indices of blocks for testing, validation and training.

    The smallest sum of squared test sizes wins (the evenest), then validation parts closest to ten slices, then the
    order of blocks. Every block is tested once.
    """
    best = min(
        _partitions(len(sizes)),
        key=lambda parts: (
            sum(sum(sizes[i] for i in part) ** 2 for part in parts),
            sum(abs(VALIDATION - sum(sizes[i] for i in _validation(sizes, part))) for part in parts),
            parts,
        ),
    )
    folds = []
    for testing in best:
        validation = _validation(sizes, testing)
        training = [i for i in range(len(sizes)) if i not in (*testing, *validation)]
        folds.append({"training": training, "validation": list(validation), "testing": list(testing)})
    return folds


def _partitions(count: int) -> Iterator[list[list[int]]]:
    """All ways to put ``count`` things into FOLDS unnamed, filled parts (restricted growth strings)."""

    def grow(labels: list[int]) -> Iterator[list[int]]:
        if len(labels) == count:
            if max(labels) == FOLDS - 1:
                yield labels
            return
        for label in range(min(FOLDS, max(labels, default=-1) + 2)):
            yield from grow([*labels, label])

    for labels in grow([]):
        yield [[i for i, label in enumerate(labels) if label == part] for part in range(FOLDS)]


def _validation(sizes: Sequence[int], testing: Sequence[int]) -> tuple[int, ...]:
    """Blocks outside ``testing`` with about ten slices together; of equals the most blocks, then the first."""
    others = [i for i in range(len(sizes)) if i not in testing]
    choices = [c for n in range(1, len(others)) for c in itertools.combinations(others, n)]
    return min(choices, key=lambda c: (abs(VALIDATION - sum(sizes[i] for i in c)), -len(c), c))


def folds_of(cases: Sequence[str]) -> dict[str, object]:
    """Content of ``folds.json``: ``blocks`` name -> cases, and per fold the cases of each section."""
    blocks = blocks_of(cases)
    folds = [
        {section: [case for i in indices for case in blocks[i]] for section, indices in fold.items()}
        for fold in fold_indices([len(block) for block in blocks])
    ]
    return {"blocks": {block[0].split("_")[1]: block for block in blocks}, "folds": folds}


def tight_box(mask: np.ndarray) -> list[int]:
    """Box of all pixels above 0 of a (rows, columns) mask: x0, y0, x1, y1, edges."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def drawn_box(box: Sequence[float], shape: tuple[int, int], law: str, case: str) -> list[float]:
    """The box after ``law``, clipped to an image of ``shape`` (rows, columns), two decimals.

    Draws come from (law, case) alone: neither the order nor the number of cases changes them.
    """
    rng = np.random.default_rng(list(hashlib.sha256(f"{law}:{case}".encode()).digest()))
    x0, y0, x1, y1 = map(float, box)
    width, height = x1 - x0, y1 - y0
    if law != "tight":
        left, top, right, bottom = rng.uniform(0, LOOSE if law == "loose" else UNSEEN, 4)
        x0, y0, x1, y1 = x0 - left * width, y0 - top * height, x1 + right * width, y1 + bottom * height
    if law == "unseen":
        across, down = rng.uniform(-SHIFT, SHIFT, 2) * (x1 - x0, y1 - y0)
        x0, y0, x1, y1 = x0 + across, y0 + down, x1 + across, y1 + down
    limits = (shape[1], shape[0], shape[1], shape[0])
    return [round(float(np.clip(v, 0, limit)), 2) for v, limit in zip((x0, y0, x1, y1), limits, strict=True)]


def inputs(data: Path) -> dict[str, object]:
    """File name (below this folder) -> content, for all files that are committed."""
    with (data / "cases.csv").open(newline="", encoding="utf-8") as stream:
        names = [(row["class"], Path(row["file"]).stem) for row in csv.DictReader(stream)]
    content: dict[str, object] = {"folds.json": folds_of([case for kind, case in names if kind == "meningioma"])}
    for kind in KINDS:
        masks = {}
        for case in sorted(case for of, case in names if of == kind):
            with Image.open(data / "labels" / f"{case}.png") as picture:
                masks[case] = np.asarray(picture.convert("L"))
        for law in LAWS:
            prefix = "" if kind == "meningioma" else f"{kind}_"
            boxes = {case: [drawn_box(tight_box(mask), mask.shape, law, case)] for case, mask in masks.items()}
            content[f"boxes/{prefix}{law}.json"] = boxes
    return content


def as_text(content: object, depth: int = 0) -> str:
    """JSON with one line per case, which a reader can look over and a diff can show."""
    inner = "\n" + " " * (depth + 1)
    if isinstance(content, dict):
        items = [f"{json.dumps(key)}: {as_text(value, depth + 1)}" for key, value in content.items()]
        return "{" + inner + ("," + inner).join(items) + "\n" + " " * depth + "}"
    if isinstance(content, list) and isinstance(content[0], dict):
        return "[" + inner + ("," + inner).join(as_text(item, depth + 1) for item in content) + "\n" + " " * depth + "]"
    return json.dumps(content)


def _number(case: str) -> int:
    return int(case.rsplit("_", 1)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cases.csv and labels/")
    for name, content in inputs(parser.parse_args().data).items():
        target = HERE / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(as_text(content) + "\n", encoding="utf-8")
        print(f"{name}: {len(content)} entries")
