"""Files are called after their case, whatever its name looks like."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged

from samseg_monai.transforms import NameAfterCased

DICOM = ["1.2.840.1", "1.2.840.2"]  # series are named like this, and so are the folders they come in


def save(folder, case, number, *, keys=("pred",), source="scan.nii.gz"):
    """Save as the bundles do."""
    volume = MetaTensor(torch.full((1, 4, 5, 3), float(number)), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    volume.meta["filename_or_obj"] = source
    chain = Compose([
        NameAfterCased(keys),
        *(SaveImaged(key, output_dir=folder, output_postfix="seg" if key == "pred" else key, output_dtype=np.uint8,
                     separate_folder=False, print_log=False) for key in keys),
    ])  # fmt: skip
    return volume, chain({"case": case, **dict.fromkeys(keys, volume)})


@pytest.mark.parametrize("cases", [DICOM, ["case0001", "case0002"], ["a.nii.gz", "a"], ["v1.0", "v1.1"]])
def test_two_cases_give_two_files_though_their_names_hold_dots(cases, tmp_path):
    for number, case in enumerate(cases, 1):
        save(tmp_path, case, number)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{case}_seg.nii.gz" for case in cases)
    for number, case in enumerate(cases, 1):
        written = nib.load(tmp_path / f"{case}_seg.nii.gz")
        assert set(np.unique(np.asarray(written.dataobj))) == {number}
        np.testing.assert_array_equal(written.header.get_zooms(), (2, 3, 4))


def test_cases_whose_scans_have_one_file_name_do_not_overwrite_each_other(tmp_path):
    for number, case in enumerate(("p1", "p2")):
        save(tmp_path, case, number, source=f"{case}/flair.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p1_seg.nii.gz", "p2_seg.nii.gz"]


def test_other_keys_are_named_too_and_the_input_keeps_its_own_name(tmp_path):
    volume, result = save(tmp_path, DICOM[0], 1, keys=("pred", "prompt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{DICOM[0]}_{what}.nii.gz" for what in ("prompt", "seg")]
    assert volume.meta["filename_or_obj"] == "scan.nii.gz"
    assert torch.equal(result["pred"].affine, volume.affine)


def test_a_plain_tensor_is_named_and_missing_keys_are_skipped_only_when_asked():
    item = {"case": "c", "pred": torch.zeros(1, 2, 2, 2)}
    named = NameAfterCased(["pred", "prompt"], allow_missing_keys=True)(item)
    assert named["pred"].meta["filename_or_obj"] == "c.nii.gz" and "prompt" not in named
    assert not isinstance(item["pred"], MetaTensor)
    with pytest.raises(KeyError, match="prompt"):
        NameAfterCased(["pred", "prompt"])(item)
