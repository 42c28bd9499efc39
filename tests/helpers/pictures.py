"""Small 2-D images for tests: two bright discs each, with labels and a datalist in pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 52)  # rows, columns
CLASSES = {"0": "background", "255": "tumour"}


def discs(number: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask of two bright discs of different sizes, which do not touch."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    image, mask = rng.normal(60, 10, size), np.zeros(size, dtype=bool)
    for centre_x, radius in ((12 + rng.uniform(-2, 2), rng.uniform(6, 8)), (38, 4)):
        disc = (x - centre_x) ** 2 + (y - rng.uniform(16, 24)) ** 2 <= radius**2
        image, mask = np.where(disc, image + 120, image), mask | disc
    return image.clip(0, 255).astype(np.uint8), mask


def make_pictures(folder: Path, count: int = 7, *, colour: bool = False) -> Path:
    """Grey or RGB PNG images with labels 0 and 255, one unlabelled image, and their datalist; returns the folder."""
    names = [f"scan_{n:04d}" for n in range(count)]
    for part in ("images", "labels", "unlabelled"):
        (folder / part).mkdir(parents=True)
    for number, name in enumerate([*names, "new"]):
        image, mask = discs(number)
        picture = Image.fromarray(np.stack([image, image // 2, 255 - image], axis=-1) if colour else image)
        picture.save(folder / ("unlabelled" if name == "new" else "images") / f"{name}.png")
        if name != "new":
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "labels" / f"{name}.png")
    files = [{"image": f"images/{n}.png", "label": f"labels/{n}.png", "reference": f"labels/{n}.png"} for n in names]
    items = [{"case": name, "patient": name, **its} for name, its in zip(names, files, strict=True)]
    datalist = {"name": "discs", "kind": "images", "spacing_mm": None, "distance_unit": "px"}
    datalist |= {"scans": ["red", "green", "blue"] if colour else ["image"], "labels": CLASSES, "label_coding": "own"}
    datalist |= {"training": items[:3], "validation": items[3:4], "testing": items[4:]}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder
