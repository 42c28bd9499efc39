"""Real exams all the way to a prediction: MRI in the BraTS layout, CT as NIfTI and DICOM. Plumbing, not accuracy."""

import json

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles import build_bundle, pack_bundle
from samseg_monai.cli.predict import predict
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.files.dicom import read_series
from samseg_monai.errors import DataError
from samseg_monai.metrics import read_rows
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

pytestmark = pytest.mark.realdata


def test_real_exams_go_all_the_way(realdata, tmp_path):
    exams = realdata / "brats_layout"
    datalist = tmp_path / "datalist.json"
    with pytest.raises(DataError, match="--label-coding 2021"):  # these exams are coded 1, 2, 4
        prepare_brats_men(exams, datalist, fractions=(0.5, 0.5, 0.0))
    prepare_brats_men(exams, datalist, label_coding="2021", fractions=(0.5, 0.5, 0.0))
    assert json.loads(datalist.read_text())["phantoms"] is False

    bundle = build_bundle("meningioma", "lora", tmp_path) / "configs"
    shared = {
        "dataset_dir": str(exams), "datalist": str(datalist), "output_dir": str(tmp_path / "run"),
        "sam_variant": "pico", "image_size": 128, "strategy::rank": 4,
    }  # fmt: skip
    picker = {"_target_": "samseg_monai.data.slices.EveryNth", "n": 40}
    run_workflow([bundle / "train.json"], {**shared, "epochs": 1, "slices::picker": picker})
    run_workflow([bundle / "evaluate.json"], {**shared, "section": "validation", "allow_seen": True})
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["metrics"]
    assert metrics["n"] == 1
    assert metrics["dice_mean"] > 0.5  # a box from the ground truth gives away as much

    archive = pack_bundle(tmp_path / "run", tmp_path / "bundle.zip", allow_seen=True)
    case = json.loads(datalist.read_text())["validation"][0]["case"]
    label = nib.load(exams / case / f"{case}-seg.nii.gz")
    where = np.argwhere(np.asarray(label.dataobj) > 0)
    low, high = where.min(0), where.max(0)
    box = {"slices": [int(low[2]) + 5, int(low[2]) + 12], "box": [*map(int, low[:2]), *map(int, high[:2])]}
    (tmp_path / "boxes.json").write_text(json.dumps({case: [box]}))
    predict(archive, input=exams / case, output=tmp_path / "seg", boxes=tmp_path / "boxes.json")
    result = nib.load(tmp_path / "seg" / f"{case}_seg.nii.gz")
    assert result.shape == label.shape and np.array_equal(result.affine, label.affine)
    assert np.asarray(result.dataobj)[..., box["slices"][0] : box["slices"][1] + 1].any()


@pytest.fixture(scope="module")
def ladder_run(abdomen, tmp_path_factory):
    """A tiny ladder that saw abdominal phantoms for one epoch: enough to send real volumes through."""
    output = tmp_path_factory.mktemp("ladder") / "run"
    bundle = build_bundle("abdomen", "ladder", output.parent) / "configs"
    shared = {**TINY, "output_dir": str(output), "batch_size": 8}
    training = {"epochs": 1, "schedule::warmup": 1, "strategy::side_weights": "random", "dataset_dir": str(abdomen)}
    run_workflow([bundle / "train.json"], {**shared, **training})
    run_workflow([bundle / "evaluate.json"], {**shared, "dataset_dir": str(abdomen)})
    return bundle, output


def test_a_real_ct_is_evaluated_and_predicted_on_its_own_grid(realdata, ladder_run, tmp_path):
    bundle, output = ladder_run
    for kind, name in (("images", "example_ct_sm"), ("labels", "example_seg")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        (tmp_path / "data" / kind / "patient.nii.gz").symlink_to(realdata / "abdomen_ct" / f"{name}.nii.gz")
    datalist = tmp_path / "datalist.json"
    prepare_folders(tmp_path / "data", datalist, label_coding="totalsegmentator", counts=(0, 0, 1), progress=False)
    results = tmp_path / "evaluation"
    overrides = {**TINY, "dataset_dir": str(tmp_path / "data"), "datalist": str(datalist), "results_dir": str(results)}
    run_workflow([bundle / "evaluate.json"], {**overrides, "output_dir": str(output), "save_predictions": True})
    honest, published = (read_rows(results / name) for name in ("cases.csv", "transunet_cases.csv"))
    assert len(honest) == len(published) == 8
    assert not any(row["empty_reference"] for row in honest), "all eight organs are in this volume"

    archive = pack_bundle(output, tmp_path / "bundle.zip", sam_checkpoint="random")
    predict(archive, input=tmp_path / "data" / "images", output=tmp_path / "seg")
    image = nib.load(realdata / "abdomen_ct" / "example_ct_sm.nii.gz")
    result = nib.load(tmp_path / "seg" / "patient_seg.nii.gz")
    assert result.shape == image.shape and np.array_equal(result.affine, image.affine)
    # the packed bundle gives what the evaluation saved, from base weights that it carries itself
    saved = nib.load(results / "predictions" / "patient_seg.nii.gz")
    assert set(np.unique(result.dataobj)) <= set(range(9))
    assert saved.shape == image.shape and np.array_equal(saved.affine, image.affine)


def test_a_dicom_series_is_predicted_on_its_own_grid(realdata, ladder_run, tmp_path):
    _, output = ladder_run
    archive = pack_bundle(output, tmp_path / "bundle.zip", sam_checkpoint="random")
    series = realdata / "abdomen_ct" / "example_ct_dicom"
    predict(archive, input=series, output=tmp_path / "seg")
    volume = read_series(series)
    result = nib.load(tmp_path / "seg" / "example_ct_dicom_seg.nii.gz")
    assert result.shape == volume.array.shape and result.shape[2] == 20
    assert np.allclose(result.affine, volume.affine, atol=1e-3)
    assert np.isclose(volume.spacing_mm[2], 2.0, atol=1e-3), "slice distance, not the thickness of 3 mm"
