"""TransUNet's preprocessed Synapse: slices become the volumes that they were cut from; what is missing is named."""

import importlib.util
import sys

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.data.datalists import load_datalist, read_datalist, unit_of
from samseg_monai.data.datalists.label_maps import BTCV_TESTING, BTCV_TRAINING
from samseg_monai.data.datalists.synapse import prepare_synapse
from samseg_monai.errors import DataError

SHAPE = (6, 5, 9)  # X, Y, Z
HAS_H5 = importlib.util.find_spec("h5py") is not None


def case_of(number):
    """A CT in whole HU, some of it outside of the window, and a label with all eight organs of TransUNet's coding."""
    rng = np.random.default_rng(number)
    return rng.integers(-400, 600, SHAPE), rng.choice([0, 5, 5, 5, 1, 2, 3, 3, 4, 4, 6, 7, 8], SHAPE)


def arrays_of(number):
    image, label = case_of(number)
    scaled = ((np.clip(image, -125, 275) + 125) / 400).astype(np.float32)
    return {"image": scaled.transpose(2, 1, 0), "label": label.astype(np.float32).transpose(2, 1, 0)}


@pytest.fixture
def src(tmp_path):
    """18 cases as slices, and the lists beside them."""
    folder, lists = tmp_path / "Synapse", tmp_path / "Synapse" / "lists" / "lists_Synapse"
    (folder / "train_npz").mkdir(parents=True)
    lists.mkdir(parents=True)
    names = []
    for case in BTCV_TRAINING:
        arrays = arrays_of(int(case))
        for z in range(SHAPE[2]):
            names.append(f"case{case}_slice{z:03d}")
            np.savez(folder / "train_npz" / f"{names[-1]}.npz", **{name: array[z] for name, array in arrays.items()})
    (lists / "train.txt").write_text("\n".join(names) + "\n")
    (lists / "test_vol.txt").write_text("")
    return folder


def prepare(src, **options):
    options = {"label_coding": "transunet", "allow_missing": True, "progress": False, **options}
    return prepare_synapse(src, src / "datalist.json", **options)


def test_slices_become_volumes_in_hu_again(src):
    summary = prepare(src, validation=3)
    assert summary.sections == {"training": 15, "validation": 3, "testing": 0}
    assert any("the size of a voxel is not known" in text for text in summary.warnings)
    assert unit_of(src / "datalist.json") == "px"
    items = {item["case"]: item for item in load_datalist(src / "datalist.json", src)}
    case = sorted(items)[0]
    image, label = case_of(int(case[4:]))
    stored = nib.load(items[case]["image"][0])
    assert nib.aff2axcodes(stored.affine) == ("L", "A", "S")
    assert np.array_equal(np.asanyarray(stored.dataobj), np.clip(image, -125, 275))
    assert np.array_equal(np.asanyarray(nib.load(items[case]["label"]).dataobj), label)
    assert read_datalist(src / "datalist.json")["labels"]["5"] == "liver"


def test_only_what_has_changed_is_written_again(src):
    prepare(src)
    volumes = sorted((src / "volumes").rglob("*.nii.gz"))
    before = {path: path.stat().st_mtime_ns for path in volumes}
    arrays = arrays_of(5)
    np.savez(src / "train_npz" / "case0005_slice002.npz", image=arrays["image"][3], label=arrays["label"][3])
    prepare(src)
    changed = [path.name for path in volumes if path.stat().st_mtime_ns != before[path]]
    assert changed == ["img0005.nii.gz", "label0005.nii.gz"]


def test_all_that_is_wrong_is_named_before_anything_is_written(src):
    (src / "train_npz" / "case0005_slice004.npz").unlink()
    (src / "train_npz" / "case0040_slice008.npz").unlink()
    np.savez(src / "train_npz" / "case0001_slice000.npz", image=np.zeros((5, 6)), label=np.zeros((5, 6)))
    with pytest.raises(DataError) as error:
        prepare(src)
    for text in (
        "case0005: no slices 4",
        "train.txt names 2 that are not there: case0005_slice004, case0040_slice008",
        "case0001: lies among the others, but is published as one to test",
    ):
        assert text in str(error.value)
    assert not (src / "volumes").exists()


def test_bad_slices_are_named_together(src):
    def spoil(case, **arrays):
        np.savez(src / "train_npz" / f"case{case}_slice000.npz", **arrays)

    good = {name: array[0] for name, array in arrays_of(1).items()}
    spoil("0005", image=good["image"] * 300, label=good["label"])
    spoil("0006", image=good["image"], label=good["label"] + 0.5)
    spoil("0007", image=good["image"][:3], label=good["label"])
    spoil("0009", image=good["image"])
    spoil("0010", image=good["image"] * np.nan, label=good["label"])
    (src / "train_npz" / "case0021_slice000.npz").write_bytes(b"PK\x03\x04 no zip")
    spoil("0023", image=np.array([{}]), label=good["label"])
    with pytest.raises(DataError, match=r"cases that cannot be used \(7 problems\)") as error:
        prepare(src)
    for text in (
        "case0005: its image has values from",
        "case0006: its label holds other values",
        "case0007: its slices have the",
        "case0009: case0009_slice000.npz: cannot be read as image and label",
        "case0010: holds values that are no finite",
        "case0021: case0021_slice000.npz:",
        "case0023: case0023_slice000.npz:",
    ):
        assert text in str(error.value), text


def test_without_h5py_the_test_volumes_ask_for_it(src, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (src / "test_vol_h5").mkdir()
    (src / "test_vol_h5" / "case0001.npy.h5").write_bytes(b"\x89HDF")
    with pytest.raises(
        DataError, match=r"case0001.npy.h5: reading it needs the package h5py; install samseg-monai\[h5\]"
    ):
        prepare(src)


@pytest.mark.skipif(not HAS_H5, reason="h5py is not installed")
def test_test_volumes_are_read_with_h5py(src):
    import h5py

    (src / "test_vol_h5").mkdir()
    for case in BTCV_TESTING:
        with h5py.File(src / "test_vol_h5" / f"case{case}.npy.h5", "w") as file:
            for name, array in arrays_of(int(case)).items():
                file[name] = array
    assert prepare(src).sections == {"training": 18, "validation": 0, "testing": 12}
