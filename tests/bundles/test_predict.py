"""``samseg predict`` on a bundle that takes no prompts: every kind of input, and no prompt that is passed over."""

import csv
import errno
import json
import logging
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.data import DataLoader

from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.bundles.loaded import load_bundle
from samseg_monai.choices import Spacing
from samseg_monai.demo.abdomen_phantoms import make_case
from samseg_monai.errors import DataError
from samseg_monai.handlers import CaseDataset
from samseg_monai.handlers.predictions import TABLE
from samseg_monai.settings import dump_settings, merged, read_settings
from samseg_monai.transforms import SaveVolumed
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


def table(folder):
    """Rows of predictions.csv, as a spreadsheet reads them."""
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


OBLIQUE = np.array([[1.8, 0.3, 0.4, -30], [-0.3, 1.9, 0.5, 12], [-0.2, -0.4, 2.9, 7], [0, 0, 0, 1]])
STORED = {  # order of the axes of the axial phantom (and which part of it), affine
    "axial": ((0, 1, 2), np.diag([-2.0, -2, 3, 1])),
    "sagittal": ((1, 2, 0), np.array([[0.0, 0, 2, 5], [-2, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]])),
    "oblique": ((0, 1, 2), OBLIQUE),
    "single": ((0, 1, 2), np.diag([2.0, 2, 3, 1])),
    "single_sagittal": ((1, 2, 0), np.array([[0.0, 0, 2, 5], [-2, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]])),
}


def stored(path, kind):
    """An abdomen in one way of storage, its two forms 1.5 mm apart with codes that a default would not have."""
    order, affine = STORED[kind]
    array = make_case([0, 41], SHAPE)["img"].transpose(order)
    array = array[..., array.shape[2] // 2 :][..., :1] if kind.startswith("single") else array
    image = nib.Nifti1Image(array, None)
    image.set_sform(affine, 2)
    moved = affine.copy()
    moved[0, 3] += 1.5
    if kind == "oblique":  # a qform has no shear
        moved[:3, :3] = np.diag([1.9, 2, 3])
    image.set_qform(moved, 3)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def test_segmentations_have_the_geometry_of_their_image_s_header(bundle, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for kind in STORED:
        stored(tmp_path / "in" / f"{kind}.nii.gz", kind)
    image = sitk.GetImageFromArray(make_case([0, 42], SHAPE)["img"].transpose(2, 1, 0))
    image.SetSpacing((2, 2, 3))
    image.SetOrigin((-5, 7, 1))
    sitk.WriteImage(image, tmp_path / "in" / "itk.mha")
    assert predict(monkeypatch, bundle, "--input", tmp_path / "in", "--output", tmp_path) == 0, capsys.readouterr().err
    for path in sorted((tmp_path / "in").iterdir()):
        made = tmp_path / f"{path.name.split('.')[0]}_seg.nii.gz"
        theirs, ours = sitk.ReadImage(path), sitk.ReadImage(made)
        for what in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(ours, what)(), getattr(theirs, what)(), atol=1e-6, err_msg=path.name)
        if path.suffix == ".mha":
            continue
        before, after = nib.load(path).header, nib.load(made).header
        for name in ("sform_code", "qform_code", "srow_x", "qoffset_x", "quatern_b", "xyzt_units"):
            assert np.array_equal(before[name], after[name]), (path.name, name)
        assert np.array_equal(before["pixdim"][:4], after["pixdim"][:4])
        assert nib.load(made).shape == nib.load(path).shape and after.get_data_dtype() == np.uint8


@pytest.fixture
def three(scans, tmp_path):
    """A folder of three cases of which any may be made to fail."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.nii.gz").symlink_to(scans / "img0041.nii.gz")
    return folder


@pytest.mark.parametrize("where", ["samseg_monai.inferers.SliceVolumeInferer", "samseg_monai.transforms.SaveVolumed"])
def test_a_case_that_fails_in_the_loop_costs_itself_alone(where, bundle, three, tmp_path, monkeypatch, capsys):
    kind = __import__(where.rpartition(".")[0], fromlist=["x"]).__dict__[where.rpartition(".")[2]]
    calls, run = [], kind.__call__

    def fail_once(self, *given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("an odd case")
        return run(self, *given, **named)

    monkeypatch.setattr(kind, "__call__", fail_once)
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 1
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["a_overlay.png", "a_seg.nii.gz", "c_overlay.png", "c_seg.nii.gz", TABLE]
    rows = table(tmp_path / "out")
    assert [row["case"] for row in rows] == ["a", "b", "c"]
    assert [row["problem"] for row in rows] == ["", "ZeroDivisionError: an odd case", ""]
    message = capsys.readouterr().err
    assert "1 of 3 cases were not predicted, the others are done" in message
    assert "b is not predicted: ZeroDivisionError: an odd case" in message and "Traceback" not in message


def test_a_full_disk_leaves_no_empty_file_and_ends_the_run(bundle, three, tmp_path, monkeypatch, capsys):
    calls, sync = [], os.fsync

    def full(number):
        calls.append(1)
        if len(calls) > 4:  # the table, the first case and its picture, the table with its row
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr("samseg_monai.files.os.fsync", full)
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_overlay.png", "a_seg.nii.gz", TABLE]
    assert [row["case"] for row in table(tmp_path / "out")] == ["a"]  # as far as the disk could hold it
    message = capsys.readouterr().err
    assert "b_seg.nii.gz: cannot be written (No space left on device)" in message
    assert "c is not predicted: not tried, as nothing more can be written" in message and "Traceback" not in message


def test_a_result_that_was_not_written_is_no_success(bundle, three, tmp_path, monkeypatch, capsys):
    (three / "a_b.nii.gz").symlink_to((three / "a.nii.gz").resolve())
    run = SaveVolumed.__call__
    monkeypatch.setattr(SaveVolumed, "__call__", lambda self, d: run(self, d) if d["case"] == "a_b" else dict(d))
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 1
    assert "3 of 4 cases were not predicted" in capsys.readouterr().err
    assert [bool(row["problem"]) for row in table(tmp_path / "out")] == [True, False, True, True]


def test_an_output_that_is_a_file_is_told_before_the_network_runs(bundle, three, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("x")
    monkeypatch.setattr("samseg_monai.inferers.SliceVolumeInferer.__call__", lambda *given, **named: 1 / 0)
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "a file is where a folder is wanted" in message and "ZeroDivision" not in message


def test_a_ct_that_is_not_in_hounsfield_units_is_refused_unless_allowed(bundle, scans, tmp_path, monkeypatch, capsys):
    image = nib.load(scans / "img0041.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1024, image.affine), tmp_path / "shifted.nii.gz")
    words = [bundle, "--input", tmp_path / "shifted.nii.gz", "--output", tmp_path / "out"]
    assert predict(monkeypatch, *words) == 1
    assert "do not look like a CT in Hounsfield units" in capsys.readouterr().err
    assert predict(monkeypatch, *words, "--allow-modality") == 0
    assert (tmp_path / "out" / "shifted_seg.nii.gz").is_file()
    loaded = load_bundle(bundle, sam_checkpoint="random", device="cpu")
    with pytest.raises(DataError, match="Hounsfield"):
        loaded.predict(tmp_path / "shifted.nii.gz")
    assert loaded.predict(tmp_path / "shifted.nii.gz", allow_modality=True)[0].shape == SHAPE


def test_a_loaded_bundle_goes_on_after_an_error(bundle, scans, monkeypatch):
    loaded = load_bundle(bundle, sam_checkpoint="random", device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr("samseg_monai.inferers.SliceVolumeInferer.__call__", lambda *given, **named: 1 / 0)
        with pytest.raises(DataError, match="ZeroDivisionError"):
            loaded.predict(scans / "img0041.nii.gz")
    assert loaded.predict(scans / "img0041.nii.gz")[0].shape == SHAPE


def test_the_table_has_volumes_slices_and_every_bad_case(bundle, three, tmp_path, monkeypatch, capsys):
    (three / "=d.nii.gz").symlink_to((three / "a.nii.gz").resolve())  # a name that spreadsheets would run
    (three / "e.nii.gz").write_bytes((three / "a.nii.gz").read_bytes()[:-40])
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 1
    rows = {row["case"]: row for row in table(tmp_path / "out")}
    assert list(rows) == ["'=d", "a", "b", "c", "e"]
    assert "e.nii.gz" in rows["e"]["problem"] and not rows["e"]["seconds"] and not rows["a"]["problem"]
    classes = load_bundle(bundle, sam_checkpoint="random", device="cpu").classes
    for cell, case in (("'=d", "=d"), ("a", "a")):
        row, made = rows[cell], nib.load(tmp_path / "out" / f"{case}_seg.nii.gz")
        labels, ml = np.asarray(made.dataobj), float(np.prod(made.header.get_zooms())) / 1000
        sizes = [float(row[f"{name}_ml"]) for name in classes]
        np.testing.assert_allclose(sizes, [ml * (labels == k).sum() for k in range(1, 9)], rtol=1e-5)
        assert int(row["slices"]) == labels.any(axis=(0, 1)).sum()
        assert row["spacing_mm"] == " x ".join(f"{side:.4g}" for side in made.header.get_zooms())
        assert (row["prompt"], row["prompted_slices"], row["resampled"]) == ("none", "", "False")
        assert 0 < float(row["seconds"]) < 600
    told = capsys.readouterr().err
    assert "4 cases to predict, 1 left out (why is told above); prompt: none; device: cpu" in told
    assert told.index("will be skipped: e: ") < told.index("1 of 4: =d: ") < told.index("4 of 4: c: ")


def test_an_interrupted_run_leaves_the_table_of_what_was_done(bundle, three, tmp_path, monkeypatch):
    run, calls = SaveVolumed.__call__, []

    def stop(self, data):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, data)

    monkeypatch.setattr(SaveVolumed, "__call__", stop)
    assert predict(monkeypatch, bundle, "--input", three, "--output", tmp_path / "out") == 130
    assert [row["case"] for row in table(tmp_path / "out")] == ["a", "b"]


def test_a_table_that_cannot_be_written_is_no_success(bundle, three, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / TABLE).mkdir(parents=True)  # a folder of this name forbids it
    assert predict(monkeypatch, bundle, "--input", three / "a.nii.gz", "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"the cases (1) were predicted, but {tmp_path}" in message and TABLE in message
    assert (tmp_path / "out" / "a_seg.nii.gz").is_file() and "Traceback" not in message


def test_a_few_lines_are_told_and_all_the_others_when_asked_for(bundle, three, tmp_path, monkeypatch, capsys, caplog):
    def lines(*more):
        words = [bundle, "--input", three, "--output", tmp_path / "out", "--no-pictures", *more]
        assert predict(monkeypatch, *words) == 0
        return [line for told in capsys.readouterr() for line in told.splitlines() if line.strip()]

    brief = lines()
    # which bundle, that its weights are random (as for tests alone), what is run, three cases, how many, where they are
    assert len(brief) == 8, brief
    assert any(line.startswith("2 of 3: b: ") for line in brief) and "3 of 3 cases were predicted" in brief
    assert brief[1] == f"segmentations: {tmp_path / 'out'}"
    assert "input summary" not in caplog.text
    assert len(lines("--verbose")) >= 8 and "input summary" in caplog.text  # MONAI's, to wherever it has begun to write
    assert not list((tmp_path / "out").glob("*.png"))
    assert len(lines()) == 8  # what MONAI logs to is as it was


def test_what_is_told_of_a_case_stands_in_its_row(bundle, scans, tmp_path, monkeypatch, capsys):
    """An exam of another spacing than the trained, in values that are no Hounsfield units; nothing is found in it."""
    settings = read_settings(json.loads((bundle / "configs" / "settings.json").read_text()), "test")
    spacing = Spacing(median=[1.0, 1.0], min=[1.0, 1.0], max=[1.0, 1.0])
    task = settings.task.model_copy(update={"trained_spacing": spacing})
    trained = write_bundle(settings.model_copy(update={"task": task}), tmp_path / "bundle" / settings.name)
    image = nib.load(scans / "img0041.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1024, image.affine), tmp_path / "odd.nii.gz")
    monkeypatch.setattr(
        "samseg_monai.transforms.RemoveSmallComponentsd.__call__", lambda self, d: {**d, "pred": d["pred"] * 0}
    )
    words = [trained, "--input", tmp_path / "odd.nii.gz", "--output", tmp_path / "out", "--allow-modality"]
    assert predict(monkeypatch, *words) == 0
    [row], told = table(tmp_path / "out"), capsys.readouterr().err
    assert row["resampled"] == "True" and row["slices"] == "0"
    for text in ("trained on 1 x 1 mm: resampled", "do not look like a CT in Hounsfield units", "nothing was found"):
        assert text in row["warnings"] and text in told
    assert (tmp_path / "out" / "odd_overlay.png").is_file()


def test_a_picture_that_cannot_be_drawn_costs_no_case(bundle, three, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samseg_monai.pictures.draw", lambda *given, **named: 1 / 0)
    assert predict(monkeypatch, bundle, "--input", three / "a.nii.gz", "--output", tmp_path / "out") == 0
    assert "warning: a: no picture could be drawn: ZeroDivisionError" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_seg.nii.gz", TABLE]
    [row] = table(tmp_path / "out")
    assert "no picture could be drawn" in row["warnings"]
    assert load_bundle(bundle, sam_checkpoint="random", device="cpu").predict(three / "a.nii.gz")[0].shape == SHAPE
    assert "no picture" not in capsys.readouterr().err  # none is drawn where an array is asked for


def _odd(item):
    logging.getLogger("samseg_monai.transforms.crop").warning("%s: the crop grows", item["case"])
    return item


def test_warnings_come_along_from_another_process():
    loader = DataLoader(CaseDataset([{"case": "a"}, {"case": "b"}], _odd), batch_size=1, num_workers=1)
    assert [batch["notes"] for batch in loader] == [["the crop grows"], ["the crop grows"]]
