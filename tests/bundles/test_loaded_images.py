"""``load_bundle`` on 2-D images: arrays and files, grey and RGB, several boxes, and no affine."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from samseg_monai.bundles import load_bundle, write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.bundles.door import open_bundle
from samseg_monai.errors import DataError, PromptError
from samseg_monai.settings import dump_settings, merged, read_settings
from tests.helpers.commands import samseg
from tests.helpers.pictures import CLASSES, SIZE, discs

BOXES = [[4.5, 8, 20, 30.25], [33, 14, 43.5, 25]]  # one around each disc


def bundle_of(folder: Path, scans: list[str]) -> Path:
    """A bundle for 2-D images as packing leaves it, with the smallest SAM and random weights."""
    task = {"scans": scans, "label_values": CLASSES, "channels": None}
    run = {"sam_variant": "tiny", "image_size": 64, "seed": 1}
    run |= {"scan_mode": "channels"} if len(scans) == 3 else {}
    changes = {"task": task, "run": run, "strategy": {"method": {"rank": 2}}, "demo": None}
    settings = read_settings(merged(dump_settings(compose("brain_tumour_t1c", "lora")), changes), "test")
    root = write_bundle(settings, folder / settings.name)
    torch.manual_seed(0)
    with open_bundle(root) as opened:
        state = opened.network().state_dict()
    (root / "models").mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, root / "models" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("grey"), ["image"])


@pytest.fixture(scope="module")
def rgb(tmp_path_factory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("rgb"), ["red", "green", "blue"])


def picture(colour: bool) -> np.ndarray:
    image, _ = discs(3)
    return np.stack([image, image // 2, 255 - image], axis=-1) if colour else image


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("boxes", [BOXES, BOXES[:1], None])
def test_array_file_and_command_give_the_same_labels(colour, boxes, grey, rgb, tmp_path, monkeypatch):
    root, array = rgb if colour else grey, picture(colour)
    (tmp_path / "in").mkdir()
    Image.fromarray(array).save(tmp_path / "in" / "some.png")
    words = ["predict", root, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    if boxes is not None:
        (tmp_path / "boxes.json").write_text(json.dumps({"some": boxes}))
        words += ["--boxes", tmp_path / "boxes.json"]
    assert samseg(monkeypatch, *words, *(["--whole-slice"] if boxes is None else [])) == 0
    expected = np.asarray(Image.open(tmp_path / "out" / "some_seg.png"))
    loaded = load_bundle(root)
    given = [boxes] if boxes is None else [boxes, {"some": boxes}, tmp_path / "boxes.json"]
    for image, prompts in [(array, boxes), *((tmp_path / "in" / "some.png", one) for one in given)]:
        labels, affine = loaded.predict(image, boxes=prompts, whole_slice=boxes is None)
        np.testing.assert_array_equal(labels, expected)
        assert labels.shape == SIZE and set(np.unique(labels)) == {0, 255}
        np.testing.assert_array_equal(affine, np.eye(4))


def test_several_boxes_are_the_union_of_each_in_whatever_order(grey):
    loaded = load_bundle(grey)
    each = [loaded.predict(picture(False), boxes=[box])[0] for box in BOXES]
    for boxes in (BOXES, BOXES[::-1]):
        both, _ = loaded.predict(picture(False), boxes=boxes)
        # boxes side by side may be summed in another order than alone: a pixel at the threshold may go either way
        assert (both != np.maximum(*each)).sum() <= 3
    assert (each[0] != each[1]).sum() >= 20  # of 2,080


def test_grey_arrays_of_every_type_of_number_give_the_same(grey):
    loaded = load_bundle(grey)
    array = picture(False)
    expected, _ = loaded.predict(array, boxes=BOXES)
    for kind in (np.uint16, np.int64, np.float32, np.float64):
        labels, _ = loaded.predict(array.astype(kind), boxes=BOXES)
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((40, 52, 3), np.float32), r"uint8 \(rows, columns, 3\) for RGB"),
        (np.zeros((40, 52, 1), np.uint8), "got an array \\(40, 52, 1\\)"),
        (np.zeros((40, 52, 4), np.uint8), "expected numbers"),
        (np.zeros((40, 52), complex), "of complex128"),
        (np.zeros(7), "expected numbers"),
        (picture(True), "in RGB, but the network was trained on images in grey"),
        (np.full((40, 52), np.nan), "NaN or infinite"),
        (np.full((40, 52), 7, np.uint8), "there is no image in it"),
    ],
)
def test_arrays_that_are_no_such_image_are_refused(array, said, grey):
    with pytest.raises(DataError, match=said):
        load_bundle(grey).predict(array, boxes=BOXES)


def test_an_affine_of_a_picture_and_boxes_outside_of_it_are_refused(grey, rgb):
    loaded = load_bundle(grey)
    with pytest.raises(DataError, match="affine is for arrays that are volumes"):
        loaded.predict(picture(False), affine=np.diag([0.5, 0.5, 1, 1]))
    with pytest.raises((DataError, PromptError), match="lies outside of the image of 52 columns and 40 rows"):
        loaded.predict(picture(False), boxes=[*BOXES, [0, 41, 20, 60]])
    with pytest.raises(DataError, match="in grey, but the network was trained on images in RGB"):
        load_bundle(rgb).predict(picture(False), boxes=BOXES)
