"""Name outputs after their case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from samseg_monai.files import file_name


class NameAfterCased(MapTransform):
    """Let ``SaveImaged`` call a file ``<case>_<postfix>``: a case of several scans has no one file to be named after.

    Args:
        keys: entries to be saved; MetaTensors.
        case_key: entry with the case's name.
        allow_missing_keys: skip absent entries.
    """

    def __init__(self, keys: KeysCollection, *, case_key: str = "case", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            item = items[key].clone() if isinstance(items[key], MetaTensor) else MetaTensor(items[key])
            # with a suffix: MONAI cuts off what looks like one, and names may hold dots, as those of DICOM folders do
            item.meta["filename_or_obj"] = f"{file_name(str(items[self.case_key]))}.nii.gz"
            items[key] = item
        return items
