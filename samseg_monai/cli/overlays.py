"""Slices for the report: image, reference, predictions and box of some cases, read from NIfTI files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from samseg_monai.report import OverlayCase, RunResult, pick_cases
from samseg_monai.transforms import boxes_of


def _canonical(path: Path) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the volume in RAS order and the in-plane voxel sides in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    zooms = image.header.get_zooms()
    return np.asarray(image.dataobj, dtype=np.float32), (float(zooms[0]), float(zooms[1]))


def overlay_cases(
    chosen: RunResult, runs: Mapping[str, Path], items: list[dict[str, Any]], *, scan: int = 1
) -> list[OverlayCase]:
    """Read the best, median and worst case of ``chosen``, each at the slice with most reference.

    Args:
        chosen: run whose cases are picked.
        runs: name of a run -> folder of its predictions (``<case>_seg.nii.gz``, ``<case>_prompt.nii.gz``).
        items: test items with ``case``, ``image`` (list of files) and ``label``.
        scan: which of the image files to show.
    """
    by_case = {item["case"]: item for item in items}
    scores = {name: _dice(folder) for name, folder in runs.items()}
    found = []
    for case in dict.fromkeys(pick_cases(chosen).values()):
        image, spacing = _canonical(Path(by_case[case]["image"][scan]))
        label = _canonical(Path(by_case[case]["label"]))[0] > 0
        k = int(label.sum((0, 1)).argmax())
        predictions = {n: _canonical(f / "predictions" / f"{case}_seg.nii.gz")[0][..., k] for n, f in runs.items()}
        prompt = _canonical(next(iter(runs.values())) / "predictions" / f"{case}_prompt.nii.gz")[0][..., k]
        box = boxes_of(torch.from_numpy(np.ascontiguousarray(prompt))).tolist()
        found.append(
            OverlayCase(
                case=case,
                image=image[..., k],
                reference=label[..., k],
                predictions=predictions,
                box=None if np.isnan(box).any() else box,
                dice={name: scores[name].get(case, float("nan")) for name in runs},
                spacing_mm=spacing,
                slice_index=k,
            )
        )
    return found


def _dice(folder: Path) -> dict[str, float]:
    from samseg_monai.metrics import case_means, read_rows

    return case_means(read_rows(folder / "cases.csv"), "dice")
