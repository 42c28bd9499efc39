"""What a prediction tells: a table with a row for each case, and a line for each as it is done."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from nibabel.affines import voxel_sizes

from samseg_monai.data.files.boxes import clicked
from samseg_monai.data.files.case_list import PROGRESS, CaseList, noted
from samseg_monai.data.slices.pickers import asked_slices
from samseg_monai.faults import what_failed
from samseg_monai.handlers.provenance import scrub
from samseg_monai.metrics.rows import add_to_table, write_table
from samseg_monai.transforms import ResampleInPlaned
from samseg_monai.transforms.saving import in_words, slice_axis

logger = logging.getLogger(__name__)
TABLE = "predictions.csv"
PROMPTS = {"json": "boxes", "mask": "mask", "image": "whole slice", "none": "none"}
_OF_VOLUMES = ("slices", "prompt", "prompted_slices", "spacing_mm", "resampled")
_OF_IMAGES = ("prompt", "spacing_mm")
_OF_ALL = ("precision", "seconds", "warnings", "problem")


class PredictionTable:
    """Writes ``predictions.csv`` and tells how far the run is.

    The table has a row for each case: those that are done, and those that could not be predicted, with the reason under
    ``problem``. A row is added as soon as its case is done, whole or not at all, so that a run that is killed leaves
    the table of what was done; when the run is over, it is written anew, sorted by case. Columns, empty where nothing
    is known:

    - ``case``; for each class ``<class>_ml``, of 2-D images ``<class>_px`` and, where the size of pixels is known,
      ``<class>_mm2``;
    - of volumes ``slices`` with anything found, as the network cuts them, and ``prompted_slices``;
    - ``prompt``: boxes, clicks, both, or mask (and by which bundle), whole slice or none; ``spacing_mm`` along the axes
      of the file; ``resampled``: whether the case was brought to the spacing that was trained on;
    - ``precision`` that SAM's image encoder computed in: float32, tf32, bf16, int8;
    - ``seconds`` from reading the case to its files; ``warnings``, as they were told; ``problem``.

    Args:
        cases: of the run.
        output_dir: folder, made if need be.
        classes: names of the values 1, 2, ... of predictions.
        prompt_source: json, mask, image or none.
        prompts_from: bundle that has predicted the prompts.
        images: cases are 2-D images.
        precision: of the network, if it tells one.
    Shape: a decollated item has "case", "image" as the network saw it, "pred" (1, X, Y, Z) on the file's grid, and
        "prompt" (N, H, W, D) where volumes have one, or "boxes" where they have clicks.
    """

    def __init__(
        self,
        cases: CaseList,
        output_dir: str | os.PathLike[str],
        *,
        classes: Sequence[str],
        prompt_source: str,
        prompts_from: str | None = None,
        images: bool = False,
        precision: str | None = None,
    ) -> None:
        self.precision = precision
        self.cases, self.path, self.classes, self.images = cases, Path(output_dir) / TABLE, list(classes), images
        self.prompt = PROMPTS.get(prompt_source, prompt_source) + (f" by {prompts_from}" if prompts_from else "")
        self.rows: dict[str, dict[str, Any]] = {}
        self._told: set[str] | None = None  # cases of which the file has the row as it is; None: it has to be written
        units = ("px", "mm2") if images else ("ml",)
        volumes = [f"{name}_{unit}" for name in self.classes for unit in units]
        self.columns = ["case", *volumes, *(_OF_IMAGES if images else _OF_VOLUMES), *_OF_ALL]
        self._began = 0.0

    def attach(self, engine: Any) -> None:
        """Attach to the ``CaseEvaluator`` of ``cases``."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._time)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)

    def write(self, case: str | None = None) -> None:
        """Add the row of a case that is done, or write the whole table as things are now.

        What keeps it from being written is left in the cases' ``lost``.
        """
        told = self._told
        try:
            if case is not None and told is not None and case not in told:
                add_to_table(self._row(case), self.path, self.columns)
                told.add(case)
            else:
                cases = sorted({*self.rows, *self.cases.bad})
                write_table(map(self._row, cases), self.path, self.columns)
                self._told = set(cases)
            self.cases.lost = ""
        except OSError as error:
            self._told = None
            self.cases.lost = what_failed(error)

    def _row(self, case: str) -> dict[str, Any]:
        bad = self.cases.bad.get(case)
        row = self.rows[case] if bad is None else {"case": case, "problem": scrub(bad)}
        return {**row, "warnings": "; ".join(scrub(note) for note in self.cases.notes.get(case, ()))}

    def _kind(self, item: Mapping[str, Any]) -> str:
        """What the case was prompted by; of a file of boxes and clicks what it holds of the case."""
        rows = item.get("boxes")
        if self.prompt != PROMPTS["json"] or not isinstance(rows, torch.Tensor) or rows.shape[-1] == 4:
            return self.prompt
        return "clicks" if bool(rows[..., :4].isnan().all()) else "boxes and clicks"

    def _start(self, engine: Any) -> None:
        self.rows, self.cases.watch = {}, self.write
        good, bad = len(self.cases.good), len(self.cases.bad)
        left = f", {bad} left out (why is told above)" if bad else ""
        count = f"{good} case{'' if good == 1 else 's'}"
        device = f"{engine.state.device}{', int8' if self.precision == 'int8' else ''}"
        rows = [row for item in self.cases.good if self.prompt == PROMPTS["json"] for row in item.get("boxes") or ()]
        clicks = clicked(rows) or any(isinstance(row, list) and len(row) > 4 for row in rows)
        prompt = "boxes or clicks" if clicks else self.prompt
        PROGRESS.info("%s to predict%s; prompt: %s; device: %s", count, left, prompt, device)
        self.write()

    def _time(self, engine: Any) -> None:
        self._began = time.perf_counter()

    def _add(self, engine: Any) -> None:
        """Row and line of the case that was just written; of one that failed ``CaseList.fail`` tells."""
        if not isinstance(engine.state.output, list):
            return
        for old, new in zip(engine.state.batch, engine.state.output, strict=True):
            item = {**old, **new}
            case = str(item["case"])
            with noted(case) as notes:
                found = self._measured(item)
                if not any(found["voxels"]):
                    logger.warning("%s: nothing was found", case)
            self.cases.note(case, notes)
            seconds = time.perf_counter() - self._began
            self.rows[case] = {**found["row"], "case": case, "prompt": self._kind(item), "seconds": round(seconds, 2)}
            self.rows[case]["precision"] = self.precision or ""
            where = f"{engine.state.iteration} of {engine.state.epoch_length}"
            PROGRESS.info("%s: %s: %s, %.1f s", where, case, found["words"], seconds)
            self.write(case)

    def _measured(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What is in one prediction: voxels of each class, cells of the table, and words."""
        image, pred = item["image"], item["pred"]
        labels = torch.as_tensor(pred).as_subclass(torch.Tensor)[0].long().clamp(min=0)
        counts = torch.bincount(labels.flatten(), minlength=len(self.classes) + 1).tolist()[1:]
        affine = np.asarray(torch.as_tensor(pred.affine).cpu(), dtype=float)
        sides = voxel_sizes(affine)[: 2 if self.images else 3]
        spacing = " x ".join(f"{side:.4g}" for side in sides)
        if self.images:
            known = bool(image.meta.get("spacing_known"))
            areas = [float(f"{n * sides.prod():.6g}") if known else "" for n in counts]
            row = _cells(self.classes, "px", counts) | _cells(self.classes, "mm2", areas)
            row["spacing_mm"] = spacing if known else ""
            return {"voxels": counts, "row": row, "words": self._words(counts, "pixels")}
        volumes = [float(f"{n * abs(np.linalg.det(affine[:3, :3])) / 1000:.6g}") for n in counts]
        others = [axis for axis in range(3) if axis != slice_axis(image, affine, labels.shape)]
        row = _cells(self.classes, "ml", volumes)
        row["slices"] = int((labels > 0).any(dim=others[1]).any(dim=others[0]).sum())
        asked = asked_slices(item.get("prompt"), item.get("boxes"))
        if asked is not None:
            row["prompted_slices"] = int(asked.sum())
        row["spacing_mm"] = spacing
        done = {str(step.get("class")) for step in image.applied_operations}
        row["resampled"] = ResampleInPlaned.__name__ in done
        prompted = f" of {row['prompted_slices']} prompted" if "prompted_slices" in row else ""
        words = f"{self._words(volumes, 'mL')} in {row['slices']}{prompted} slices"
        return {"voxels": counts, "row": row, "words": words}

    def _words(self, sizes: Sequence[float], unit: str) -> str:
        if len(sizes) == 1:
            return f"{self.classes[0]} {in_words(sizes[0])} {unit}"
        found = sum(size > 0 for size in sizes)
        return f"{found} of {len(sizes)} classes, together {in_words(sum(sizes))} {unit}"


def _cells(classes: Sequence[str], unit: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{unit}": value for name, value in zip(classes, values, strict=True)}
