"""Coarse masks as prompts: a person's, or what another bundle has predicted; found by the name of their case."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samseg_monai.data.files.volumes import SUFFIXES, Volume, grid_difference, read_volume, stem_of, stored_like
from samseg_monai.errors import PromptError
from samseg_monai.files import file_name

LOG = logging.getLogger(__name__)


class CoarseMasks:
    """Masks of cases.

    Args:
        place: one file (of one case), or a folder with ``<case>.nii.gz``, ``<case>_seg.nii.gz`` or
            ``<case>-seg.nii.gz``, also in a sub-folder ``<case>/``.
        values: of the masks that are prompts; None: all above 0.
        made_by: bundle that has predicted them. One that found nothing is an answer; a person's empty mask is a slip.
    """

    def __init__(self, place: str | Path, *, values: Sequence[int] | None = None, made_by: str | None = None) -> None:
        self.place, self.values, self.made_by = Path(place), values, made_by
        self._own = _masks_in(self.place)

    def of(self, case: str) -> Path:
        """The mask of a case; PromptError where there is none."""
        if not self.place.is_dir():
            return self.place
        # that of a result is called as any system allows
        wanted = (case, f"{case}_seg", f"{case}-seg", file_name(case, "_seg"))
        found = [
            places[stem] for places in (self._own, _masks_in(self.place / case)) for stem in wanted if stem in places
        ]
        if found:
            return min(found, key=lambda match: (match.parent != self.place, match))
        if self.made_by is not None:
            raise PromptError(f"{self.made_by}, whose masks are the prompts, did not predict it; why is told above")
        raise PromptError(f"no coarse mask in {self.place}; expected {case}{SUFFIXES[0]} or {case}_seg{SUFFIXES[0]}")

    def checked(self, case: str, image: Volume) -> Path:
        """The mask of a case: on the grid of ``image``, of finite values, and not empty; PromptError says what it is.

        Notes, and that another bundle found nothing, are logged.
        """
        path = self.of(case)
        first_scan = Volume(image.array[..., 0] if image.array.ndim == 4 else image.array, image.affine, image.sha256)
        mask, turned = stored_like(read_volume(path), first_scan)
        difference, note = grid_difference(mask, first_scan)
        for text in filter(None, (turned, note)):
            LOG.warning("%s: prompt %s: %s", case, path.name, text)
        if difference:
            raise PromptError(f"prompt {path.name}: {difference} of the image; resample it to the image's grid")
        if bad := int(np.count_nonzero(~np.isfinite(mask.array))):
            raise PromptError(f"prompt {path.name}: {bad} voxels are NaN or infinite; save 0 and 1")
        if (mask.array > 0 if self.values is None else np.isin(mask.array, self.values)).any():
            return path
        if self.made_by is None:
            of = "" if self.values is None else f" (of the values {', '.join(map(str, self.values))})"
            raise PromptError(f"prompt {path.name}: the mask is empty{of}, so there is nothing to look for")
        LOG.warning("%s: %s found nothing, so that there was no prompt and nothing was looked for", case, self.made_by)
        return path


def _masks_in(folder: Path) -> dict[str, Path]:
    """Stem -> the first file of that name in a folder; none in what is no folder."""
    files = sorted(path for path in folder.iterdir() if not path.is_dir()) if folder.is_dir() else []
    return {stem: path for path in reversed(files) if (stem := stem_of(path)) is not None}
