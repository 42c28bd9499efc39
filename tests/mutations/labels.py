"""Labels beside images: values, storage, shapes, grids; by ``check_label``'s and ``RecodeLabeld``'s rules.

A label is whole numbers that the table names (off by at most 0.001), finite, on the image's grid to 0.05 voxel.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from samseg_monai.data.datalists.checks import CaseCheck, check_files
from samseg_monai.errors import DataError, raise_all
from samseg_monai.transforms import RecodeLabeld
from tests.mutations.harness import Trial, pick
from tests.mutations.nifti import _moved, good

TABLES = (
    {"0": "background", "1": "a", "2": "b"}, {"0": "background", "1": "a", "4": "b", "255": "ignore"},
    {"-1": "void", "0": "background", "1": "b", "7": "a", "8": "a"}, {"1": "a", "2": "b"},
)  # fmt: skip
SHAPE = (8, 7, 4)


def make(folder: Path) -> Any:
    """One image, and labels of many kinds."""
    base = np.array(good(np.zeros(SHAPE))["srow"]).reshape(3, 4)
    affine = np.vstack([base, [0, 0, 0, 1]])
    image = folder / "image.nii"
    nib.save(nib.Nifti1Image(np.arange(224, dtype=np.int16).reshape(SHAPE), affine), image)

    def trial(rng: random.Random) -> Trial:
        table = rng.choice(TABLES)
        names = {int(value): name for value, name in table.items()}
        values = np.array(rng.choices(sorted(names), k=224), dtype=float).reshape(SHAPE)
        kind = rng.choice(["u1", "i2", "f4", "f8", "i8", "i1", "u2"])
        if (values.min() < 0 and kind[0] == "u") or (values.max() > 127 and kind == "i1"):
            kind = "i2"
        told = []
        if rng.random() < 0.5:
            put = pick(rng, 3, -2, 254, 256, 1e9, 0.5, 1.0001, 1.0009, 1.0011, 0.99999999, 1.5, np.nan, np.inf, -np.inf,
                       1e30, 2**31, 99999, -1e-4, 255, 7)  # fmt: skip
            where = rng.choice((1, 5, 224))
            kind = kind if kind[0] == "f" or rng.random() < 0.3 else "f8"
            with np.errstate(all="ignore"):
                values.flat[rng.sample(range(224), where)] = put
            told.append(f"{where} voxels are {put}")
        with np.errstate(all="ignore"):
            stored = values.astype(kind)
        shape, grid = SHAPE, affine.copy()
        how = rng.random()
        if how < 0.1:
            stored = pick(rng, stored[:-1], stored[..., None], np.repeat(stored[..., None], 2, 3), stored[..., 0],
                          stored.transpose(1, 0, 2), stored[:, :, :1])  # fmt: skip
            told.append(f"shape {stored.shape}")
        elif how < 0.35:
            size = pick(rng, 1e-6, 0.001, 0.01, 0.05, 0.2, 1.0)
            at = (rng.randrange(3), rng.choice((0, 1, 2, 3, 3)))
            grid[at] += size
            told.append(f"affine {at} + {size}")
        elif how < 0.4:
            grid = pick(rng, np.diag([-1, -1, 1, 1]) @ grid, grid @ np.diag([-1, 1, 1, 1]), np.eye(4))
            told.append("another affine")
        path = folder / "label.nii"
        picture = nib.Nifti1Image(stored, grid, dtype=stored.dtype)
        picture.header.set_xyzt_units("mm")
        nib.save(picture, path)
        rule, expected = _rule(stored, nib.load(path).affine, affine, names, shape)
        return Trial(f"{table} {kind} {'; '.join(told)}", lambda: _read(image, path, names), rule,
                     lambda found: _differs(found, expected))  # fmt: skip

    return trial


def _rule(
    stored: np.ndarray, grid: np.ndarray, affine: np.ndarray, names: dict[int, str], shape: tuple[int, ...]
) -> tuple[str | None, np.ndarray | None]:
    stored = stored[..., 0] if stored.ndim == 4 and stored.shape[3] == 1 else stored
    if stored.shape != shape:
        return f"shape {stored.shape}", None
    turned = all(
        int(np.abs(grid[:3, n]).argmax()) == int(np.abs(affine[:3, n]).argmax())
        and grid[np.abs(affine[:3, n]).argmax(), n] * affine[np.abs(affine[:3, n]).argmax(), n] > 0
        for n in range(3)
    )
    # axes that are stored in another direction are turned, where the turned grid is the image's
    if not turned:
        return None, None
    moved = _moved(grid, affine, shape)
    if moved > 0.0501:
        return f"moved by {moved} voxels", None
    lengths = np.linalg.norm(grid[:3, :3], axis=0)
    if not all(0.05 <= side <= 20 for side in lengths):
        return "voxels of no size", None
    if not np.isfinite(stored).all():
        return "NaN or infinite", None
    whole = np.rint(stored.astype(float))
    if np.abs(stored.astype(float) - whole).max() > 1e-3:
        return "no whole numbers", None
    if strange := set(np.unique(whole)) - {0, *names}:
        return f"values {sorted(strange)[:5]}", None
    known = {0: 0, **{value: _class(value, name) for value, name in names.items()}}
    expected = np.vectorize(lambda value: known[int(value)])(whole).astype(np.uint8)
    return (None if moved >= 0.0499 else ""), expected


def _class(value: int, name: str) -> int:
    return {"a": 1, "b": 2, "ignore": 255, "void": 255}.get(name, 0)


def _read(image: Path, label: Path, names: dict[int, str]) -> tuple[Any, Any]:
    check = CaseCheck("p1", {"image": image, "label": label})
    check_files(check, label="label", legal={**names, 0: names.get(0, "background")})
    raise_all(check.problems, DataError, "refused")
    from samseg_monai.data.files.volumes import read_volume

    volume = read_volume(label)
    recode = RecodeLabeld(
        "label", {"0": "background", **{str(value): name for value, name in names.items()}}, ["a", "b"]
    )
    array = MetaTensor(torch.as_tensor(np.ascontiguousarray(volume.array.astype(volume.array.dtype.newbyteorder("=")))))
    return check, recode({"label": array[None], "case": "p1"})["label"]


def _differs(found: tuple[Any, Any], expected: np.ndarray | None) -> str:
    check, recoded = found
    if expected is None:
        return ""
    if not np.array_equal(np.asarray(recoded)[0], expected):
        return "classes that are not those of the values"
    return "" if sum(check.voxels_per_label.values()) == expected.size else f"counts {check.voxels_per_label}"
