"""A folder of DICOM slices is read as MONAI reads it, or refused where MONAI would load something else in silence."""

import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, SaveImaged

from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.dicom import holds_series, is_dicom, read_series
from samseg_monai.data.files.volumes import read_volume
from samseg_monai.errors import DataError
from samseg_monai.transforms import NameAfterCased

# row and column directions in LPS; the slices of the second descend towards the feet
AXES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "feet first": ((-1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": ((0.8, 0.6, 0), (-0.6, 0.8, 0)),
}
ORIGIN, PIXEL, STEP = np.array([5.0, 6, 7]), (0.8, 0.7), 2.0
SHAPE = (7, 6, 5)


def write_slice(path, plane, position, axes=AXES["axial"], *, pixel=PIXEL, tags=None, compress=False):
    """Write a (columns, rows[, RGB]) plane as a slice of 3 mm thickness, whatever the distance to the next one."""
    colour = plane.ndim == 3
    image = sitk.GetImageFromArray(plane.swapaxes(0, 1)[None], isVector=colour)
    image.SetSpacing((*pixel, 3.0))
    meta = {
        "0008|0060": "CT",
        "0020|000d": "1.2.3",
        "0020|000e": "1.2.3.4",
        "0020|0032": "\\".join(f"{x:.6f}" for x in position),
        "0020|0037": "\\".join(str(x) for x in np.ravel(axes)),
        "0018|0050": "3",
    }
    for tag, value in {**meta, **(tags or {})}.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(compress)  # JPEG 2000
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(folder, array=None, axes=AXES["axial"], **options):
    """Write (X, Y, Z) as slices whose names are in another order than their positions; return it with its affine."""
    folder.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    assert array.shape[2] <= 5  # name_of has five names
    normal = np.cross(*np.asarray(axes, float))
    for k in range(array.shape[2]):
        write_slice(folder / name_of(k), array[..., k], ORIGIN + k * STEP * normal, axes, **options)
    columns = np.column_stack([PIXEL[0] * np.array(axes[0]), PIXEL[1] * np.array(axes[1]), STEP * normal, ORIGIN])
    return array, np.diag([-1, -1, 1, 1]) @ np.vstack([columns, [0, 0, 0, 1]])


def name_of(k):
    return f"CT.{k * 3 % 5}"


def in_monai(folder):
    return LoadImaged("image", ensure_channel_first=True)({"image": str(folder)})["image"]


def refused(folder):
    with pytest.raises(DataError) as error:
        read_series(folder)
    return str(error.value)


def element(group, number, kind, value):
    """One data element, explicit little endian."""
    value += b"\0" * (len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind in (b"OB", b"SQ") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind + length + value


def object_without_image(storage):
    meta = (
        element(2, 2, b"UI", storage) + element(2, 3, b"UI", b"1.2.9") + element(2, 16, b"UI", b"1.2.840.10008.1.2.1")
    )
    meta = element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
    return b"\0" * 128 + b"DICM" + meta + element(8, 0x16, b"UI", storage) + element(0x20, 0xE, b"UI", b"1.2.3.4")


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_a_series_is_read_by_position_as_monai_reads_it(tmp_path, axes):
    array, affine = write_series(tmp_path, axes=axes)
    ours = read_series(tmp_path)
    assert np.array_equal(ours.array, array)
    np.testing.assert_allclose(ours.affine, affine, atol=1e-5)
    assert ours.spacing_mm == (0.8, 0.7, 2.0)  # not the 3 mm of the slice thickness
    assert ours.notes == ()
    image = in_monai(tmp_path)
    assert np.array_equal(image.numpy(), array[None])
    np.testing.assert_allclose(image.affine.numpy(), ours.affine, atol=1e-5)


def test_jpeg_2000_is_decoded(tmp_path):
    array = np.add.outer(np.arange(32), np.arange(96)).reshape(32, 32, 3).astype(np.int16)
    write_series(tmp_path / "small", array, compress=True)
    write_series(tmp_path / "large", array)
    sizes = [(tmp_path / folder / name_of(0)).stat().st_size for folder in ("small", "large")]
    assert sizes[0] < sizes[1] - 1000
    assert np.array_equal(read_series(tmp_path / "small").array, array)
    assert np.array_equal(in_monai(tmp_path / "small")[0].numpy(), array)


def test_a_file_that_gdcm_lists_but_itk_cannot_open_is_refused(tmp_path):
    write_series(tmp_path)
    file = tmp_path / name_of(2)
    file.write_bytes(file.read_bytes()[132:])  # neither preamble nor magic
    with pytest.raises(RuntimeError, match="Could not create IO object"):
        in_monai(tmp_path)
    assert f"{file.name}: has no DICOM preamble" in refused(tmp_path)


def test_files_are_known_by_their_content_and_other_files_are_passed_over(tmp_path):
    array, _ = write_series(tmp_path)
    (tmp_path / name_of(1)).rename(tmp_path / "IM 1.dcm")
    for name in ("README.txt", "._IM 1.dcm"):
        (tmp_path / name).write_text("no slice")
    (tmp_path / "DICOMDIR").write_bytes(object_without_image(b"1.2.840.10008.1.3.10"))
    assert all(is_dicom(tmp_path / name) for name in ("IM 1.dcm", name_of(0)))
    assert not any(is_dicom(tmp_path / name) for name in ("README.txt", "._IM 1.dcm", "DICOMDIR", "absent.dcm"))
    assert np.array_equal(read_series(tmp_path).array, array)
    assert np.array_equal(in_monai(tmp_path)[0].numpy(), array)
    (tmp_path / "empty").mkdir()
    assert holds_series(tmp_path) and not holds_series(tmp_path / "empty")
    assert "0 DICOM" in refused(tmp_path / "empty")


def test_the_hash_follows_the_content_and_not_the_names(tmp_path):
    write_series(tmp_path)
    first = read_series(tmp_path).sha256
    for k in range(SHAPE[2]):
        (tmp_path / name_of(k)).rename(tmp_path / f"new {k}.dcm")
    assert read_series(tmp_path).sha256 == first
    file = tmp_path / "new 3.dcm"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_series(tmp_path).sha256 != first


TAGS = {
    "series instance UID": ("0020|000e", "1.2.3.5"),
    "series number": ("0020|0011", "8"),
    "series date": ("0008|0021", "20200101"),
    "sequence name": ("0018|0024", "fl3d"),
    "slice thickness": ("0018|0050", "2"),
    "rows": None,
    "columns": None,
}


@pytest.mark.parametrize("what", TAGS)
def test_what_monai_takes_apart_in_silence_is_refused(tmp_path, what):
    write_series(tmp_path)
    plane, tags = np.zeros(SHAPE[:2], np.int16), {}
    if what in ("rows", "columns"):
        plane = np.zeros((7, 9) if what == "rows" else (9, 6), np.int16)
    else:
        tags = dict([TAGS[what]])
    write_slice(tmp_path / "other", plane, ORIGIN + [0, 0, STEP * 5], tags=tags)
    with pytest.warns(UserWarning, match="more than one DICOM series"):
        assert in_monai(tmp_path).shape[-1] in (1, 5)  # of 6 slices
    message = refused(tmp_path)
    assert f"holds 2 series, which differ in their {what}:" in message
    assert "5 slices" in message and "1 slices, such as other" in message


def test_a_series_that_gdcm_takes_apart_for_another_reason_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path)
    monkeypatch.setattr(
        "samseg_monai.data.files.dicom._listed_by_gdcm", lambda folder: [[folder / "CT.0"], [folder / "CT.1"]]
    )
    assert "ITK divides it into 2 series" in refused(tmp_path)


def test_two_orientations_are_named(tmp_path):
    write_series(tmp_path)
    write_slice(tmp_path / "localizer", np.zeros(SHAPE[:2], np.int16), ORIGIN, AXES["sagittal"])
    message = refused(tmp_path)
    assert "two orientations, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] (CT.0)" in message
    assert "[0.0, 1.0, 0.0, 0.0, 0.0, -1.0] (localizer)" in message


def test_a_gap_is_named_in_mm(tmp_path):
    write_series(tmp_path)
    (tmp_path / name_of(3)).unlink()
    assert in_monai(tmp_path).affine[2, 2] == pytest.approx(8 / 3)  # wrong, and without an error
    assert f"are 2 mm apart, but 4 mm lie between {name_of(2)} and {name_of(4)}: 1 missing" in refused(tmp_path)


def test_uneven_and_equal_positions_are_refused(tmp_path):
    write_series(tmp_path)
    plane = np.zeros(SHAPE[:2], np.int16)
    write_slice(tmp_path / "last", plane, ORIGIN + [0, 0, 8 + 2.7])
    assert f"not evenly spaced, 2 to 2.7 mm apart (2.7 mm lie between {name_of(4)} and last)" in refused(tmp_path)
    write_slice(tmp_path / "last", plane, ORIGIN + [0, 0, 8])
    assert f"2 slices lie at the same position (15.00 mm): {name_of(4)}, last;" in refused(tmp_path)


def test_rounded_positions_are_even(tmp_path):
    for k in range(8):
        write_slice(tmp_path / f"{k}.dcm", np.full((4, 4), k, np.int16), (0, 0, round(0.625 * k, 2)))
    assert read_series(tmp_path).spacing_mm[2] == pytest.approx(0.625, abs=1e-3)


def test_a_gantry_tilt_is_refused_with_its_angle(tmp_path):
    for k in range(4):
        position = ORIGIN + [0, np.tan(np.radians(12)) * k * STEP, k * STEP]
        write_slice(tmp_path / f"{k}.dcm", np.zeros(SHAPE[:2], np.int16), position)
    message = refused(tmp_path)
    assert "gantry tilt of 12.0 degrees, up to 1.28 mm sideways" in message
    assert "dcm2niix" in message


def test_one_slice_is_no_volume_and_two_are_doubtful(tmp_path):
    array, _ = write_series(tmp_path, np.arange(84, dtype=np.int16).reshape(7, 6, 2))
    two = read_series(tmp_path)
    assert np.array_equal(two.array, array)
    assert two.notes == (f"{tmp_path.name}: has only 2 slices; is the series complete?",)
    (tmp_path / name_of(1)).unlink()
    assert "1 DICOM slice, which is no volume" in refused(tmp_path)


def test_every_damaged_file_and_every_object_without_image_is_named(tmp_path):
    write_series(tmp_path)
    end = tmp_path / name_of(4)
    end.write_bytes(end.read_bytes()[:-20])
    assert in_monai(tmp_path).shape[-1] == 4  # MONAI loads a shorter volume
    (tmp_path / "structures").write_bytes(object_without_image(b"1.2.840.10008.5.1.4.1.1.481.3"))
    (tmp_path / "report").write_bytes(object_without_image(b"1.2.840.10008.5.1.4.1.1.88.11"))
    (tmp_path / "unknown").write_bytes(object_without_image(b"1.2.3"))
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "lfs.dcm").write_text("version https://git-lfs.github.com/spec/v1")
    write_slice(tmp_path / "colour", np.zeros((7, 6, 3), np.uint8), ORIGIN)
    message = refused(tmp_path)
    assert "(8 problems)" in message
    for line in (
        f"{end.name}: truncated or damaged",
        "structures: is a radiotherapy structure set (RTSTRUCT), not a slice",
        "report: is a structured report",
        "unknown: truncated or damaged DICOM file, or one without an image",
        "text.dcm: truncated or damaged",
        "empty.dcm: the file is empty",
        "lfs.dcm: is a git-lfs pointer",
        "colour: is in colour (3 values per pixel)",
    ):
        assert f"  - {line}" in message


def test_frames_in_one_file_and_slices_without_position_are_refused(tmp_path):
    write_series(tmp_path / "a")
    bare = tmp_path / "a" / name_of(2)
    bare.write_bytes(bare.read_bytes().replace(b"\x20\0\x32\0", b"\x20\0\x31\0", 1))  # the position's tag
    assert f"{bare.name}: has no position or orientation" in refused(tmp_path / "a")
    (tmp_path / "b").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 6, 7), np.uint8)), tmp_path / "b" / "frames.dcm")
    assert "frames.dcm: holds 4 frames in one file" in refused(tmp_path / "b")


def test_slices_of_other_pixel_size_or_kind_of_number_are_refused(tmp_path):
    write_series(tmp_path)
    position = ORIGIN + [0, 0, STEP * 5]
    write_slice(tmp_path / "other", np.zeros(SHAPE[:2], np.int16), position, pixel=(0.9, 0.7))
    assert "different pixel sizes: (0.8, 0.7) (CT.4), (0.9, 0.7) (other)" in refused(tmp_path)
    write_slice(tmp_path / "other", np.zeros(SHAPE[:2], np.uint8), position)
    assert "different kinds of numbers: 16-bit signed integer (CT.4), 8-bit unsigned" in refused(tmp_path)


def save_what_is_bright(item, folder, level):
    """Load, orient, threshold, invert and save, as the configs of the bundles do; return the saved image."""
    before = Compose(
        [LoadImaged("image", ensure_channel_first=True), Orientationd("image", axcodes="RAS", labels=None)]
    )
    data = before(item)
    image = data["image"]
    data["pred"] = MetaTensor((image > level).to(torch.float32), meta=image.meta)
    after = Compose(
        [
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
            NameAfterCased("pred"),
            SaveImaged(
                "pred", output_dir=folder, output_postfix="seg", output_dtype=np.uint8, resample=True, mode="nearest",
                separate_folder=False, print_log=False,
            ),
        ]
    )  # fmt: skip
    after(data)
    return nib.load(folder / f"{item['case']}_seg.nii.gz")


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_a_saved_mask_lies_on_the_grid_of_its_series(tmp_path, axes):
    array, affine = write_series(tmp_path / "patient", axes=axes)
    saved = save_what_is_bright(find_cases(tmp_path, scans=("ct",)).good[0], tmp_path / "out", 100)
    np.testing.assert_allclose(saved.affine, affine, atol=1e-3)
    assert np.array_equal(np.asarray(saved.dataobj), array > 100)


@pytest.mark.realdata
def test_a_real_ct_is_read_as_monai_reads_it_and_saved_on_its_grid(realdata, tmp_path):
    folder = realdata / "abdomen_ct" / "example_ct_dicom"
    ours, image = read_series(folder), in_monai(folder)
    assert ours.array.shape == (512, 512, 20) and ours.spacing_mm == (0.9766, 0.9766, 2.0)
    assert np.array_equal(image[0].numpy(), ours.array)
    np.testing.assert_allclose(image.affine.numpy(), ours.affine, atol=1e-6)
    item = find_cases(folder, scans=("ct",)).good[0]
    assert item == {"case": "example_ct_dicom", "image": str(folder.resolve())}

    level = 100
    saved = save_what_is_bright(item, tmp_path, level)
    np.testing.assert_allclose(saved.affine, ours.affine, atol=1e-3)
    mine = np.asarray(saved.dataobj)
    assert np.array_equal(mine, ours.array > level)
    # the reference's rows run the other way: it is compared by world position, not by index
    reference = read_volume(realdata / "abdomen_ct" / "example_seg_dicom.nii.gz")
    to_reference = np.linalg.inv(reference.affine) @ saved.affine
    indices = np.argwhere(np.ones(mine.shape, bool))
    there = indices @ to_reference[:3, :3].T + to_reference[:3, 3]
    np.testing.assert_allclose(there, np.round(there), atol=1e-3)
    i, j, k = np.round(there).astype(int).T
    labels = reference.array[i, j, k].reshape(mine.shape)
    assert not np.array_equal(labels, reference.array)
    bright = {organ: float(mine[labels == organ].mean()) for organ in (52, 2, 3) if (labels == organ).any()}
    assert bright and min(bright.values()) > 0.8, bright  # contrast-filled organs exceed 100 HU where they should be
    astray = {organ: float(mine[reference.array == organ].mean()) for organ in bright}
    assert min(astray.values()) < 0.5, astray


ODD = {
    "gantrytilting": "gantry tilt of 14.0 degrees",
    "notavolume": "4 slices lie at the same position (61.50 mm)",
    "sliceincrement": "are 5 mm apart, but 10 mm lie between IM-0001-0009-0001.dcm and IM-0001-0010-0001.dcm",
    "sliceorientation": "slices of two orientations",
}


@pytest.mark.realdata
def test_odd_real_series_are_refused_or_noted(realdata):
    odd = realdata / "odd_inputs" / "dicom"
    assert {path.name for path in odd.iterdir()} == {*ODD, "slicecount"}
    for name, reason in ODD.items():
        assert reason in refused(odd / name / "001")
    assert "only 2 slices" in read_series(odd / "slicecount" / "001").notes[0]
