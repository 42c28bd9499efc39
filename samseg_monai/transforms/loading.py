"""Load a case for training, evaluation or prediction, and refuse what ``samseg prepare`` would refuse."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from samseg_monai.data.datalists import case_hashes
from samseg_monai.data.files.dicom import hash_of
from samseg_monai.data.files.volumes import modality_doubt, size_problem, unit_problem, value_problem
from samseg_monai.errors import DataError, raise_all, reason_of
from samseg_monai.transforms.grids import name_of

LOG = logging.getLogger(__name__)


class LoadCased(LoadImaged):
    """MONAI's ``LoadImaged``, which also looks at what it has loaded.

    An image must have finite values, not all the same, voxels of a size that scanners give, and lengths in mm. A case
    with "recorded" (``datalists.load_datalist``) must consist of the files that were prepared: their hash is compared,
    once as long as size and time of change stay; the entry is taken out. Values that do not look like the modality are
    told in the log.

    Args:
        keys: files to load, as of ``LoadImaged``; "image" among them is the image.
        modality: of the images, as DICOM abbreviates it; empty: they are not judged.
        given: as of ``LoadImaged``.
    Raises: DataError naming the case and everything that is wrong with it.
    """

    def __init__(self, keys: Any, modality: str = "", **given: Any) -> None:
        super().__init__(keys, **given)
        self.modality, self.volumes = modality, given.get("reader") is None

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        d = dict(data)
        name = name_of(d)
        recorded = d.pop("recorded", None)
        if recorded and not _as_recorded(recorded):
            raise DataError(
                f"{name}: its files are not those that were prepared (their sha256 differs from the datalist's "
                "hashes); prepare the datalist again, or bring the files back"
            )
        files = d.get("image")
        try:
            with np.errstate(all="ignore"):  # numbers beyond all bounds are refused below
                d = super().__call__(d, reader)
        except Exception as error:
            raise DataError(f"{name}: cannot be loaded; {reason_of(error)}") from error
        if "image" in self.keys and "image" in d:
            raise_all(self._problems(d["image"], files, name), DataError, f"{name}: its image cannot be used")
        return d

    def _problems(self, image: torch.Tensor, files: Any, name: str) -> list[str]:
        array = torch.as_tensor(image).as_subclass(torch.Tensor).numpy()
        several = isinstance(files, (list, tuple)) and len(files) == len(array)
        parts = zip((Path(str(file)).name for file in files), array, strict=True) if several else [("", array)]
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
