"""Small components are removed class by class, by volume in mm^3, alike in scores and in saved files."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from samseg_monai.bundles import build_bundle
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import RemoveSmallComponentsd
from samseg_monai.workflow import run_workflow

AFFINE = np.array([[0.0, 2, 0, 5], [-1, 0, 0, 0], [0, 0, 1.5, -3], [0, 0, 0, 1]])  # voxels of 3 mm^3, turned
# a network that finds what is bright, and sizes at which nothing is resampled
KNOWN = {
    "network_def": {"_target_": "tests.helpers.audit_networks.Known", "threshold": 1.0},
    "loaded": "$None",
    "crop_size": [40, 40],
    "image_size": 40,
}


def volume(*blocks: tuple[int, int, int, int], shape=(1, 14, 8, 6), dtype=torch.float32) -> MetaTensor:
    """Blocks (value, first x, voxels along x, y), 3 voxels deep."""
    labels = torch.zeros(shape, dtype=dtype)
    for value, x, length, y in blocks:
        labels[0, x : x + length, y, 1:4] = value
    return MetaTensor(labels, affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "a.nii.gz"})


def kept(labels: torch.Tensor, min_mm3: float) -> torch.Tensor:
    return RemoveSmallComponentsd("pred", min_mm3)({"pred": labels, "case": "a"})["pred"]


def test_the_smallest_volume_that_stays_is_the_limit_itself():
    """Two voxels times 3 deep are 6 voxels of 3 mm^3: 18 mm^3 stay at a limit of 18 and go just above it."""
    labels = volume((1, 0, 2, 1))
    assert torch.equal(kept(labels, 18), labels)
    assert kept(labels, 18.001).sum() == 0


def test_noise_of_an_affine_does_not_decide():
    labels = volume((1, 0, 2, 1))
    labels.affine = labels.affine * (1 - 1e-8)
    assert kept(labels, 18).sum() == 6


def test_classes_neither_join_nor_count_together():
    """A large and a small part of class 1, and beside the small one class 2, which is large."""
    labels = volume((1, 0, 5, 1), (1, 8, 2, 1), (2, 10, 4, 1))
    expected = volume((1, 0, 5, 1), (2, 10, 4, 1))
    assert torch.equal(kept(labels, 20), expected)
    assert kept(labels, 40).unique().tolist() == [0, 1]
    assert kept(labels, 1000).sum() == 0


def test_channels_are_kept_apart():
    labels = torch.cat([volume((1, 0, 5, 1)).as_tensor(), volume((1, 0, 2, 1)).as_tensor()])
    result = kept(MetaTensor(labels, affine=torch.as_tensor(AFFINE)), 20)
    assert torch.equal(result[0].as_tensor(), labels[0]) and result[1].sum() == 0


def test_parts_that_touch_at_a_corner_are_one():
    labels = volume((1, 0, 2, 1), (1, 2, 2, 2))  # x 0 to 1 at y = 1, x 2 to 3 at y = 2
    assert kept(labels, 36).sum() == 12
    assert kept(volume((1, 0, 2, 1), (1, 3, 2, 2)), 36).sum() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bool])
def test_everything_else_of_the_segmentation_stays(dtype):
    labels = volume((1, 0, 5, 1), (1, 8, 2, 1), dtype=dtype)
    labels.applied_operations = [{"class": "Flip"}]
    before = labels.clone()
    result = kept(labels, 20)
    assert (result.dtype, result.shape) == (dtype, labels.shape)
    assert torch.equal(result.affine, labels.affine) and result.meta["filename_or_obj"] == "a.nii.gz"
    assert result.applied_operations == [{"class": "Flip"}]
    assert torch.equal(labels, before) and not torch.equal(result, before)  # the input is left alone


@pytest.mark.parametrize("shape", [(1, 14, 8, 6), (3, 14, 8, 6)])
def test_nothing_in_nothing_out(shape):
    assert kept(volume(shape=shape), 5).shape == shape


@pytest.mark.parametrize("min_mm3", [0, -1, "50", float("nan"), float("inf"), True])
def test_a_limit_that_is_no_volume_is_refused(min_mm3):
    with pytest.raises(ConfigError, match="positive volume"):
        RemoveSmallComponentsd("pred", min_mm3)


def test_no_limit_keeps_everything():
    assert torch.equal(kept(volume((1, 0, 5, 1)), None), volume((1, 0, 5, 1)))


def test_what_is_no_segmentation_is_refused_by_case():
    with pytest.raises(DataError, match=r"a: pred must be a MetaTensor .* got Tensor"):
        kept(volume().as_tensor(), 5)
    with pytest.raises(DataError, match="a: pred has values that are not whole numbers"):
        kept(volume((1, 0, 2, 1)) * 0.5, 5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build_bundle("meningioma", "zero_shot", tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def speck(tmp_path_factory):
    """A tumour of 6 * 6 * 4 voxels of 2 mm^3, and something as bright of 2 * 2 * 1 voxels that is none: 8 mm^3."""
    folder = tmp_path_factory.mktemp("speck")
    image, label = np.zeros((2, 40, 40, 6), dtype=np.float32)
    image[2:38, 2:38] = 50
    label[10:16, 10:16, 1:5] = 1
    image[label == 1] = 300
    image[28:30, 28:30, 2] = 300
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    case = folder / "case"
    case.mkdir()
    for scan in ("t1n", "t1c", "t2w", "t2f"):
        nib.save(nib.Nifti1Image(image, affine), case / f"case-{scan}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), case / "case-seg.nii.gz")
    image_files = [f"case/case-{scan}.nii.gz" for scan in ("t1n", "t1c", "t2w", "t2f")]
    files = {"image": image_files, "label": "case/case-seg.nii.gz", "reference": "case/case-seg.nii.gz"}
    item = {"case": "case", "patient": "case", **files}
    datalist = {"name": "speck", "testing": [item], "training": [], "validation": [], "hashes": {}}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder


@pytest.mark.parametrize(("limit", "false"), [(None, 1), (8, 1), (8.5, 0)])
def test_the_limit_of_a_bundle_changes_scores_and_files_alike_and_is_on_the_card(bundle, speck, limit, false, tmp_path):
    limits = {} if limit is None else {"min_component_mm3": limit}
    overrides = {**KNOWN, **limits, "dataset_dir": str(speck), "output_dir": str(tmp_path), "save_predictions": True}
    run_workflow([bundle / "configs" / "evaluate.json"], overrides)
    with open(tmp_path / "evaluation" / "cases.csv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    # the tumour itself is found exactly: Dice 1 / (1 + FP) and HD95 374 FP / (1 + FP)
    assert [float(row[f"lesion_{name}"]) for name in ("tp", "fn", "fp")] == [1, 0, false]
    assert float(row["lesion_dice"]) == 1 / (1 + false)
    assert float(row["lesion_hd95_mm"]) == 374 * false / (1 + false)
    assert float(row["dice"]) == pytest.approx(1.0 if not false else 2 * 144 / (144 + 148))
    settings = json.loads((tmp_path / "evaluation" / "run_card.json").read_text(encoding="utf-8"))["settings"]
    assert settings["min_component_mm3"] == limit and settings["lesion_wise"] is True
    assert settings["lesions"] == {"dilation": 1, "ignored_mm3": 50.0, "penalty_mm": 374.0}
    (saved,) = (tmp_path / "evaluation" / "predictions").glob("*_seg.nii.gz")
    assert np.asarray(nib.load(saved).dataobj).sum() == 144 + 4 * false
    recorded = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert recorded["min_component_mm3"] == limit


def test_prediction_removes_them_too(bundle, speck, tmp_path):
    overrides = {
        **KNOWN,
        "min_component_mm3": 8.5,
        "prompt::source": "image",
        "dataset_dir": str(speck),
        "output_dir": str(tmp_path),
    }
    run_workflow([bundle / "configs" / "inference.json"], overrides)
    (saved,) = (tmp_path / "predictions").glob("*_seg.nii.gz")
    assert np.asarray(nib.load(saved).dataobj).sum() == 144
