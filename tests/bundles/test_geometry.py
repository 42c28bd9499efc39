"""Exams of a clinic through whole bundles: boxes far from the middle, another spacing, one bad case among good ones."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles import build_bundle
from samseg_monai.errors import DataError
from samseg_monai.workflow import run_workflow
from tests.helpers.commands import samseg

TUMOUR = (slice(8, 30), slice(100, 130), slice(1, 4))
# a network that finds what is bright, in or out of boxes, at a size at which the crop of 24 x 30 mm is not enlarged
KNOWN = {
    "network_def": {"_target_": "tests.helpers.audit_networks.Known", "threshold": 1.0},
    "loaded": "$None",
    "crop_mm": [24.0, 30.0],
    "image_size": 70,
}
TRAINED = "$dict(median=[1.0, 1.0], min=[1.0, 1.0], max=[1.0, 1.0])"


@pytest.fixture(scope="module")
def inference(tmp_path_factory) -> Path:
    return build_bundle("meningioma", "zero_shot", tmp_path_factory.mktemp("bundle")) / "configs" / "inference.json"


def write(folder: Path, case: str, image: np.ndarray, spacing: float = 0.43) -> Path:
    (folder / case).mkdir(parents=True)
    for scan in ("t1n", "t1c", "t2w", "t2f"):
        affine = np.diag([spacing, spacing, 4.0, 1.0])
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / case / f"{case}-{scan}.nii.gz")
    return folder / case


def exam() -> np.ndarray:
    """150 x 150 voxels, a head that is as large, and a tumour near its edge."""
    image = np.zeros((150, 150, 5))
    image[5:145, 5:145] = 50
    image[TUMOUR] = 300
    return image


def predict(inference: Path, folder: Path, boxes: dict, **changes) -> dict[str, np.ndarray]:
    (folder.parent / "boxes.json").write_text(json.dumps(boxes))
    places = {"dataset_dir": str(folder), "output_dir": str(folder.parent), "boxes": str(folder.parent / "boxes.json")}
    run_workflow([inference], {**KNOWN, **places, "prompt::source": "json", **changes})
    return masks(folder)


def masks(folder: Path) -> dict[str, np.ndarray]:
    found = (folder.parent / "predictions").glob("*_seg.nii.gz")
    return {path.name.removesuffix("_seg.nii.gz"): np.asarray(nib.load(path).dataobj) for path in found}


BOX = {"slices": [1, 3], "box": [8, 100, 29, 129]}


@pytest.mark.parametrize("resample", [None, False, True])
def test_what_a_box_marks_far_from_the_middle_is_segmented(resample, inference, tmp_path, capfd):
    """With the central crop of voxels Dice was 0.018, slices with boxes were empty, and the exit code was 0."""
    write(tmp_path / "in", "clinic", exam())
    changes = {} if resample is None else {"trained_spacing": TRAINED, "resample": resample}
    found = predict(inference, tmp_path / "in", {"clinic": [BOX]}, **changes)["clinic"]
    told = "".join(capfd.readouterr())
    expected = exam() > 100
    assert found.shape == expected.shape and found[..., 1:4].any(axis=(0, 1)).all()
    dice = 2 * (found.astype(bool) & expected).sum() / (found.sum() + expected.sum())
    assert dice == 1 if not resample else dice > 0.9, dice
    assert ("trained on 1 x 1 mm: resampled" in told) is bool(resample)
    assert "clinic: the crop leaves out" in told


def test_boxes_made_of_a_mask_reach_the_network_as_they_were_made(inference, tmp_path, monkeypatch):
    """A mask of rectangles, ``samseg boxes``, a network that fills its boxes: the mask comes back, voxel for voxel."""
    write(tmp_path / "in", "clinic", exam())
    mask = np.zeros((150, 150, 5), np.uint8)
    mask[TUMOUR], mask[120:141, 10:30, 2:4] = 1, 1
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image(mask, np.diag([0.43, 0.43, 4.0, 1.0])), tmp_path / "masks" / "clinic_seg.nii.gz")
    words = ["from-mask", tmp_path / "masks", "--image", tmp_path / "in", "--output", tmp_path / "made.json"]
    assert samseg(monkeypatch, "boxes", *words, "--per", "component") == 0
    boxes = json.loads((tmp_path / "made.json").read_text())
    assert len(boxes["clinic"]) == 5
    network = {"_target_": "tests.helpers.audit_networks.InBoxes"}
    found = predict(inference, tmp_path / "in", boxes, crop_mm="$None", image_size=150, network_def=network)["clinic"]
    assert np.array_equal(found, mask)


def test_two_boxes_apart_make_the_crop_grow_and_nothing_is_lost(inference, tmp_path, capfd):
    image = exam()
    image[120:140, 10:30, 2] = 300
    write(tmp_path / "in", "clinic", image)
    boxes = [BOX, {"slice": 2, "box": [120, 10, 139, 29]}]
    found = predict(inference, tmp_path / "in", {"clinic": boxes}, image_size=128)["clinic"].astype(bool)
    assert 2 * (found & (image > 100)).sum() / (found.sum() + (image > 100).sum()) > 0.95
    assert "the crop grows from 56 to 132 voxels along axis 0" in "".join(capfd.readouterr())


def test_one_bad_case_costs_one_case(inference, tmp_path, capsys):
    """A strip that becomes less than a pixel wide fails before the network, an oversized one within it."""
    strip = np.full((400, 2, 5), 50.0)
    strip[10:20, 0] = 300
    write(tmp_path / "in", "a_strip", strip)
    write(tmp_path / "in", "b_strange", exam() - 9000.0)
    write(tmp_path / "in", "c_good", exam())
    network = {"_target_": "tests.helpers.audit_networks.Fussy", "threshold": 1.0}
    boxes = {"a_strip": [{"slice": 1, "box": [10, 0, 19, 0]}], "b_strange": [BOX], "c_good": [BOX]}
    with pytest.raises(DataError, match=r"2 of 3 cases were not predicted, the others are done; .*: a_strip, b_st"):
        predict(inference, tmp_path / "in", boxes, crop_mm="$None", image_size=150, network_def=network)
    told = "".join(capsys.readouterr())
    assert "a_strip is not predicted: " in told
    assert "b_strange is not predicted: RuntimeError: I do not like this" in told
    assert list(masks(tmp_path / "in")) == ["c_good"]
    assert np.array_equal(masks(tmp_path / "in")["c_good"] > 0, exam() > 100)
