"""2-D images stand upright, keep their values, and every file that would give a wrong result is named."""

import json
import shutil
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImaged
from PIL import Image
from typer.testing import CliRunner

from samseg_monai import cli
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist, spacing_of, unit_of
from samseg_monai.data.datalists.images import prepare_images
from samseg_monai.data.files.boxes import read_boxes
from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.images import ImageFileReader, read_image
from samseg_monai.errors import ConfigError, DataError, PromptError

GREY = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) * 4
MASK = np.where((GREY > 60) & (GREY < 130), 255, 0).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
READER = "samseg_monai.data.files.images.ImageFileReader"


def save(path, array=GREY, *, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def save_png(path, rows, *, width, bits, colour):
    """A PNG of any bit depth, chunk by chunk (PNG specification, third edition, 5 and 11.2.1)."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def save_dicom(path, array, *, spacing=None, frames=1, modality="CT"):
    stack = np.stack([array] * frames)
    image = sitk.GetImageFromArray(stack, isVector=array.ndim == 3)
    if spacing is not None:  # along columns of the array first
        image.SetSpacing((spacing[1], spacing[0], 1.0))
    image.SetMetaData("0008|0060", modality)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path))
    writer.SetImageIO("GDCMImageIO")
    writer.Execute(image)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.fixture
def folders(tmp_path):
    """Twelve images of four patients: a_0 to a_2, ..., d_0 to d_2; masks beside them."""
    rng = np.random.default_rng(0)
    for patient in "abcd":
        for number in range(3):
            name = f"{patient}_{number}.png"
            save(tmp_path / "set" / "images" / name, rng.integers(0, 256, GREY.shape).astype(np.uint8))
            save(tmp_path / "set" / "masks" / name, MASK)
    return tmp_path / "set"


def prepare(folders, **options):
    options = {"labels": {"255": "tumour"}, "progress": False, **options}
    if not options.keys() & {"split_file", "folds"}:
        options.setdefault("fractions", (0.5, 0.25, 0.25))
    return prepare_images(folders / "images", folders / "masks", folders.parent / "d.json", **options)


def datalist_of(folders):
    return read_datalist(folders.parent / "d.json")


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "PNG"])
def test_grey_of_8_bits_stands_upright(tmp_path, suffix):
    picture = read_image(save(tmp_path / f"x.{suffix}"))
    assert picture.array.shape == (6, 9, 1) and picture.array.dtype == np.uint8
    assert np.array_equal(picture.array[..., 0], GREY)
    assert picture.notes == () and picture.spacing_mm == (1, 1, 1) and picture.own_spacing_mm is None


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_keeps_its_values(tmp_path, suffix):
    values = GREY.astype(np.uint16) * 300
    assert values.max() > 60000
    assert np.array_equal(read_image(save(tmp_path / f"x.{suffix}", values)).array[..., 0], values)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_colours_are_the_last_axis(tmp_path, suffix):
    picture = read_image(save(tmp_path / f"x.{suffix}", COLOUR))
    assert picture.array.shape == (6, 9, 1, 3) and picture.scans == ("red", "green", "blue")
    assert np.array_equal(picture.array[:, :, 0], COLOUR)


def test_jpeg_agrees_with_an_independent_decoder(tmp_path):
    save(tmp_path / "x.jpg", np.kron(GREY, np.ones((8, 8), np.uint8)), quality=95)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.jpg")))
    assert np.abs(read_image(tmp_path / "x.jpg").array[..., 0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("shape", [(9, 6), (9, 6, 1), (9, 6, 1, 1)])
def test_nifti_has_x_along_columns(tmp_path, shape):
    nib.save(nib.Nifti1Image(GREY.T.reshape(shape), np.diag([0.5, 0.7, 1, 1])), tmp_path / "x.nii.gz")
    picture = read_image(tmp_path / "x.nii.gz")
    assert np.array_equal(picture.array[..., 0], GREY)
    assert picture.spacing_mm == (0.7, 0.5, 1) and picture.own_spacing_mm == pytest.approx((0.7, 0.5))
    assert read_image(tmp_path / "x.nii.gz", 0.3).spacing_mm == (0.3, 0.3, 1)


def test_dicom_of_one_frame_needs_neither_position_nor_suffix(tmp_path):
    save_dicom(tmp_path / "x.dcm", GREY.astype(np.int16) - 100, spacing=(0.7, 0.5))
    (tmp_path / "x.dcm").rename(tmp_path / "IM01")
    picture = read_image(tmp_path / "IM01")
    assert np.array_equal(picture.array[..., 0], GREY.astype(int) - 100)
    assert picture.spacing_mm == (0.7, 0.5, 1) and picture.kind == "DICOM"
    radiograph = read_image(save_dicom(tmp_path / "r.dcm", GREY, spacing=(0.7, 0.5), modality="CR"))
    assert radiograph.own_spacing_mm is None and "on the detector" in radiograph.notes[0]
    assert np.array_equal(read_image(save_dicom(tmp_path / "c.dcm", COLOUR)).array[:, :, 0], COLOUR)
    content = save_dicom(tmp_path / "m.dcm", GREY).read_bytes()
    (tmp_path / "m.dcm").write_bytes(content.replace(b"MONOCHROME2", b"MONOCHROME1"))
    negative = read_image(tmp_path / "m.dcm")
    assert "is read as its negative" in negative.notes[0] and np.array_equal(negative.array[..., 0], 255 - GREY)


def test_few_bits_and_palettes_are_told(tmp_path):
    one = read_image(save(tmp_path / "one.png", MASK > 0))
    assert np.array_equal(one.array[..., 0], MASK) and "1 bit" in one.notes[0]
    four = read_image(save_png(tmp_path / "four.png", [b"\x01\x2f"], width=4, bits=4, colour=0))
    assert four.array.ravel().tolist() == [0, 17, 34, 255] and "4 bits" in four.notes[0]
    palette = Image.fromarray((MASK > 0).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert np.array_equal(grey.array[..., 0], MASK) and "palette" in grey.notes[0]
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "red.png")
    red = read_image(tmp_path / "red.png")
    assert red.array.shape == (6, 9, 1, 3) and "palette of colours" in red.notes[0]
    named = read_image(save(tmp_path / "x.png", format="JPEG"))
    assert "is a JPEG file" in named.notes[0]


def bad_files(folder):
    """File -> words of the sentence about it."""
    folder.mkdir(exist_ok=True)
    whole = save(folder / "whole.png").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 8] ^= 255
    contents = {
        "short.png": (whole[: len(whole) // 2], "truncated or damaged"),
        "no_end.png": (whole[:-12], "truncated or damaged"),
        "damaged.png": (bytes(damaged), "truncated or damaged"),
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"not an image", "no PNG, JPEG, TIFF or BMP"),
        "page.jpg": (b"<html></html>", "is a web page"),
    }
    (folder / "whole.png").unlink()
    jpeg = save(folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    words = {name: text for name, (_, text) in contents.items()} | {"half.jpg": "truncated or damaged"}
    save(folder / "alpha.png", mode="RGBA"), save(folder / "grey_alpha.png", mode="LA")
    save(folder / "transparent.png", transparency=0)
    words |= dict.fromkeys(("alpha.png", "grey_alpha.png", "transparent.png"), "alpha channel")
    save(folder / "cmyk.jpg", COLOUR, mode="CMYK"), save(folder / "printed.tif", COLOUR, mode="CMYK")
    words |= dict.fromkeys(("cmyk.jpg", "printed.tif"), "is in CMYK")
    save(folder / "lab.tif", COLOUR, mode="LAB")
    words["lab.tif"] = "colours of the kind LAB"
    for suffix in ("jpg", "png", "tif"):
        save(folder / f"turned_{suffix}.{suffix}", exif=exif(6))
        words[f"turned_{suffix}.{suffix}"] = "EXIF orientation 6"
    save(folder / "pages.tif", save_all=True, append_images=[Image.fromarray(GREY)])
    save_dicom(folder / "frames.dcm", GREY, frames=3)
    words |= {"pages.tif": "2 frames or pages", "frames.dcm": "3 frames"}
    save_png(folder / "deep.png", [b"\1\2" * 6], width=2, bits=16, colour=2)
    words["deep.png"] = "16 bits for each of three colours"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 3)), np.eye(4)), folder / "volume.nii.gz")
    words["volume.nii.gz"] = "expected one slice"
    (folder / "link.png").symlink_to("nowhere.png")
    words["link.png"] = "cannot be read"
    return words


def test_every_bad_file_is_described_and_never_read_by_another_reader(tmp_path):
    load = LoadImaged("image", reader=READER, ensure_channel_first=True)
    for name, words in bad_files(tmp_path / "bad").items():
        with pytest.raises(DataError, match=f"{name}: .*{words}"):
            read_image(tmp_path / "bad" / name)
        with pytest.raises(Exception, match=words):
            load({"image": str(tmp_path / "bad" / name)})
    assert read_image(save(tmp_path / "upright.jpg", exif=exif(1))).notes == ()


def test_a_picture_beyond_the_limit_and_one_without_pixels_are_refused(tmp_path):
    save_png(tmp_path / "huge.png", [b"\0"], width=300_000_000, bits=8, colour=0)
    with pytest.raises(DataError, match=r"huge.png: is too large for Pillow"):
        read_image(tmp_path / "huge.png")
    save_png(tmp_path / "none.png", [], width=4, bits=8, colour=0)
    nib.save(nib.Nifti1Image(np.zeros((0, 3), np.uint8), np.eye(4)), tmp_path / "none.nii.gz")
    for name in ("none.png", "none.nii.gz"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    content = save_dicom(tmp_path / "short.dcm", GREY).read_bytes()
    (tmp_path / "short.dcm").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"short.dcm: truncated or damaged DICOM"):
        read_image(tmp_path / "short.dcm")


def test_floats_of_a_tiff_are_kept(tmp_path):
    assert np.array_equal(
        read_image(save(tmp_path / "x.tif", GREY / np.float32(7))).array[..., 0], GREY / np.float32(7)
    )


def test_a_white_is_zero_tiff_of_16_bits_is_refused(tmp_path):
    save(tmp_path / "x.tif", GREY.astype(np.uint16), tiffinfo={262: 0})
    with pytest.raises(DataError, match="white as 0"):
        read_image(tmp_path / "x.tif")


def test_the_reader_works_by_name_in_monai_s_loader(tmp_path):
    colour, mask = save(tmp_path / "c #1.png", COLOUR), save(tmp_path / "m.png", MASK)
    grey = save(tmp_path / "g.png", GREY.astype(np.uint16) * 300)
    load = LoadImaged(["image", "label"], reader=READER, spacing=0.49, ensure_channel_first=True)
    loaded = load({"image": [str(colour)], "label": str(mask)})
    assert loaded["image"].shape == (3, 6, 9, 1) and loaded["label"].shape == (1, 6, 9, 1)
    assert np.array_equal(loaded["image"].numpy()[..., 0], np.moveaxis(COLOUR, -1, 0))
    assert np.array_equal(loaded["label"].numpy()[0, ..., 0], MASK)
    assert loaded["image"].affine.diagonal().tolist() == [0.49, 0.49, 1, 1]
    assert loaded["image"].meta["filename_or_obj"] == str(colour)
    assert load({"image": str(grey), "label": str(mask)})["image"].max() == int(GREY.max()) * 300
    array, meta = ImageFileReader().get_data(ImageFileReader().read(grey))
    assert array.shape == (6, 9, 1) and meta["filename_or_obj"] == str(grey)
    assert ImageFileReader().verify_suffix([grey]) and not ImageFileReader().verify_suffix(tmp_path / "x.txt")
    with pytest.raises(DataError, match="an image is one file, got 2"):
        load({"image": [str(grey), str(grey)], "label": str(mask)})
    for spacing in (0, -1, float("nan"), "0.5", True):
        with pytest.raises(ConfigError, match="spacing must be"):
            ImageFileReader(spacing=spacing)


def test_all_images_of_a_group_are_in_one_section(folders):
    summary = prepare(folders, group=r"^([a-z])_", spacing=0.49)
    datalist = datalist_of(folders)
    sections = {s: {item["patient"] for item in datalist[s]} for s in ("training", "validation", "testing")}
    assert [len(patients) for patients in sections.values()] == [2, 1, 1]
    assert set.union(*sections.values()) == set("abcd")
    assert summary.sections == {"training": 6, "validation": 3, "testing": 3}
    assert {item["patient"] for item in datalist["training"]} == {item["case"][0] for item in datalist["training"]}
    assert datalist["kind"] == "images" and datalist["scans"] == ["image"]
    item = datalist["testing"][0]
    name = f"{item['case']}.png"
    assert item["image"] == f"images/{name}" and item["label"] == item["reference"] == f"masks/{name}"
    path = folders.parent / "d.json"
    assert (unit_of(path), spacing_of(path)) == ("mm", 0.49)
    assert labels_of(path) == {"0": "background", "255": "tumour"}
    assert load_datalist(path, folders, "testing", scans=["image"])[0]["image"] == str(folders / "images" / name)
    text = "\n".join(summary.lines())
    assert "12 images of 4 groups: 6 training, 3 validation, 3 testing" in text
    assert "shapes: 6x9 (12)" in text and "spacings in mm: 0.49x0.49 (12)" in text
    pixels = int((MASK == 255).sum()) * 12
    assert f"label 255 tumour: {pixels} pixels" in text and "in 12 images" in text
    assert "grey uint8 (12), from 0 to 255" in text and f": {folders}" in text
    with pytest.raises(DataError, match="have the channels image, the network wants red, green, blue"):
        load_datalist(path, folders, "testing", scans=["red", "green", "blue"])


def test_without_group_and_spacing_the_summary_says_what_nobody_knows(folders):
    text = "\n".join(prepare(folders).lines())
    assert "12 images, it is not known which share a patient" in text
    assert "distances are in pixels" in text
    path = folders.parent / "d.json"
    assert (unit_of(path), spacing_of(path)) == ("px", None)
    assert all(item["patient"] == item["case"] for item in datalist_of(folders)["training"])
    prepare(folders, spacing=0.49)
    assert (unit_of(path), spacing_of(path)) == ("mm", 0.49)


def test_a_split_file_names_cases_or_groups(folders, tmp_path):
    split = {"training": ["a", "b"], "validation": ["c_0", "c_1"], "testing": ["d"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    summary = prepare(folders, group="^[a-z]", split_file=tmp_path / "split.json")
    assert summary.sections == {"training": 6, "validation": 2, "testing": 3}
    assert "c_2: not named by the split file, not used" in summary.warnings
    split["testing"].append("a_0")
    (tmp_path / "split.json").write_text(json.dumps({**split, "validation": ["x"]}))
    with pytest.raises(DataError, match="unknown case or group x") as caught:
        prepare(folders, group="^[a-z]", split_file=tmp_path / "split.json")
    assert "group a is in training and testing" in str(caught.value)


def test_groups_that_names_do_not_tell_are_named(folders):
    with pytest.raises(DataError, match=r"a_0: its name does not tell its group") as caught:
        prepare(folders, group=r"(b|c|d)_")
    assert "3 of 12 cases" in str(caught.value) and "b_0" not in str(caught.value)
    with pytest.raises(ConfigError, match="is not a regular expression"):
        prepare(folders, group="(")


def test_every_bad_pair_is_named_and_the_others_go_on(folders):
    images, masks = folders / "images", folders / "masks"
    save(masks / "a_0.png", np.stack([MASK] * 3, axis=-1))
    save(masks / "a_1.png", MASK[:5])
    save(masks / "a_2.png", np.where(GREY == 8, 7, MASK).astype(np.uint8))
    (masks / "b_0.png").unlink()
    (images / "b_1.png").unlink()
    save(images / "b_2.jpg")
    save(masks / "c_0_mask.png", MASK)
    (masks / "c_1.png").unlink()
    save(masks / "c_1.jpg", MASK, quality=30)
    save(images / "d_0.png", np.full_like(GREY, 3))
    words = {
        "a_0": "is an RGB picture (its three channels are equal)",
        "a_1": "has 5 rows and 9 columns, but a_0.png has 6 and 9".replace("a_0", "a_1"),
        "a_2": "7 (1 pixels); name every value",
        "b_1": "no image of this name in images",
        "b_2": "b_2.jpg and b_2.png in images differ by their suffix only",
        "c_0": "c_0.png and c_0_mask.png in masks are masks of one image",
        "c_1": "JPEG is lossy",
        "d_0": "every pixel has the value 3",
    }
    with pytest.raises(DataError, match="8 of 11 cases") as caught:
        prepare(folders)
    lines = str(caught.value).splitlines()
    for case, text in words.items():
        assert any(f"- {case}: " in line and text in line for line in lines), (case, text)
    assert not any(f"- {case}:" in line for case in ("b_0", "c_2", "d_1", "d_2") for line in lines)
    summary = prepare(folders, skip_bad=True)
    assert sum(summary.sections.values()) == 3 and len(summary.left_out) == len(lines) - 1
    assert "1 of 12 cases have no label and are left out: b_0" in summary.warnings
    assert not (folders / "d.json.part").exists()


def test_bad_images_of_every_kind_are_listed_by_prepare(folders):
    words = bad_files(folders / "images")
    for name in words:
        save(folders / "masks" / f"{name.split('.')[0]}_seg.png", MASK)
    summary = prepare(folders, skip_bad=True)
    assert sum(summary.sections.values()) == 12
    for name, text in words.items():
        told = [line for line in summary.left_out if line.startswith(f"{name.split('.')[0]}: ")]
        assert any(text in line for line in told), name


def test_leftovers_are_passed_over_and_other_files_are_told(folders):
    for name in ("._a_0.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (folders / "images" / name).write_bytes(b"x")
    (folders / "images" / "more").mkdir()
    summary = prepare(folders)
    assert sum(summary.sections.values()) == 12
    assert "1 entries of images are no images: notes.txt" in summary.warnings
    assert "1 entries of images are folders, which are not looked into: more" in summary.warnings


def test_masks_may_lie_beside_their_images_and_a_pattern_takes_some(folders):
    assert sum(prepare(folders, match="[ab]_*.png").sections.values()) == 6
    for path in (folders / "masks").iterdir():
        shutil.copy(path, folders / "images" / f"{path.stem}_seg.png")
    options = {"labels": {"255": "tumour"}, "fractions": (0.4, 0.3, 0.3), "progress": False, "match": "b_*"}
    prepare_images(folders / "images", folders / "images", folders.parent / "d.json", **options)
    item = datalist_of(folders)["training"][0]
    assert (item["image"], item["label"]) == (f"{item['case']}.png", f"{item['case']}_seg.png")
    with pytest.raises(DataError, match="no image whose name matches 'x"):
        prepare(folders, match="x*")


def test_folders_without_a_common_parent_are_refused(folders):
    with pytest.raises(DataError, match="no common parent folder"):
        prepare_images("/", folders / "masks", folders / "d.json", labels={"255": "tumour"}, progress=False)


def test_rgb_images_are_three_channels_of_one_file(folders):
    for path in sorted((folders / "images").iterdir()):
        grey = np.asarray(Image.open(path))
        save(path, np.stack([grey, grey[::-1], grey], axis=-1) if path.stem != "d_2" else np.stack([grey] * 3, axis=-1))
    summary = prepare(folders)
    path = folders.parent / "d.json"
    assert datalist_of(folders)["scans"] == ["red", "green", "blue"]
    assert any("d_2.png: is stored in RGB, but its three channels are equal" in text for text in summary.warnings)
    items = load_datalist(path, folders, "training", scans=["red", "green", "blue"])
    assert LoadImaged("image", reader=READER, ensure_channel_first=True)(items[0])["image"].shape == (3, 6, 9, 1)
    save(folders / "images" / "a_0.png")
    with pytest.raises(DataError, match=r"a_0.png: is in grey, but 11 others are in RGB"):
        prepare(folders)


def test_equal_images_under_two_names_are_told(folders):
    shutil.copy(folders / "images" / "a_0.png", folders / "images" / "d_0.png")
    save(folders / "masks" / "a_0.png", np.roll(MASK, 1, axis=0))
    assert "a_0 and d_0 have the same content" in prepare(folders).warnings


def test_one_bit_masks_are_255_and_that_is_told_once(folders):
    for path in (folders / "masks").iterdir():
        save(path, MASK > 0)
    texts = [text for text in prepare(folders).warnings if "1 bit a pixel" in text]
    assert len(texts) == 1 and texts[0].startswith("a_0.png and 11 other masks: ")
    with pytest.raises(DataError, match=r"labels \[255\] are outside \[0, 1\]"):
        prepare(folders, labels={"1": "tumour"})


def nifti_pair(folders, case, mask_affine):
    for sub, array, affine in (("images", GREY, np.diag([0.5, 0.5, 1, 1])), ("masks", MASK, mask_affine)):
        nib.save(nib.Nifti1Image(array.T[..., None], affine), folders / sub / f"{case}.nii.gz")


def test_pixel_sizes_are_never_mixed(folders):
    nifti_pair(folders, "n_0", np.diag([0.5, 0.5, 1, 1]))
    with pytest.raises(DataError, match="1 of 13 images state their pixel size"):
        prepare(folders)
    assert "n_0.nii.gz" not in str(prepare(folders, spacing=0.4).left_out)
    assert any("states its own pixel size; 0.4 mm is used" in t for t in prepare(folders, spacing=0.4).warnings)
    nifti_pair(folders, "n_1", np.diag([0.5, 0.6, 1, 1]))
    flipped = np.diag([-0.5, 0.5, 1, 1])
    nifti_pair(folders, "n_2", flipped)
    summary = prepare(folders, skip_bad=True, match="n_*", fractions=(1, 0, 0))
    assert unit_of(folders.parent / "d.json") == "mm" and summary.spacings_mm == {"0.5x0.5": 1}
    assert any("n_1: mask n_1.nii.gz: states 0.6 x 0.5 mm" in text for text in summary.left_out)
    assert any("n_2: mask n_2.nii.gz: its affine differs, by " in text for text in summary.left_out)


BOXES = {"a_0": [[1.5, 0, 8.25, 5], [2, 2, 4, 4]], "a_1": [[0, 0, 9, 6]], "a_2": [[-1, -2, 3.5, 4]]}


def test_boxes_stay_floats_and_belong_to_a_section(folders, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"training": ["a"], "testing": ["b"]}))
    prepare(folders, group="^[a-z]", split_file=tmp_path / "split.json")
    (tmp_path / "boxes.json").write_text(json.dumps(BOXES))
    items = load_datalist(tmp_path / "d.json", folders, "training", boxes=tmp_path / "boxes.json")
    assert {item["case"]: item["boxes"] for item in items} == BOXES
    assert all(type(value) is float for item in items for box in item["boxes"] for value in box)
    with pytest.raises(DataError, match=r"cases of .* without a box") as caught:
        load_datalist(tmp_path / "d.json", folders, "testing", boxes=tmp_path / "boxes.json")
    assert all(f"- b_{number}" in str(caught.value) for number in range(3))
    (tmp_path / "boxes.json").write_text(json.dumps({**BOXES, "a_0": [[9, 0, 12, 5]]}))
    with pytest.raises(PromptError, match=r"a_0: boxes\[0\] lies outside of the image of 9 columns and 6 rows"):
        load_datalist(tmp_path / "d.json", folders, "training", boxes=tmp_path / "boxes.json")


def test_all_slips_of_a_box_file_are_listed_at_once(tmp_path):
    slips = {
        "a": ([[1, 2, 3]], "must be four numbers"),
        "b": ([[1, 2, float("nan"), 4]], "not finite"),
        "c": ([[5, 2, 5, 4]], "x0 < x1"),
        "d": ([[0, 6, 3, 7]], "outside of the image"),
        "e": ([1, 2, 3, 4], "one more pair of brackets"),
        "f": ([], "expected a list of boxes"),
        "g": ([[1, 2, 3, True]], "must be four numbers"),
        "i": ([[0.25, 0.3, 0.5, 1.0]], "fractions of the image"),
        "j": ([[3, 1, 3.0000001, 5]], "less than 0.01 pixels"),
        "k": ([[-4, 1, 0.001, 5]], "less than 0.01 pixels"),  # of which nothing is left in the image
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({name: boxes for name, (boxes, _) in slips.items()}))
    with pytest.raises(PromptError, match="10 problems") as caught:
        read_boxes(path, {"d": (6, 9), "k": (6, 9)})
    for name, (_, text) in slips.items():
        assert any(f"- {name}: " in line and text in line for line in str(caught.value).splitlines()), name
    for content, text in (("[1", "is not JSON"), ("[]", "got a list"), ('{"a": [], "a": []}', "twice")):
        path.write_text(content)
        with pytest.raises(PromptError, match=text):
            read_boxes(path)
    path.write_text('{"first pixel": [[0, 0, 1, 1]], "wide": [[0.5, 0.5, 1, 1.5]], "above": [[0, -1, 1, 0.5]]}')
    assert len(read_boxes(path, dict.fromkeys(("first pixel", "wide", "above"), (6, 9)))) == 3


def test_images_for_prediction_are_found_and_bad_ones_set_aside(folders, tmp_path):
    images = folders / "images"
    bad_files(images)
    (
        save(images / "a_0.jpg"),
        save(images / "c.png", COLOUR),
        save(images / "b_0_overlay.png"),
        save(images / "a_seg.png"),
    )
    (images / "Thumbs.db").write_bytes(b"x")
    found = find_cases(images, scans=["image"], kind="images")
    names = [f"{p}_{n}" for p in "abcd" for n in range(3)]
    assert [item["case"] for item in found.good] == [name for name in names if name != "a_0"]
    assert found.good[0] == {"case": "a_1", "image": str((images / "a_1.png").resolve())}
    assert "has the same name as a_0.png" in found.bad["a_0.jpg"] and "a_0.jpg" in found.bad["a_0.png"]
    assert "is in RGB, but the network was trained on images in grey" in found.bad["c"]
    assert "cannot be read" in found.bad["link"] and "EXIF" in found.bad["turned_jpg"]
    with pytest.raises(DataError, match="cases were not predicted"):
        found.finish()
    colours = find_cases([images / "c.png", images / "a_1.png"], scans=["red", "green", "blue"], kind="images")
    assert [item["case"] for item in colours.good] == ["c"] and "is in grey, but" in colours.bad["a_1"]
    one = find_cases([images / "a_1.png"] * 2, scans=["image"], kind="images")
    assert [item["case"] for item in one.good] == ["a_1"] and not one.bad
    one = find_cases(images / "a_1.png", scans=["image"], kind="images")
    assert [item["case"] for item in one.good] == ["a_1"]
    listed = find_cases([images / "a_1.png", images / "gone.png", folders / "x.txt"], scans=["image"], kind="images")
    assert set(listed.bad) == {"gone.png", "x.txt"}
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no 2-D image in"):
        find_cases(tmp_path / "none", scans=["image"], kind="images")


def test_boxes_of_images_for_prediction_cost_one_case_each(folders, tmp_path):
    slips = {**BOXES, "b_0": [[20, 0, 30, 5]], "b_1": "x"}
    (tmp_path / "boxes.json").write_text(json.dumps(slips))
    found = find_cases(folders / "images", scans=["image"], boxes=tmp_path / "boxes.json", kind="images")
    assert {item["case"]: item["boxes"] for item in found.good} == BOXES
    assert "outside of the image of 9 columns and 6 rows" in found.bad["b_0"]
    assert "expected a list of boxes" in found.bad["b_1"]
    assert "no boxes are given for this image" in found.bad["c_0"] and len(found.bad) == 9
    with pytest.raises(PromptError, match="masks as prompts are for volumes"):
        find_cases(folders / "images", scans=["image"], prompts=folders / "masks", kind="images")
    with pytest.raises(ConfigError, match="unknown kind of cases"):
        find_cases(folders / "images", scans=["image"], kind="pictures")


def test_datalists_of_images_are_checked(folders):
    prepare(folders)
    path = folders.parent / "d.json"
    good = json.loads(path.read_text())
    changes = (
        ({"distance_unit": "cm"}, "expected one of mm, px"),
        ({"spacing_mm": -1}, "spacing_mm: expected a size in mm"),
        ({"spacing_mm": 0.5}, "is px although spacing_mm is 0.5"),
        ({"training": [{"case": "x", "image": ["a.png", "b.png"]}]}, "2 image files for 1 scans"),
    )
    for change, text in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=text):
            read_datalist(path)
    path.write_text(json.dumps({"kind": "images", "training": [{"image": "images/x-001.png"}]}))
    assert read_datalist(path)["training"] == [{"case": "x-001", "patient": "x-001", "image": "images/x-001.png"}]


def test_the_command_prints_the_summary(folders):
    words = ["prepare", "images", "--images", str(folders / "images"), "--masks", str(folders / "masks")]
    words += ["--output", str(folders / "d.json"), "--labels", "255=tumour", "--group", "^([a-d])", "--spacing", "0.5"]
    done = CliRunner().invoke(cli.app, [*words, "--fractions", "0.5,0.25,0.25", "--name", "Slices"])
    assert done.exit_code == 0, done.output
    assert "12 images of 4 groups" in done.output and read_datalist(folders / "d.json")["name"] == "Slices"


@pytest.mark.realdata
def test_real_slices_of_meningioma(realdata, tmp_path):
    src = realdata / "brain_tumour_t1c"
    options = {"labels": {"255": "tumour"}, "group": r"meningioma_(\d+)", "spacing": 0.49, "progress": False}
    output = tmp_path / "d.json"
    summary = prepare_images(src / "images", src / "labels", output, match="meningioma_*", **options)
    assert sum(summary.sections.values()) == summary.patients == 77 and summary.left_out == summary.warnings == []
    assert summary.shapes == {"512x512": 77} and summary.cases_per_label == {"0": 77, "255": 77}
    rows = [line.split(",") for line in (src / "cases.csv").read_text().split()]
    column = next(n for n, name in enumerate(rows[0]) if "pixel" in name)
    pixels = [int(row[column]) for row in rows[1:] if "meningioma" in ",".join(row)]
    assert len(pixels) == 77 and sum(pixels) == summary.voxels_per_label["255"]
