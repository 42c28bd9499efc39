"""Prediction finds its cases and prompts; bad ones are set aside with a reason, the good ones go on."""

import gzip
import json
import os
import re
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImaged

from samseg_monai.data import BRATS_SCANS as SCANS
from samseg_monai.data.files.cases import CaseList, find_cases
from samseg_monai.data.files.volumes import read_volume
from samseg_monai.demo.brain_phantoms import write_brats_cases
from samseg_monai.errors import DataError, PromptError, by_reason, raise_all
from samseg_monai.transforms import GivenPromptd
from tests.data.test_dicom import write_series

REALDATA = Path(os.environ.get("SAMSEG_REALDATA", "absent"))
IDS = [f"BraTS-MEN-{n:05d}-000" for n in range(3)]
SHAPE = (32, 36, 12)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    write_brats_cases(folder, 3, shape=SHAPE, seed=2)
    return folder


@pytest.fixture
def src(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "src"))


@pytest.fixture
def volume():
    return np.random.default_rng(0).integers(1, 900, (9, 8, 7)).astype(np.int16)


def names(cases):
    return [item["case"] for item in cases.good]


def test_a_folder_of_cases_and_a_single_case_folder(src):
    cases = find_cases(src)
    assert names(cases) == IDS
    assert [Path(f).name for f in cases.good[0]["image"]] == [f"{IDS[0]}-{scan}.nii.gz" for scan in SCANS]
    assert all(Path(f).is_absolute() for f in cases.good[0]["image"])
    cases.finish()
    assert find_cases(src / IDS[1]).good == [cases.good[1]]


def test_scans_come_in_the_order_asked_for(src):
    item = find_cases(src / IDS[0], scans=("t2f", "t1c")).good[0]
    assert [Path(f).name.split("-")[-1] for f in item["image"]] == ["t2f.nii.gz", "t1c.nii.gz"]
    assert find_cases(src / IDS[0], scans=("t1c",)).good == [{"case": IDS[0], "image": item["image"][1]}]


def test_files_of_many_cases_in_one_folder_and_a_list_of_files(src, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in src.rglob("*.nii.gz"):
        shutil.copy(path, flat)
    assert names(find_cases(flat)) == IDS
    listed = [flat / f"{IDS[2]}-{scan}.nii.gz" for scan in reversed(SCANS)]
    item = find_cases(listed).good[0]
    assert [Path(f).name for f in item["image"]] == [f"{IDS[2]}-{scan}.nii.gz" for scan in SCANS]


def test_single_files_of_every_kind_load_the_same_way_in_monai(tmp_path, volume):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    affine = np.array([[-2.0, 0, 0, 5], [0, -2, 0, 7], [0, 0, 3, 1], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "b.nii")
    nib.save(nib.Nifti1Image(volume[..., None], affine), tmp_path / "c.nii.gz")
    itk_image = sitk.GetImageFromArray(volume.transpose(2, 1, 0))
    itk_image.SetSpacing((2, 2, 3))
    itk_image.SetOrigin((-5, -7, 1))
    for name in ("d.mha", "e.nrrd"):
        sitk.WriteImage(itk_image, tmp_path / name)
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "a_seg.nii.gz")  # a mask, no case
    cases = find_cases(tmp_path, scans=("ct",))
    assert names(cases) == ["a", "b", "c", "d", "e"]
    load = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])
    for item in cases.good:
        image = load(item)["image"]
        assert np.array_equal(image.numpy(), volume[None]), item["case"]
        np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-6, err_msg=item["case"])
        ours = read_volume(item["image"])
        assert np.array_equal(np.squeeze(ours.array), volume), item["case"]
        np.testing.assert_allclose(ours.affine, affine, atol=1e-6, err_msg=item["case"])


def test_channels_of_one_file_count_as_scans(tmp_path, volume):
    nib.save(nib.Nifti1Image(np.stack([volume, volume + 1], -1), np.eye(4)), tmp_path / "two.nii.gz")
    assert find_cases(tmp_path, scans=("a", "b")).good[0]["case"] == "two"
    with pytest.raises(DataError, match="2 channels or time points"):
        find_cases(tmp_path, scans=("a",))
    with pytest.raises(DataError, match="2 scan for a network that wants 4"):
        find_cases(tmp_path)


def test_bad_cases_are_set_aside_and_finish_names_them_all(src):
    (src / IDS[0] / f"{IDS[0]}-t2w.nii.gz").unlink()
    broken = src / IDS[1] / f"{IDS[1]}-t1c.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-30])
    cases = find_cases(src)
    assert names(cases) == [IDS[2]]
    assert "no file for t2w" in cases.bad[IDS[0]]
    assert "truncated" in cases.bad[IDS[1]]
    with pytest.raises(DataError, match="2 of 3 cases were not predicted") as error:
        cases.finish()
    assert IDS[0] in str(error.value)
    assert IDS[1] in str(error.value)
    assert "truncated" not in str(error.value)  # which was told before the others were predicted


def test_a_reason_of_many_cases_is_told_once():
    lines = [f"p{number}: p{number}.png: is turned" for number in range(7)] + ["q: cannot be read", "no case of a name"]
    told = by_reason(lines, 20)
    assert told == ["7 of 20 cases: CASE.png: is turned; first: p0, p1, p2", *lines[7:]]
    assert by_reason(lines[:3], 20) == lines[:3]
    with pytest.raises(
        DataError, match=r"^bad \(9 problems\):\n  - 7 of 20 cases: .*\n  - q: .*\n  - no case of a name$"
    ):
        raise_all(lines, DataError, "bad", cases=20)


def test_a_list_may_hold_files_that_are_absent_no_image_or_of_one_name(tmp_path, volume):
    for folder in ("p1", "p2"):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / folder / "scan.nii.gz")
    (tmp_path / "notes.txt").write_text("x")
    sources = [
        tmp_path / "p1/scan.nii.gz",
        tmp_path / "p2/scan.nii.gz",
        tmp_path / "gone.nii.gz",
        tmp_path / "notes.txt",
    ]
    cases = find_cases(sources, scans=("ct",))
    assert names(cases) == ["scan"]
    assert set(cases.bad) == {"p2/scan", "gone.nii.gz", "notes.txt"}
    assert "is called scan too" in cases.bad["p2/scan"]


def test_nothing_found_or_nothing_good_fails_at_once(tmp_path):
    with pytest.raises(DataError, match="no image in"):
        find_cases(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no case can be predicted.*\n.*a: a.nii.gz: the file is empty"):
        find_cases(tmp_path, scans=("ct",))


def write_boxes(folder, table):
    path = folder / "boxes.json"
    path.write_text(json.dumps(table))
    return path


def test_boxes_travel_with_their_case_and_a_case_without_is_set_aside(src, tmp_path):
    entries = [{"slice": 3, "box": [0, 0, 31, 35]}, {"slices": [4, 11], "box": [5, 6, 5, 6]}]
    cases = find_cases(src, boxes=write_boxes(tmp_path, {IDS[0]: entries, "typo": entries}))
    assert names(cases) == [IDS[0]]
    assert cases.good[0]["boxes"] == entries
    assert set(cases.bad) == {IDS[1], IDS[2]}
    assert "no boxes are given for this case" in cases.bad[IDS[1]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"slice": 12, "box": [0, 0, 1, 1]}, r"slices \[12, 12\] are not within 0 to 11"),
        ({"slices": [5, 4], "box": [0, 0, 1, 1]}, "in order"),
        ({"slice": 1, "box": [0, 0, 32, 1]}, "not .* within 0 to 31 and 0 to 35"),
        ({"slice": 1, "box": [3, 0, 2, 1]}, "in order"),
        ({"slice": 1, "box": [0, 0, 1]}, "needs whole numbers"),
        ({"slice": 1.5, "box": [0, 0, 1, 1]}, "needs whole numbers"),
        ({"slice": True, "box": [0, 0, 1, 1]}, "needs whole numbers"),
        ({"slice": 1, "slices": [1, 2], "box": [0, 0, 1, 1]}, "one of"),
        ({"box": [0, 0, 1, 1]}, "one of"),
        ("1", "must have"),
    ],
)
def test_a_slip_in_a_box_costs_one_case(src, tmp_path, entry, message):
    good = {"slice": 1, "box": [0, 0, 1, 1]}
    cases = find_cases(src, boxes=write_boxes(tmp_path, {IDS[0]: [good, entry], IDS[1]: [good], IDS[2]: [good]}))
    assert names(cases) == IDS[1:]
    assert re.search(rf"boxes\[1\] .*{message}", cases.bad[IDS[0]])


def test_coarse_masks_are_found_by_name_and_must_fit(src, tmp_path):
    masks = tmp_path / "masks"
    (masks / IDS[1]).mkdir(parents=True)
    shutil.copy(src / IDS[0] / f"{IDS[0]}-seg.nii.gz", masks / f"{IDS[0]}.nii.gz")
    shutil.copy(src / IDS[1] / f"{IDS[1]}-seg.nii.gz", masks / IDS[1] / f"{IDS[1]}_seg.nii.gz")
    cases = find_cases(src, prompts=masks)
    assert [Path(item["prompt"]).name for item in cases.good] == [f"{IDS[0]}.nii.gz", f"{IDS[1]}_seg.nii.gz"]
    assert "no coarse mask" in cases.bad[IDS[2]]

    image = nib.load(masks / f"{IDS[0]}.nii.gz")
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.eye(4)), masks / f"{IDS[0]}.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), image.affine), masks / f"{IDS[2]}-seg.nii.gz")
    cases = find_cases(src, prompts=masks)
    assert names(cases) == [IDS[1]]
    assert "affine differs" in cases.bad[IDS[0]]
    assert "the mask is empty" in cases.bad[IDS[2]]


def test_a_coarse_mask_may_have_its_axes_stored_otherwise(src, tmp_path, caplog):
    """As 3D Slicer and ITK-SNAP save what was drawn on DICOM; it is turned, and the same box comes of it."""
    image = nib.load(src / IDS[0] / f"{IDS[0]}-seg.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("SPL")
    )
    nib.save(image.as_reoriented(turn), tmp_path / "drawn.nii.gz")
    item = find_cases(src / IDS[0], prompts=tmp_path / "drawn.nii.gz").good[0]
    assert "drawn.nii.gz: its axes are stored as SPL, and turned to" in caplog.text
    load = LoadImaged("image", ensure_channel_first=True)
    prompt = GivenPromptd("mask")(load(item))["prompt"]
    assert np.array_equal(prompt[0] > 0, np.asanyarray(image.dataobj) > 0)


def test_one_mask_file_serves_one_case(src):
    mask = src / IDS[0] / f"{IDS[0]}-seg.nii.gz"
    assert find_cases(src / IDS[0], prompts=mask).good[0]["prompt"] == str(mask)
    with pytest.raises(PromptError, match="one file for 3 cases"):
        find_cases(src, prompts=mask)


def test_contradicting_or_unreadable_prompts_stop_the_run(src, tmp_path):
    with pytest.raises(PromptError, match="give one of them"):
        find_cases(src, boxes="b.json", prompts="masks")
    with pytest.raises(PromptError, match="cannot be read"):
        find_cases(src, boxes=tmp_path / "absent.json")
    with pytest.raises(PromptError, match="expected"):
        find_cases(src, boxes=write_boxes(tmp_path, []))
    with pytest.raises(PromptError, match="no such file or folder"):
        find_cases(src, prompts=tmp_path / "absent")


@pytest.mark.parametrize("key", ["ElementDataFile = ", "data file: ", "datafile: "])
def test_headers_that_name_another_file_are_refused_by_name(key, tmp_path, volume):
    """ITK would read the voxels from there, whatever lies there."""
    secret, mha = tmp_path / "secret.raw", key.startswith("E")
    secret.write_bytes(volume.tobytes())
    path = tmp_path / ("evil.mha" if mha else "evil.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(path))
    header, _, _ = path.read_bytes().partition(b"ElementDataFile" if mha else b"\n\n")
    path.write_bytes(header.replace(b"gzip", b"raw") + f"{'' if mha else chr(10)}{key}{secret}\n\n".encode())
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).sum() == volume.sum()  # the control
    with pytest.raises(DataError, match=r"evil\.(mha|nrrd): its header names another file .*secret\.raw"):
        find_cases(path, scans=("image",))


def test_other_formats_under_these_names_are_refused(tmp_path, volume):
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / "x.vtk"))
    for name in ("a.mha", "b.nrrd"):
        shutil.copy(tmp_path / "x.vtk", tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: .*neither an MHA nor a NRRD file"):
            read_volume(tmp_path / name)
    pair = nib.Nifti1Pair(volume, np.eye(4))
    nib.save(pair, tmp_path / "pair.hdr")
    (tmp_path / "pair.hdr").rename(tmp_path / "pair.nii")
    with pytest.raises(DataError, match="header of a pair"):
        read_volume(tmp_path / "pair.nii")


def test_names_of_cases_are_those_of_files_but_no_paths():
    found = CaseList()
    for case in ("../../etc/x", "a\x1b[2J", "nul", "", "plain case.1"):
        found.add(case, [Path("image")])
    assert list(found.files) == [".._.._etc_x", "a_[2J", "nul", "_", "plain case.1"]
    found.add("nul", [Path("other")])
    assert list(found.bad.values()) == ["another case is called nul too (image); rename one"]
    found.add("plain case?1", [Path("image")])
    found.add("plain case:1", [Path("other")])
    assert list(found.bad.values())[1:] == [
        "its results would be called like those of plain case?1 (image); rename one"
    ]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_truncated_mha_and_nrrd_are_found(tmp_path, volume, suffix):
    for name in ("good", "short"):
        sitk.WriteImage(sitk.GetImageFromArray(volume), tmp_path / f"{name}{suffix}")
    path = tmp_path / f"short{suffix}"
    path.write_bytes(path.read_bytes()[:-50])
    cases = find_cases(tmp_path, scans=("ct",))
    assert names(cases) == ["good"]
    assert "truncated or damaged" in cases.bad["short"]


def test_a_folder_of_dicom_files_is_a_case_and_so_is_each_of_several(tmp_path, monkeypatch):
    for case in ("p2", "p1"):
        write_series(tmp_path / case)
    (tmp_path / "papers").mkdir()
    cases = find_cases(tmp_path, scans=("ct",))
    assert cases.good == [{"case": case, "image": str(tmp_path / case)} for case in ("p1", "p2")]
    cases.finish()
    assert find_cases(tmp_path / "p1", scans=("ct",)).good == cases.good[:1]
    assert find_cases([tmp_path / "p2", tmp_path / "p1"], scans=("ct",)).good == cases.good
    monkeypatch.chdir(tmp_path / "p2")
    assert find_cases(".", scans=("ct",)).good == cases.good[1:]


def test_dicom_series_of_several_scans_lie_in_folders_named_after_them(tmp_path):
    from monai.transforms import LoadImaged

    for case in ("p1", "p2"):
        for n, scan in enumerate((*SCANS, "localizer")):
            array, affine = write_series(tmp_path / case / scan, np.arange(210, dtype=np.int16).reshape(7, 6, 5) + n)
    cases = find_cases(tmp_path)
    assert names(cases) == ["p1", "p2"]
    assert cases.good[0]["image"] == [str(tmp_path / "p1" / scan) for scan in SCANS]
    image = LoadImaged("image", ensure_channel_first=True)(cases.good[0])["image"]
    assert np.array_equal(image.numpy(), np.stack([array - 4 + n for n in range(4)]))
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-5)
    assert find_cases(tmp_path / "p1").good == cases.good[:1]
    assert find_cases(tmp_path / "p1", scans=("t1c", "t1n")).good[0]["image"] == cases.good[0]["image"][1::-1]

    shutil.rmtree(tmp_path / "p1" / "t2w")
    write_series(tmp_path / "p3")
    cases = find_cases(tmp_path)
    assert names(cases) == ["p2"]
    assert cases.bad["p1"] == "no folder of DICOM files for t2w beside t1n"
    assert cases.bad["p3"].startswith('no series is t1n or t1c or t2w or t2f by its description, among p3 (""); choose')


def test_one_scan_may_lie_in_a_folder_named_after_it(tmp_path):
    write_series(tmp_path / "p1" / "ct")
    wanted = [{"case": "p1", "image": str(tmp_path / "p1" / "ct")}]
    assert find_cases(tmp_path, scans=("ct",)).good == find_cases(tmp_path / "p1", scans=("ct",)).good == wanted
    write_series(tmp_path / "p1" / "p5")  # now ct is but one of several cases
    assert names(find_cases(tmp_path / "p1", scans=("ct",))) == ["ct", "p5"]


def test_dicom_files_in_the_wrong_place_are_named(tmp_path, volume, caplog):
    write_series(tmp_path / "good")
    write_series(tmp_path / "deep" / "study")
    write_series(tmp_path / "mixed")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "mixed" / "a.nii.gz")
    write_series(tmp_path / "masked")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "masked" / "a_seg.nii.gz")
    cases = find_cases(tmp_path, scans=("ct",))
    assert names(cases) == ["a", "deep", "good", "masked"]
    assert set(cases.bad) == {"mixed"}
    assert "holds DICOM files beside a.nii.gz" in cases.bad["mixed"]

    cases = find_cases([tmp_path / "good", tmp_path / "good" / "CT.0"], scans=("ct",))
    assert cases.bad == {"CT.0": "is one slice of a DICOM series; give its folder"}
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "b.nii.gz")
    assert names(find_cases(tmp_path, scans=("ct",))) == ["a", "b", "deep", "good", "masked"]
    assert "passed over, named like masks: a_seg.nii.gz" in caplog.text


def test_a_bad_series_costs_one_case_and_boxes_count_loaded_slices(tmp_path, caplog):
    for case in ("flat", "gap", "good", "short"):
        write_series(tmp_path / case, np.zeros((7, 6, 5), np.int16) if case == "flat" else None)
    (tmp_path / "gap" / "CT.3").unlink()
    for name in ("CT.0", "CT.3", "CT.1"):
        (tmp_path / "short" / name).unlink()
    table = {case: [{"slices": [0, 4], "box": [0, 0, 6, 5]}] for case in ("flat", "gap", "good", "short")}
    cases = find_cases(tmp_path, scans=("ct",), boxes=write_boxes(tmp_path, table))
    assert cases.good == [{"case": "good", "image": str(tmp_path / "good"), "boxes": table["good"]}]
    assert "flat: every voxel has the value 0" in cases.bad["flat"]
    assert "4 mm lie between" in cases.bad["gap"]
    assert "slices [0, 4] are not within 0 to 1" in cases.bad["short"]
    assert "short: short: has only 2 slices" in caplog.text


ODD = {
    "4d_singleton_image": None,
    "constant_image": "every voxel has the value 7",
    "nan_inf_image": "NaN or infinite",
    "no_qform_no_sform": None,
    "ok_image": None,
    "plain_nifti_named_gz": "is not a gzip file",
    "qform_sform_mismatch": None,
    "scl_slope_zero": None,
    "sheared_affine": None,
    "truncated_gzip": "truncated or damaged gzip",
    "truncated_pixels": "truncated or damaged NIfTI",
    "zero_bytes": "0 bytes",
    "liver_0": "git-lfs pointer",
}


@pytest.mark.realdata
@pytest.mark.skipif(not (REALDATA / "odd_inputs").is_dir(), reason="SAMSEG_REALDATA does not hold odd_inputs")
def test_odd_files_are_accepted_or_refused_as_decided(caplog):
    folder = REALDATA / "odd_inputs"
    files = [p for p in sorted((folder / "derived_synthetic").iterdir()) if "label" not in p.name]
    files.append(folder / "git_lfs_pointer" / "images" / "liver_0.nii.gz")
    assert len(files) == len(ODD) == 13
    cases = find_cases(files, scans=("mr",))
    assert names(cases) == sorted(name for name, reason in ODD.items() if reason is None)
    assert set(cases.bad) == {name for name, reason in ODD.items() if reason}
    for name, reason in cases.bad.items():
        assert ODD[name] in reason
    noted = {record.getMessage().split(":")[0] for record in caplog.records if record.levelname == "WARNING"}
    assert noted == {"no_qform_no_sform", "qform_sform_mismatch", "sheared_affine"}


@pytest.mark.realdata
@pytest.mark.skipif(not (REALDATA / "brats_layout").is_dir(), reason="SAMSEG_REALDATA does not hold brats_layout")
def test_real_exams_are_found():
    cases = find_cases(REALDATA / "brats_layout")
    assert names(cases) == ["BraTS-TCGA-00001-000", "BraTS-TCGA-00002-000"]
    cases.finish()


def test_programs_called_images_are_refused_by_name(tmp_path):
    """Pillow would hand an EPS file to Ghostscript, which runs it."""
    (tmp_path / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(secret) (r) file\n")
    with pytest.raises(DataError, match=r"evil\.png: .*no PNG, JPEG, TIFF or BMP file"):
        find_cases(tmp_path / "evil.png", scans=("image",), kind="images")


def blank(path, seed=0, low=100, affine=None):
    """A small noisy volume at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (low + np.random.default_rng(seed).normal(0, 9, (6, 5, 4))).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def accounted(cases):
    """Cases, bad cases, and names that were passed over."""
    return names(cases), sorted(cases.bad), sorted(name for listed in cases.passed.values() for name in listed)


@pytest.mark.parametrize("old", [("t1", "t1ce", "t2", "flair"), ("T1", "T1CE", "T2", "FLAIR")])
def test_names_of_older_brats_are_known(old, tmp_path):
    for case in ("B17_1", "B17_2"):
        for scan in old:
            blank(tmp_path / case / f"{case}_{scan}.nii.gz")
        blank(tmp_path / case / f"{case}_seg.nii.gz")
    expected = [str(tmp_path / "B17_1" / f"B17_1_{scan}.nii.gz") for scan in old]
    found = find_cases(tmp_path)
    assert accounted(found) == (["B17_1", "B17_2"], [], ["B17_1_seg.nii.gz", "B17_2_seg.nii.gz"])
    assert found.good[0]["image"] == expected
    found = find_cases(tmp_path, scans=("t1c",))  # the others are no cases of their own
    assert names(found) == ["B17_1", "B17_2"] and found.good[0]["image"] == expected[1]
    (tmp_path / "B17_2" / f"B17_2_{old[1]}.nii.gz").unlink()
    assert "no file for t1c beside" in find_cases(tmp_path).bad["B17_2"]
    assert accounted(find_cases(tmp_path, scans=("t1c",)))[:2] == (["B17_1"], ["B17_2"])
    blank(tmp_path / "B17_1" / "B17_1-t1c.nii.gz")
    with pytest.raises(DataError, match=f"B17_1-t1c.nii.gz and B17_1_{old[1]}.nii.gz are the same scan"):
        find_cases(tmp_path / "B17_1")


def test_scans_may_lie_in_the_folder_of_their_case_under_their_names_alone(tmp_path):
    for case in ("p1", "p2"):
        for scan in ("t1c", "flair", "seg"):
            blank(tmp_path / case / f"{scan}.nii.gz")
    found = find_cases(tmp_path, scans=("t1c", "t2f"))
    assert accounted(found)[:2] == (["p1", "p2"], [])
    assert found.good[1]["image"] == [str(tmp_path / "p2" / f"{scan}.nii.gz") for scan in ("t1c", "flair")]
    found = find_cases(tmp_path, scans=("t1c",))
    assert accounted(found) == (["p1", "p2"], [], [*["flair.nii.gz"] * 2, *["seg.nii.gz"] * 2])
    assert names(find_cases([tmp_path / "p1" / "t1c.nii.gz"], scans=("t1c",))) == ["t1c"]  # as it always was


def test_a_stray_image_beside_case_folders_hides_none_of_them(tmp_path, caplog):
    for case in "ABC":
        blank(tmp_path / case / f"{case}.nii.gz")
    blank(tmp_path / "template.nii.gz")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".DS_Store").write_bytes(b"x")
    found = find_cases(tmp_path, scans=("image",))
    assert accounted(found) == (["A", "B", "C", "template"], [], ["empty/", "notes.txt"])
    assert "passed over, no images: notes.txt" in caplog.text and "folders without an image: empty/" in caplog.text
    blank(tmp_path / "D" / "study" / "D.nii.gz")
    (tmp_path / "E.mhd").write_text("ObjectType = Image")
    assert find_cases(tmp_path, scans=("image",)).bad.keys() == {"D", "E.mhd"}


def test_names_with_and_without_the_scan_are_all_cases(tmp_path, caplog):
    for name in ("p1_image", "p2_image", "p3", "p1_extra"):
        blank(tmp_path / f"{name}.nii.gz")
    assert accounted(find_cases(tmp_path, scans=("image",))) == (["p1", "p2", "p3"], [], ["p1_extra.nii.gz"])


def test_a_case_that_has_other_scans_only_is_named(tmp_path):
    for name in ("A-t1n", "A-t1c", "B-t1n"):
        blank(tmp_path / f"{name}.nii.gz")
    assert accounted(find_cases(tmp_path, scans=("t1c",))) == (["A"], ["B"], ["A-t1n.nii.gz"])
    assert find_cases([tmp_path / "B-t1n.nii.gz"], scans=("t1c",)).good  # asked for by its name
    shutil.copy(tmp_path / "A-t1c.nii.gz", tmp_path / "A_t1c.nii.gz")
    with pytest.raises(DataError, match=r"A: A-t1c.nii.gz and A_t1c.nii.gz are the same scan"):
        find_cases(tmp_path, scans=("t1c",))


@pytest.mark.parametrize("ending", [".seg", "-label", "_mask", "_gtv", "_GTV2", "-Segmentation", "_labels"])
def test_masks_beside_an_image_are_no_images(tmp_path, ending, volume):
    for name in ("P01", f"P01{ending}"):
        sitk.WriteImage(sitk.GetImageFromArray(volume), tmp_path / f"{name}.nrrd")
    blank(tmp_path / "masks" / "P01.nii.gz")
    assert accounted(find_cases(tmp_path, scans=("image",))) == (["P01"], [], [f"P01{ending}.nrrd", "masks/"])


def test_dead_links_are_named_and_links_to_blobs_are_read(tmp_path):
    source = tmp_path / "in"
    blob = blank(tmp_path / "blobs" / "x.nii.gz").rename(tmp_path / "blobs" / "0a1b")
    source.mkdir()
    (source / "c1.nii.gz").symlink_to("../.git/annex/x.nii.gz")
    (source / "c2.nii.gz").symlink_to(blob)
    (source / "c3").symlink_to(tmp_path / "unmounted")
    found = find_cases(source, scans=("image",))
    assert found.good == [{"case": "c2", "image": str(source / "c2.nii.gz")}] and found.bad.keys() == {"c1", "c3"}
    assert "link to ../.git/annex/x.nii.gz, which is not there" in found.bad["c1"]
    write_series(tmp_path / "series")
    (tmp_path / "series" / "CT.5").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"CT\.5: .*nowhere, which is not there"):
        find_cases(tmp_path / "series", scans=("image",))


def test_a_damaged_header_costs_one_case(tmp_path):
    good = blank(tmp_path / "good.nii.gz")
    raw = bytearray(gzip.decompress(good.read_bytes()))

    def changed(name, offset, form, *values):
        content = bytearray(raw)
        struct.pack_into(form, content, offset, *values)
        (tmp_path / name).write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))

    changed("huge.nii.gz", 40, "<4h", 3, 3000, 3000, 3000)
    changed("offset.nii", 108, "<f", float("inf"))
    changed("negative.nii", 40, "<4h", 3, -6, 5, 4)
    changed("metres.nii", 123, "<B", 1)
    changed("microns.nii.gz", 123, "<B", 3)
    (tmp_path / "cut.nii").write_bytes(raw[:200])
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(raw) + bytes(50_000_000)))
    blank(tmp_path / "tiny_voxels.nii", affine=np.diag([0.001, 0.001, 0.001, 1]))
    blank(tmp_path / "large_voxels.nii", affine=np.diag([1, 1, 25, 1]))
    nib.save(nib.Nifti1Image(np.full((6, 5, 4), 1e39) * np.arange(4), np.eye(4)), tmp_path / "beyond.nii")
    found = find_cases(tmp_path, scans=("image",))
    assert names(found) == ["good"]
    reasons = {
        "bomb": "goes on behind the 832 bytes",
        "huge": "27000000000 voxels", "offset": "damaged", "negative": "damaged|voxels", "metres": "in metres",
        "microns": "in microns", "cut": "damaged", "tiny_voxels": "0.001 x 0.001 x 0.001 mm", "beyond": "float32",
        "large_voxels": "1 x 1 x 25 mm",
    }  # fmt: skip
    assert found.bad.keys() == reasons.keys()
    assert all(re.search(reason, found.bad[case]) for case, reason in reasons.items()), found.bad


def test_any_error_in_the_check_of_a_case_is_its_own(src, monkeypatch):
    read = read_volume

    def read_or_fail(path):
        if IDS[1] in path.name:
            raise ZeroDivisionError("odd")
        return read(path)

    monkeypatch.setattr("samseg_monai.data.files.dicom.read_volume", read_or_fail)
    found = find_cases(src)
    assert names(found) == [IDS[0], IDS[2]] and found.bad == {IDS[1]: "ZeroDivisionError: odd"}


def test_a_mask_with_nan_and_a_case_twice_in_the_boxes_are_refused(src, tmp_path):
    mask = src / IDS[0] / f"{IDS[0]}-seg.nii.gz"
    image = nib.load(mask)
    array = np.asarray(image.dataobj).astype(np.float32)
    array[0, 0, :2] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "mask.nii.gz")
    with pytest.raises(DataError, match="2 voxels are NaN or infinite"):
        find_cases(src / IDS[0], prompts=tmp_path / "mask.nii.gz")
    (tmp_path / "boxes.json").write_text('{"a": [], "a": []}')
    with pytest.raises(PromptError, match="keys given twice"):
        find_cases(src, boxes=tmp_path / "boxes.json")


def test_another_modality_is_refused_or_doubted(tmp_path, caplog):
    hounsfield = np.clip(np.random.default_rng(0).normal(-300, 500, (6, 5, 40)), -1000, 900).astype(np.int16)
    changed = {"hu": hounsfield, "plus_1024": hounsfield + 1024, "greys": (hounsfield + 1000) // 8}
    for name, array in changed.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = find_cases(tmp_path, scans=("image",), modality="CT")
    assert names(found) == ["hu"] and found.bad.keys() == {"plus_1024", "greys"}
    assert all("Hounsfield" in reason and "--allow-modality" in reason for reason in found.bad.values())
    found = find_cases(tmp_path, scans=("image",), modality="MR")
    assert names(found) == ["greys", "plus_1024"] and "look like a CT" in found.bad["hu"]
    assert len(find_cases(tmp_path, scans=("image",), modality="CT", allow_modality=True).good) == 3
    assert "plus_1024.nii.gz: its values (from 24 to 1924) do not look like a CT" in caplog.text
    write_series(tmp_path / "series", tags={"0008|0060": "MR"})
    with pytest.raises(DataError, match="DICOM files say that it is MR, this is for CT"):
        find_cases(tmp_path / "series", scans=("image",), modality="CT")
    assert find_cases(tmp_path / "series", scans=("image",), modality="MRI").good
