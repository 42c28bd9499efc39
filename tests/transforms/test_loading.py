"""What is loaded to train or evaluate is looked at as in prepare: values, sizes, units, hashes."""

import gzip
import json
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.images import prepare_images
from samseg_monai.data.files.volumes import modality_doubt, read_volume
from samseg_monai.demo.brain_phantoms import write_brats_cases
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import LoadCased, RecodeLabeld
from tests.helpers.pictures import make_pictures

KEYS = ["image", "label"]


def load(item, **options):
    return LoadCased(KEYS, ensure_channel_first=True, allow_missing_keys=True, **options)(item)


@pytest.fixture
def folder(tmp_path):
    """Three volumes with labels, prepared."""
    rng = np.random.default_rng(0)
    for n in range(3):
        for kind, array in (("images", rng.normal(0, 300, (6, 5, 4))), ("labels", rng.integers(0, 3, (6, 5, 4)))):
            (tmp_path / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / kind / f"v{n}.nii.gz")
    table = {"1": "a", "2": "b"}
    prepare_folders(tmp_path, tmp_path / "d.json", labels=table, counts=(1, 1, 1), progress=False)
    return tmp_path


def test_a_case_that_was_changed_after_prepare_is_named(folder):
    for section in ("training", "validation", "testing"):
        [item] = load_datalist(folder / "d.json", folder, section)
        loaded = load(item)
        assert "recorded" not in loaded and loaded["image"].shape == (1, 6, 5, 4)
    label = folder / "labels" / "v2.nii.gz"
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.full(image.shape, 77, np.float32), image.affine), label)
    with pytest.raises(DataError, match="v2: its files are not those that were prepared"):
        load(item)
    table = json.loads((folder / "d.json").read_text())
    del table["hashes"]  # a list of one's own has none
    (folder / "d.json").write_text(json.dumps(table))
    assert "recorded" not in load_datalist(folder / "d.json", folder, "testing")[0]


def test_hashes_of_every_kind_of_datalist_are_compared(tmp_path):
    write_brats_cases(tmp_path / "brats", 3, shape=(32, 36, 8), seed=2)
    prepare_brats_men(tmp_path / "brats", tmp_path / "brats" / "d.json", fractions=(0.34, 0.33, 0.33), progress=False)
    pictures = make_pictures(tmp_path / "pictures")
    prepare_images(
        pictures / "images", pictures / "labels", pictures / "d.json", labels={"255": "disc"}, progress=False
    )
    for root, scans in ((tmp_path / "brats", ["t1c"]), (pictures, ["image"])):
        item = load_datalist(root / "d.json", root, "training", scans=scans)[0]
        given = {"reader": "samseg_monai.data.files.images.ImageFileReader"} if root == pictures else {}
        assert "recorded" in item and load(item, **given)["image"].shape[0] == 1
        other = next(iter(item["recorded"]["files"].values()))  # a scan that is not used
        with open(other, "ab") as stream:
            stream.write(b"x")
        with pytest.raises(DataError, match="not those that were prepared"):
            load(item, **given)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_would_count_as_dice_zero_are_refused(tmp_path, value):
    array = np.arange(120.0).reshape(6, 5, 4)
    array[0, 0, 0] = value
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match=r"one: its image cannot be used.*\n.*1 voxels are NaN or infinite"):
        load({"case": "one", "image": str(tmp_path / "x.nii.gz")})
    nib.save(nib.Nifti1Image(np.ones((6, 5, 4)), np.eye(4)), tmp_path / "y.nii.gz")
    with pytest.raises(DataError, match=r"y\.nii\.gz: every voxel has the value 1"):
        load({"case": "one", "image": [str(tmp_path / "y.nii.gz")] * 2})


def test_sizes_and_units_that_are_not_mm_are_refused(tmp_path):
    array = np.arange(120.0).reshape(6, 5, 4)
    for name, side, unit in (("large", 30.0, "mm"), ("metres", 1.0, "meter"), ("microns", 1.0, "micron")):
        image = nib.Nifti1Image(array, np.diag([side, 1, 1, 1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    for name, said in (("large", "30 x 1 x 1 mm"), ("metres", "in metres"), ("microns", "in microns")):
        with pytest.raises(DataError, match=f"{name}: .*\n.*{said}"):
            load({"case": name, "image": str(tmp_path / f"{name}.nii.gz")})


def test_a_file_that_cannot_be_loaded_is_named_and_a_doubt_is_told(folder, caplog):
    (folder / "bad.nii.gz").write_bytes(gzip.compress(b"no header"))
    with pytest.raises(DataError, match="one: cannot be loaded; ImageFileError"):
        load({"case": "one", "image": str(folder / "bad.nii.gz")})
    array = np.arange(120.0).reshape(6, 5, 4)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "x.nii.gz")
    load({"case": "one", "image": str(folder / "x.nii.gz")}, modality="CT")
    assert "one: its values (from 0 to 119) do not look like a CT in Hounsfield units" in caplog.text
    assert not modality_doubt(array, "MR") and not modality_doubt(array, "") and modality_doubt(array - 1010, "MR")


def test_prepare_says_that_a_ct_is_not_in_hounsfield_units(folder, caplog):
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"1": "a", "2": "b"}}))
    image = nib.load(folder / "images" / "v1.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata() + 1024, image.affine), folder / "images" / "v1.nii.gz")
    summary = prepare_folders(folder, folder / "d.json", counts=(1, 1, 1), progress=False)
    assert [text for text in summary.warnings if "Hounsfield" in text and text.startswith("v1: ")]
    assert not [text for text in summary.warnings if "Hounsfield" in text and not text.startswith("v1: ")]


def test_dead_links_are_listed_by_prepare(folder):
    for kind in ("images", "labels"):
        (folder / kind / "v9.nii.gz").symlink_to("nowhere/x.nii.gz")
    with pytest.raises(DataError, match=r"v9: v9\.nii\.gz: cannot be read, as it is a link to nowhere/x\.nii\.gz"):
        prepare_folders(folder, folder / "d.json", labels={"1": "a", "2": "b"}, progress=False)


def test_foreground_is_one_class_and_its_values_must_be_known():
    label = np.array([[0, 1, 2, 3]])
    table = {"0": "background", "1": "core", "2": "oedema", "3": "enhancing"}
    recode = RecodeLabeld("label", table, ["tumour"], merged=True)
    assert recode({"label": label})["label"].tolist() == [[0, 1, 1, 1]]
    with pytest.raises(DataError, match=r"one: label has values \[77\]"):
        recode({"case": "one", "label": label + 74 * (label == 3)})
    free = RecodeLabeld("label", {}, ["tumour"], merged=True)({"label": np.array([[0, 0.4, 0.5, 9]])})["label"]
    assert free.tolist() == [[0, 0, 1, 1]] and str(free.dtype) == "torch.uint8"
    with pytest.raises(ConfigError, match="merged labels are one class"):
        RecodeLabeld("label", table, ["a", "b"], merged=True)


@pytest.mark.parametrize("axes", [(6, 5, 4, 3), (6, 5, 4, 2, 2)])
def test_an_image_of_other_axes_that_comes_after_prepare_is_named(folder, axes):
    """Of a datalist with hashes as a changed file, of one's own list by its shape."""
    [item] = load_datalist(folder / "d.json", folder, "testing")
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).normal(0, 9, axes).astype(np.float32), np.eye(4)), item["image"][0]
    )
    with pytest.raises(DataError, match="v2: its files are not those that were prepared"):
        load(dict(item), scans=["image"])
    del item["recorded"]
    shape = " x ".join(map(str, axes[:3])) if len(axes) == 4 else " x ".join(map(str, axes[:4]))
    told = rf"v2: its image has {axes[-1]} channels or time points of {shape} voxels, expected 1 of three axes"
    with pytest.raises(DataError, match=told):
        load(dict(item), scans=["image"])
    if len(axes) == 4:  # one file of named scans
        assert load(dict(item), scans=["a", "b", "c"])["image"].shape == (3, 6, 5, 4)
    item["image"], item["label"] = [item["label"]], item["image"][0]
    with pytest.raises(DataError, match=r"v2: its label has . channels or time points of"):
        load(item, scans=["image"])


def test_volumes_beyond_the_memory_are_refused_by_their_headers(folder, monkeypatch):
    image = nib.load(folder / "images" / "v0.nii.gz")
    image.to_filename(folder / "x.nii")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(folder / "x.nrrd"))
    monkeypatch.setattr("samseg_monai.data.files.headers.free_memory", lambda: 900.0)
    for name in ("images/v0.nii.gz", "x.nii", "x.nrrd"):
        told = r"its header speaks of 120 voxels, 9\.6e-07 GB in memory, of which 9e-07 GB are free"
        with pytest.raises(DataError, match=told):
            read_volume(folder / name)
        with pytest.raises(DataError, match=f"one: cannot be loaded; .*{told}"):
            load({"case": "one", "image": str(folder / name)})
    monkeypatch.setattr("samseg_monai.data.files.headers.free_memory", lambda: 1000.0)
    assert read_volume(folder / "images" / "v0.nii.gz").array.shape == (6, 5, 4)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_file_that_goes_on_behind_its_voxels_is_refused_and_not_unpacked(folder, name):
    whole = gzip.decompress((folder / "images" / "v0.nii.gz").read_bytes())
    pack = gzip.compress if name.endswith(".gz") else bytes
    (folder / name).write_bytes(pack(whole))
    assert read_volume(folder / name).array.shape == (6, 5, 4)
    for more in (1, 200_000_000 if name.endswith(".gz") else 1000):  # the larger one is 200 kB as gzip
        (folder / name).write_bytes(pack(whole + bytes(more)))
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"{name}: goes on behind the 832 bytes that its header speaks of"):
            read_volume(folder / name)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()
