"""Decathlon folders and plain folders become datalists split by volume; every defect is named at once."""

import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from samseg_monai.data.datalists import labels_of, load_datalist
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.label_maps import parse_labels
from samseg_monai.errors import ConfigError, DataError

LABELS = {"1": "anterior", "2": "posterior"}
ONE = (
    "validation has one case: its chance decides which epoch is kept; validate on more, or keep the last epoch "
    "(val_interval 0)"
)
AFFINE = np.diag([1.0, 2.0, 1.5, 1.0])
SHAPE = (7, 6, 5)


def write_pair(folder, case, pair, *, label_dtype=np.uint8):
    rng = np.random.default_rng(int(case[-3:]))
    for sub, values in zip(pair, (rng.integers(0, 900, SHAPE), np.arange(210).reshape(SHAPE) % 3), strict=True):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        dtype = np.float32 if sub == pair[0] else label_dtype
        nib.save(nib.Nifti1Image(values.astype(dtype), AFFINE), folder / sub / f"{case}.nii.gz")


@pytest.fixture
def plain(tmp_path) -> Path:
    for number in range(10):
        write_pair(tmp_path / "set", f"vol_{number:03d}", ("images", "labels"))
    return tmp_path / "set"


@pytest.fixture
def decathlon(tmp_path) -> Path:
    src = tmp_path / "Task04_Hippocampus"
    for number in range(10):
        write_pair(src, f"vol_{number:03d}", ("imagesTr", "labelsTr"))
    (src / "imagesTs").mkdir()
    shutil.copy(src / "imagesTr" / "vol_000.nii.gz", src / "imagesTs" / "vol_777.nii.gz")
    shutil.copy(src / "imagesTr" / "vol_000.nii.gz", src / "imagesTr" / "._vol_000.nii.gz")
    write_table(src, range(10))
    return src


def write_table(src, numbers, **changes):
    names = [f"vol_{n:03d}.nii.gz" for n in numbers]
    table = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/vol_777.nii.gz"],
    }
    (src / "dataset.json").write_text(json.dumps({**table, **changes}))


def prepare(src, **options):
    return prepare_folders(src, src.parent / "d.json", progress=False, **options)


def cases_of(src):
    datalist = json.loads((src.parent / "d.json").read_text())
    return {s: [item["case"] for item in datalist[s]] for s in ("training", "validation", "testing")}


def names(*numbers):
    return [f"vol_{n:03d}" for n in numbers]


def test_counts_take_volumes_in_the_order_of_their_names(plain):
    summary = prepare(plain, labels=LABELS, counts=(5, 2, 3), name="Test set")
    datalist = json.loads((plain.parent / "d.json").read_text())
    assert cases_of(plain) == {"training": names(*range(5)), "validation": names(5, 6), "testing": names(7, 8, 9)}
    assert datalist["split"] == {"by": "volume", "order": "name", "counts": [5, 2, 3]}
    assert (datalist["name"], datalist["scans"], datalist["phantoms"]) == ("Test set", ["image"], False)
    assert datalist["label_coding"] == "own"
    assert labels_of(plain.parent / "d.json") == {"0": "background", **LABELS}
    assert summary.voxels_per_label == {"0": 700, "1": 700, "2": 700}
    assert summary.spacings_mm == {"1x2x1.5": 10}
    assert summary.warnings == []
    assert summary.lines()[0].startswith("10 volumes, it is not known which share a patient: 5 training")
    item = load_datalist(plain.parent / "d.json", plain, "validation", scans=["image"])[0]
    assert item["image"] == [str((plain / "images" / "vol_005.nii.gz").resolve())]
    assert item["reference"] == item["label"] == str((plain / "labels" / "vol_005.nii.gz").resolve())
    assert item["patient"] == "vol_005"


def test_names_that_look_like_time_points_stay_separate_volumes(tmp_path):
    for number in range(3):
        write_pair(tmp_path / "set", f"P-00001-{number:03d}", ("images", "labels"))
    prepare(tmp_path / "set", labels=LABELS, counts=(1, 1, 1))
    assert all(len(cases) == 1 for cases in cases_of(tmp_path / "set").values())


def test_fractions_are_drawn_with_a_seed_or_cut_by_name(plain):
    prepare(plain, labels=LABELS, fractions=(0.5, 0.2, 0.3), by_name=True)
    assert cases_of(plain) == {"training": names(*range(5)), "validation": names(5, 6), "testing": names(7, 8, 9)}
    drawn = {}
    for seed in (0, 1, 0):
        prepare(plain, labels=LABELS, fractions=(0.5, 0.2, 0.3), seed=seed)
        assert [len(cases) for cases in cases_of(plain).values()] == [5, 2, 3]
        assert drawn.setdefault(seed, cases_of(plain)) == cases_of(plain)
    assert drawn[0] != drawn[1]
    split = json.loads((plain.parent / "d.json").read_text())["split"]
    assert split == {"by": "volume", "order": "hash", "seed": 0, "fractions": [0.5, 0.2, 0.3]}


@pytest.mark.parametrize("counts", [(5, 2, 2), (11, -1, 0), (5, 5)])
def test_counts_that_do_not_fit_are_refused(plain, counts):
    with pytest.raises(DataError, match="a split of 10 cases needs three counts"):
        prepare(plain, labels=LABELS, counts=counts)


def test_a_decathlon_folder_brings_its_own_table(decathlon):
    summary = prepare(decathlon, counts=(6, 2, 2))
    datalist = json.loads((decathlon.parent / "d.json").read_text())
    assert (datalist["name"], datalist["modality"]) == ("Hippocampus", "MRI")
    assert datalist["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert datalist["training"][0] == {
        "case": "vol_000", "patient": "vol_000", "image": ["imagesTr/vol_000.nii.gz"],
        "label": "labelsTr/vol_000.nii.gz", "reference": "labelsTr/vol_000.nii.gz",
    }  # fmt: skip
    assert summary.warnings == ["1 images in imagesTs have no label: 'samseg predict' takes them"]
    prepare(decathlon, counts=(6, 2, 2), labels=LABELS)
    assert labels_of(decathlon.parent / "d.json")["1"] == "anterior"


def test_only_listed_volumes_are_used_and_the_others_named(decathlon):
    write_table(decathlon, [3, 1, 2])
    summary = prepare(decathlon, counts=(1, 1, 1))
    assert cases_of(decathlon) == {"training": names(1), "validation": names(2), "testing": names(3)}
    assert any("7 images are not in the training list of dataset.json: vol_000" in w for w in summary.warnings)


def test_a_bad_list_is_described_entry_by_entry(decathlon):
    entries = [
        {"image": "./imagesTr/vol_000.nii.gz", "label": "./labelsTr/vol_000.nii.gz"},
        {"image": "./imagesTr/vol_000.nii.gz", "label": "./labelsTr/vol_000.nii.gz"},
        {"image": "./imagesTr/vol_001.nii.gz", "label": "../elsewhere.nii.gz"},
        {"image": "./imagesTr/vol_099.nii.gz", "label": "./labelsTr/vol_002.nii.gz"},
        "./imagesTr/vol_003.nii.gz",
    ]
    write_table(decathlon, [], training=entries)
    with pytest.raises(DataError, match="4 of 4 cases") as error:
        prepare(decathlon)
    for expected in (
        "vol_000: is listed twice in dataset.json",
        "vol_001: its label in dataset.json is no file below",
        "vol_099: vol_099.nii.gz: cannot be read",
        "training[4]: its image in dataset.json is no file below",
    ):
        assert expected in str(error.value)


def test_tables_that_cannot_be_used_are_refused_and_the_reversed_one_is_understood(decathlon):
    write_table(decathlon, range(10), labels={"background": 0, "anterior": 1, "posterior": 2})
    prepare(decathlon)
    assert labels_of(decathlon.parent / "d.json") == {"0": "background", **LABELS}
    write_table(decathlon, range(10), labels={"a": "b"})
    with pytest.raises(DataError, match="labels must be"):
        prepare(decathlon)
    (decathlon / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        prepare(decathlon)


def test_somebody_must_say_what_the_labels_mean_and_only_one(plain):
    with pytest.raises(ConfigError, match="nobody says what the numbers in the labels mean"):
        prepare(plain)
    with pytest.raises(ConfigError, match="give one of them"):
        prepare(plain, labels=LABELS, label_coding="samed")
    with pytest.raises(ConfigError, match="unknown label coding 'x'"):
        prepare(plain, label_coding="x")
    warnings = prepare(plain, label_coding="samed").warnings
    assert any(w.startswith("no case has left kidney (3), gallbladder (4)") for w in warnings)
    assert any("not the largest organ" in w for w in warnings)
    assert json.loads((plain.parent / "d.json").read_text())["label_coding"] == "samed"


def test_labels_are_parsed_from_the_command_line():
    assert parse_labels("1=anterior, 02 = posterior part") == {"1": "anterior", "2": "posterior part"}
    assert parse_labels("1=a,-1=outside") == {"1": "a", "-1": "outside"}
    for wrong in ("", "1", "1=", "=a", "one=a", "1=a,1=b", "--1=a", "1.0=a", "9999999=a"):
        with pytest.raises(ConfigError, match="each value once"):
            parse_labels(wrong)


def test_defects_of_all_cases_are_named_at_once_and_can_be_left_out(plain):
    def spoil(number, sub, change, affine=AFFINE):
        path = plain / sub / f"vol_{number:03d}.nii.gz"
        nib.save(nib.Nifti1Image(change(nib.load(path).get_fdata()).astype(np.float32), affine), path)

    first = plain / "images" / "vol_000.nii.gz"
    first.write_bytes(first.read_bytes()[:-30])
    bad = int((nib.load(plain / "images" / "vol_001.nii.gz").get_fdata() > 800).sum())
    spoil(1, "images", lambda a: np.where(a > 800, np.nan, a))
    spoil(2, "labels", lambda a: a[:, :, :-1])
    spoil(3, "labels", lambda a: a, affine=np.diag([1.0, 2.0, 2.0, 1.0]))
    spoil(4, "labels", lambda a: a * 0.75)
    spoil(5, "labels", lambda a: a * 255)
    (plain / "labels" / "vol_006.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    (plain / "images" / "vol_007.nii.gz").write_bytes(b"")
    (plain / "images" / "vol_008.nii").write_bytes(gzip.decompress((plain / "images" / "vol_008.nii.gz").read_bytes()))
    write_pair(plain, "vol_010", ("images", "labels"))
    (plain / "images" / "vol_010.nii.gz").unlink()
    with pytest.raises(DataError, match=r"10 of 11 cases .*--skip-bad \(10 problems\)") as error:
        prepare(plain, labels=LABELS)
    for expected in (
        "vol_000: vol_000.nii.gz: truncated or damaged gzip",
        f"vol_001: vol_001.nii.gz: {bad} voxels are NaN or infinite",
        "vol_002: vol_002.nii.gz: shape (7, 6, 4) differs",
        "vol_003: vol_003.nii.gz: affine differs",
        "vol_004: vol_004.nii.gz: labels are not whole numbers (0.75, 1.5)",
        "vol_005: vol_005.nii.gz: labels [255, 510] are outside [0, 1, 2]; name every value with --labels",
        "vol_006: vol_006.nii.gz: is a git-lfs pointer",
        "vol_007: vol_007.nii.gz: the file is empty",
        "vol_008: vol_008.nii and vol_008.nii.gz in images: keep one",
        "vol_010: no file of this name in images",
    ):
        assert f"  - {expected}" in str(error.value)
    summary = prepare(plain, labels=LABELS, skip_bad=True, counts=(0, 0, 1))
    assert len(summary.left_out) == 10
    assert cases_of(plain)["testing"] == names(9)


def test_labels_stored_as_fractions_are_counted_and_pass(plain):
    write_pair(plain, "vol_003", ("images", "labels"), label_dtype=np.float32)
    write_pair(plain, "vol_004", ("images", "labels"), label_dtype=np.float32)
    assert prepare(plain, labels=LABELS).warnings == [
        "2 labels are stored as float32 and hold whole numbers only: they are read as integers",
        ONE,
    ]


def test_the_same_volume_under_two_names_and_labels_nobody_has_are_warned_of(plain):
    for sub in ("images", "labels"):
        shutil.copy(plain / sub / "vol_001.nii.gz", plain / sub / "vol_008.nii.gz")
    warnings = prepare(plain, labels={**LABELS, "3": "tail"}).warnings
    assert warnings == ["vol_001 and vol_008 have the same content", "no case has tail (3)", ONE]


def test_a_folder_one_level_too_high_or_too_low_is_pointed_out(plain, decathlon):
    with pytest.raises(DataError, match=r"did you mean .*Task04_Hippocampus"):
        prepare(plain.parent)
    with pytest.raises(DataError, match="give its parent"):
        prepare(plain / "labels")
    with pytest.raises(DataError, match="absent: no such folder"):
        prepare(plain / "absent")
    with pytest.raises(DataError, match=r"dataset.json: is no folder"):
        prepare(decathlon / "dataset.json")
    for path in (plain / "images").iterdir():
        path.unlink()
    shutil.rmtree(plain / "labels")
    (plain / "labels").mkdir()
    with pytest.raises(DataError, match="no volume in images"):
        prepare(plain, labels=LABELS)


def test_the_command_prepares_and_refuses_two_kinds_of_split(plain, tmp_path):
    import typer

    from samseg_monai.cli.data import prepare_app

    app = typer.Typer()
    app.add_typer(prepare_app, name="prepare")
    arguments = ["prepare", "folders", "--src", plain, "--output", tmp_path / "d.json", "--labels"]
    arguments = [str(a) for a in [*arguments, "1=anterior,2=posterior", "--split", "5,2,3"]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "5 training, 2 validation, 3 testing" in done.output
    assert "label 2 posterior: 700 voxels (33.333 %), in 10 cases" in done.output
    both = CliRunner().invoke(app, [*arguments, "--fractions", "1,0,0"])
    assert both.exit_code == 1 and "--split and --fractions: each says how to split" in str(both.exception)
    for fractions in ("nan,0.5,0.5", "inf,0,0", "-0.5,1,0.5"):
        wrong = CliRunner().invoke(app, [*arguments, "--fractions", fractions])
        assert wrong.exit_code == 2 and "expected 3 numbers >= 0" in wrong.output
    assert CliRunner().invoke(app, [*arguments, "--seed", "-1"]).exit_code == 2


def regrid(path, change):
    image = nib.load(path)
    affine = image.affine.copy()
    change(affine)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


def test_a_grid_is_the_same_while_no_corner_moves_by_a_twentieth_of_a_voxel(plain):
    """A label 0.002 mm off passes with a note; a spacing error that adds up to half a voxel is another grid."""

    def shifted(affine):
        affine[0, 3] += 0.002

    def stretched(affine):
        affine[0, 0] *= 1 + 0.5 / np.asarray(nib.load(plain / "images" / "vol_000.nii.gz").dataobj).shape[0]

    regrid(plain / "labels" / "vol_000.nii.gz", shifted)
    summary = prepare(plain, labels=LABELS)
    assert any("vol_000: " in text and "0.002 voxels at a corner" in text for text in summary.warnings)
    regrid(plain / "labels" / "vol_001.nii.gz", stretched)
    with pytest.raises(DataError, match=r"vol_001.nii.gz: affine differs, by 0\.[45]"):
        prepare(plain, labels=LABELS)


@pytest.mark.realdata
def test_real_hippocampi_are_prepared_by_name(realdata, tmp_path):
    summary = prepare_folders(
        realdata / "hippocampus", tmp_path / "d.json", labels=LABELS, counts=(128, 30, 40), progress=False
    )
    assert summary.sections == {"training": 128, "validation": 30, "testing": 40}
    assert summary.voxels_per_label == {"0": 11822748, "1": 343831, "2": 313910}
    assert summary.spacings_mm == {"1x1x1": 198}
    assert summary.warnings[-1].startswith("2 labels are stored as float32")
    cases = cases_of(tmp_path / "x")
    assert cases["training"] + cases["validation"] + cases["testing"] == sorted(
        path.name.removesuffix(".nii.gz") for path in (realdata / "hippocampus" / "images").iterdir()
    )


@pytest.mark.realdata
def test_odd_files_are_each_described(realdata, tmp_path):
    odd = realdata / "odd_inputs" / "derived_synthetic"
    pairs = {
        "good": ("ok_image.nii.gz", "ok_label.nii.gz", None),
        "slope": ("scl_slope_zero.nii", "ok_label.nii.gz", None),
        "sheared": ("sheared_affine.nii.gz", "ok_label.nii.gz", "affine differs"),
        "four": ("4d_singleton_image.nii.gz", "ok_label.nii.gz", None),  # a fourth axis of one
        "constant": ("constant_image.nii.gz", "ok_label.nii.gz", "every voxel has the value"),
        "nan": ("nan_inf_image.nii.gz", "ok_label.nii.gz", "NaN or infinite"),
        "gzip": ("truncated_gzip.nii.gz", "ok_label.nii.gz", "truncated or damaged gzip"),
        "pixels": ("truncated_pixels.nii", "ok_label.nii.gz", "truncated or damaged NIfTI"),
        "zero": ("zero_bytes.nii.gz", "ok_label.nii.gz", "the file is empty"),
        "packed": ("plain_nifti_named_gz.nii.gz", "ok_label.nii.gz", "is not a gzip file"),
        "offset": ("ok_image.nii.gz", "label_affine_offset_5mm.nii.gz", "affine differs"),
        "flipped": ("ok_image.nii.gz", "label_flipped_axis_same_world.nii.gz", None),
        "fraction": ("ok_image.nii.gz", "label_float_noninteger.nii.gz", None),  # by 0.0001
        "high": ("ok_image.nii.gz", "label_high_values_0_255_510.nii.gz", "[255, 510] are outside [0, 1, 2]"),
        "shape": ("ok_image.nii.gz", "label_shape_mismatch.nii.gz", "shape (35, 51, 33) differs"),
    }
    pointers = realdata / "odd_inputs" / "git_lfs_pointer"
    src = tmp_path / "set"
    for case, (image, label, _) in pairs.items():
        for sub, name in (("images", image), ("labels", label)):
            (src / sub).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(odd / name, src / sub / f"{case}.nii{'.gz' if name.endswith('.gz') else ''}")
    for sub in ("images", "labels"):
        shutil.copyfile(pointers / sub / "liver_0.nii.gz", src / sub / "pointer.nii.gz")
    summary = prepare(src, labels=LABELS, skip_bad=True, counts=(3, 1, 1))
    usable = ["flipped", "four", "fraction", "good", "slope"]
    assert sorted(case for cases in cases_of(src).values() for case in cases) == usable
    told = {case: [text for text in summary.left_out if text.startswith(f"{case}: ")] for case in (*pairs, "pointer")}
    for case, (_, _, reason) in pairs.items():
        assert bool(told[case]) == bool(reason), case
        assert any((reason or "") in text for text in told[case]) or not reason, told[case]
    assert len([text for text in told["pointer"] if "git-lfs pointer" in text]) == 2


@pytest.mark.parametrize("off", [1e-8, 4e-4])
def test_labels_that_are_nearly_whole_are_rounded_with_a_note_and_trained_alike(plain, off):
    from samseg_monai.transforms import RecodeLabeld

    path = plain / "labels" / "vol_004.nii.gz"
    label = nib.load(path).get_fdata()
    nib.save(nib.Nifti1Image(label - off * (label > 0), AFFINE), path)  # 0.99999999
    (note,) = [text for text in prepare(plain, labels=LABELS).warnings if text.startswith("vol_004")]
    assert "140 labels are no whole numbers by up to" in note and "they are rounded" in note
    recode = RecodeLabeld("label", {"0": "background", **LABELS}, ["anterior", "posterior"])
    assert np.array_equal(recode({"label": nib.load(path).get_fdata()})["label"], label)
    with pytest.raises(DataError, match=r"values \[70000000000\]|values \[1, 70000000000\]"):
        recode({"label": np.array([7e10, 1.0])})
