"""Predictions whose scores are known by hand, sent through the whole evaluation of every bundle."""

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.workflow import run_workflow

# those of several classes without prompts are audited in test_audit_classes.py
BUNDLES = [Path(__file__).parents[2] / "bundles" / f"meningioma_segmentation_{name}" for name in ("lora", "zero_shot")]
SHAPE, SPACING_MM, CROP = (48, 48, 8), (1.0, 1.0, 2.0), 40
BOXES = {  # case -> cuboid of tumour as slices along x, y, z
    "inside": (slice(20, 30), slice(16, 22), slice(2, 5)),
    "across": (slice(0, 10), slice(16, 22), slice(2, 5)),  # the crop loses x = 0 ... 3
    "without": None,
}


@pytest.fixture(scope="module")
def audit_data(tmp_path_factory) -> Path:
    """Three cases of one grey value per tissue, so that a threshold is a perfect network."""
    folder = tmp_path_factory.mktemp("audit")
    items = []
    for case, where in BOXES.items():
        label = np.zeros(SHAPE, dtype=np.uint8)
        image = np.zeros(SHAPE, dtype=np.float32)
        image[2:46, 2:46] = 50
        if where is not None:
            label[where] = 1
            image[where] = 300
        affine = np.diag([*SPACING_MM, 1.0])
        nib.save(nib.Nifti1Image(image, affine), folder / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"{case}-seg.nii.gz")
        files = {"image": [f"{case}.nii.gz"] * 4, "label": f"{case}-seg.nii.gz", "reference": f"{case}-seg.nii.gz"}
        items.append({"case": case, "patient": case, **files})
    datalist = {"name": "audit", "testing": items, "training": [], "validation": [], "hashes": {}}
    (folder / "datalist.json").write_text(json.dumps(datalist))
    return folder


def scores(bundle: Path, data: Path, output: Path, network: dict, **more: str) -> tuple[dict, dict, dict]:
    """Evaluate ``network`` through the bundle; return rows per case, rows of the ellipse, metrics."""
    overrides = {
        "dataset_dir": str(data), "output_dir": str(output), "network_def": network, "loaded": "$None",
        "crop_size": [CROP, CROP], "image_size": CROP, **more,
    }  # fmt: skip
    run_workflow([bundle / "configs" / "evaluate.json"], overrides)
    found = []
    for name in ("cases.csv", "ellipse_cases.csv"):
        with open(output / "evaluation" / name, newline="") as stream:
            found.append({row["case"]: row for row in csv.DictReader(stream)})
    return found[0], found[1], json.loads((output / "evaluation" / "metrics.json").read_text())["metrics"]


def inscribed_ellipse(width: int, height: int) -> int:
    """Count the pixels whose centre lies in the ellipse inscribed in a box of ``width`` x ``height`` pixels."""
    x = (np.arange(width) + 0.5 - width / 2) / (width / 2)
    y = (np.arange(height) + 0.5 - height / 2) / (height / 2)
    return int((x[:, None] ** 2 + y[None, :] ** 2 <= 1).sum())


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_perfect_prediction_scores_one_because_the_crop_holds_what_is_asked_about(bundle, audit_data, tmp_path):
    known = {"_target_": "tests.helpers.audit_networks.Known", "threshold": 1.0}
    rows, ellipse, _ = scores(bundle, audit_data, tmp_path, known)
    for case in ("inside", "across"):
        found = {k: float(rows[case][k]) for k in ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm")}
        assert found == {"dice": 1.0, "hd95_mm": 0.0, "nsd_1mm": 1.0, "nsd_2mm": 1.0}
    count = inscribed_ellipse(10, 6)
    for case in ("inside", "across"):
        assert float(ellipse[case]["dice"]) == pytest.approx(2 * count / (count + 60))
    cut = json.loads((tmp_path / "evaluation" / "run_card.json").read_text())["cut"]
    assert set(cut) == set(BOXES) and all(counts["label"] == 0 < counts["image"] for counts in cut.values())


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_where_nobody_says_where_to_look_the_crop_costs_what_it_cuts(bundle, audit_data, tmp_path):
    known = {"_target_": "tests.helpers.audit_networks.Known", "threshold": 1.0}
    rows, _, metrics = scores(bundle, audit_data, tmp_path, known, **{"prompt::source": "image"})
    cut = json.loads((tmp_path / "evaluation" / "run_card.json").read_text())["cut"]
    assert {case: counts["label"] for case, counts in cut.items()} == {"inside": 0, "across": 4 * 6 * 3, "without": 0}

    inside = {k: float(rows["inside"][k]) for k in ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm")}
    assert inside == {"dice": 1.0, "hd95_mm": 0.0, "nsd_1mm": 1.0, "nsd_2mm": 1.0}
    # 6 of 10 columns are left; the face at x = 0, 12 % of the surface, is 4 mm away
    assert float(rows["across"]["dice"]) == pytest.approx(2 * 0.6 / 1.6)
    assert float(rows["across"]["hd95_mm"]) == pytest.approx(4.0)
    assert float(rows["across"]["nsd_1mm"]) < float(rows["across"]["nsd_2mm"]) < 1
    assert rows["without"]["excluded"] == "True" and rows["without"]["dice"] in ("", "nan")
    assert (metrics["n"], metrics["n_excluded"]) == (2, 1)
    assert metrics["dice_mean"] == pytest.approx((1 + 0.75) / 2)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_empty_prediction_scores_zero_and_the_image_diagonal(bundle, audit_data, tmp_path):
    rows, _, metrics = scores(bundle, audit_data, tmp_path, {"_target_": "tests.helpers.audit_networks.Empty"})
    diagonal = math.dist((0, 0, 0), [n * s for n, s in zip(SHAPE, SPACING_MM, strict=True)])
    for case in ("inside", "across"):
        assert (float(rows[case]["dice"]), float(rows[case]["nsd_2mm"])) == (0.0, 0.0)
        assert float(rows[case]["hd95_mm"]) == pytest.approx(diagonal)
    assert metrics["n_empty_prediction"] == metrics["n"] == 2


def test_published_policy_says_so_in_the_column_names(audit_data, tmp_path):
    bundle = BUNDLES[0]
    overrides = {
        "dataset_dir": str(audit_data), "output_dir": str(tmp_path), "loaded": "$None", "policy": "transunet",
        "network_def": {"_target_": "tests.helpers.audit_networks.Empty"}, "crop_size": [CROP, CROP],
        "image_size": CROP,
    }  # fmt: skip
    run_workflow([bundle / "configs" / "evaluate.json"], overrides)
    with open(tmp_path / "evaluation" / "cases.csv", newline="") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    # a missed organ gets distance 0 there: the reason why it is never the default
    assert float(rows["inside"]["hd95_transunet_voxel"]) == 0.0
    assert "hd95_mm" not in rows["inside"]
