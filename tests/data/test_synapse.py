"""BTCV's folder becomes the published 18/12 datalist; missing cases, defects and foreign codings are named at once."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.datalists.label_maps import ABDOMEN, labels_in
from samseg_monai.data.datalists.label_maps import BTCV_TESTING as TESTING
from samseg_monai.data.datalists.label_maps import BTCV_TRAINING as TRAINING
from samseg_monai.data.datalists.synapse import prepare_synapse
from samseg_monai.demo.abdomen_phantoms import SMALLEST_SHAPE, write_btcv_cases
from samseg_monai.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("btcv") / "RawData"
    write_btcv_cases(folder / "Training", shape=SMALLEST_SHAPE, seed=1)
    return folder


@pytest.fixture
def src(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "RawData"))


def label_of(src, case):
    return src / "Training" / "label" / f"label{case}.nii.gz"


def image_of(src, case):
    return src / "Training" / "img" / f"img{case}.nii.gz"


def rewrite(path, change):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(image.dataobj)), image.affine), path)


def recode_files(src, coding):
    """Turn raw files into those of another coding, by name of organ."""
    value_of = {name: value for value, name in ABDOMEN[coding].items()}
    table = np.array([0] + [value_of.get(name, 0) for name in ABDOMEN["btcv13"].values()], dtype=np.uint8)
    for case in (*TRAINING, *TESTING):
        rewrite(label_of(src, case), lambda label: table[label.astype(int)])


def prepare(src, **options):
    return prepare_synapse(src, src.parent / "d.json", progress=False, **options)


def cases_of(path):
    datalist = json.loads(path.read_text())
    return {s: [item["case"] for item in datalist[s]] for s in ("training", "validation", "testing")}


def test_a_complete_folder_becomes_the_published_split(src, tmp_path):
    summary = prepare(src)
    datalist = json.loads((tmp_path / "d.json").read_text())
    assert summary.sections == {"training": 18, "validation": 0, "testing": 12}
    assert (summary.patients, summary.shapes) == (30, {"x".join(map(str, SMALLEST_SHAPE)): 30})
    assert cases_of(tmp_path / "d.json") == {
        "training": [f"case{case}" for case in TRAINING],
        "validation": [],
        "testing": [f"case{case}" for case in TESTING],
    }
    assert {key: datalist[key] for key in ("name", "modality", "phantoms", "scans", "label_coding", "split")} == {
        "name": "Synapse", "modality": "CT", "phantoms": True, "scans": ["image"], "label_coding": "btcv13",
        "split": {"by": "published 18/12", "validation": 0, "seed": 0},
    }  # fmt: skip
    assert datalist["labels"] == labels_in("btcv13")
    assert len(set(datalist["hashes"].values())) == 30
    voxels = sum(int((np.asanyarray(nib.load(label_of(src, c)).dataobj) == 6).sum()) for c in (*TRAINING, *TESTING))
    assert summary.voxels_per_label["6"] == voxels
    assert any(line.startswith(f"label 6 liver: {voxels} voxels") for line in summary.lines())
    first = load_datalist(tmp_path / "d.json", src, "testing", scans=["image"])[0]
    assert first["image"] == [str(image_of(src, "0001").resolve())]
    assert first["label"] == first["reference"] == str(label_of(src, "0001").resolve())
    assert first["patient"] == "case0001"


def test_the_folder_may_be_given_at_any_level(src, tmp_path):
    lists = []
    for level, folder in enumerate((src.parent, src, src / "Training")):
        prepare_synapse(folder, tmp_path / f"{level}.json", progress=False)
        (first, *_) = load_datalist(tmp_path / f"{level}.json", folder, "training")
        lists.append(first["image"])
    assert lists[0] == lists[1] == lists[2]
    with pytest.raises(DataError, match="holds no folders img and label"):
        prepare_synapse(src / "Training" / "img", tmp_path / "d.json")


def test_validation_is_taken_out_of_the_18_and_never_out_of_the_12(src, tmp_path):
    chosen = {}
    for seed in range(4):
        prepare(src, validation=3, seed=seed)
        cases = cases_of(tmp_path / "d.json")
        assert sorted(cases["training"] + cases["validation"]) == [f"case{case}" for case in TRAINING]
        assert cases["testing"] == [f"case{case}" for case in TESTING]
        assert len(cases["validation"]) == 3
        chosen[seed] = frozenset(cases["validation"])
        before = (tmp_path / "d.json").read_text()
        prepare(src, validation=3, seed=seed)
        assert (tmp_path / "d.json").read_text() == before
    assert len(set(chosen.values())) > 1
    # by sha256 of "0:case<id>", worked out with hashlib alone
    assert chosen[0] == {"case0024", "case0027", "case0037"}
    for wrong in (-1, 18):
        with pytest.raises(ConfigError, match="expected 0 to 17"):
            prepare(src, validation=wrong)


def test_missing_cases_are_an_error_that_lists_all_of_them_unless_allowed(src):
    for case in ("0005", "0038"):
        image_of(src, case).unlink()
        label_of(src, case).unlink()
    with pytest.raises(DataError, match=r"published cases 0005, 0038; .* --allow-missing"):
        prepare(src)
    with pytest.raises(DataError, match="0005, 0038"):
        prepare(src, skip_bad=True)  # what is absent is not a bad file
    summary = prepare(src, allow_missing=True)
    assert summary.sections == {"training": 17, "validation": 0, "testing": 11}
    assert [w for w in summary.warnings if "0005, 0038" in w]


def test_cases_that_were_never_published_are_named_and_left_out(src, tmp_path):
    shutil.copy(image_of(src, "0001"), image_of(src, "0061"))
    shutil.copy(label_of(src, "0001"), label_of(src, "0061"))
    (src / "Training" / "img" / "._img0001.nii.gz").write_bytes(b"left by a Mac")
    summary = prepare(src)
    assert [w for w in summary.warnings if "0061" in w] == ["case 0061 is not one of the 30 published ones: not used"]
    assert "0061" not in (tmp_path / "d.json").read_text()
    for case in (*TRAINING, *TESTING):
        image_of(src, case).unlink()
        label_of(src, case).unlink()
    with pytest.raises(DataError, match=r"none of the 30 published cases is there \(found 0061\)"):
        prepare(src)


def test_unpacked_files_are_taken_and_two_of_one_case_are_not(src):
    nib.save(nib.load(image_of(src, "0001")), src / "Training" / "img" / "img0001.nii")
    with pytest.raises(DataError, match=r"case0001: several files: img0001.nii, img0001.nii.gz; keep one"):
        prepare(src)
    image_of(src, "0001").unlink()
    assert prepare(src).sections["testing"] == 12


def test_defects_of_all_cases_are_named_at_once_and_can_be_left_out(src, tmp_path):
    image_of(src, "0005").write_bytes(image_of(src, "0005").read_bytes()[:-40])
    rewrite(label_of(src, "0006"), lambda a: a[:, :, :-1])
    rewrite(label_of(src, "0001"), lambda a: a.astype(np.float32) + 0.5)
    rewrite(label_of(src, "0002"), lambda a: np.where(a == 13, 14, a).astype(np.uint8))
    label_of(src, "0003").unlink()
    label = nib.load(label_of(src, "0004"))
    moved = label.affine + np.eye(4)[:, [3]] * np.array([0, 0, 0, 1])
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(np.asanyarray(label.dataobj), moved), label_of(src, "0004"))
    with pytest.raises(DataError, match="6 of 30 cases") as error:
        prepare(src)
    for expected in (
        "case0005: img0005.nii.gz: truncated or damaged gzip",
        "case0006: label0006.nii.gz: shape (",
        "case0001: label0001.nii.gz: labels are not whole numbers (0.5",
        "case0002: label0002.nii.gz: labels [14] are outside",
        "case0003: no file label/label0003.nii.gz",
        "case0004: label0004.nii.gz: affine differs",
    ):
        assert expected in str(error.value)
    assert not (tmp_path / "d.json").exists()
    summary = prepare(src, skip_bad=True)
    assert summary.sections == {"training": 16, "validation": 0, "testing": 8}
    assert len(summary.left_out) == 6


@pytest.mark.parametrize("coding", ["samed", "merit", "transunet"])
def test_files_of_eight_organs_need_their_name_and_then_pass_without_a_warning(src, coding):
    recode_files(src, coding)
    with pytest.raises(DataError, match="looks like one of samed, merit, transunet: name it with --label-coding"):
        prepare(src)
    assert prepare(src, label_coding=coding).warnings == []
    for wrong in {"samed", "merit", "transunet"} - {coding}:
        warnings = prepare(src, label_coding=wrong).warnings
        assert warnings
        assert all(w.endswith(f"is {wrong} the coding of these files?") for w in warnings)


def test_raw_files_are_refused_under_another_name(src):
    with pytest.raises(DataError, match=r"labels \[9, 10, 11, 12, 13\] are outside .*looks like btcv13: name it"):
        prepare(src, label_coding="samed")
    warnings = prepare(src, label_coding="totalsegmentator").warnings
    assert any("no case has aorta (52)" in w for w in warnings)
    with pytest.raises(ConfigError, match="choose one of btcv13, samed, merit, transunet, totalsegmentator"):
        prepare(src, label_coding="2023")


def test_commands_do_the_whole_way(tmp_path):
    import typer

    from samseg_monai.cli.data import phantom_app, prepare_app

    app = typer.Typer()
    app.add_typer(phantom_app, name="phantom")
    app.add_typer(prepare_app, name="prepare")

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    shape = ",".join(map(str, SMALLEST_SHAPE))
    made = call("phantom", "btcv", "--output", tmp_path, "--cases", 5, "--unlabelled", 1, "--shape", shape)
    assert made.exit_code == 0, made.output
    assert "wrote 5 labelled and 1 unlabelled phantoms" in made.output
    arguments = ("prepare", "synapse", "--src", tmp_path, "--output", tmp_path / "d.json", "--validation", 1)
    failed = call(*arguments)
    assert isinstance(failed.exception, DataError)
    listed = call(*arguments, "--allow-missing")
    assert listed.exit_code == 0, listed.output
    assert "5 cases of 5 patients: 2 training, 1 validation, 2 testing" in listed.output
    assert call("phantom", "btcv", "--output", tmp_path, "--shape", "32,36").exit_code == 2


@pytest.mark.parametrize("change", [lambda hu: hu + 1024, lambda hu: np.clip((hu + 125) / 400 * 255, 0, 255)])
def test_a_ct_that_is_not_in_hounsfield_units_is_told(change, src):
    for case in TRAINING[:2]:
        rewrite(image_of(src, case), lambda array: change(array.astype(float)).astype(np.int16))
    told = [text for text in prepare(src).warnings if "do not look like a CT in Hounsfield units" in text]
    assert len(told) == 2 and all(case in text for case, text in zip(sorted(TRAINING[:2]), sorted(told), strict=True))
