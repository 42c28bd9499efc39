"""Label maps: from the numbers in a file to the classes of a network, and small components removed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import find_objects, generate_binary_structure, label

from samseg_monai.choices import IGNORE
from samseg_monai.data.datalists.label_maps import ROUNDED, is_ignored
from samseg_monai.data.files.boxes import is_number
from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.transforms.grids import EachKeyd, name_of, on_grid_of

_UNKNOWN = IGNORE - 1  # no class: uint8 labels have at most 253 of them
_CHUNK = 1 << 20  # voxels at a time: the integer copies of a whole CT would be eight times its label
_ALL_NEIGHBOURS = generate_binary_structure(3, 3)
SPACING_DECIMALS = 5  # of mm: columns of an affine have noise (1.0000001), which must not decide what is small


class RecodeLabeld(EachKeyd):
    """Map the values of label files to 0 (everything else), 1 to K (position of the name in ``classes`` + 1), and 255.

    255 is for voxels that nobody has judged: a value named "ignore", "ignored" or "void". Loss and scores leave them
    out. Files keep the coding they came in; what their values mean is read from the datalist.

    Args:
        keys: labels of any shape, whole numbers of any dtype; those within 0.001 of one are rounded.
        labels: value -> name for every value that is legal in the files (``datalists.labels_of``). Several values may
            have one name; a name that is not among the classes becomes 0.
        classes: names of the classes in the order of the network's channels, without the background.
        merged: every named value above 0 is the one class, whatever its name, but those that nobody has judged. Without
            ``labels`` all from 0.5 on is.
        codings: other tables like ``labels`` by name; those in which a strange label would be legal are suggested.
    Returns: uint8 of the same shape; device, geometry and history of the label.
    Raises:
        ConfigError: at construction, for classes without a value in ``labels`` (all at once), classes named twice, more
            than 253 of them, or labels whose values are not whole numbers.
        DataError: for a label with values that are not whole or that ``labels`` does not know, naming case and values.
    """

    def __init__(
        self,
        keys: KeysCollection,
        labels: Mapping[str, str],
        classes: Sequence[str],
        *,
        merged: bool = False,
        codings: Mapping[str, Mapping[Any, str]] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        try:
            names = {int(value): name for value, name in labels.items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(f'labels must be {{"0": "background", "1": "<name>", ...}}, got {labels!r}') from error
        if merged and len(classes) != 1:
            raise ConfigError(f"merged labels are one class, got {list(classes)!r}")
        if not merged:
            _check_classes(classes, names)
        self.classes = tuple(classes)
        self.names = names
        self.codings = {coding: {0, *map(int, table)} for coding, table in (codings or {}).items()}
        if not names:
            self.table = None
            return
        # one slot more at both ends: values beyond the table are clipped into them
        self.lowest = min(names) - 1
        table = np.full(max(names) - min(names) + 3, _UNKNOWN, dtype=np.uint8)
        for value, name in names.items():
            of_class = value > 0 if merged else self.classes.index(name) + 1 if name in self.classes else 0
            table[value - self.lowest] = IGNORE if is_ignored(name) else of_class
        self.table = table

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        values = torch.as_tensor(d[key]).as_subclass(torch.Tensor).detach().cpu().numpy()
        flat = np.ascontiguousarray(values).reshape(-1)
        recoded = np.empty(flat.size, dtype=np.uint8)
        where = f"{name_of(d)}: {key}"
        for start in range(0, flat.size, _CHUNK):
            recoded[start : start + _CHUNK] = self._look_up(flat[start : start + _CHUNK], where)
        if (recoded == _UNKNOWN).any():
            self._refuse({round(float(value)) for value in np.unique(flat)}, where)
        d[key] = on_grid_of(d[key], torch.from_numpy(recoded.reshape(values.shape)))

    def _look_up(self, values: np.ndarray, where: str) -> np.ndarray:
        if self.table is None:
            return values >= 0.5
        if values.dtype.kind == "f":
            whole = np.rint(values)
            odd = values[~(np.abs(values - whole) <= ROUNDED)]  # true of NaN, too
            if odd.size:
                shown = ", ".join(f"{value:g}" for value in np.unique(odd)[:4])
                raise DataError(
                    f"{where} has values that are not whole numbers ({shown}): resample labels by nearest neighbour"
                )
            values = np.clip(whole, self.lowest, max(self.names) + 1)
        slots = values.astype(np.int64) - self.lowest
        return self.table[np.clip(slots, 0, len(self.table) - 1, out=slots)]

    def _refuse(self, present: set[int], where: str) -> None:
        strange = sorted(present - set(self.names))
        fitting = [coding for coding, legal in self.codings.items() if legal.issuperset(present)]
        hint = f"its values are legal in {', '.join(fitting)}: " if fitting else ""
        known = sorted(self.names)
        legal = known if len(known) <= 20 else f"[{known[0]} to {known[-1]}]"
        raise DataError(
            f"{where} has values {strange[:20]} that the datalist's labels {legal} do not know; {hint}prepare the "
            "datalist again with the label coding of these files"
        )


def _check_classes(classes: Sequence[str], names: Mapping[int, str]) -> None:
    if isinstance(classes, str) or not classes or len(classes) >= _UNKNOWN:
        raise ConfigError(f"classes must be a list of 1 to {_UNKNOWN - 1} names, got {classes!r}")
    known = sorted({name for value, name in names.items() if value != 0})
    problems = [f"{name}: no value has this name" for name in classes if name not in known]
    problems += [f"{name}: voxels of this name are left out, no class is" for name in classes if is_ignored(name)]
    problems += [f"{name}: named twice" for name in sorted(set(classes)) if list(classes).count(name) > 1]
    raise_all(problems, ConfigError, f"classes do not fit the labels of the datalist ({', '.join(known)})")


class ForegroundProbabilityd(MapTransform):
    """The probability of any class, out of logits, beside them: sigmoid of one channel, of several 1 minus the softmax
    of the first, the background.

    Args:
        keys: logits (C, ...). Those of several channels become the number of the largest one, (1, ...), float32.
        probability_key: where the probability goes, (1, ...), float32, 0 to 1.
        decide: False leaves several channels as they are.
    """

    def __init__(self, keys: KeysCollection, probability_key: str, *, decide: bool = True) -> None:
        super().__init__(keys)
        self.probability_key, self.decide = probability_key, decide

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            logits = found[key].float()
            several = len(logits) > 1
            found[self.probability_key] = 1 - logits.softmax(0)[:1] if several else logits.sigmoid()
            found[key] = logits.argmax(0, keepdim=True).float() if several and self.decide else logits
        return found


class RemoveSmallComponentsd(EachKeyd):
    """Set components that are smaller than ``min_mm3`` to 0; one of exactly ``min_mm3`` stays.

    MONAI's ``RemoveSmallObjectsd`` needs scikit-image, takes each value of a map of labels for one object however far
    its parts lie from each other, and rounds a volume in mm^3 up to one voxel more where an affine is not exact.

    A component is a set of voxels of one channel and one value, connected through faces, edges or corners (26
    neighbours): the same as a predicted lesion of BraTS's lesion-wise scores. Classes do not join and do not count
    together.

    Args:
        keys: segmentations (C, H, W, D) with an affine in mm: a map of whole numbers, 0 the background, or channels of
            0 and 1.
        min_mm3: smallest volume that stays, mm^3; None keeps everything.
    Returns: shape, dtype, device, geometry and history of the segmentation.
    Raises:
        ConfigError: at construction, for a volume that is not a positive number.
        DataError: for a segmentation without affine, of another shape, or with values that are not whole numbers.
    """

    def __init__(self, keys: KeysCollection, min_mm3: float | None, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if min_mm3 is not None and not (is_number(min_mm3) and 0 < min_mm3 < math.inf):
            raise ConfigError(f"min_mm3 must be a positive volume in mm^3, got {min_mm3!r}; null keeps everything")
        self.min_mm3 = min_mm3

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(data) if self.min_mm3 is None else super().__call__(data)

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        volume, where = d[key], f"{name_of(d)}: {key}"
        if not isinstance(volume, MetaTensor) or volume.ndim != 4:
            raise DataError(
                f"{where} must be a MetaTensor (C, H, W, D) with an affine, got {type(volume).__name__} of shape "
                f"{tuple(volume.shape)}; load it with LoadImaged"
            )
        voxel_mm3 = float(np.prod(np.round(volume.pixdim.double().cpu().numpy(), SPACING_DECIMALS)))
        labels = volume.as_tensor().detach().cpu().clone().numpy()
        for channel in labels:
            for box in find_objects((channel != 0).view(np.uint8)):
                self._clear(channel[box], voxel_mm3, where)
        d[key] = on_grid_of(volume, torch.from_numpy(labels))

    def _clear(self, labels: np.ndarray, voxel_mm3: float, where: str) -> None:
        """Clear the small components of one channel (H, W, D) in place."""
        values = np.unique(labels)
        if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
            raise DataError(f"{where} has values that are not whole numbers; threshold it or take the largest logit")
        for value in values[values != 0]:
            parts, _ = label(labels == value, structure=_ALL_NEIGHBOURS)
            small = np.bincount(parts.ravel()) * voxel_mm3 < float(self.min_mm3 or 0)
            small[0] = False
            labels[small[parts]] = 0
