"""Boxes of 2-D images stay the numbers they were: against rectangles that MONAI moved, and against hand computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Flipd,
    Orientationd,
    Resized,
    ResizeWithPadOrCropd,
    Rotated,
)
from torch import nn

from samseg_monai.errors import ConfigError, PromptError
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.transforms import (
    EllipseFromBoxesd,
    EllipseFromPromptd,
    FinalBoxesd,
    SimulatedBoxesd,
    SplineResized,
)

SIZE = (30, 40)  # rows, columns
KEYS = ["image", "label"]


def case(boxes: list[list[float]], size: tuple[int, int] = SIZE, spacing: float = 0.5) -> dict:
    """An image as the reader gives it, its label the filled boxes, and the boxes."""
    label = torch.zeros((1, *size, 1))
    for x0, y0, x1, y1 in boxes:
        label[:, int(y0) : int(y1), int(x0) : int(x1)] = 1
    affine = torch.diag(torch.tensor([spacing, spacing, 1.0, 1.0], dtype=torch.float64))
    meta = {"original_affine": affine.clone()}
    image = MetaTensor(torch.rand(1, *size, 1), affine=affine, meta=dict(meta))
    return {"case": "a", "image": image, "label": MetaTensor(label, affine=affine, meta=dict(meta)), "boxes": boxes}


MOVES = {
    "nothing": ([], lambda x0, y0, x1, y1: [x0, y0, x1, y1]),
    "resize": ([Resized(KEYS, (60, 120, 1), mode="nearest")], lambda x0, y0, x1, y1: [3 * x0, 2 * y0, 3 * x1, 2 * y1]),
    "crop": ([CenterSpatialCropd(KEYS, (20, 30, -1))], lambda x0, y0, x1, y1: [x0 - 5, y0 - 5, x1 - 5, y1 - 5]),
    "pad": ([ResizeWithPadOrCropd(KEYS, (34, 40, -1))], lambda x0, y0, x1, y1: [x0, y0 + 2, x1, y1 + 2]),
    "flip": ([Flipd(KEYS, 1)], lambda x0, y0, x1, y1: [40 - x1, y0, 40 - x0, y1]),
    "orientation": ([Orientationd(KEYS, "PRS", labels=None)], lambda x0, y0, x1, y1: [y0, 40 - x1, y1, 40 - x0]),
    "all": (
        [Orientationd(KEYS, "ALS", labels=None), CenterSpatialCropd(KEYS, (36, 20, -1)), Resized(KEYS, (72, 40, 1))],
        # axes exchanged and columns reversed, then two rows and five columns cut off, then twice as large
        lambda x0, y0, x1, y1: [2 * (30 - y1 - 5), 2 * (x0 - 2), 2 * (30 - y0 - 5), 2 * (x1 - 2)],
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_boxes_follow_the_image_as_a_filled_rectangle_does(move):
    transforms, by_hand = MOVES[move]
    box = [11.0, 8.0, 26.0, 19.0]
    d = Compose(transforms)(case([box]))
    expected = torch.tensor([by_hand(*box)])
    found = FinalBoxesd("json")(d)["boxes"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    drawn = SimulatedBoxesd()({k: v for k, v in d.items() if k != "boxes"} | {"label": d["label"] > 0.5})["boxes"]
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_fractions_of_pixels_survive_and_what_sticks_out_is_clipped():
    boxes = [[10.25, 7.5, 20.125, 12.875], [-3.5, 20.5, 12.0, 44.0]]
    d = Compose([Resized(KEYS, (15, 20, 1))])({**case([]), "boxes": boxes})
    found = FinalBoxesd("json")(d)["boxes"]
    expected = torch.tensor([[5.125, 3.75, 10.0625, 6.4375], [0.0, 10.25, 6.0, 15.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_box_outside_of_the_crop_is_an_error_that_names_case_and_box():
    d = CenterSpatialCropd(KEYS, (10, 10, -1))(case([[16, 12, 20, 14], [1, 1, 4, 4]]))
    with pytest.raises(PromptError, match=r"a: nothing is left.*\n.*box 1 lies outside"):
        FinalBoxesd("json")(d)


def test_a_rotation_by_other_angles_is_refused():
    d = Rotated("image", (0.0, 0.0, 0.3), keep_size=True)(case([[16, 12, 20, 14]]))
    with pytest.raises(PromptError, match="right angles"):
        FinalBoxesd("json")(d)


@pytest.mark.parametrize("given", [None, [[1, 2, 3]], [[1, 2, 3, float("nan")]], "boxes"])
def test_boxes_that_are_none_are_refused(given):
    with pytest.raises(PromptError, match="a: 'boxes' must be a list"):
        FinalBoxesd("json")({**case([]), "boxes": given})


class Recorder(nn.Module):
    """Gives zeros and keeps what it got."""

    def forward(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        self.image, self.boxes = image, boxes
        return torch.zeros_like(image[:, :1])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_network_gets_the_box_times_the_ratio_of_sizes(rows):
    rng = np.random.default_rng(rows)
    low, side = rng.uniform(0, 20, (rows, 2)), rng.uniform(1, 9, (rows, 2))
    boxes = torch.tensor(np.concatenate([low, low + side], axis=1), dtype=torch.float32)
    network = Recorder()
    resize = Resized("image", 1024, size_mode="longest")
    inferer = SliceVolumeInferer([resize])
    logits = inferer(torch.rand(1, 1, *SIZE, 1), network, boxes=torch.cat([boxes, torch.full((1, 4), torch.nan)])[None])
    assert logits.shape == (1, 1, *SIZE, 1)
    assert network.boxes.shape == (1, rows + 1, 4) and network.boxes[0, -1].isnan().all()
    scale = 1024 / 40
    torch.testing.assert_close(network.boxes[0, :-1], boxes * scale, rtol=0, atol=1e-4)


def test_image_without_any_box_is_empty_and_the_network_sees_none():
    network = Recorder()
    logits = SliceVolumeInferer([])(torch.rand(1, 1, *SIZE, 1), network, boxes=torch.full((1, 1, 4), torch.nan))
    assert (logits == -20).all()
    assert network.boxes.isnan().all()


def test_boxes_cannot_follow_a_resize_without_record():
    inferer = SliceVolumeInferer([SplineResized("image", 64)], direct=True)
    with pytest.raises(ConfigError, match="SplineResized"):
        inferer(torch.rand(1, 1, *SIZE, 1), Recorder(), boxes=torch.tensor([[[1.0, 1, 5, 5]]]))


def test_boxes_of_another_shape_are_refused():
    with pytest.raises(PromptError, match=r"\(1, N, 4\)"):
        SliceVolumeInferer([])(torch.rand(1, 1, *SIZE, 1), Recorder(), boxes=torch.zeros(1, 4))


def drawn(seed: int | None = None, **law) -> SimulatedBoxesd:
    return SimulatedBoxesd(loosen=law.pop("loosen", (0.0, 0.3)), seed=seed, **law)


def unboxed(boxes: list[list[float]], name: str = "a") -> dict:
    return {"case": name, "label": case(boxes)["label"]}


def test_sides_move_outwards_each_on_its_own_within_the_law_and_are_not_rounded():
    law = drawn(loosen=(0.1, 0.3))
    law.set_random_state(0)
    boxes = torch.cat([law(unboxed([[15, 10, 25, 15]]))["boxes"] for _ in range(300)])
    outward = (boxes - torch.tensor([15.0, 10, 25, 15])) * torch.tensor([-1, -1, 1, 1]) / torch.tensor([10, 5, 10, 5])
    assert outward.min() >= 0.1 - 1e-5 and outward.max() <= 0.3 + 1e-5
    assert ((outward.mean(0) - 0.2).abs() < 0.015).all()
    assert (torch.corrcoef(outward.T) - torch.eye(4)).abs().max() < 0.2
    assert (boxes != boxes.round()).float().mean() > 0.99


def test_a_fraction_of_the_boxes_is_tight():
    law = drawn(tight=1 / 3)
    law.set_random_state(0)
    boxes = torch.cat([law(unboxed([[15, 10, 25, 15]]))["boxes"] for _ in range(600)])
    tight = (boxes == torch.tensor([15.0, 10, 25, 15])).all(dim=1)
    assert abs(tight.float().mean() - 1 / 3) < 0.06


def test_shift_moves_the_whole_box():
    law = drawn(loosen=(0.0, 0.0), shift=0.1)
    law.set_random_state(0)
    boxes = torch.cat([law(unboxed([[15, 10, 25, 15]]))["boxes"] for _ in range(200)])
    moved = boxes - torch.tensor([15.0, 10, 25, 15])
    torch.testing.assert_close(moved[:, :2], moved[:, 2:], atol=1e-4, rtol=0)
    assert 0.9 < moved[:, 0].abs().max() <= 1.0001 and 0.45 < moved[:, 1].abs().max() <= 0.5001


def test_seeded_boxes_depend_on_seed_and_case_and_not_on_resolution():
    small = drawn(7)(unboxed([[15, 10, 25, 15]]))["boxes"]
    assert torch.equal(drawn(7)(unboxed([[15, 10, 25, 15]]))["boxes"], small)
    assert not torch.equal(drawn(8)(unboxed([[15, 10, 25, 15]]))["boxes"], small)
    assert not torch.equal(drawn(7)(unboxed([[15, 10, 25, 15]], "b"))["boxes"], small)
    large = unboxed([[15, 10, 25, 15]])["label"].repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(drawn(7)({"case": "a", "label": large})["boxes"], 4 * small, rtol=0, atol=1e-4)


def test_components_get_a_box_each_and_batches_get_equal_rows():
    d = unboxed([[2, 2, 6, 6], [15, 10, 25, 15]])
    both = torch.tensor([[15.0, 10, 25, 15], [2, 2, 6, 6]])
    assert torch.equal(SimulatedBoxesd(per_component=True)(d)["boxes"], both)
    padded = SimulatedBoxesd(per_component=True, max_boxes=4)(d)["boxes"]
    assert torch.equal(padded[:2], both) and padded[2:].isnan().all() and padded.shape == (4, 4)
    assert torch.equal(SimulatedBoxesd(per_component=True, max_boxes=1)(d)["boxes"], both[:1])
    assert torch.equal(SimulatedBoxesd(max_boxes=8)(d)["boxes"], torch.tensor([[2.0, 2, 25, 15]]))
    assert SimulatedBoxesd()(unboxed([]))["boxes"].isnan().all()


def test_boxes_stay_in_the_image():
    law = drawn(loosen=(0.5, 0.9), shift=0.5)
    law.set_random_state(0)
    boxes = torch.cat([law(unboxed([[0, 0, 9, 30], [36, 0, 40, 4]]))["boxes"] for _ in range(200)])
    assert boxes.min() >= 0 and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 30).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_bad_laws_are_all_named_at_once():
    for law, *expected in (
        ({"loosen": (0.3, 0.1), "tight": 2, "shift": 0.6, "seed": -1, "max_boxes": 0},
         "loosen is a pair", "tight is", "shift is", "seed must", "max_boxes must"),
        ({"loosen": 0.3, "tight": "a", "shift": None},  # as a command line gives them
         "tight must be a number, got 'a'", "shift must be a number, got None", "loosen is a pair", "got 0.3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            SimulatedBoxesd(**law)
        assert all(text in str(caught.value) for text in expected)
    for loosen in ("01", (0.1, "x"), (0.1,)):
        with pytest.raises(ConfigError, match="loosen is a pair"):
            SimulatedBoxesd(loosen=loosen)
    for fraction in ("a", None, 0.5):
        with pytest.raises(ConfigError, match="shrink must be"):
            FinalBoxesd("label", shrink=fraction)
    with pytest.raises(ConfigError, match=r"less than 0\.5"):
        FinalBoxesd("label", shrink=0.5)
    with pytest.raises(PromptError, match="boxes are given"):
        SimulatedBoxesd()(case([[1, 1, 4, 4]]))
    with pytest.raises(PromptError, match="a: there are no boxes"):
        FinalBoxesd("label")({"case": "a"})


def test_shrinking_keeps_the_middle_and_nan():
    boxes = torch.tensor([[10.0, 10, 20, 30], [torch.nan] * 4])
    shrunk = FinalBoxesd("label", shrink=0.1)({"boxes": boxes})["boxes"]
    torch.testing.assert_close(shrunk[0], torch.tensor([11.0, 12, 19, 28]))
    assert shrunk[1].isnan().all()


def test_the_whole_image_is_a_box():
    assert FinalBoxesd("image")(case([]))["boxes"].tolist() == [[0, 0, 40, 30]]


def test_ellipse_in_whole_pixels_is_that_of_the_prompt_mask():
    box = [11.0, 8.0, 26.0, 19.0]
    d = {**case([box]), "boxes": torch.tensor([box])}
    ellipse = EllipseFromBoxesd()(d)["ellipse"]
    assert torch.equal(ellipse, EllipseFromPromptd("label")(d)["ellipse"])
    assert ellipse.affine.equal(d["image"].affine)


def test_ellipses_of_several_boxes_are_joined():
    boxes = torch.tensor([[2.3, 3.1, 14.9, 20.4], [20.5, 4.0, 38.2, 16.6], [torch.nan] * 4])
    ellipse = EllipseFromBoxesd()({**case([]), "boxes": boxes})["ellipse"]
    areas = np.pi / 4 * ((14.9 - 2.3) * (20.4 - 3.1) + (38.2 - 20.5) * (16.6 - 4.0))
    assert ellipse.shape == (1, *SIZE, 1)
    assert float(ellipse.sum()) == pytest.approx(areas, rel=0.03)
