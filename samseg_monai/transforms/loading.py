"""Load a case for training, evaluation or prediction, and refuse what ``samseg prepare`` would refuse."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from samseg_monai.data.datalists import case_hashes
from samseg_monai.data.files.dicom import hash_of
from samseg_monai.data.files.volumes import (
    modality_doubt,
    refuse_too_large,
    size_problem,
    unit_problem,
    value_problem,
)
from samseg_monai.errors import DataError, raise_all, reason_of
from samseg_monai.transforms.grids import name_of

LOG = logging.getLogger(__name__)


class LoadCased(LoadImaged):
    """MONAI's ``LoadImaged``, which also looks at what it has loaded.

    An image must have three axes and the channels of its scans, finite values, not all the same, voxels of a size that
    scanners give, and lengths in mm; what else is loaded has one channel. A case
    with "recorded" (``datalists.load_datalist``) must consist of the files that were prepared: their hash is compared,
    once as long as size and time of change stay; the entry is taken out. Values that do not look like the modality are
    told in the log.

    Args:
        keys: files to load, as of ``LoadImaged``; "image" among them is the image.
        modality: of the images, as DICOM abbreviates it; empty: they are not judged.
        scans: names of the channels of the image; None: one for each of its files, and of a single file any number.
        given: as of ``LoadImaged``.
    Raises: DataError naming the case and everything that is wrong with it.
    """

    def __init__(self, keys: Any, modality: str = "", *, scans: Sequence[str] | None = None, **given: Any) -> None:
        super().__init__(keys, **given)
        self.modality, self.scans, self.volumes = modality, scans, given.get("reader") is None

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        d = dict(data)
        name = name_of(d)
        recorded = d.pop("recorded", None)
        if recorded and not _as_recorded(recorded):
            raise DataError(
                f"{name}: its files are not those that were prepared (their sha256 differs from the datalist's "
                "hashes); prepare the datalist again, or bring the files back"
            )
        files = {key: d[key] if isinstance(d[key], (list, tuple)) else [d[key]] for key in self.key_iterator(d)}
        try:
            for file in () if recorded or not self.volumes else (file for found in files.values() for file in found):
                refuse_too_large(file)
            with np.errstate(all="ignore"):  # numbers beyond all bounds are refused below
                d = super().__call__(d, reader)
        except Exception as error:
            raise DataError(f"{name}: cannot be loaded; {reason_of(error)}") from error
        for key, found in files.items():
            if problem := self._wrong_shape(d[key], str(key), len(found)):
                raise DataError(f"{name}: its {key} {problem}; save it anew, or bring back what was prepared")
        if "image" in files:
            raise_all(self._problems(d["image"], files["image"], name), DataError, f"{name}: its image cannot be used")
        return d

    def _wrong_shape(self, array: torch.Tensor, key: str, files: int) -> str:
        """What is wrong with the axes of something loaded (C, H, W, D); empty where nothing is."""
        wanted = len(self.scans) if self.scans is not None else files if files > 1 else len(array)
        wanted = wanted if key == "image" else 1
        if array.ndim == 4 and len(array) == wanted:
            return ""
        axes = " x ".join(map(str, array.shape[1:]))
        return f"has {len(array)} channels or time points of {axes} voxels, expected {wanted} of three axes"

    def _problems(self, image: torch.Tensor, files: Sequence[Any], name: str) -> list[str]:
        array = torch.as_tensor(image).as_subclass(torch.Tensor).numpy()
        each = len(files) == len(array)
        parts = zip((Path(str(file)).name for file in files), array, strict=True) if each else [("", array)]
        problems = [f"{file}: {problem}".lstrip(": ") for file, part in parts if (problem := value_problem(part))]
        if isinstance(image, MetaTensor) and self.volumes:
            problems += [size_problem(np.asarray(image.affine), array.shape[1:])]
            problems += [unit_problem(image.meta.get("xyzt_units", 0))]
        if not any(problems) and (doubt := modality_doubt(array, self.modality)):
            LOG.warning("%s: %s", name, doubt)
        return [problem for problem in problems if problem]


def _as_recorded(recorded: Mapping[str, Any]) -> bool:
    """Whether the files of a case have the hash that ``samseg prepare`` has recorded."""
    return recorded["sha256"] in case_hashes({name: hash_of(file) for name, file in recorded["files"].items()})
