"""``samseg predict`` on a bundle that takes no prompts: every kind of input, and no prompt that is passed over."""

import json

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.demo.abdomen_phantoms import make_case
from samseg_monai.settings import dump_settings, merged, read_settings
from tests.data.test_dicom import write_series
from tests.helpers.commands import samseg

SHAPE = (40, 32, 16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Eight organs with the smallest SAM and random weights: what matters here is the way, not the outcome."""
    changes = {"run": {"sam_variant": "tiny", "image_size": 32}}
    settings = read_settings(merged(dump_settings(compose("abdomen", "zero_shot")), changes), "test")
    return write_bundle(settings, tmp_path_factory.mktemp("bundle") / settings.name)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two NIfTI files of one case each, named like BTCV's."""
    folder = tmp_path_factory.mktemp("scans")
    for number in (41, 42):
        case = make_case([0, number], SHAPE)
        nib.save(nib.Nifti1Image(case["img"], case["affine"]), folder / f"img{number:04d}.nii.gz")
    return folder


def predict(monkeypatch, *words):
    return samseg(monkeypatch, "predict", *words, "--sam-checkpoint", "random")


def check(result, affine, shape):
    assert result.shape == shape
    np.testing.assert_allclose(result.affine, affine, atol=1e-5)
    values = np.unique(np.asarray(result.dataobj))
    assert len(values) > 1 and set(values) <= set(range(9))  # noise, but of nine classes


def test_folder_of_files_is_predicted_without_prompts(bundle, scans, tmp_path, monkeypatch):
    assert predict(monkeypatch, bundle, "--input", scans, "--output", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob("*.nii.gz")) == ["img0041_seg.nii.gz", "img0042_seg.nii.gz"]
    for path in scans.iterdir():
        check(nib.load(tmp_path / path.name.replace(".nii", "_seg.nii")), nib.load(path).affine, SHAPE)


def test_one_file_is_predicted(bundle, scans, tmp_path, monkeypatch):
    assert predict(monkeypatch, bundle, "--input", scans / "img0042.nii.gz", "--output", tmp_path) == 0
    assert [p.name for p in tmp_path.glob("*.nii.gz")] == ["img0042_seg.nii.gz"]


def test_dicom_series_gives_nifti_in_the_same_place(bundle, tmp_path, monkeypatch):
    array = make_case([0, 41], SHAPE)["img"][..., 6:11]
    _, affine = write_series(tmp_path / "series", array)
    assert predict(monkeypatch, bundle, "--input", tmp_path / "series", "--output", tmp_path / "out") == 0
    [path] = (tmp_path / "out").glob("*_seg.nii.gz")
    # slices along the same axes in the same order: the affine says so to the last digit
    check(nib.load(path), affine, array.shape)


@pytest.mark.parametrize("option", ["--boxes", "--prompts"])
def test_prompts_for_a_bundle_that_takes_none_are_refused(option, bundle, scans, tmp_path, monkeypatch, capsys):
    (tmp_path / "given.json").write_text(json.dumps({"img0041": [{"slice": 5, "box": [3, 3, 9, 9]}]}))
    words = [bundle, "--input", scans, "--output", tmp_path / "out", option, tmp_path / "given.json"]
    assert predict(monkeypatch, *words) == 1
    message = capsys.readouterr().err
    assert "takes no prompts" in message and option in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_bundle_is_named(scans, tmp_path, monkeypatch, capsys):
    assert predict(monkeypatch, scans, "--input", scans, "--output", tmp_path / "out") == 1
    assert "configs/inference.json" in capsys.readouterr().err
