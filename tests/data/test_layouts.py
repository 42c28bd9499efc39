"""Data as people have them: every layout is recognised by what lies there, said, and gives a datalist that loads."""

import json
import shutil
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samseg_monai import cli
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.images import prepare_images
from samseg_monai.data.files.dicom import read_series
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms.loading import LoadCased
from tests.data.test_dicom import AXES, write_series
from tests.data.test_pacs import exam, tags_of
from tests.helpers.commands import samseg

LABELS = {"1": "a", "2": "b"}
AFFINE = np.diag([1.0, 2.0, 1.5, 1.0])
SHAPE = (7, 6, 5)
MASK = (np.arange(210).reshape(SHAPE) % 3).astype(np.uint8)
CASES = 5


def scan(seed=0, channels=()):
    return np.random.default_rng(seed).integers(0, 900, (*SHAPE, *channels)).astype(np.int16)


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii.gz"):
        nib.save(nib.Nifti1Image(array, affine), path)
    else:
        image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        image.SetSpacing((1.0, 2.0, 1.5))
        sitk.WriteImage(image, str(path))


def save_series(folder, array):
    """A DICOM series; ITK's axes, whose first two point to the left and to the back."""
    folder.mkdir(parents=True)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((1.0, 2.0, 1.5))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        piece = image[:, :, k]
        for tag, value in {
            "0008|0060": "MR", "0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0018": f"1.2.3.{k + 1}",
            "0020|0013": str(k), "0020|0032": f"0\\0\\{k * 1.5}", "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "1.5",
        }.items():  # fmt: skip
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"IM{k:03d}"))
        writer.SetImageIO("GDCMImageIO")
        writer.Execute(piece)


def said(src, **table):
    src.mkdir(parents=True, exist_ok=True)
    (src / "dataset.json").write_text(json.dumps(table))


def notes(summary):
    """Warnings but for the one that every data set of this size has."""
    return [text for text in summary.warnings if not text.startswith("validation has one case")]


def prepare(src, **options):
    options = {"labels": LABELS, "fractions": (0.6, 0.2, 0.2), "progress": False, **options}
    if options.keys() & {"folds", "split_file"}:
        options["fractions"] = None
    return prepare_folders(src, src.parent / "d.json", **options)


def loaded(src):
    """All items of the datalist, their images loaded as a bundle does, which compares their hashes."""
    sections = ("training", "validation", "testing")
    items = [item for section in sections for item in load_datalist(src.parent / "d.json", src, section)]
    load = LoadCased(keys=("image", "label"), ensure_channel_first=True, image_only=True)
    found = [load(item) for item in items]
    return {item["case"]: (item, d["image"], d["label"]) for item, d in zip(items, found, strict=True)}


def test_nnunet_raw_data_with_one_channel_and_with_two(tmp_path):
    src = tmp_path / "Dataset001_X"
    for n in range(CASES):
        save(src / f"imagesTr/case_{n:03}_0000.nii.gz", scan(n))
        save(src / f"labelsTr/case_{n:03}.nii.gz", MASK)
    said(src, channel_names={"0": "T1"}, labels={"background": 0, "a": 1, "b": 2}, numTraining=5, file_ending=".nii.gz")
    summary = prepare(src, labels=None)
    assert "layout: nnU-Net raw data (<case>_0000)" in summary.lines()
    assert notes(summary) == [] and labels_of(tmp_path / "d.json") == {"0": "background", **LABELS}
    assert sorted(loaded(src)) == [f"case_{n:03}" for n in range(CASES)]
    for n in range(CASES - 1):
        save(src / f"imagesTr/case_{n:03}_0001.nii.gz", scan(n + 10))
    said(src, channel_names={"0": "T1", "1": "FLAIR (fat sat)"}, labels={"background": 0, "a": 1, "b": 2})
    with pytest.raises(DataError, match=r"case_004: no file case_004_0001 for FLAIR_fat_sat"):
        prepare(src, labels=None)
    save(src / "imagesTr/case_004_0001.nii.gz", scan(14))
    prepare(src, labels=None)
    assert read_datalist(tmp_path / "d.json")["scans"] == ["T1", "FLAIR_fat_sat"]
    item, image, _ = loaded(src)["case_003"]
    assert [Path(f).name for f in item["image"]] == ["case_003_0000.nii.gz", "case_003_0001.nii.gz"]
    assert np.array_equal(image, np.stack([scan(3), scan(13)]))


def test_regions_of_nnunet_have_no_names_of_their_own(tmp_path):
    src = tmp_path / "set"
    for n in range(3):
        save(src / f"imagesTr/c{n}_0000.nii.gz", scan(n))
        save(src / f"labelsTr/c{n}.nii.gz", MASK)
    said(src, channel_names={"0": "T1"}, labels={"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(DataError, match=r"regions of several values \(whole\).*--labels"):
        prepare(src, labels=None)
    assert prepare(src).sections["training"] == 1


@pytest.mark.parametrize("listed", [True, False])
def test_four_scans_on_a_fourth_axis_have_names(tmp_path, listed):
    src = tmp_path / "Task01_BrainTumour"
    for n in range(CASES):
        save(src / f"imagesTr/B_{n}.nii.gz", scan(n, (4,)))
        save(src / f"labelsTr/B_{n}.nii.gz", MASK)
    pairs = [{"image": f"./imagesTr/B_{n}.nii.gz", "label": f"./labelsTr/B_{n}.nii.gz"} for n in range(CASES)]
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    said(src, modality=modality, labels={"0": "background", "1": "edema", "2": "b"}, training=pairs if listed else [])
    prepare(src, labels=None)
    assert read_datalist(tmp_path / "d.json")["scans"] == ["FLAIR", "T1w", "t1gd", "T2w"]
    item, image, label = loaded(src)["B_2"]
    assert Path(item["image"]).name == "B_2.nii.gz"
    assert np.array_equal(image, np.moveaxis(scan(2, (4,)), 3, 0)) and label.shape == (1, *SHAPE)
    with pytest.raises(DataError, match=r"one file of a case holds FLAIR, T1w, t1gd, T2w; the network wants t1gd"):
        load_datalist(tmp_path / "d.json", src, scans=["t1gd"])
    save(src / "imagesTr/B_3.nii.gz", scan(3, (3,)))
    constant = scan(4, (4,))
    constant[..., 1] = 7
    save(src / "imagesTr/B_4.nii.gz", constant)
    with pytest.raises(DataError, match="expected 4 scans on a fourth axis") as error:
        prepare(src, labels=None)
    assert "B_4.nii.gz: scan 1: every voxel has the value 7" in str(error.value)


def test_a_fourth_axis_of_one_is_no_axis(tmp_path):
    src = tmp_path / "set"
    for n in range(3):
        save(src / f"images/c{n}.nii.gz", scan(n, (1,)))
        save(src / f"labels/c{n}.nii.gz", MASK[..., None] if n else MASK)
    prepare(src)
    assert all(image.shape == label.shape == (1, *SHAPE) for _, image, label in loaded(src).values())


@pytest.mark.parametrize("name", ["{case}/{scan}", "{case}/{case}_{scan}", "{case}/{case}-{scan}"])
def test_one_folder_for_each_case(tmp_path, name):
    src = tmp_path / "set"
    for n in range(CASES):
        for m, part in enumerate(("t1", "flair")):
            save(src / f"{name.format(case=f'P{n}', scan=part)}.nii.gz", scan(10 * m + n))
        save(src / f"{name.format(case=f'P{n}', scan='Seg')}.nii.gz", MASK)
    save(src / "P0" / "localiser.nii.gz", scan(99))
    (src / "papers").mkdir()
    summary = prepare(src)
    assert "layout: one folder for each case, with flair, t1" in summary.lines()
    assert notes(summary) == ["localiser: not used, 1 of 5 cases have it", "1 folders hold no image: papers"]
    item, image, _ = loaded(src)["P3"]
    assert np.array_equal(image, np.stack([scan(13), scan(3)])) and item["patient"] == "P3"
    next((src / "P1").glob("*t1*")).unlink()
    with pytest.raises(DataError, match="P1: no t1 in its folder"):
        prepare(src)
    next((src / "P2").glob("*Seg*")).unlink()
    summary = prepare(src, skip_bad=True, fractions=(0.4, 0.3, 0.3))
    assert sum(summary.sections.values()) == 3
    assert "1 of 5 cases have no label and are left out: P2" in summary.lines()[6:][0] + str(summary.warnings)


def test_mha_and_nrrd_files_and_dicom_series_in_place_of_files(tmp_path):
    src = tmp_path / "set"
    for n in range(3):
        save(src / f"P{n}" / "image.mha", scan(n))
        save(src / f"P{n}" / "label.nrrd", MASK)
    prepare(src)
    assert np.array_equal(loaded(src)["P1"][1][0], scan(1))
    shutil.rmtree(src)
    for n in range(3):
        save_series(src / "images" / f"P{n}", scan(n))
        save(src / "labels" / f"P{n}.mha", MASK)
    summary = prepare(src)
    assert summary.spacings_mm == {"1x2x1.5": 3}
    assert np.array_equal(loaded(src)["P1"][1][0], scan(1)) and np.array_equal(loaded(src)["P1"][2][0], MASK)
    shutil.rmtree(src)
    for n in range(3):
        save_series(src / f"P{n}" / "t1", scan(n))
        save_series(src / f"P{n}" / "t2", scan(n + 10))
        save(src / f"P{n}" / "label.mha", MASK)
    prepare(src)
    assert np.array_equal(loaded(src)["P1"][1], np.stack([scan(1), scan(11)]))
    moved = next((src / "P1" / "t1").iterdir())
    moved.rename(moved.with_name("renamed"))
    loaded(src)
    shutil.copy(src / "P0" / "t1" / moved.name, moved.with_name("renamed"))
    with pytest.raises(DataError, match="P1: its files are not those that were prepared"):
        loaded(src)
    moved.with_name("renamed").unlink()
    for path in sorted((src / "P2" / "t2").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="2 of 3 cases") as error:
        prepare(src)
    assert "t1: its slices are not evenly" in str(error.value) or "1 missing" in str(error.value)
    assert "1 DICOM slice" in str(error.value)
    for path in (src / "P2" / "t2").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no file .*t2"):
        loaded(src)


@pytest.mark.parametrize("kind", ["backslashes", "byte order mark", "umlauts"])
def test_what_other_systems_write(tmp_path, kind):
    src, name = tmp_path / "set", "Müller" if kind == "umlauts" else "c"
    for n in range(3):
        save(src / "imagesTr" / unicodedata.normalize("NFD", f"{name}{n}.nii.gz"), scan(n))
        save(src / "labelsTr" / unicodedata.normalize("NFC", f"{name}{n}.nii.gz"), MASK)
    table = {"labels": {"0": "background", **LABELS}}
    if kind == "backslashes":
        pairs = [{"image": f".\\imagesTr\\c{n}.nii.gz", "label": f"labelsTr\\c{n}.nii.gz"} for n in range(3)]
        table["training"] = pairs
    (src / "dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(table).encode())
    prepare(src, labels=None)
    assert sorted(loaded(src)) == [f"{name}{n}" for n in range(3)]
    split = {"training": [unicodedata.normalize("NFD", f"{name}{n}") for n in (0, 1)], "testing": [f"{name}2"]}
    (tmp_path / "split.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(split).encode())
    assert prepare(src, labels=None, split_file=tmp_path / "split.json").sections["training"] == 2


@pytest.mark.parametrize("slash", ["..\\x.nii.gz", "C:\\x.nii.gz", "\\x.nii.gz", "a\0.nii.gz"])
def test_paths_of_a_table_stay_in_the_folder(tmp_path, slash):
    src = tmp_path / "set"
    save(src / "imagesTr/c.nii.gz", scan())
    (src / "labelsTr").mkdir()
    said(src, labels=LABELS, training=[{"image": "imagesTr/c.nii.gz", "label": slash}])
    with pytest.raises(DataError, match=r"its label in dataset\.json is no file below"):
        prepare(src, labels=None, fractions=(1, 0, 0))


def test_a_table_of_patients_keeps_them_together(tmp_path):
    src, table = tmp_path / "set", tmp_path / "patients.csv"
    for n in range(6):
        save(src / f"images/v{n}.nii.gz", scan(n))
        save(src / f"labels/v{n}.nii.gz", MASK)
    rows = "".join(f"v{n}.nii.gz;p{n // 2};{n}\r\n" for n in range(6))
    table.write_bytes(("\ufeffCase;Patient;age\r\n" + rows).encode())
    summary = prepare(src, table=table, fractions=(0.34, 0.33, 0.33))
    assert summary.patients == 3 and set(summary.sections.values()) == {2}
    datalist = read_datalist(tmp_path / "d.json")
    assert datalist["split"]["by"] == "patient"
    assert {item["patient"] for item in datalist["training"]} in ({"p0"}, {"p1"}, {"p2"})
    table.write_text("case,patient\nv0,p0\nv1,\nv2,a\nv2,b\nv3,c\nv4,c\n")
    with pytest.raises(DataError) as error:
        prepare(src, table=table)
    assert all(text in str(error.value) for text in ("v1: no patient", "v2: several patients", "v5: no patient"))
    for text, reason in {
        "": "has no rows", "case,patient\n": "has no rows", "case,case\nv0,a\n": "'case': 2 times",
        "case,patient\nv0\n": "row 2: 1 cells for 2 columns", "name,age\nv0,3\n": "needs the columns case and patient",
        'case,patient\nv0,"p0\n': "cannot be read",
    }.items():  # fmt: skip
        table.write_text(text)
        with pytest.raises(DataError, match=reason):
            prepare(src, table=table)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(src, table=table)


def test_a_table_lists_the_cases_itself(tmp_path):
    src, table = tmp_path / "set", tmp_path / "set" / "cases.csv"
    lines = ["case,t1,t2,mask,patient,remark"]
    for n in range(4):
        save(src / f"some/{n}.nii.gz", scan(n))
        save(src / f"other/deep/{n}.nii.gz", scan(n + 10))
        save(src / f"m{n}.nii.gz", MASK)
        lines.append(f"Case{n},some\\{n}.nii.gz,other/deep/{n}.nii.gz,m{n}.nii.gz,p{n // 2},x")
    table.write_text("\n".join([*lines, "Case9,some/0.nii.gz,other/deep/0.nii.gz,,p9,"]))
    summary = prepare(src, table=table, fractions=(0.5, 0.0, 0.5))
    assert summary.sections == {"training": 2, "validation": 0, "testing": 2} and summary.patients == 2
    assert "1 of 5 cases have no label and are left out: Case9" in summary.warnings
    assert "columns of cases.csv that are not used: remark" in summary.warnings
    datalist = read_datalist(tmp_path / "d.json")
    assert datalist["scans"] == ["t1", "t2"]
    item = load_datalist(tmp_path / "d.json", src)[0]
    assert [Path(f).parent.name for f in item["image"]] == ["some", "deep"]
    table.write_text("\n".join([*lines, "Case0,some/1.nii.gz,../x.nii.gz,m1.nii.gz,p0,"]))
    with pytest.raises(DataError, match=r"Case0: two rows in cases\.csv"):
        prepare(src, table=table, fractions=(0.5, 0, 0.5))


def test_a_table_of_patients_groups_images(tmp_path):
    from PIL import Image

    for n in range(6):
        for sub, array in (("images", np.arange(12) + n), ("masks", np.arange(12) % 2)):
            (tmp_path / sub).mkdir(exist_ok=True)
            Image.fromarray(array.reshape(3, 4).astype(np.uint8)).save(tmp_path / sub / f"a{n}.png")
    (tmp_path / "t.csv").write_text("".join(["file\tsubject\n", *(f"a{n}.png\tp{n // 3}\n" for n in range(6))]))
    options = {"labels": {"1": "x"}, "fractions": (0.5, 0, 0.5), "table": tmp_path / "t.csv", "progress": False}
    folders = (tmp_path / "images", tmp_path / "masks", tmp_path / "d.json")
    assert prepare_images(*folders, **options).sections == {"training": 3, "validation": 0, "testing": 3}
    rows = "".join(f"a{n}.png\t{'pP'[n // 3]}\n" for n in range(6))
    (tmp_path / "t.csv").write_text(f"file\tsubject\n{rows}")
    assert "split as two; if they are one, call them the same: 'P' and 'p'" in str(prepare_images(*folders, **options))
    with pytest.raises(ConfigError, match="a group and a table"):
        prepare_images(*folders, **options, group="a")


def test_folds_test_every_patient_once(tmp_path):
    src, table = tmp_path / "set", tmp_path / "t.csv"
    for n in range(7):
        save(src / f"images/v{n}.nii.gz", scan(n))
        save(src / f"labels/v{n}.nii.gz", MASK)
    table.write_text("case,patient\n" + "".join(f"v{n},p{max(n, 1)}\n" for n in range(7)))
    summary = prepare(src, folds=3, table=table)
    assert "in the first of 3 folds" in summary.lines()[0]
    assert [path.name for path in summary.datalists] == [f"d_fold{k}.json" for k in (1, 2, 3)]
    folds = [read_datalist(path) for path in summary.datalists]
    cases = [{s: [item["case"] for item in fold[s]] for s in ("training", "validation", "testing")} for fold in folds]
    assert sorted(case for fold in cases for case in fold["testing"]) == [f"v{n}" for n in range(7)]
    for number, fold in enumerate(cases):
        assert fold["validation"] == cases[(number + 1) % 3]["testing"]
        assert sorted(case for part in fold.values() for case in part) == [f"v{n}" for n in range(7)]
        assert folds[number]["split"]["fold"] == number + 1 and len(folds[number]["hashes"]) == 7
    for folds, reason in ((2, "at least 3"), (9, "6 patients cannot fill 9 folds")):
        with pytest.raises((ConfigError, DataError), match=reason):
            prepare(src, folds=folds, table=table)
    with pytest.raises(ConfigError, match="--folds and --split-file: each says how to split"):
        prepare(src, folds=3, split_file="x")
    with pytest.raises(ConfigError, match="--by-name and --folds"):
        prepare(src, folds=3, by_name=True)


def old_brats(src, cases, *, seg="seg", scans=("t1", "t1ce", "t2", "flair"), value=4, mark="_"):
    for case in cases:
        for number, name in enumerate(scans):
            save(src / case / f"{Path(case).name}{mark}{name}.nii.gz", scan(number))
        save(src / case / f"{Path(case).name}{mark}{seg}.nii.gz", ((MASK > 0) * value).astype(np.uint8))


@pytest.mark.parametrize("names", ["BraTS2021_{n:05}", "HGG/Brats18_2013_{n}_1", "BraTS20_Training_{n:03}"])
def test_brats_of_2017_to_2021_with_their_own_names(tmp_path, names):
    src = tmp_path / "set"
    old_brats(src, [names.format(n=n) for n in range(3)])
    if names.startswith("HGG"):
        old_brats(src, ["LGG/Brats18_TCIA_9_1"])
    options = {"fractions": (0.4, 0.3, 0.3), "progress": False}
    with pytest.raises(DataError, match="--label-coding 2021"):
        prepare_brats_men(src, tmp_path / "d.json", **options)
    summary = prepare_brats_men(src, tmp_path / "d.json", label_coding="2021", **options)
    datalist = read_datalist(tmp_path / "d.json")
    assert datalist["scans"] == ["t1n", "t1c", "t2w", "t2f"] and summary.patients == len(summary.sections) + (
        names.startswith("HGG")
    )
    item, image, _ = next(iter(loaded(src).values()))
    assert [Path(f).name.split("_")[-1] for f in item["image"]] == [
        f"{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")
    ]
    assert np.array_equal(image[1], scan(1))


@pytest.mark.parametrize("mark", ["_", "-"])
def test_meningioma_for_radiotherapy_has_one_scan_and_one_label(tmp_path, mark):
    src = tmp_path / "set"
    cases = ["BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001-2", "BraTS-MEN-RT-0002-1", "BraTS-MEN-RT-0003-1"]
    old_brats(src, cases, seg="gtv", scans=("t1c",), value=1, mark=mark)
    summary = prepare_brats_men(src, tmp_path / "d.json", fractions=(0.4, 0.3, 0.3), progress=False)
    datalist = read_datalist(tmp_path / "d.json")
    assert (datalist["name"], datalist["scans"], datalist["label_coding"]) == ("BraTS-MEN-RT", ["t1c"], "gtv")
    assert datalist["labels"] == {"0": "background", "1": "gross tumour volume"}
    assert summary.patients == 3 and any("with t1c and gtv (such as" in line for line in summary.lines())
    summary = prepare(src, labels={"1": "tumour"}, fractions=(0.5, 0.25, 0.25))
    assert "layout: one folder for each case, with t1c" in summary.lines()


def test_every_entry_of_a_folder_of_images_is_used_or_named(tmp_path):
    src = tmp_path / "set"
    for n in range(3):
        save(src / f"images/v{n}.nii.gz", scan(n))
        save(src / f"labels/v{n}.nii.gz", MASK)
    (src / "images" / "v9.mhd").write_text("x")
    (src / "images" / "Thumbs.db").write_text("x")
    (src / "images" / "old").mkdir()
    (warning,) = notes(prepare(src))
    assert warning.startswith("2 entries of images are no volumes") and warning.endswith("old, v9.mhd")


@pytest.mark.parametrize(
    "words", [["--src", ""], ["--src=", "x"], ["--src", "x", "--output", ""], ["--src", "x", "", "--output", "d.json"]]
)
def test_an_empty_argument_is_not_the_current_folder(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["samseg", "prepare", "folders", *words])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2 and "an argument is empty" in capsys.readouterr().err


def test_an_export_of_an_archive_is_prepared_by_its_tags(tmp_path, monkeypatch):
    src = tmp_path / "export"
    arrays = {n: exam(src / f"PAT{n}" / "STUDY", patient=n, scans={"t1c": "T1 +C", "x": "t2_flair"}) for n in range(4)}
    again = exam(src / "PAT4" / "2021", patient=3, study=2, scans={"t1c": "T1 +C", "x": "t2_flair"})
    affine = read_series(src / "PAT0" / "STUDY" / "SE000002").affine
    label = MASK[:, ::-1]  # as other tools store it
    turned = affine @ np.array([[1, 0, 0, 0], [0, -1, 0, 5], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    for place in ("PAT0/seg", "PAT1/STUDY/label", "labels/PAT2", "PAT3/PAT3_mask", "PAT4/2021/gtv"):
        save(src / f"{place}.nii.gz", label, turned)
    words = ["prepare", "folders", "--src", src, "--output", tmp_path / "d.json", "--labels", "1=a,2=b"]
    words += ["--fractions", "0.5,0.25,0.25"]
    assert samseg(monkeypatch, *words, "--scan", "t1c=+c", "--scan", "t2f") == 0
    found = loaded(src)
    assert sorted(found) == ["PAT0", "PAT1", "PAT2", "PAT3", "PAT4"]
    for n in range(5):
        scans = again if n == 4 else arrays[n]
        assert np.array_equal(found[f"PAT{n}"][1], np.stack([scans["t1c"], scans["x"]]))
    datalist = read_datalist(tmp_path / "d.json")
    parts = {item["case"]: part for part in ("training", "validation", "testing") for item in datalist[part]}
    assert parts["PAT3"] == parts["PAT4"]  # one patient, whose id stays in the files
    assert "ID3" not in (tmp_path / "d.json").read_text() and "DOE" not in (tmp_path / "d.json").read_text()

    shutil.copy(src / "labels" / "PAT2.nii.gz", src / "PAT2" / "seg.nii.gz")
    (src / "PAT1" / "STUDY" / "SE000002").rename(src / "PAT1" / "STUDY" / "SE000003" / "more")
    for path in (src / "PAT1" / "STUDY" / "SE000003" / "more").iterdir():
        path.rename(path.parent.parent / f"T1_{path.name}")
    (src / "PAT0" / "seg.nii.gz").unlink()
    with pytest.raises(DataError) as error:
        prepare(src, scans={"t1c": "", "t2f": ""})
    assert "PAT2.nii.gz and seg.nii.gz: which is the label? Keep one" in str(error.value)
    assert '("T1 +C", series 2) shares its folder with other files' in str(error.value)
    with pytest.raises(DataError, match="no series is t1n by its description"):
        prepare(src, scans={"t1n": ""})
    with pytest.raises(DataError, match="no DICOM series in it or below"):
        prepare(src / "labels", scans={"t1n": ""})
    for scan_option in ("=x", "t1c="):
        assert samseg(monkeypatch, *words, "--scan", scan_option) == 1
    (tmp_path / "t.csv").write_text("case,label,image\na,b,c\n")
    with pytest.raises(ConfigError, match=r"but t\.csv lists them"):
        prepare(src, scans={"t1c": ""}, table=tmp_path / "t.csv")


def test_one_patient_id_for_all_is_a_dummy(tmp_path):
    src = tmp_path / "export"
    for n in range(4):
        array = exam(src / f"P{n}" / "S", patient=0, scans={"t1c": f"T1 +C {n}"})["t1c"]
        affine = read_series(src / f"P{n}" / "S" / "SE000002").affine
        save(src / f"P{n}" / "seg.nii.gz", (array % 3).astype(np.uint8), affine)
    summary = prepare(src, scans={"t1c": ""}, fractions=(0.5, 0.25, 0.25))
    assert "each top folder is taken for a patient" in str(summary.warnings) and summary.patients == 4


def export(src, exams):
    """One series and its label for each folder with its PatientID, or None for none; the warnings and the owners."""
    for number, (place, patient) in enumerate(exams.items()):
        tags = {**tags_of(number, 1, 2, "T1 +C"), "0010|0020": patient}
        write_series(src / place / "t1c", scan(number), AXES["axial"], tags={k: v for k, v in tags.items() if v})
        save(src / place / "seg.nii.gz", MASK, read_series(src / place / "t1c").affine)
    summary = prepare(src, scans={"t1c": ""}, fractions=(1, 0, 0))
    datalist = read_datalist(src.parent / "d.json")
    return str(summary.warnings), {item["case"]: item["patient"] for item in datalist["training"]}


def test_exams_of_one_folder_or_one_id_are_one_patients(tmp_path):
    exams = {"PATA/S1": "A1", "PATA/S2": None, "PATB/S1": "B1", "PATB/S2": "B2", "PX/S1": "X", "PY/S1": "X"}
    exams |= {"D1/S": "ANON", "D2/S": "ANON", "D3/S": "ANON", "N0/S": "N0", "N1/S": None}
    said, owners = export(tmp_path / "export", exams)
    assert owners == {
        "PATA_S1": "PATA_S1", "PATA_S2": "PATA_S1", "PATB_S1": "PATB_S1", "PATB_S2": "PATB_S1", "PX": "PX", "PY": "PX",
        "D1": "D1", "D2": "D1", "D3": "D1", "N0": "N0", "N1": "N1",
    }  # fmt: skip
    assert "cases that have no PatientID: PATA_S1, PATA_S2: the split keeps them together" in said
    assert "a top folder with several PatientIDs: PATB_S1, PATB_S2: the split keeps them together" in said
    assert "one PatientID in 2 top folders: PX, PY: the split keeps them together" in said
    assert "PatientID 'ANON' is in 3 top folders, as a dummy would be: D1, D2, D3: the split keeps them" in said
    assert "no PatientID: N1: each is split as a patient of its own" in said

    (tmp_path / "t.csv").write_text("case,patient\n" + "".join(f"{case},{case[:2]}\n" for case in owners))
    summary = prepare(tmp_path / "export", scans={"t1c": ""}, fractions=(1, 0, 0), table=tmp_path / "t.csv")
    assert summary.patients == 8 and "PatientID" not in str(summary.warnings)


@pytest.mark.parametrize(("exams", "patients", "text"), [
    ({"DICOM/P1/S1": "1", "DICOM/P1/S2": "2", "DICOM/P2/S": "3"}, 2, "several PatientIDs"),
    ({"2021-03-04/P1": "1", "2021-03-04/P2": "2", "20220101/P1": "1"}, 2, "one PatientID in 2 top folders"),
    ({"a/P1": "1", "a/P2": "2", "b/P1": "1", "b/P3": "3"}, 3, "together they would join all cases"),
    ({"P1/S1": None, "P1/S2": None, "P2/S": None}, 2, "no case has a PatientID: each top folder is taken for"),
    ({"P1/S1": "1", "P1/S2": "1", "P2/S": "2"}, 2, None),
    ({"P1/S1": "1", "P1/S2": "1"}, 1, "one PatientID in 2 top folders"),
])  # fmt: skip
def test_a_folder_of_all_or_of_a_date_joins_no_patients(tmp_path, exams, patients, text):
    said, owners = export(tmp_path / "export", exams)
    assert len(set(owners.values())) == patients
    assert text in said if text else "PatientID" not in said


def test_names_of_patients_in_a_table_are_composed_and_compared(tmp_path):
    for n, _ in enumerate(patients := ["\u00e9", "e\u0301", "P1", "p1"]):
        save(tmp_path / f"set/{n}.nii.gz", scan(n))
        save(tmp_path / f"set/m{n}.nii.gz", MASK)
        save(tmp_path / f"pair/images/{n}.nii.gz", scan(n))
        save(tmp_path / f"pair/labels/{n}.nii.gz", MASK)
    listed = "".join(f"{n},{n}.nii.gz,m{n}.nii.gz,{patient}\n" for n, patient in enumerate(patients))
    rows = "".join(f"{n},{patient}\n" for n, patient in enumerate(patients))
    for name, text in {"set": "case,image,label,patient\n" + listed, "pair": "case,patient\n" + rows}.items():
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        summary = prepare(tmp_path / name, table=tmp_path / "t.csv", fractions=(1, 0, 0))
        assert summary.patients == 3 and "call them the same: 'P1' and 'p1'" in str(summary.warnings)
