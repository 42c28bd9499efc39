"""Datalists are read, checked and split without surprises."""

import json
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samseg_monai.data.datalists import (
    check_datalist,
    first_cases,
    load_datalist,
    patient_of,
    read_datalist,
    trained_spacing,
    write_datalist,
)
from samseg_monai.data.datalists.checks import CaseCheck, check_files
from samseg_monai.data.datalists.splits import SECTIONS, split_by_patient
from samseg_monai.data.files.images import read_image
from samseg_monai.errors import DataError


def item(case, scans=("a", "b")):
    return {"case": case, "image": [f"{case}/{case}-{s}.nii.gz" for s in scans], "label": f"{case}/{case}-seg.nii.gz"}


def datalist(**sections):
    return {"scans": ["a", "b"], **{s: [item(c) for c in sections.get(s, ())] for s in SECTIONS}}


def test_items_come_with_absolute_paths_and_an_uncropped_reference(tmp_path):
    path = tmp_path / "lists" / "datalist.json"
    write_datalist(datalist(training=["P-001-000"]), path)
    (tmp_path / "P-001-000").mkdir()
    for name in ("a", "b", "seg"):
        (tmp_path / "P-001-000" / f"P-001-000-{name}.nii.gz").touch()
    (loaded,) = load_datalist(path, tmp_path, "training")
    folder = tmp_path / "P-001-000"
    assert loaded["image"] == [str(folder / "P-001-000-a.nii.gz"), str(folder / "P-001-000-b.nii.gz")]
    assert loaded["reference"] == loaded["label"] == str(folder / "P-001-000-seg.nii.gz")
    assert loaded["patient"] == "P-001"


def test_all_missing_files_are_named_at_once(tmp_path):
    write_datalist(datalist(training=["P-001-000", "P-002-000"]), tmp_path / "d.json")
    with pytest.raises(DataError, match="is dataset_dir right") as error:
        load_datalist(tmp_path / "d.json", tmp_path, "training")
    assert str(error.value).count("no file") == 6  # two scans and a label of two cases; the reference is the label


@pytest.mark.parametrize(
    ("section", "folder", "message"),
    [
        ("test", ".", "unknown datalist section 'test'"),
        ("testing", ".", "has no cases"),
        ("training", "no", "not a folder"),
    ],
)
def test_what_cannot_be_loaded_is_told(tmp_path, section, folder, message):
    write_datalist(datalist(training=["P-001-000"]), tmp_path / "d.json")
    with pytest.raises(DataError, match=message):
        load_datalist(tmp_path / "d.json", tmp_path / folder, section)


def test_every_structural_defect_is_named_at_once():
    bad = datalist(training=["P-001-000", "P-002-000", "P-002-000"], testing=["P-001-001"])
    bad["validation"] = [{"case": "P-003-000"}, item("P-004-000", scans=("a",))]
    with pytest.raises(DataError) as error:
        check_datalist(bad)
    text = str(error.value)
    assert "(4 problems)" in text
    assert "validation[0]: needs a case and an image" in text
    assert "P-004-000: 1 image files for 2 scans" in text
    assert "P-002-000 is listed 2 times" in text
    assert "patient P-001 is in training and testing" in text


def test_files_that_are_no_datalist_are_refused(tmp_path):
    for content, message in (
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"training": {}}', "a list of"),
    ):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(DataError, match=message):
            read_datalist(tmp_path / "d.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_datalist(tmp_path / "absent.json")


def test_decathlon_items_get_the_keys_they_lack(tmp_path):
    (tmp_path / "d.json").write_text(
        json.dumps({"training": [{"image": "./images/h_001.nii.gz", "label": "l.nii.gz"}]})
    )
    (item,) = read_datalist(tmp_path / "d.json")["training"]
    assert (item["case"], item["patient"], item["reference"]) == ("h_001", "h_001", "l.nii.gz")
    scans = {"training": [{"image": ["c/X-00001-000-t1n.nii.gz", "c/X-00001-000-t2w.nii.gz"]}]}
    (tmp_path / "d.json").write_text(json.dumps(scans))
    assert read_datalist(tmp_path / "d.json")["training"][0]["case"] == "X-00001-000"


def test_patient_is_the_case_without_its_time_point():
    assert patient_of("BraTS-MEN-00004-001") == "BraTS-MEN-00004"
    assert patient_of("hippocampus_003") == "hippocampus_003"


def test_split_keeps_patients_together_and_the_fractions():
    patients = {f"P-{p:03d}-{t:03d}": f"P-{p:03d}" for p in range(200) for t in range(1 + p % 3)}
    split = split_by_patient(patients, (0.7, 0.1, 0.2), seed=1)
    assert sorted(case for cases in split.values() for case in cases) == sorted(patients)
    members = {section: {patients[case] for case in cases} for section, cases in split.items()}
    assert {section: len(p) for section, p in members.items()} == {"training": 140, "validation": 20, "testing": 40}
    assert max(Counter(p for group in members.values() for p in group).values()) == 1


def test_split_is_the_same_everywhere_and_differs_by_seed():
    patients = {f"C{n}": f"C{n}" for n in range(10)}
    golden = split_by_patient(patients, (0.6, 0.2, 0.2), seed=0)
    # order by sha256 of "0:C<n>", worked out with hashlib alone
    assert golden == {
        "training": ["C0", "C2", "C3", "C5", "C7", "C8"],
        "validation": ["C1", "C9"],
        "testing": ["C4", "C6"],
    }
    assert split_by_patient(patients, (0.6, 0.2, 0.2), seed=1) != golden


def test_every_section_with_a_fraction_gets_a_patient():
    patients = {f"C{n}": f"C{n}" for n in range(3)}
    assert [len(c) for c in split_by_patient(patients, (0.9, 0.05, 0.05)).values()] == [1, 1, 1]
    assert [len(c) for c in split_by_patient(patients, (0.5, 0.5, 0)).values()] in ([1, 2, 0], [2, 1, 0])
    with pytest.raises(DataError, match="2 patients cannot fill 3 sections"):
        split_by_patient({"a": "a", "b": "b"})
    with pytest.raises(DataError, match="with sum 1"):
        split_by_patient(patients, (0.5, 0.1, 0.1))


def test_scans_are_picked_by_name_and_in_order(tmp_path):
    for name in ("a", "b", "c", "seg"):
        (tmp_path / name).touch()
    item = {"case": "X-000", "patient": "X", "image": ["a", "b", "c"], "label": "seg", "reference": "seg"}
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"scans": ["t1", "t2", "t3"], "training": [item], "validation": [], "testing": []}))
    [found] = load_datalist(path, tmp_path, "training", scans=["t3", "t1"])
    assert [Path(file).name for file in found["image"]] == ["c", "a"]
    with pytest.raises(DataError, match="t4"):
        load_datalist(path, tmp_path, "training", scans=["t3", "t4"])


def test_the_first_cases_of_an_order_that_the_seed_draws_are_nested():
    items = [{"case": f"case{number}"} for number in range(8)]

    def drawn(order, seed, count):
        return [one["case"] for one in first_cases(order, count, seed=seed)]

    sets = [set(drawn(items, 0, count)) for count in (1, 3, 5, None)]
    assert [len(one) for one in sets] == [1, 3, 5, 8] and sets[0] < sets[1] < sets[2] < sets[3]
    assert set(drawn(items[::-1], 0, 3)) == sets[1] and drawn(items, 0, 3) == sorted(sets[1])
    assert len({frozenset(drawn(items, seed, 3)) for seed in range(9)}) > 3
    with pytest.raises(DataError, match="there are 8 training cases, not the 9 asked for"):
        drawn(items, 0, 9)


def test_trained_spacing_is_that_of_the_plane_after_reorientation(tmp_path):
    items = []
    for number, spacing in enumerate(((0.5, 2.0, 1.0), (0.7, 3.0, 1.0), (1.0, 5.0, 1.25))):
        affine = np.zeros((4, 4))
        affine[0, 0], affine[2, 1], affine[1, 2], affine[3, 3] = *spacing, 1  # stored as R, S, A
        path = tmp_path / f"c{number}{('.nii.gz', '.nii', '.mha')[number]}"
        if number < 2:
            nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine), path)
        else:
            image = sitk.GetImageFromArray(np.zeros((5, 4, 3), np.uint8))
            image.SetSpacing(spacing)
            image.SetDirection([1, 0, 0, 0, 0, 1, 0, 1, 0])
            sitk.WriteImage(image, str(path))
        items.append({"case": f"c{number}", "image": path.name, "label": path.name})
    write_datalist({"training": items, "validation": [], "testing": []}, tmp_path / "d.json")
    found = trained_spacing(tmp_path / "d.json", tmp_path, "RAS")
    assert found == {"median": [0.7, 1.0], "min": [0.5, 1.0], "max": [1.0, 1.25]}
    assert trained_spacing(tmp_path / "d.json", tmp_path, "SAR")["median"] == [3.0, 1.0]
    [used] = first_cases(load_datalist(tmp_path / "d.json", tmp_path), 1, seed=1)  # of few cases: theirs alone
    own = {"c0": [0.5, 1.0], "c1": [0.7, 1.0], "c2": [1.0, 1.25]}[used["case"]]
    assert trained_spacing(tmp_path / "d.json", tmp_path, "RAS", 1, 1) == dict.fromkeys(found, own)
    (tmp_path / "c1.nii").write_bytes(b"no header")
    with pytest.raises(DataError, match=r"c1: c1.nii: its header cannot be read"):
        trained_spacing(tmp_path / "d.json", tmp_path, "RAS")


VOXELS = np.arange(504, dtype=np.uint16).reshape(7, 8, 9)


def foreign(folder, name):
    """A file that MONAI's readers would take for another one's voxels, or hand to a program that runs it."""
    (folder / "secret.raw").write_bytes(VOXELS.tobytes())
    path = folder / name
    if name.endswith(".png"):
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(secret) (r) file\n")
    elif name.endswith(".npy"):
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif name.endswith(".nii"):  # ITK goes by the content
        path.write_bytes(b"NRRD0004\ntype: uint16\ndimension: 3\nsizes: 9 8 7\ndata file: secret.raw\n\n")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(path))
        header, mark, _ = path.read_bytes().partition(b"ElementDataFile" if name.endswith("mha") else b"\n\n")
        named = b"ElementDataFile = secret.raw\n" if mark[:1] == b"E" else b"\ndata file: secret.raw\n\n"
        path.write_bytes(header.replace(b"gzip", b"raw") + named)
    return name


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("evil.mha", "volumes", "its header names another file ('secret.raw')"),
        ("evil.nrrd", "volumes", "its header names another file ('secret.raw')"),
        ("evil.nii", "volumes", "its header names another file ('secret.raw')"),
        ("evil.npy", "volumes", "is no image; expected one of .nii.gz"),
        ("evil.png", "volumes", "is no image; expected one of .nii.gz"),
        ("evil.png", "images", "is a PostScript program"),
    ],
)
@pytest.mark.parametrize("key", ["image", "label"])
def test_files_that_would_have_others_read_or_run_are_refused_in_training(name, kind, said, key, tmp_path):
    good = "good.png" if kind == "images" else "good.nii.gz"
    (tmp_path / good).touch()
    pair = {"image": good, "label": good, key: foreign(tmp_path, name)}
    content = {"training": [{"case": "one", **pair}], "validation": [], "testing": []}
    (tmp_path / "d.json").write_text(json.dumps(content if kind == "volumes" else {**content, "kind": kind}))
    with pytest.raises(DataError) as error:
        load_datalist(tmp_path / "d.json", tmp_path, "training")
    assert f"one: {name}: {said}" in str(error.value)


@pytest.mark.parametrize("name", ["evil.mha", "evil.nrrd"])
def test_and_when_a_datalist_is_made(name, tmp_path):
    check = CaseCheck("one", {"image": tmp_path / foreign(tmp_path, name)})
    check_files(check, label="label", legal=(0, 1), hint=lambda case, others: "")
    assert len(check.problems) == 1 and "its header names another file ('secret.raw')" in check.problems[0]
    with pytest.raises(DataError, match="PostScript program"):
        read_image(tmp_path / foreign(tmp_path, "evil.png"))
