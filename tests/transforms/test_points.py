"""Clicks as prompts: where they are drawn, read and moved, and what SAM makes of them."""

import json
import math

import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCropd, Compose, Flipd, Resized, Rotate90d
from segment_anything import SamPredictor

from samseg_monai.data.files.boxes import as_floats, read_boxes
from samseg_monai.errors import ConfigError, PromptError
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.transforms import FinalBoxesd, SimulatedBoxesd, UnpromptedIgnoredd, move_boxes
from samseg_monai.transforms.crop import _extent
from samseg_monai.transforms.points import objects, prompted
from samseg_monai.transforms.saving import BOX, overlay_picture
from tests.transforms.test_boxes_float import KEYS, case, unboxed

NAN = math.nan
CLICKS = {"inside": [[20.5, 12.5], [17, 13]], "outside": [[2, 28]]}


def clicks_of(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, 4 + 3 P) to clicks (N, P, 3)."""
    return rows[:, 4:].unflatten(1, (-1, 3))


def test_the_first_click_is_the_depth_of_the_largest_component():
    label = torch.zeros(1, 40, 40)
    label[0, 2:5, 2:5] = 1  # a small one
    label[0, 10:31, 12:25] = 1  # 21 rows, 13 columns
    label[0, 10:31, 25:40] = 0
    label[0, 20, 25:40] = 1  # a thin tail does not move it
    [row] = SimulatedBoxesd(kind="points")({"case": "a", "label": label})["boxes"]
    assert row[:4].isnan().all() and row[6] == 1
    assert row[4] == 18.5 and 16.5 <= row[5] <= 24.5
    label = torch.ones(1, 9, 21)  # the border is a border of the object: else any pixel would be as deep
    assert SimulatedBoxesd(kind="points")({"case": "a", "label": label})["boxes"][0, 4:6].tolist()[1] == 4.5


@pytest.mark.parametrize("kind", ["points", "both"])
@pytest.mark.parametrize("seed", [3, None])
def test_clicks_lie_inside_and_near_but_outside_and_a_seed_repeats_them(kind, seed):
    rng = torch.Generator().manual_seed(0)
    label = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 8, generator=rng), (60, 80))[0] > 0.6
    how = {"kind": kind, "inside": 4, "outside": 5, "seed": seed, "per_component": True}
    law = SimulatedBoxesd(**how)
    law.set_random_state(1)
    rows = law({"case": "a", "label": label})["boxes"]
    parts = objects(label[0].numpy(), per_component=True)
    assert rows.shape == (len(parts), 4 + 3 * 9) and len(parts) > 1
    plain = SimulatedBoxesd(seed=seed, per_component=True)({"case": "a", "label": label})["boxes"]
    assert rows[:, :4].isnan().all() if kind == "points" else torch.equal(rows[:, :4], plain)
    for (rectangle, own), clicks in zip(parts, clicks_of(rows), strict=True):
        assert clicks[:, 2].tolist() == [1] * 4 + [0] * 5
        for x, y, inside in clicks.tolist():
            place = (int(y), int(x))
            assert (x % 1, y % 1) == (0.5, 0.5) and own[place] == bool(inside) and label[0][place] == bool(inside)
            x0, y0, x1, y1 = rectangle
            near = [max(3, math.ceil(0.25 * side)) for side in (x1 - x0, y1 - y0)]
            assert x0 - near[0] < x < x1 + near[0] and y0 - near[1] < y < y1 + near[1]
    again, other = (law({"case": name, "label": label})["boxes"] for name in "ab")
    assert torch.equal(again.nan_to_num(), rows.nan_to_num()) == (seed is not None)
    assert not torch.equal(other.nan_to_num(), rows.nan_to_num())


def test_the_box_and_draws_of_an_older_run_stay_what_they_were():
    one, other = (SimulatedBoxesd(seed=7, loosen=(0, 0.3), kind=kind) for kind in ("box", "both"))
    d = unboxed([[4, 6, 20, 17]])
    assert torch.equal(one(d)["boxes"], other(d)["boxes"][:, :4])


def test_where_nothing_is_outside_or_nothing_inside_there_is_no_click():
    full = SimulatedBoxesd(kind="points", outside=2)({"case": "a", "label": torch.ones(1, 8, 8)})["boxes"]
    assert prompted(full).all() and clicks_of(full)[0, 1:].isnan().all()
    d = SimulatedBoxesd(kind="points", outside=2)({"case": "a", "label": torch.zeros(1, 8, 8)})
    assert d["boxes"].shape == (1, 13) and not prompted(d["boxes"]).any()
    assert (UnpromptedIgnoredd()(d)["label"] == 255).all()
    assert (UnpromptedIgnoredd()({"label": torch.ones(1, 8, 8), "boxes": full})["label"] == 1).all()
    padded = SimulatedBoxesd(kind="both", per_component=True, max_boxes=3)(unboxed([[1, 1, 5, 5]]))["boxes"]
    assert prompted(padded).tolist() == [True, False, False]


@pytest.mark.parametrize("how", [{"kind": "click"}, {"kind": "points", "inside": 0}, {"kind": "both", "outside": -1}])
def test_clicks_that_cannot_be_drawn_are_refused(how):
    with pytest.raises(ConfigError, match="kind is box, points or both"):
        SimulatedBoxesd(**how)


def test_a_file_holds_boxes_and_clicks_and_every_fault_is_named(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a": [[1, 2, 3, 4], CLICKS], "b": [[1, 2, 3, 4]]}))
    found = read_boxes(path, {"a": (30, 40)})
    assert found["b"] == [[1, 2, 3, 4]]
    expected = [[1, 2, 3, 4, *[NAN] * 9], [NAN] * 4 + [20.5, 12.5, 1, 17, 13, 1, 2, 28, 0]]
    np.testing.assert_array_equal(found["a"], expected)
    wrong = [
        ({"outside": [[1, 2]]}, "needs a box or a click inside"),
        ({"inside": [[1, 2, 3]]}, "must be a list of clicks"),
        ({"inside": [[1, "2"]]}, "no two finite numbers"),
        ({"inside": [[1, 1e400]]}, "no two finite numbers"),
        ({"inside": [[41, 2]]}, "outside of the image of 40 columns"),
        ({"inside": [[0.4, 0.5]]}, "fractions of the image"),
        ({"inside": [[4, 5]], "points": []}, "has 'points'"),
        ({"inside": [[4, 5]], "box": [4, 5, 3, 9]}, "x0 < x1"),
        ({"inside": [[4, 5]] * 1001}, "1,001 clicks"),
        ({"inside": [[4.5, 5]], "outside": [[4, 5.9]]}, "is clicked inside and outside at [4, 5]; keep one"),
    ]
    path.write_text(json.dumps({"a": [prompt for prompt, _ in wrong]}))
    with pytest.raises(PromptError) as error:
        read_boxes(path, {"a": (30, 40)})
    for number, (_, text) in enumerate(wrong):
        assert any(f"boxes[{number}]" in line and text in line for line in str(error.value).splitlines()), text


GEOMETRIES = [
    (Resized(KEYS, (60, 20, 1)), lambda x, y: (x / 2, 2 * y)),
    (Flipd(KEYS, 1), lambda x, y: (40 - x, y)),
    (Rotate90d(KEYS), lambda x, y: (y, 40 - x)),
    (CenterSpatialCropd(KEYS, (28, 38, -1)), lambda x, y: (x - 1, y - 1)),
]


@pytest.mark.parametrize("transform,by_hand", GEOMETRIES)
def test_clicks_follow_the_image_as_boxes_do(transform, by_hand):
    given = {**CLICKS, "box": [16, 10, 25, 16]}
    d = Compose([transform])({**case([]), "boxes": as_floats([given])})
    [row] = FinalBoxesd("json", kind="both")(d)["boxes"]
    expected = [number for x, y in [*CLICKS["inside"], *CLICKS["outside"]] for number in by_hand(x, y)]
    np.testing.assert_allclose(clicks_of(row[None])[0, :, :2].ravel(), expected, atol=1e-4)
    assert clicks_of(row[None])[0, :, 2].tolist() == [1, 1, 0]
    box = [*by_hand(16, 10), *by_hand(25, 16)]
    np.testing.assert_allclose(row[:4], [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])], atol=1e-4)


def test_a_click_outside_of_the_crop_and_another_kind_are_errors():
    d = CenterSpatialCropd(KEYS, (10, 10, -1))({**case([]), "boxes": as_floats([CLICKS])})
    with pytest.raises(PromptError, match="a click of prompt 0 lies outside"):
        FinalBoxesd("json")(d)
    d = {**case([]), "boxes": as_floats([CLICKS, [1, 2, 9, 9]])}
    with pytest.raises(PromptError, match="prompts of the file are box, but prompt::kind is 'points'"):
        FinalBoxesd("json", kind="points")(d)
    assert FinalBoxesd("json")(d)["boxes"].shape == (2, 13)


def test_a_crop_holds_all_clicks():
    assert _extent({**case([]), "boxes": as_floats([CLICKS])}, "boxes").tolist() == [[12, 2], [28, 21]]


def test_a_shrunk_box_leaves_its_clicks():
    rows = torch.tensor(as_floats([{**CLICKS, "box": [10, 10, 20, 30]}]))
    [row] = FinalBoxesd("label", shrink=0.1)({"boxes": rows})["boxes"]
    assert row.tolist() == [11, 12, 19, 28, *rows[0, 4:].tolist()]


def test_clicks_are_seen_in_the_picture():
    rows = torch.tensor(as_floats([CLICKS]))
    picture = np.asarray(overlay_picture(np.zeros((30, 40, 1)), np.zeros((30, 40), int), rows))
    assert (picture[12, 20] == BOX).all() and (picture[28, 2] == BOX).all() and not picture[0].any()


def prompt_taught():
    """A tiny network whose prompt encoder has no zeros: what each part of a prompt does is seen."""
    torch.manual_seed(0)
    made = SamSegmenter("tiny", image_size=64, scans=2)
    made.load_base("random")
    with torch.no_grad():
        for parameter in made.sam.prompt_encoder.parameters():
            parameter.normal_()
    return made


@pytest.fixture(scope="module")
def network():
    return prompt_taught()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["points", "both", "box"])
def test_the_masks_are_those_of_sam_predictor(kind):
    """One point, three and a box: pixels of the predictor are counted from the middle of the first one."""
    torch.manual_seed(1)
    ours = SamSegmenter("tiny", image_size=64, scans=3, scan_mode="channels", input_scale="sam")
    ours.load_base("random")
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    box, clicks, labels = np.array([4.0, 9, 40, 50]), np.array([[20.0, 30], [25, 33], [2, 60]]), np.array([1, 1, 0])
    predictor = SamPredictor(ours.sam)
    predictor.set_image(picture)
    for count in (1, 3):
        given = {"box": box} if kind != "points" else {}
        given |= {"point_coords": clicks[:count], "point_labels": labels[:count]} if kind != "box" else {}
        expected = predictor.predict(**given, multimask_output=False, return_logits=True)[0]
        row = {"box": box.tolist()} if kind != "points" else {}
        for key, label in (("inside", 1), ("outside", 0)):
            own = clicks[:count][labels[:count] == label]
            row |= {key: (own + 0.5).tolist()} if kind != "box" else {}
        rows = torch.tensor(as_floats([row]))
        found = ours(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), rows[None])
        torch.testing.assert_close(found[0].numpy(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prompts_of_all_kinds_in_a_batch_are_those_of_each_alone(network):
    image = torch.randn(3, 2, 48, 64)
    given = [
        [CLICKS, [5, 6, 30, 40]],
        [{"inside": [[33, 20]]}, {**CLICKS, "box": [5, 6, 30, 40]}],
        [{"inside": [[33, 20]], "box": [1, 1, 9, 9]}],
    ]
    lone = [as_floats([prompt]) for prompts in given for prompt in prompts]
    width = max(len(rows[0]) for rows in lone)
    table = torch.full((4, 3, width), NAN)  # an image without any prompt, and rows without
    for number, prompts in enumerate(given):
        for k, row in enumerate(as_floats(prompts)):
            table[number, k, : len(row)] = torch.tensor(row)
    found = network(torch.cat([image, image[:1]]), table)
    assert (found[3] == -20).all()
    for number, prompts in enumerate(given):
        each = [network(image[number : number + 1], torch.tensor([as_floats([prompt])])) for prompt in prompts]
        torch.testing.assert_close(found[number], torch.cat(each).amax(0), atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_network_through_clicks():
    torch.manual_seed(0)
    network = SamSegmenter("tiny", image_size=64)
    table = torch.tensor([as_floats([CLICKS]), as_floats([{**CLICKS, "box": [5, 6, 30, 40]}])])
    network.sam.requires_grad_(True)
    network(torch.randn(2, 1, 64, 64), table).sum().backward()
    grads = [network.sam.prompt_encoder.point_embeddings[k].weight.grad for k in range(4)]
    assert all(grad.abs().max() > 0 for grad in grads)
    assert network.sam.image_encoder.patch_embed.proj.weight.grad.abs().max() > 0


def test_a_volume_of_one_slice_takes_clicks_and_a_network_without_sam_refuses_them(network):
    image = torch.randn(1, 2, 32, 32, 1)
    rows = torch.tensor([as_floats([{"inside": [[12, 20]]}])])
    with torch.no_grad():
        found = SliceVolumeInferer([Resized(["image"], (64, 64))])(image, network, boxes=rows)
        resized = torch.nn.functional.interpolate(image[..., 0], 64, mode="area")
        direct = network(resized, move_boxes(rows[0], torch.eye(4), torch.diag(torch.tensor([0.5, 0.5, 1, 1])))[None])
    assert found.shape == (1, 1, 32, 32, 1) and direct.isfinite().all()
    plain = PlainSegmenter(torch.nn.Conv2d(3, 1, 1), image_size=32, scans=2, boxes="channel")
    with pytest.raises(ConfigError, match=r"expected \(B, 4\) or \(B, N, 4\) with B=1"):
        plain(image[..., 0], rows)
