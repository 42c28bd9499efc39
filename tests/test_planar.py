"""2-D images from PNG files through a bundle and back to PNG files: train, evaluate, pack, predict."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samseg_monai import bundles
from samseg_monai.cli.workflow import run_workflow

TINY = {"sam_variant": "tiny", "sam_checkpoint": "random", "image_size": 64}
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folder of seven small PNG images with labels 0 and 255, and their datalist; distances in pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"scan_{n:04d}" for n in range(7)]
    for number, name in enumerate(names):
        image, mask = discs(number)
        for part, array in (("images", image), ("labels", mask.astype(np.uint8) * 255)):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(array).save(folder / part / f"{name}.png")
    items = [
        {
            "case": n,
            "patient": n,
            "image": f"images/{n}.png",
            "label": f"labels/{n}.png",
            "reference": f"labels/{n}.png",
        }
        for n in names
    ]
    datalist = {"name": "discs", "kind": "images", "spacing_mm": None, "distance_unit": "px", "scans": ["image"]}
    datalist |= {"labels": CLASSES, "label_coding": "own"}
    datalist |= {"training": items[:3], "validation": items[3:4], "testing": items[4:]}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder


def config(strategy: str, name: str, folder: Path) -> list[Path]:
    return [bundles.build_bundle("brain_tumour_t1c", strategy, folder) / "configs" / f"{name}.json"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """Run folder of a training and its evaluation with saved predictions."""
    folder = tmp_path_factory.mktemp("run")
    places = {"dataset_dir": str(pictures), "output_dir": str(folder / "out")}
    settings = {**TINY, "epochs": 2, "val_interval": 1, "strategy::rank": 2, "strategy::decoder": True}
    run_workflow(config("lora", "train", folder), {**places, **settings})
    run_workflow(config("lora", "evaluate", folder), {**places, **settings_of_evaluation(), "save_predictions": True})
    return folder / "out"


def settings_of_evaluation() -> dict:
    return {**TINY, "strategy::rank": 2, "strategy::decoder": True}


def test_training_and_evaluation_write_tables_in_pixels(trained):
    table = rows(trained / "evaluation" / "cases.csv")
    assert [row["case"] for row in table] == ["scan_0004", "scan_0005", "scan_0006"]
    assert {"dice", "hd95_px", "hd95_medpy_px", "nsd_1px", "nsd_2px"} <= set(table[0])
    assert not any(name.endswith("_mm") or name.endswith("_ml") for name in table[0])
    ellipses = rows(trained / "evaluation" / "ellipse_cases.csv")
    assert all(0.3 < float(row["dice"]) < 1 for row in ellipses)
