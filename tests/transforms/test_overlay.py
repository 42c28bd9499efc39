"""The picture beside a predicted volume: the same for every way of storage, with what was found and asked for."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from samseg_monai import pictures
from samseg_monai.transforms import SaveOverlayd
from samseg_monai.transforms.saving import CLASSES, in_words

NAMES = ["left", "right"]


def volumes(axes="LPS", cut="LPS", shape=(40, 48, 24), spacing=(1.0, 1.0, 2.0)):
    """A case as it comes to be saved: two cuboids found in slices 4 to 19, of a file whose axes are ``axes``; the
    network saw it along those of ``cut``, without a border of 3 voxels, and with a box in slices 4 to 9."""
    own = nib.orientations.axcodes2ornt("LPS")
    labels = np.zeros(shape, np.uint8)
    labels[8:14, 12:30, 4:20], labels[22:30, 15:25, 6:20] = 1, 2
    image = 100.0 + 60 * labels + np.arange(shape[1])[:, None]
    prompt = np.zeros(shape, np.uint8)
    prompt[7:32, 10:32, 4:10] = 1
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    inner = (slice(3, -3), slice(3, -3))
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ (3, 3, 0)

    def turned(array, form, wanted):
        turn = nib.orientations.ornt_transform(own, nib.orientations.axcodes2ornt(wanted))
        found = nib.Nifti1Image(np.ascontiguousarray(array, dtype=np.float32), form).as_reoriented(turn)
        return MetaTensor(np.ascontiguousarray(found.get_fdata(dtype=np.float32))[None], affine=found.affine)

    return {
        "case": "p1",
        "pred": turned(labels, affine, axes),
        "image": turned(image[inner], moved, cut),
        "prompt": turned(prompt[inner], moved, cut),
    }


def drawn(folder, d, **options):
    SaveOverlayd("pred", options.pop("classes", NAMES), folder, **options)(d)
    with Image.open(folder / "p1_overlay.png") as picture:
        return np.asarray(picture)


def is_colour(picture, colour):
    return (picture == np.array(colour)).all(axis=-1)


@pytest.mark.parametrize("axes", ["RAS", "SLP", "PSR"])
def test_every_way_of_storage_gives_the_same_picture(axes, tmp_path):
    """But for the number of a slice, which names its axis where that is not the third, as boxes count."""
    first, second = drawn(tmp_path / "a", volumes()), drawn(tmp_path / "b", volumes(axes, cut="RAS"))
    assert first.shape[1] == 3 * (320 + 2) and first.shape == second.shape
    other = (first != second).any(axis=2)
    assert other.any() == (axes != "RAS")
    rows, columns = np.nonzero(other)
    height = (first.shape[0] - 40) // 2  # of a panel, above the legend
    assert (rows % height < 40).all() and (columns % 322 < 110).all()


def test_the_patient_s_right_is_on_the_left_and_boxes_stand_in_their_slices_alone(tmp_path):
    picture = drawn(tmp_path, volumes())
    panels = [picture[y : y + 386, x : x + 322] for y in (0, 386) for x in (0, 322, 644)]
    for number, panel in enumerate(panels):
        left, right = (np.argwhere(is_colour(panel[25:350, 20:300], colour)) for colour in CLASSES[:2])
        # axis 0 runs to the patient's left: class 1 lies before class 2, and is seen left of it
        assert len(left) and len(right) and left[:, 1].max() < right[:, 1].min()
        boxed = is_colour(panel[25:350], pictures.BOX).any()
        assert boxed == (number < 2), number  # slices 5, 8, 10, 13, 16, 18


def test_slices_are_those_that_the_network_cuts(tmp_path):
    """Coronal ones, say: head up, the patient's right on the left."""
    d = volumes(cut="LSP", spacing=(1.0, 1.0, 1.0))
    picture = drawn(tmp_path, d)
    assert picture.shape[1] == 3 * (384 + 2) and picture.shape[0] < 2 * 300  # 40 mm wide and 24 mm high
    affine = np.asarray(d["pred"].affine)
    assert pictures.letters_of(affine, 1) == "RLSI" and pictures.letters_of(affine, 0) == "APSI"
    assert pictures.letters_of(affine) == "RLAP"


def test_an_empty_prediction_is_shown_where_it_was_asked_for(tmp_path):
    d = volumes()
    d["pred"] = d["pred"] * 0
    picture = drawn(tmp_path, d)
    assert picture.shape[1] == 322  # one slice
    assert is_colour(picture[25:350], pictures.BOX).any() and not is_colour(picture, CLASSES[0]).any()
    del d["prompt"]
    assert not is_colour(drawn(tmp_path, d)[25:350], pictures.BOX).any()


def test_a_file_of_one_slice_is_shown_whole_and_whole_slices_have_no_box(tmp_path):
    d = volumes()
    d = {key: value[:, 25:26] if key == "pred" else value for key, value in d.items()}
    d["pred"].affine[:3, 3] += d["pred"].affine[:3, 0] * 25
    d["prompt"] = torch.ones_like(d["prompt"])
    picture = drawn(tmp_path, d)
    assert picture.shape[1] == 384 + 2 and is_colour(picture, CLASSES[1]).any()
    assert not is_colour(picture[25:350], pictures.BOX).any()


def test_sizes_read_well():
    assert [in_words(x) for x in (12345.6, 99.96, 1.2345, 0.0, 0.0001)] == [
        "12346", "100", "1.23", "0", "less than 0.001",
    ]  # fmt: skip
