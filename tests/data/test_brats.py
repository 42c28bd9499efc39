"""A BraTS folder becomes a datalist; whatever is wrong with it is named, case by case and all at once."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from samseg_monai.data import BRATS_SCANS as SCANS
from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.data.datalists.crops import smallest_crop
from samseg_monai.demo.brain_phantoms import write_brats_cases
from samseg_monai.errors import ConfigError, DataError

REALDATA = Path(os.environ.get("SAMSEG_REALDATA", "absent"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    write_brats_cases(folder, 6, shape=(32, 36, 12), seed=2, unlabelled=1)
    return folder


@pytest.fixture
def src(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "src"))


def file_of(src, number, name):
    case = f"BraTS-MEN-{number:05d}-000"
    return src / case / f"{case}-{name}.nii.gz"


def rewrite(path, change, *, affine=None, dtype=None):
    image = nib.load(path)
    array = change(np.asanyarray(image.dataobj))
    array = array.astype(dtype or array.dtype)
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def put(value):
    def change(array):
        array = array.astype(np.float32)
        array[10, 10, 5] = value
        return array

    return change


def prepare(src, **options):
    return prepare_brats_men(src, src / "datalist.json", progress=False, **options)


def test_a_clean_folder_becomes_a_loadable_datalist(src):
    summary = prepare(src, fractions=(0.5, 0.25, 0.25))
    datalist = json.loads((src / "datalist.json").read_text())
    assert summary.sections == {"training": 3, "validation": 2, "testing": 1}
    assert summary.shapes == {"32x36x12": 6}
    assert summary.spacings_mm == {"5x5x12": 6}
    labels = sum(np.asanyarray(nib.load(file_of(src, n, "seg")).dataobj).size for n in range(6))
    assert sum(summary.voxels_per_label.values()) == labels
    assert set(summary.cases_per_label) == {"0", "1", "2", "3"}
    assert datalist["scans"] == list(SCANS)
    assert datalist["label_coding"] == "2023"
    assert len(set(datalist["hashes"].values())) == 6
    items = [item for section in summary.sections for item in load_datalist(src / "datalist.json", src, section)]
    assert sorted(item["case"] for item in items) == [f"BraTS-MEN-{n:05d}-000" for n in range(6)]
    for item in items:
        assert [Path(f).name for f in item["image"]] == [f"{item['case']}-{scan}.nii.gz" for scan in SCANS]
    assert str(src) not in (src / "datalist.json").read_text()


DEFECTS = {
    "missing scan": (lambda f: f("t2w").unlink(), r"no file for t2w"),
    "label of another name": (
        lambda f: f("seg").rename(f("seg").with_name("W39_1998.09.19_Segm.nii.gz")),
        r"no file for seg, but W39_1998.09.19_Segm.nii.gz; rename",
    ),
    "zero bytes": (lambda f: f("t1c").write_bytes(b""), r"t1c.nii.gz: the file is empty"),
    "git-lfs": (lambda f: f("t1c").write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "web page": (lambda f: f("t1c").write_text("<!DOCTYPE html><p>log in"), "is a web page"),
    "truncated": (lambda f: f("t1n").write_bytes(f("t1n").read_bytes()[:-40]), "truncated or damaged gzip"),
    "check sum": (lambda f: f("t1n").write_bytes(f("t1n").read_bytes()[:-8] + bytes(8)), "truncated or damaged gzip"),
    "pixels": (
        lambda f: f("t1n").write_bytes(gzip.compress(gzip.decompress(f("t1n").read_bytes())[:-99])),
        "truncated or damaged NIfTI",
    ),
    "not gzip": (lambda f: f("t1n").write_bytes(gzip.decompress(f("t1n").read_bytes())), "is not a gzip file"),
    "shape": (lambda f: rewrite(f("t2f"), lambda a: a[:, :, :-1]), r"t2f.nii.gz: shape \(32, 36, 11\) differs from"),
    "affine": (lambda f: rewrite(f("seg"), np.copy, affine=np.diag([-5.0, -5, 12, 1])), r"seg.nii.gz: affine differs"),
    "nan": (lambda f: rewrite(f("t2f"), put(np.nan)), "1 voxels are NaN or infinite"),
    "inf": (lambda f: rewrite(f("t2f"), put(-np.inf)), "1 voxels are NaN or infinite"),
    "constant": (lambda f: rewrite(f("t2f"), lambda a: a * 0), "every voxel has the value 0"),
    "label 4": (lambda f: rewrite(f("seg"), put(4), dtype=np.uint8), r"labels \[4\] are outside .*--label-coding 2021"),
    "label 255": (lambda f: rewrite(f("seg"), put(255), dtype=np.uint8), r"labels \[255\] are outside \[0, 1, 2, 3\]$"),
    "label -1": (lambda f: rewrite(f("seg"), put(-1), dtype=np.int16), r"labels \[-1\] are outside"),
    "label 1.5": (lambda f: rewrite(f("seg"), put(1.5)), r"not whole numbers \(1.5\)"),
    "4D": (lambda f: rewrite(f("t1n"), lambda a: np.stack([a, a], -1)), "expected three axes"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_with_its_case_and_nothing_is_written(src, name):
    spoil, message = DEFECTS[name]
    spoil(lambda scan: file_of(src, 3, scan))
    with pytest.raises(DataError, match="1 of 6 cases") as error:
        prepare(src)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert all(line.startswith("  - BraTS-MEN-00003-000: ") for line in lines)
    assert any(re.search(message, line) for line in lines), lines
    assert not (src / "datalist.json").exists()


def test_all_defects_of_all_cases_are_named_at_once_and_can_be_left_out(src):
    for number, name in enumerate(("missing scan", "nan", "label 255")):
        DEFECTS[name][0](lambda scan, n=number: file_of(src, n, scan))
    DEFECTS["truncated"][0](lambda scan: file_of(src, 1, scan))
    with pytest.raises(DataError, match="3 of 6 cases") as error:
        prepare(src)
    assert str(error.value).count("  - BraTS-MEN-") == 4
    summary = prepare(src, skip_bad=True, fractions=(0.4, 0.3, 0.3))
    assert summary.sections == {"training": 1, "validation": 1, "testing": 1}
    assert len(summary.left_out) == 4
    assert "BraTS-MEN-00001-000" not in (src / "datalist.json").read_text()


def test_cases_without_a_label_are_counted_and_left_out(src):
    file_of(src, 3, "seg").unlink()
    ids = [f"BraTS-MEN-{n:05d}" for n in range(6)]
    (src / "split.json").write_text(json.dumps({"training": ids[:4], "validation": ids[4:]}))
    summary = prepare(src, split_file=src / "split.json")
    assert summary.sections == {"training": 3, "validation": 2, "testing": 0}
    assert summary.warnings == ["1 of 6 cases have no label and are left out: BraTS-MEN-00003-000"]
    for number in (0, 1, 2, 4, 5):
        file_of(src, number, "seg").unlink()
    with pytest.raises(DataError, match="none of 6 cases has a label"):
        prepare(src)


def test_an_empty_mask_is_a_warning(src):
    rewrite(file_of(src, 0, "seg"), lambda a: a * 0)
    summary = prepare(src)
    assert sum(summary.sections.values()) == 6
    warning, one = summary.warnings
    assert one.startswith("validation has one case") and warning.startswith("BraTS-MEN-00000-000: ")
    assert "the mask is empty" in warning


def test_the_older_label_coding_is_legal_when_asked_for_and_recorded(src):
    for number in range(6):
        rewrite(file_of(src, number, "seg"), lambda a: np.where(a == 3, 4, a).astype(np.uint8))
    summary = prepare(src, label_coding="2021")
    assert set(summary.voxels_per_label) == {"0", "1", "2", "4"}
    assert json.loads((src / "datalist.json").read_text())["label_coding"] == "2021"
    with pytest.raises(ConfigError, match="2023, 2021"):
        prepare(src, label_coding="2022")


def test_hash_changes_with_any_byte_of_a_case_only(src):
    prepare(src)
    before = json.loads((src / "datalist.json").read_text())["hashes"]
    rewrite(file_of(src, 2, "t2w"), put(7), dtype=np.int16)
    prepare(src)
    after = json.loads((src / "datalist.json").read_text())["hashes"]
    assert [case for case in before if before[case] != after[case]] == ["BraTS-MEN-00002-000"]


def test_a_split_file_is_followed_and_what_it_leaves_out_is_named(src):
    ids = [f"BraTS-MEN-{n:05d}" for n in range(6)]
    split = {"training": [ids[0], f"{ids[1]}-000"], "validation": [ids[2]], "testing": [{"case": f"{ids[3]}-000"}]}
    (src / "split.json").write_text(json.dumps(split))
    summary = prepare(src, split_file=src / "split.json")
    assert summary.sections == {"training": 2, "validation": 1, "testing": 1}
    assert [w.split(":")[0] for w in summary.warnings] == [f"{ids[4]}-000", f"{ids[5]}-000", "validation has one case"]


def test_a_split_file_with_leaks_or_strangers_is_refused(src):
    other = src / "BraTS-MEN-00000-001"
    other.mkdir()
    for name in (*SCANS, "seg"):
        shutil.copy(file_of(src, 1, name), other / f"{other.name}-{name}.nii.gz")
    split = {"training": ["BraTS-MEN-00000-000", "BraTS-MEN-77777-000"], "testing": ["BraTS-MEN-00000-001"]}
    (src / "split.json").write_text(json.dumps(split))
    with pytest.raises(DataError) as error:
        prepare(src, split_file=src / "split.json")
    assert "unknown case or patient BraTS-MEN-77777-000" in str(error.value)
    assert "patient BraTS-MEN-00000 is in training and testing" in str(error.value)


def test_a_folder_one_level_too_high_or_too_low_is_pointed_out(src):
    with pytest.raises(DataError, match=r"did you mean .*src"):
        prepare(src.parent)
    with pytest.raises(DataError, match="give its parent"):
        prepare(src / "BraTS-MEN-00000-000")
    with pytest.raises(DataError, match="is not a folder"):
        prepare_brats_men(src / "absent", src / "d.json")


def test_smallest_crop_holds_every_brain_by_monai_s_own_centre_crop(src):
    from monai.transforms import CenterSpatialCrop, LoadImage, Orientation

    prepare(src, fractions=(1, 0, 0))
    report = smallest_crop(src / "datalist.json", src, crop=(20, 22))
    load, turn = LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)
    items = load_datalist(src / "datalist.json", src)
    scans = {item["case"]: turn(load(item["image"])) for item in items}
    labels = {item["case"]: turn(load(item["label"])) for item in items}

    def lost(volumes, crop):
        cropper = CenterSpatialCrop((*crop, -1))
        kept = {case: int((cropper(v) != 0).any(0).sum()) for case, v in volumes.items()}
        return {case: int((v != 0).any(0).sum()) - kept[case] for case, v in volumes.items()}

    side_0, side_1 = report.centre_crop
    assert not any(lost(scans, (side_0, side_1)).values())
    assert any(lost(scans, (side_0 - 1, side_1)).values())
    assert any(lost(scans, (side_0, side_1 - 1)).values())
    assert report.tumour_voxels_lost == {c: n for c, n in lost(labels, (20, 22)).items() if n}
    assert report.brain_voxels_lost == {c: n for c, n in lost(scans, (20, 22)).items() if n}
    assert report.tumour_voxels_lost
    low_0, low_1, high_0, high_1 = report.tight_box
    union = np.any([(v != 0).any(0).any(-1).numpy() for v in scans.values()], axis=0)
    assert union[low_0 : high_0 + 1, low_1 : high_1 + 1].sum() == union.sum()
    assert union[low_0].any() and union[high_0].any() and union[:, low_1].any() and union[:, high_1].any()


def test_commands_do_the_whole_way(tmp_path):
    import typer

    from samseg_monai.cli.data import bbox, phantom_app, prepare_app

    app = typer.Typer()
    app.add_typer(phantom_app, name="phantom")
    app.add_typer(prepare_app, name="prepare")
    app.command("bbox")(bbox)

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    made = call("phantom", "brats", "--output", tmp_path, "--cases", 4, "--shape", "32,36,12")
    assert made.exit_code == 0, made.output
    listed = call(
        "prepare", "brats-men", "--src", tmp_path, "--output", tmp_path / "d.json", "--fractions", "0.5,0.25,0.25"
    )
    assert listed.exit_code == 0, listed.output
    assert "4 cases of 4 patients: 2 training, 1 validation, 1 testing" in listed.output
    measured = call("bbox", tmp_path / "d.json", "--dataset-dir", tmp_path, "--output", tmp_path / "crop.json")
    assert measured.exit_code == 0, measured.output
    assert "smallest centre crop" in measured.output
    assert json.loads((tmp_path / "crop.json").read_text())["cases"] == 2
    assert call("phantom", "brats", "--output", tmp_path, "--shape", "32,36").exit_code == 2
    failed = call("prepare", "brats-men", "--src", tmp_path / "absent", "--output", tmp_path / "e.json")
    assert failed.exit_code == 1
    assert isinstance(failed.exception, DataError)


@pytest.mark.realdata
@pytest.mark.skipif(not (REALDATA / "brats_layout").is_dir(), reason="SAMSEG_REALDATA does not hold brats_layout")
def test_real_exams_are_refused_in_one_coding_and_prepared_in_the_other(tmp_path):
    source = REALDATA / "brats_layout"
    with pytest.raises(DataError, match="1 of 2 cases") as error:
        prepare_brats_men(source, tmp_path / "d.json", progress=False)
    assert "BraTS-TCGA-00001-000-seg.nii.gz: labels [4] are outside [0, 1, 2, 3]" in str(error.value)
    assert "--label-coding 2021" in str(error.value)
    halves = (0.5, 0.5, 0)
    summary = prepare_brats_men(source, tmp_path / "d.json", label_coding="2021", fractions=halves, progress=False)
    assert summary.sections == {"training": 1, "validation": 1, "testing": 0}
    assert summary.voxels_per_label == {"0": 8897821 + 8903812, "1": 2477 + 9281, "2": 20862 + 14907, "4": 6840}
    assert summary.spacings_mm == {"1x1x1": 2}
    report = smallest_crop(tmp_path / "d.json", source)
    assert 100 < report.centre_crop[0] < 200
    assert 130 < report.centre_crop[1] <= 240
