"""Two real exams in the BraTS layout, from the folder to a prediction, with pico: plumbing, not accuracy."""

import json

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles import build_bundle, pack_bundle
from samseg_monai.cli.bundle import predict
from samseg_monai.cli.workflow import run_workflow
from samseg_monai.data.brats import prepare_brats_men
from samseg_monai.errors import DataError

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
        "sam_variant": "pico", "image_size": 256, "strategy::rank": 4,
    }  # fmt: skip
    picker = {"_target_": "samseg_monai.data.slices.EveryNth", "n": 40}
    run_workflow([bundle / "train.json"], {**shared, "epochs": 1, "slices::picker": picker})
    run_workflow([bundle / "evaluate.json"], {**shared, "section": "validation"})
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["metrics"]
    assert metrics["n"] == 1
    assert metrics["dice_mean"] > 0.5  # a box from the ground truth gives away as much

    archive = pack_bundle(tmp_path / "run", tmp_path / "bundle.zip")
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
