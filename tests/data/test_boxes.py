"""``samseg boxes``: what was drawn elsewhere becomes the file that predictions take, voxel for voxel."""

import json
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from samseg_monai.data.files.boxes import read_boxes, volume_boxes, write_boxes
from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.dicom import read_series, slices_of
from samseg_monai.data.files.drawn_boxes import Images, boxes_from_masks, boxes_from_slicer, parse_margin
from samseg_monai.errors import ConfigError, DataError
from tests.data.test_dicom import AXES, name_of, write_series, write_slice
from tests.helpers.commands import samseg

SHAPE = (11, 9, 6)
OBLIQUE = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([0.8, 0.7, 2, 1]) if affine is None else affine), path)
    return path


def two_objects():
    """Two objects side by side in slices 1 to 3, a third alone in slice 4 (touching the border)."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 2:5, 1:4] = 1
    mask[6:9, 3:8, 2:4] = 2
    mask[10, 0:2, 4] = 1
    return mask


def filled(boxes, shape=SHAPE):
    out = np.zeros(shape, bool)
    for i0, j0, i1, j1, k0, k1 in volume_boxes(boxes, shape, "test"):
        out[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1] = True
    return out


def roi(low, high, affine=None, system="LPS", name="R", **more):
    """A ROI around the voxels ``low`` to ``high``, both included, edge to edge, with the axes of the image's grid."""
    affine = np.eye(4) if affine is None else np.asarray(affine, float)
    flip = np.diag([-1.0, -1, 1] if system == "LPS" else [1.0, 1, 1])
    low, high = np.asarray(low, float), np.asarray(high, float)
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    centre = affine[:3, :3] @ ((low + high) / 2) + affine[:3, 3]
    return {
        "type": "ROI", "name": name, "coordinateSystem": system, "coordinateUnits": "mm", "roiType": "Box",
        "center": (flip @ centre).tolist(), "size": ((high - low + 1) * sides).tolist(),
        "orientation": (flip @ affine[:3, :3] / sides).ravel().tolist(), "insideOut": False,
        "controlPoints": [{"position": (flip @ centre).tolist()}], **more,
    }  # fmt: skip


def markups(path, *entries):
    path.write_text(json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": list(entries)}))
    return path


# --- which slice is number 0


@pytest.mark.parametrize("head_first", [True, False])
def test_a_box_drawn_by_instance_number_row_and_column_is_translated(tmp_path, head_first, monkeypatch, capsys):
    """What a reader notes in a viewer: image number, columns and rows of the picture."""
    folder = tmp_path / "patient"
    folder.mkdir()
    for k in range(5):  # from the feet upwards
        plane = np.full((7, 6), 10 * k, np.int16)
        plane[2:5, 1:3] = 10 * k + 5  # columns 2 to 4, rows 1 to 2
        tags = {"0020|0013": str(5 - k if head_first else k + 1)}
        write_slice(folder / name_of(k), plane, (5, 6, 7 + 2 * k), tags=tags)
    instance = 2
    assert samseg(monkeypatch, "boxes", "slices", folder) == 0
    header, *rows = (line.split(",") for line in capsys.readouterr().out.splitlines())
    assert header == ["slice", "instance_number", "position_mm", "file"]
    assert [row[2] for row in rows] == ["7.00", "9.00", "11.00", "13.00", "15.00"]
    [k] = [int(row[0]) for row in rows if row[1] == str(instance)]
    assert k == (3 if head_first else 1)
    box = {"slice": k, "box": [2, 1, 4, 2]}
    array = read_series(folder).array
    inside = filled([box], array.shape)
    assert set(array[inside]) == {10 * k + 5} and (array[~inside] == 10 * k + 5).sum() == 0
    (tmp_path / "boxes.json").write_text(json.dumps({"patient": [box]}))
    assert find_cases(folder, scans=("ct",), boxes=tmp_path / "boxes.json").good[0]["boxes"] == [box]


# direction in LPS in which slices ascend: towards head, feet, the patient's right
@pytest.mark.parametrize(
    ("axes", "upwards"), [("axial", [0, 0, 1]), ("feet first", [0, 0, -1]), ("sagittal", [-1, 0, 0])]
)
def test_slices_ascend_along_the_normal_of_the_pictures(tmp_path, axes, upwards):
    write_series(tmp_path, axes=AXES[axes])
    found = slices_of(tmp_path)
    assert [piece.name for piece in found] == [name_of(k) for k in range(5)]
    np.testing.assert_allclose(np.diff([piece.position for piece in found], axis=0), np.tile(upwards, (4, 1)) * 2.0)


@pytest.mark.realdata
def test_a_real_series_is_numbered_from_the_feet_whatever_its_instance_numbers(realdata):
    folder = realdata / "abdomen_ct" / "example_ct_dicom"
    found = slices_of(folder)
    heights = [piece.position[2] for piece in found]
    assert heights == sorted(heights)
    volume = read_series(folder)
    middle = found[7]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(folder / middle.name))
    picture = sitk.GetArrayFromImage(reader.Execute())[0]  # (rows, columns)
    assert np.array_equal(volume.array[200:232, 140:167, 7], picture[140:167, 200:232].T)
    assert [piece.instance for piece in found] == [str(n) for n in range(286, 266, -1)]  # from the head downwards


# --- from masks


@pytest.mark.parametrize("per", ["slice", "component"])
def test_boxes_hold_every_voxel_and_are_tight(tmp_path, per):
    mask = np.random.default_rng(3).random((23, 19, 7)) > 0.9
    mask[..., 2] = False
    found = boxes_from_masks([save(tmp_path / "a_seg.nii.gz", mask.astype(np.uint8))], per=per)
    assert list(found.boxes) == ["a"] and not found.bad
    boxes = volume_boxes(found.boxes["a"], mask.shape, "test")
    assert not (mask & ~filled(found.boxes["a"], mask.shape)).any()
    for i0, j0, i1, j1, k, _ in boxes:  # each side of each box touches the foreground
        plane = mask[i0 : i1 + 1, j0 : j1 + 1, k]
        assert plane[0].any() and plane[-1].any() and plane[:, 0].any() and plane[:, -1].any()
    assert {box[4] for box in boxes} == {0, 1, 3, 4, 5, 6}
    assert (len(boxes) == 6) == (per == "slice")


def test_labels_components_and_margins(tmp_path):
    path = save(tmp_path / "p1.nii.gz", two_objects())

    def of(**options):
        found = boxes_from_masks([path], **options)
        assert not found.bad
        return found.boxes["p1"], found.notes

    boxes, notes = of()
    assert boxes == [
        {"slice": 1, "box": [1, 2, 3, 4]}, {"slice": 2, "box": [1, 2, 8, 7]}, {"slice": 3, "box": [1, 2, 8, 7]},
        {"slice": 4, "box": [10, 0, 10, 1]},
    ]  # fmt: skip
    assert notes == ["p1: values 1, 2 are taken together; --label chooses"]
    several, _ = of(per="component")
    assert several[1:3] == [{"slice": 2, "box": [6, 3, 8, 7]}, {"slice": 2, "box": [1, 2, 3, 4]}]
    assert of(labels=[2]) == ([{"slice": k, "box": [6, 3, 8, 7]} for k in (2, 3)], [])
    # 1 mm is two voxels of 0.8 mm along i, two of 0.7 along j; boxes end at the image's border
    assert of(labels=[2], margin=parse_margin("1mm"))[0][0] == {"slice": 2, "box": [4, 1, 10, 8]}
    assert of(labels=[2], margin=parse_margin("1.6 mm"))[0][0]["box"][0] == 4  # exactly two voxels
    assert of(labels=[2], margin=parse_margin("1voxel"))[0][0] == {"slice": 2, "box": [5, 2, 9, 8]}
    for text in ("3", "mm", "-1mm", "3 cm", "nan mm"):
        with pytest.raises(ConfigError, match="expected a number with its unit"):
            parse_margin(text)
    with pytest.raises(ConfigError, match="expected slice or component"):
        of(per="volume")


def test_what_is_no_mask_is_named_and_the_others_go_on(tmp_path):
    soft = two_objects() * 0.37
    nan = np.where(two_objects(), np.nan, 0)
    save(tmp_path / "soft.nii.gz", soft)
    save(tmp_path / "nan.nii.gz", nan)
    save(tmp_path / "empty.nii.gz", two_objects() * 0)
    save(tmp_path / "four.nii.gz", np.stack([two_objects()] * 2, -1))
    save(tmp_path / "good.nii.gz", two_objects() + np.float32(1e-6))
    (tmp_path / "damaged.nii.gz").write_bytes(b"\x1f\x8b rubbish")
    found = boxes_from_masks([tmp_path])
    assert list(found.boxes) == ["good"]
    reasons = {"soft": "holds values such as 0.37", "nan": "NaN or infinite", "empty": "the mask is empty",
               "four": "2 channels", "damaged": "truncated or damaged"}  # fmt: skip
    assert found.bad.keys() == reasons.keys()
    assert all(reason in found.bad[case] for case, reason in reasons.items()), found.bad
    assert (
        "no voxel has the value 3; it holds 0, 1, 2"
        in boxes_from_masks([tmp_path / "good.nii.gz"], labels=[3]).bad["good"]
    )
    save(tmp_path / "two" / "p_seg.nii.gz", two_objects())
    save(tmp_path / "two" / "p-label.nii.gz", two_objects())
    assert len(boxes_from_masks([tmp_path / "two"]).bad) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no mask in"):
        boxes_from_masks([tmp_path / "none"])


def test_masks_beside_images_and_in_case_folders_are_found(tmp_path):
    for case in ("A", "B"):
        save(tmp_path / "in" / f"{case}.nii.gz", two_objects())
        save(tmp_path / "in" / f"{case}_seg.nii.gz", two_objects())
        save(tmp_path / "deep" / case / f"{case}-t1c.nii.gz", two_objects())
        save(tmp_path / "deep" / case / f"{case}-seg.nii.gz", two_objects())
    found = boxes_from_masks([tmp_path / "in"], images=tmp_path / "in")
    assert list(found.boxes) == ["A", "B"]
    assert found.notes[0] == "passed over, as others in in are named like masks: A.nii.gz, B.nii.gz"
    deep = boxes_from_masks([tmp_path / "deep"], images=tmp_path / "deep")
    assert deep.boxes == found.boxes
    assert Images(tmp_path / "deep").of("B") == tmp_path / "deep" / "B" / "B-t1c.nii.gz"
    with pytest.raises(DataError, match="no image of this case"):
        Images(tmp_path / "deep").of("C")


def test_masks_of_pictures_give_boxes_in_pixels(tmp_path):
    plane = np.zeros((20, 30), np.uint8)
    plane[4:9, 10:26], plane[15:18, 2:3] = 255, 255
    Image.fromarray(plane).save(tmp_path / "a_mask.png")
    found = boxes_from_masks([tmp_path], per="component", margin=parse_margin("1.5px"))
    write_boxes(tmp_path / "boxes.json", found.boxes)
    assert read_boxes(tmp_path / "boxes.json", {"a": (20, 30)}) == {
        "a": [[8.5, 2.5, 27.5, 10.5], [0.5, 13.5, 4.5, 19.5]]
    }
    assert boxes_from_masks([tmp_path / "a_mask.png"]).boxes == {"a": [[2.0, 4.0, 26.0, 18.0]]}
    assert "no pixel size" in boxes_from_masks([tmp_path], margin=(1.0, "mm")).bad["a"]
    with pytest.raises(ConfigError, match="a mask of a 2-D image"):
        boxes_from_masks([tmp_path], images=tmp_path)
    # a NIfTI slice has axis 0 along columns, and its own pixel size
    save(tmp_path / "flat.nii.gz", plane.T[..., None], np.diag([0.5, 2, 1, 1]))
    flat = boxes_from_masks([tmp_path / "flat.nii.gz"], flat=True, margin=(1.0, "mm"))
    assert flat.boxes == {"flat": [[0.0, 3.5, 28.0, 18.5]]}
    Image.fromarray(np.stack([plane, plane, plane * 0], -1)).save(tmp_path / "colour.png")
    assert "in colour" in boxes_from_masks([tmp_path / "colour.png"]).bad["colour"]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_mask_stored_in_other_directions_or_cut_is_moved_onto_the_image(tmp_path, order):
    mask = two_objects().astype(bool)
    save(tmp_path / "img.nii.gz", np.zeros(SHAPE, np.int16), OBLIQUE)
    wanted = boxes_from_masks([save(tmp_path / "img_seg.nii.gz", mask.astype(np.uint8), OBLIQUE)]).boxes["img"]
    for flips in product((1, -1), repeat=3):
        cut = (slice(1, 11), slice(0, 8), slice(1, 5))  # all of the foreground
        linear = np.zeros((3, 3))
        for new, old in enumerate(order):
            linear[old, new] = flips[old]
        start = [(c.start if f > 0 else c.stop - 1) for c, f in zip(cut, flips, strict=True)]
        back = np.vstack([np.column_stack([linear, start]), [0, 0, 0, 1]])  # stored voxel -> voxel of the image
        stored = mask[cut][tuple(slice(None, None, f) for f in flips)].transpose(order)
        path = save(tmp_path / "other" / "img_seg.nii.gz", stored.astype(np.uint8), OBLIQUE @ back)
        found = boxes_from_masks([path], images=tmp_path)
        assert found.boxes == {"img": wanted}, (order, flips, found.bad)
        assert "it is cut to a part of img.nii.gz" in found.notes[-1]
        assert ("its axes are stored as" in found.notes[-1]) == (flips != (1, 1, 1) or order != (0, 1, 2))


def test_a_mask_on_another_grid_or_beyond_the_image_is_refused(tmp_path):
    image = save(tmp_path / "img.nii.gz", np.zeros(SHAPE, np.int16))
    mask, affine = two_objects(), np.diag([0.8, 0.7, 2, 1.0])
    for change, reason in (
        (np.diag([2, 1, 1, 1.0]), "affine differs"),
        (np.diag([1.01, 1, 1, 1.0]), "affine differs"),
        (np.array([[1, 0, 0, 0.4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "affine differs"),
        (
            np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
            "2 of its 59 foreground voxels lie outside",
        ),
    ):
        path = save(tmp_path / "m.nii.gz", mask, affine @ change)
        assert reason in boxes_from_masks([path], images=image).bad["m"]


@pytest.mark.realdata
def test_a_real_mask_whose_rows_run_the_other_way_fits_its_series(realdata):
    series = realdata / "abdomen_ct" / "example_ct_dicom"
    path = realdata / "abdomen_ct" / "example_seg_dicom.nii.gz"
    aorta = 52
    [boxes] = boxes_from_masks([path], labels=[aorta], images=series).boxes.values()
    [unmoved] = boxes_from_masks([path], labels=[aorta]).boxes.values()
    assert boxes != unmoved and len(boxes) == len(unmoved)
    array = read_series(series).array

    def bright(of):  # contrast in the aorta
        return float(array[filled(of, array.shape)].mean())

    assert bright(boxes) > 140 > 100 > bright(unmoved)


# --- from 3D Slicer


@pytest.mark.parametrize("system", ["LPS", "RAS"])
@pytest.mark.parametrize("affine", [np.diag([0.8, 0.7, 2, 1]), np.diag([-1, -1, 3, 1.0]), OBLIQUE], ids=str)
def test_a_roi_gives_the_voxels_that_it_was_drawn_around(tmp_path, affine, system):
    image = save(tmp_path / "p1-t1c.nii.gz", np.zeros(SHAPE, np.int16), affine)
    entries = [roi((2, 3, 1), (7, 5, 4), affine, system), roi((0, 0, 5), (10, 8, 5), affine, system)]
    found = boxes_from_slicer([markups(tmp_path / "a.mrk.json", *entries)], image)
    wanted = [{"slices": [1, 4], "box": [2, 3, 7, 5]}, {"slices": [5, 5], "box": [0, 0, 10, 8]}]
    assert (found.boxes, found.bad, found.notes) == ({"p1": wanted}, {}, [])
    named = boxes_from_slicer([tmp_path / "a.mrk.json"] * 2, image, case="x/y")
    assert named.boxes == {"x_y": wanted * 2}


@pytest.mark.parametrize("axes", AXES)
def test_a_roi_on_a_dicom_series_meets_its_slices(tmp_path, axes):
    _, affine = write_series(tmp_path / "patient", axes=AXES[axes])
    found = boxes_from_slicer(
        [markups(tmp_path / "r.mrk.json", roi((1, 2, 3), (4, 2, 4), affine))], tmp_path / "patient"
    )
    assert found.boxes == {"patient": [{"slices": [3, 4], "box": [1, 2, 4, 2]}]} and not found.notes


def test_rois_that_are_turned_thin_or_cut_are_told(tmp_path):
    image = save(tmp_path / "i.nii.gz", np.zeros((40, 40, 10), np.int16), np.diag([1, 1, 2, 1]))
    c = np.cos(np.radians(30))
    turned = roi((10, 10, 2), (29, 29, 5), np.diag([1, 1, 2, 1]), orientation=[c, -0.5, 0, 0.5, c, 0, 0, 0, 1])
    thin = roi((3, 3, 4), (8, 8, 4), np.diag([1, 1, 2, 1]), size=[6, 6, 0.1], center=[-5.5, -5.5, 8.9], name="thin")
    cut = roi((30, 30, 8), (45, 35, 12), np.diag([1, 1, 2, 1]), name="cut")
    bare = {"type": "ROI", "controlPoints": [{"position": [-5, -5, 4]}], "size": [3, 3, 2]}  # of another program
    line = {"type": "Line", "name": "L"}
    found = boxes_from_slicer([markups(tmp_path / "a.mrk.json", turned, thin, cut, line, bare)], image)
    side = 10 * (c + 0.5)  # half of the box around a square of 20 turned by 30 degrees, in the middle of voxels
    low, high = int(np.ceil(19.5 - side)), int(np.floor(19.5 + side))
    assert found.boxes["i"] == [
        {"slices": [2, 5], "box": [low, low, high, high]}, {"slices": [4, 4], "box": [3, 3, 8, 8]},
        {"slices": [8, 9], "box": [30, 30, 39, 35]}, {"slices": [2, 2], "box": [4, 4, 6, 6]},
    ]  # fmt: skip
    told = "\n".join(found.notes)
    for text in ("(R) is turned against the image by 30 degrees", "(thin) is thinner than a voxel",
                 "(cut) reaches beyond the image", "(L) is no ROI ('Line'): passed over"):  # fmt: skip
        assert text in told
    assert len(found.notes) == 4


BAD_ROI = {
    "outside": ({"center": [500, 0, 0]}, "lies outside of the image"),
    "system": ({"coordinateSystem": "XYZ"}, "expected LPS or RAS"),
    "units": ({"coordinateUnits": "cm"}, "expected mm or um"),
    "inside out": ({"insideOut": True}, "inside out"),
    "kind": ({"roiType": "Sphere"}, "expected a box"),
    "flat": ({"size": [5, 0, 5]}, "a size of three numbers above 0"),
    "words": ({"size": "5 5 5"}, "a size of three numbers above 0"),
    "nan": ({"center": [float("nan"), 0, 0]}, "needs a center of three numbers"),
    "huge": ({"center": [10**400, 0, 0]}, "is not JSON (a number of 401 digits)"),
    "far": ({"center": [1e308, -1e308, 0]}, "needs a center of three numbers"),
    "two": ({"center": [1, 2]}, "needs a center of three numbers"),
    "shear": ({"orientation": [1, 1, 0, 0, 1, 0, 0, 0, 1]}, "is no rotation"),
    "zero": ({"orientation": [0] * 9}, "is no rotation"),
    "none": ({"orientation": None}, "is no rotation"),
    "a line": ({"type": "Line"}, "holds no ROI"),
}


@pytest.mark.parametrize("kind", BAD_ROI)
def test_bad_rois_are_named(tmp_path, kind):
    change, reason = BAD_ROI[kind]
    image = save(tmp_path / "i.nii.gz", np.zeros(SHAPE, np.int16))
    found = boxes_from_slicer([markups(tmp_path / "a.mrk.json", roi((1, 1, 1), (2, 2, 2), **change))], image)
    assert not found.boxes and reason in found.bad["a.mrk.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"markups": 3}', '{"markups": [3]}', '{"markups": []}', "<html>"])
def test_files_that_are_no_markups_are_named(tmp_path, text):
    (tmp_path / "a.mrk.json").write_text(text)
    image = save(tmp_path / "i.nii.gz", np.zeros(SHAPE, np.int16))
    assert "save the ROI from Slicer" in boxes_from_slicer([tmp_path / "a.mrk.json"], image).bad["a.mrk.json"]
    with pytest.raises(ConfigError, match="is no volume"):
        boxes_from_slicer([], tmp_path / "a.mrk.json")


def test_microns_are_read(tmp_path):
    image = save(tmp_path / "i.nii.gz", np.zeros(SHAPE, np.int16), np.eye(4))
    plain = roi((1, 2, 3), (4, 5, 5), system="RAS")
    scaled = {**plain, "coordinateUnits": ["um", "UCUM", "micrometer"],
              "center": [v * 1000 for v in plain["center"]], "size": [v * 1000 for v in plain["size"]]}  # fmt: skip
    found = [boxes_from_slicer([markups(tmp_path / "a.mrk.json", entry)], image).boxes for entry in (plain, scaled)]
    assert found[0] == found[1] == {"i": [{"slices": [3, 5], "box": [1, 2, 4, 5]}]}


# --- the commands


def test_the_commands_write_what_predictions_read(tmp_path, monkeypatch, capsys):
    out = tmp_path / "boxes.json"
    for case in ("A", "B"):
        save(tmp_path / "masks" / f"{case}.nii.gz", two_objects() * (case == "A"))
        rng = np.random.default_rng(0)
        save(tmp_path / "images" / f"{case}.nii.gz", rng.normal(100, 9, SHAPE).astype(np.float32))
    words = ["boxes", "from-mask", tmp_path / "masks", "--output", out, "--label", 1]
    assert samseg(monkeypatch, *words) == 1
    told = capsys.readouterr().err
    assert "B: no voxel has the value 1; it holds 0" in told and "Traceback" not in told and not out.exists()
    assert samseg(monkeypatch, *words, "--skip-bad", "--margin", "1voxel") == 0
    said = capsys.readouterr()
    assert "left out: B: " in said.err and "4 boxes of 1 cases" in said.out
    drawn = markups(tmp_path / "b.mrk.json", roi((2, 2, 2), (5, 5, 3), np.diag([0.8, 0.7, 2, 1])))
    words = ["boxes", "from-slicer", drawn, "--image", tmp_path / "images" / "B.nii.gz", "--output", out, "--add"]
    assert samseg(monkeypatch, *words) == 0
    found = find_cases(tmp_path / "images", scans=("image",), boxes=out)
    assert {item["case"]: item["boxes"] for item in found.good} == json.loads(out.read_text())
    assert found.good[1]["boxes"] == [{"slices": [2, 3], "box": [2, 2, 5, 5]}]
    assert samseg(monkeypatch, *words) == 0 and "replaced: B" in capsys.readouterr().out
    assert samseg(monkeypatch, "boxes", "slices", out) == 1
    assert samseg(monkeypatch, "boxes", "from-mask", tmp_path / "gone", "--output", out) == 1


def test_the_Images_a_case_is_not_that_of_one_whose_name_goes_on(tmp_path):
    """P1-2 sorts before P1.nii.gz; its boxes would lie on other slices."""
    for name in ("P1.nii.gz", "P1-2.nii.gz", "P3_0000.nii.gz", "P3_a.nii.gz", "P4-t1ce.nii.gz", "P4-t2.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / name)
    assert Images(tmp_path).of("P1").name == "P1.nii.gz" and Images(tmp_path).of("P1-2").name == "P1-2.nii.gz"
    assert Images(tmp_path).of("P3").name == "P3_0000.nii.gz" and Images(tmp_path).of("P4").name == "P4-t1ce.nii.gz"
    (tmp_path / "P1.nii.gz").unlink()
    assert Images(tmp_path).of("P1").name == "P1-2.nii.gz"  # nothing else is called like it
    (tmp_path / "P1-2.nii.gz").rename(tmp_path / "P1-3.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "P1_b.nii.gz")
    with pytest.raises(DataError, match=r"several images in .* begin like this case \(P1-3.nii.gz, P1_b.nii.gz\)"):
        Images(tmp_path).of("P1")
