"""Slices for the report: image, reference, predictions and box of some cases, read from NIfTI files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from samseg_monai.report import OverlayCase, RunResult, pick_cases
from samseg_monai.transforms import RecodeLabeld, boxes_of


def _canonical(path: Path) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the volume in RAS order and the in-plane voxel sides in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    zooms = image.header.get_zooms()
    return np.asarray(image.dataobj, dtype=np.float32), (float(zooms[0]), float(zooms[1]))


def overlay_cases(
    chosen: RunResult,
    runs: Mapping[str, Path],
    items: list[dict[str, Any]],
    *,
    scan: int = 0,
    labels: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    window: tuple[float, float] | None = None,
) -> list[OverlayCase]:
    """Read the best, median and worst case of ``chosen``, each at the slice that shows most.

    That is the slice with most classes of the reference, and among those the one with most of it.

    Args:
        chosen: run whose cases are picked.
        runs: name of a run -> folder of its predictions (``<case>_seg.nii.gz`` and, where boxes were prompts,
            ``<case>_prompt.nii.gz``).
        items: test items with ``case``, ``image`` (file or list of files) and ``label``.
        scan: which of the image files to show.
        labels: what the values of the label files mean (``datalists.labels_of``); None: all above 0 is one class.
        classes: names of the values 1, 2, ... of the predictions, with ``labels``.
        window: intensities shown as black and white; None leaves that to the figure.

    Raises:
        ConfigError, DataError: labels and classes do not fit each other, or a label file has other values.
    """
    by_case = {item["case"]: item for item in items}
    scores = {name: _dice(folder) for name, folder in runs.items()}
    recode = None if labels is None else RecodeLabeld("label", labels, classes)
    found = []
    for case in dict.fromkeys(pick_cases(chosen).values()):
        files = by_case[case]["image"]
        image, spacing = _canonical(Path(files if isinstance(files, str) else files[scan]))
        label = _canonical(Path(by_case[case]["label"]))[0]
        label = label > 0 if recode is None else recode({"case": case, "label": torch.from_numpy(label)})["label"]
        reference = np.asarray(label, dtype=np.uint8)
        k = _fullest(reference)
        predictions = {n: _canonical(f / "predictions" / f"{case}_seg.nii.gz")[0][..., k] for n, f in runs.items()}
        found.append(
            OverlayCase(
                case=case,
                image=image[..., k] if window is None else np.clip(image[..., k], *window),
                reference=reference[..., k],
                predictions=predictions,
                box=_box(next(iter(runs.values())) / "predictions" / f"{case}_prompt.nii.gz", k),
                dice={name: scores[name].get(case, float("nan")) for name in runs},
                spacing_mm=spacing,
                slice_index=k,
            )
        )
    return found


def _fullest(reference: np.ndarray) -> int:
    """Slice of (H, W, D) with most classes, then most foreground; the first of equals."""
    counts = [len(np.unique(plane[plane > 0])) for plane in np.moveaxis(reference, 2, 0)]
    areas = (reference > 0).sum((0, 1))
    return max(range(reference.shape[2]), key=lambda k: (counts[k], areas[k]))


def _box(path: Path, k: int) -> list[float] | None:
    """Box of the stored prompt in slice k; None where there was no prompt, or none in this slice."""
    if not path.is_file():
        return None
    box = boxes_of(torch.from_numpy(np.ascontiguousarray(_canonical(path)[0][..., k])))
    return None if box.isnan().any() else box.tolist()


def _dice(folder: Path) -> dict[str, float]:
    from samseg_monai.metrics import case_means, read_rows

    return case_means(read_rows(folder / "cases.csv"), "dice")
