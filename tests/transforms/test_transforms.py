"""Prompts as a volume, the boxes in it, and the grid check."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, RandFlipd, Resized, ResizeWithPadOrCropd

from samseg_monai.errors import ConfigError, DataError, PromptError
from samseg_monai.transforms import (
    BoxFromPromptd,
    CheckSameGridd,
    EllipseFromPromptd,
    GivenPromptd,
    SimulatedPromptd,
    boxes_of,
)

OBLIQUE = torch.tensor(
    [[-0.9, 0.1, 0.0, 20.0], [0.1, 0.8, -0.3, -7.0], [0.0, 0.4, 2.5, 3.0], [0, 0, 0, 1]], dtype=torch.float64
)


def volume_with(rectangle: tuple[int, int, int, int], size=(40, 50, 6), slices=(1, 2, 4)) -> torch.Tensor:
    """(1, H, W, D) label with the corners and centre of a rectangle y0 x0 y1 x1 (ends included) set in some slices."""
    label = torch.zeros(1, *size)
    y0, x0, y1, x1 = rectangle
    for z in slices:
        label[0, y0, x1, z] = 1
        label[0, y1, x0, z] = 2
    return label


def prompt_of(label: torch.Tensor, case: str = "a", **settings) -> torch.Tensor:
    return SimulatedPromptd(**settings)({"label": label, "case": case})["prompt"]


def test_tight_prompt_is_the_filled_rectangle_of_every_slice_with_label():
    prompt = prompt_of(volume_with((5, 7, 12, 30)))
    expected = torch.zeros(1, 40, 50, 6, dtype=torch.uint8)
    expected[0, 5:13, 7:31, [1, 2, 4]] = 1
    assert prompt.dtype == torch.uint8
    assert torch.equal(prompt, expected)


def test_prompt_of_one_slice_and_of_the_whole_volume_agree():
    label = volume_with((5, 7, 12, 30))
    assert torch.equal(prompt_of(label[..., 1]), prompt_of(label)[..., 1])


def test_loosened_sides_stay_within_the_asked_fraction_of_their_side():
    label = torch.zeros(1, 100, 120, 40)
    label[0, 40:60, 50:80] = 1  # 20 high, 30 wide
    shifts = []
    for z, plane in enumerate(prompt_of(label, loosen=(0.1, 0.3), seed=3).unbind(-1)):
        x0, y0, x1, y1 = boxes_of(plane).tolist()
        assert plane.sum() == (x1 - x0) * (y1 - y0), f"slice {z} is not a filled rectangle"
        shifts.append([(50 - x0) / 30, (x1 - 80) / 30, (40 - y0) / 20, (y1 - 60) / 20])
    drawn = np.array(shifts)
    rounding = 0.5 / 20
    assert drawn.min() >= 0.1 - rounding and drawn.max() <= 0.3 + rounding
    assert drawn.std(axis=0).min() > 0.03  # every side moves by itself
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.6


def test_loosened_prompt_is_clipped_to_the_image():
    label = torch.zeros(1, 16, 16, 1)
    label[0, 0:8, 8:16] = 1
    prompt = prompt_of(label, loosen=(1.0, 1.0), seed=0)
    assert boxes_of(prompt[..., 0]).tolist() == [0, 0, 16, 16]


def test_seeded_draws_depend_on_case_and_slice_only():
    label = torch.zeros(1, 90, 100, 6)
    label[0, 30:60, 40:70] = 1
    settings = {"loosen": (0.0, 0.3), "seed": 11}
    everything = prompt_of(label, **settings)
    assert torch.equal(everything, prompt_of(label, **settings))
    alone = torch.zeros_like(label)
    alone[..., 3] = label[..., 3]
    assert torch.equal(prompt_of(alone, **settings)[..., 3], everything[..., 3])  # other slices do not matter
    cropped = prompt_of(label[:, 10:, 20:90], **settings)
    assert torch.equal(cropped, everything[:, 10:, 20:90])  # nor does an in-plane crop
    transform = SimulatedPromptd(**settings)
    transform({"label": label, "case": "b"})
    assert torch.equal(transform({"label": label, "case": "a"})["prompt"], everything)  # nor the cases before
    assert not torch.equal(prompt_of(label, case="b", **settings), everything)
    assert not torch.equal(prompt_of(label, loosen=(0.0, 0.3), seed=12), everything)
    assert not torch.equal(everything[..., 0], everything[..., 1])


def test_unseeded_draws_come_from_the_random_state_that_monai_sets():
    label = torch.zeros(1, 60, 60)
    label[0, 20:40, 20:40] = 1
    transform = Compose([SimulatedPromptd(loosen=(0.0, 0.5))])

    def draw(seed: int) -> torch.Tensor:
        transform.set_random_state(seed)
        return transform({"label": label})["prompt"]

    assert torch.equal(draw(1), draw(1))
    assert len({boxes_of(draw(seed)).numpy().tobytes() for seed in range(8)}) > 4


def test_prompt_per_component_draws_a_rectangle_for_each():
    label = torch.zeros(1, 30, 30)
    label[0, 2:6, 3:9] = 1
    label[0, 20:24, 15:18] = 1
    prompt = prompt_of(label, per_component=True)
    assert torch.equal(prompt > 0, label > 0)
    assert boxes_of(prompt, per_component=True, max_boxes=3)[:2].tolist() == [[3, 2, 9, 6], [15, 20, 18, 24]]


def test_prompt_keeps_geometry_and_history_of_the_label():
    label = MetaTensor(volume_with((5, 7, 12, 30)), affine=OBLIQUE)
    oriented = Orientationd(["label"], axcodes="RAS")({"label": label, "case": "a"})
    for made in (
        SimulatedPromptd()(oriented)["prompt"],
        GivenPromptd("image")({"image": oriented["label"]})["prompt"],
        EllipseFromPromptd("label")(oriented)["ellipse"],
    ):
        assert made.shape == oriented["label"].shape
        torch.testing.assert_close(made.affine, oriented["label"].affine)
        assert len(made.applied_operations) == len(oriented["label"].applied_operations) == 1


@pytest.mark.parametrize("loosen", [(0.3, 0.1), (-0.1, 0.2), (0.1,), (0.0, float("nan"))])
def test_impossible_loosening_is_refused(loosen):
    with pytest.raises(ConfigError, match="loosen is a pair"):
        SimulatedPromptd(loosen=loosen)


def test_seeded_prompt_of_an_unnamed_case_is_refused():
    with pytest.raises(PromptError, match="'case'"):
        SimulatedPromptd(seed=1)({"label": volume_with((1, 1, 3, 3))})


@pytest.mark.parametrize("size", [(60, 70), (64, 64), (138, 202), (53, 101)])
@pytest.mark.parametrize("mode", ["nearest", "area", "bilinear"])
@pytest.mark.parametrize("target", [40, 128, 333])
def test_box_after_resize_is_the_scaled_box_within_a_pixel(size, mode, target):
    rng = np.random.default_rng(target)
    resize = Resized("prompt", spatial_size=target, size_mode="longest", mode=mode)
    for _ in range(5):
        y0, x0 = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        y1, x1 = rng.integers(y0 + 8, size[0] + 1), rng.integers(x0 + 8, size[1] + 1)
        prompt = torch.zeros(1, *size, dtype=torch.uint8)
        prompt[0, y0:y1, x0:x1] = 1
        small = resize({"prompt": prompt})["prompt"]
        scale = np.array([small.shape[2] / size[1], small.shape[1] / size[0]] * 2)
        np.testing.assert_allclose(boxes_of(small).numpy(), np.array([x0, y0, x1, y1]) * scale, atol=1.0)


def test_box_survives_a_downscale_that_averages_it_away():
    prompt = torch.zeros(1, 64, 64)
    prompt[0, 33, 10:50] = 1
    small = Resized("prompt", spatial_size=16, size_mode="longest", mode="area")({"prompt": prompt})["prompt"]
    assert small.max() < 0.5
    np.testing.assert_allclose(boxes_of(small).numpy(), [2.5, 8.25, 12.5, 8.5], atol=1.0)


def test_boxes_are_those_of_the_flipped_prompt():
    prompt = torch.zeros(1, 20, 30)
    prompt[0, 3:5, 7:17] = 1
    chain = Compose([RandFlipd("prompt", prob=1.0, spatial_axis=1), BoxFromPromptd()])
    assert chain({"prompt": prompt})["boxes"].tolist() == [30 - 17, 3, 30 - 7, 5]


def test_box_of_an_empty_slice_is_nan():
    assert boxes_of(torch.zeros(8, 8)).isnan().all()
    assert boxes_of(torch.zeros(1, 8, 8), per_component=True, max_boxes=3).isnan().all()


def test_boxes_per_component_are_largest_first_and_padded_with_nan():
    prompt = torch.zeros(1, 20, 20, dtype=torch.uint8)
    prompt[0, 1:3, 1:3] = 1
    prompt[0, 3, 3] = 1  # touches by a corner only: still the same component
    prompt[0, 10:18, 5:15] = 1
    prompt[0, 5, 19] = 1
    found = boxes_of(prompt, per_component=True, max_boxes=4)
    assert found.shape == (4, 4)
    assert found[:3].tolist() == [[5, 10, 15, 18], [1, 1, 4, 4], [19, 5, 20, 6]]
    assert found[3].isnan().all()
    assert boxes_of(prompt, per_component=True, max_boxes=1).tolist() == [[5, 10, 15, 18]]
    assert boxes_of(prompt).tolist() == [1, 1, 20, 18]


def test_box_of_a_volume_is_refused():
    with pytest.raises(PromptError, match=r"\(N, H, W\).*\(1, 4, 4, 2\)"):
        boxes_of(torch.zeros(1, 4, 4, 2))


def test_ellipse_fills_its_box_by_a_quarter_of_pi():
    prompt = torch.zeros(1, 120, 150, 3)
    prompt[0, 10:90, 30:130, 1] = 1
    ellipse = EllipseFromPromptd()({"prompt": prompt})["ellipse"]
    assert ellipse.dtype == torch.float32
    assert boxes_of(ellipse[..., 1]).tolist() == [30, 10, 130, 90]
    assert ellipse[..., 1].sum().item() == pytest.approx(np.pi / 4 * 80 * 100, rel=0.005)  # pixels at the rim
    assert ellipse[..., [0, 2]].sum() == 0
    assert torch.equal(ellipse, ellipse.flip(0)) and ellipse[0, 50, 30, 1] == 1 and ellipse[0, 10, 30, 1] == 0
    assert torch.equal(EllipseFromPromptd()({"prompt": prompt[..., 1]})["ellipse"], ellipse[..., 1])


def boxes_case(boxes) -> dict:
    return {"image": MetaTensor(torch.zeros(4, 10, 12, 5), affine=OBLIQUE), "case": "P7", "boxes": boxes}


def test_given_boxes_are_filled_with_both_ends_included():
    done = GivenPromptd("json")(
        boxes_case([{"slice": 2, "box": [1, 3, 4, 8]}, {"slices": [3, 4], "box": [0, 0, 9, 11]}])
    )
    expected = torch.zeros(1, 10, 12, 5, dtype=torch.uint8)
    expected[0, 1:5, 3:9, 2] = 1
    expected[0, :, :, 3:] = 1
    assert torch.equal(done["prompt"].as_tensor(), expected)
    torch.testing.assert_close(done["prompt"].affine, OBLIQUE)
    assert boxes_of(done["prompt"][..., 2]).tolist() == [3, 1, 9, 5]  # x is axis 1, y is axis 0
    assert "boxes" not in done


def test_two_boxes_of_one_slice_are_two_prompts():
    apart = [{"slice": 1, "box": [1, 1, 3, 3]}, {"slice": 1, "box": [6, 7, 8, 10]}]
    over = [{"slices": [0, 1], "box": [2, 2, 8, 9]}, {"slice": 4, "box": [0, 0, 1, 1]}]
    prompt = GivenPromptd("json")(boxes_case([*apart, *over]))["prompt"]
    assert prompt.shape == (3, 10, 12, 5) and prompt.dtype == torch.uint8  # no more channels than boxes in a slice
    found = boxes_of(prompt[..., 1])
    assert sorted(found.tolist()) == [[1, 1, 4, 4], [2, 2, 10, 9], [7, 6, 11, 9]]
    assert sorted(torch.nan_to_num(boxes_of(prompt[..., 4]), -1).tolist())[-1] == [0, 0, 2, 2]
    ellipse = EllipseFromPromptd()({"prompt": prompt})["ellipse"]
    assert ellipse.shape == (1, 10, 12, 5)
    assert ellipse[0, 2, 2, 1] and ellipse[0, 7, 8, 1] and not ellipse[0, 1, 10, 1]


def test_given_boxes_follow_the_image_through_reorientation_and_crop():
    case = boxes_case([{"slice": 2, "box": [3, 4, 6, 8]}])
    case["image"][:, 3:7, 4:9, 2] = 5.0
    chain = [
        GivenPromptd("json"),
        Orientationd(["image", "prompt"], axcodes="RAS", labels=None),
        ResizeWithPadOrCropd(["image", "prompt"], spatial_size=(8, 14, -1)),
    ]
    done = Compose(chain)(case)
    assert done["prompt"].shape[1:] == (8, 14, 5)
    assert torch.equal(done["prompt"][0] > 0, done["image"][0] > 0) and done["prompt"].sum() == 20


def test_all_bad_boxes_are_named_at_once_with_their_case():
    good = {"slice": 0, "box": [0, 0, 1, 1]}
    bad = [
        {"slice": 5, "box": [0, 0, 1, 1]},
        {"slice": 0, "box": [4, 0, 1, 1]},
        {"slice": 0, "box": [0, 0, 1, 12]},
        {"box": [0, 0, 1, 1]},
        {"slice": 0, "slices": [0, 1], "box": [0, 0, 1, 1]},
        {"slice": 0, "box": [0, 0, 1]},
        {"slice": 0, "box": [0, 0.5, 1, 1]},
        {"slice": True, "box": [0, 0, 1, float("nan")]},
        "box",
    ]
    with pytest.raises(PromptError) as caught:
        GivenPromptd("json")(boxes_case([good, *bad]))
    message = str(caught.value)
    assert "P7" in message and "9 problems" in message and "boxes[0]" not in message
    assert all(f"boxes[{number}] " in message for number in range(1, 10))


def test_missing_list_of_boxes_is_refused_but_an_empty_one_is_not():
    assert GivenPromptd("json")(boxes_case([]))["prompt"].sum() == 0
    with pytest.raises(PromptError, match=r"P7.*must be a list"):
        GivenPromptd("json")(boxes_case(None))


def test_prompt_from_image_covers_every_slice():
    done = GivenPromptd("image")({"image": torch.zeros(4, 6, 7, 3)})
    assert done["prompt"].shape == (1, 6, 7, 3) and done["prompt"].all() and done["prompt"].dtype == torch.uint8


def test_same_grid_passes_and_another_grid_is_named():
    image = MetaTensor(torch.zeros(4, 6, 7, 3), affine=OBLIQUE)
    close = OBLIQUE.clone()
    close[0, 3] += 5e-4
    check = CheckSameGridd(["prompt", "label"])
    case = {"case": "P9", "image": image, "label": torch.zeros(1, 6, 7, 3)}
    passed = check(case | {"prompt": MetaTensor(torch.zeros(1, 6, 7, 3), affine=close)})
    assert torch.equal(passed["prompt"].affine, image.affine)  # and is the image's from here on
    far = OBLIQUE.clone()
    far[0, 3] += 1
    with pytest.raises(DataError, match=r"P9: .*(?s:.)*prompt: its affine differs.*21.* against .*20.* of image"):
        check(case | {"prompt": MetaTensor(torch.zeros(1, 6, 7, 3), affine=far)})
    with pytest.raises(DataError, match=r"prompt has shape \(6, 8, 3\), image has \(6, 7, 3\)"):
        check(case | {"prompt": MetaTensor(torch.zeros(1, 6, 8, 3), affine=OBLIQUE)})


def test_transforms_survive_pickling():
    for transform in (SimulatedPromptd(seed=3), BoxFromPromptd(), CheckSameGridd("prompt"), EllipseFromPromptd()):
        assert type(pickle.loads(pickle.dumps(transform))) is type(transform)
