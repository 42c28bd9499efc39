"""The crop in mm, which cuts no prompt, and the spacing that a network was trained on."""

import logging

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd, ResizeWithPadOrCropd

from samseg_monai.data import CUT
from samseg_monai.errors import PromptError
from samseg_monai.transforms import CropInPlaned, ResampleInPlaned, for_training

KEYS = ["image", "label", "prompt"]


def case(shape=(40, 30, 6), spacing=1.0, inside=(slice(10, 30), slice(6, 24)), **masks) -> dict:
    """An image whose foreground lies ``inside``, noise there and 0 around it, and masks of given slices."""
    affine = np.diag([spacing, spacing, 2.0, 1.0])
    image = torch.zeros(2, *shape)
    image[(slice(None), *inside)] = 5 + torch.rand(image[(slice(None), *inside)].shape)
    made = {"case": "P1", "image": MetaTensor(image, affine=affine)}
    for key, where in masks.items():
        mask = torch.zeros(1, *shape, dtype=torch.uint8)
        mask[(0, *where)] = 1
        made[key] = MetaTensor(mask, affine=affine)
    return made


def cropped(item, size_mm=(24.0, 20.0), **settings):
    return CropInPlaned(KEYS, size_mm, allow_missing_keys=True, **settings)(item)


@pytest.mark.parametrize("size", [(24, 20), (25, 21), (60, 20), (61, 33), (40, 30)])
@pytest.mark.parametrize("shape", [(40, 30, 6), (41, 31, 6)])
def test_where_the_middle_cuts_nothing_it_is_monais_central_crop(shape, size):
    item = case(shape, inside=(slice(14, 24), slice(10, 18)), prompt=(slice(15, 18), slice(12, 15), slice(2, 4)))
    expected = ResizeWithPadOrCropd(KEYS, (*size, -1), allow_missing_keys=True)(item)
    done = cropped(item, size)
    for key in ("image", "prompt"):
        assert torch.equal(done[key].as_tensor(), expected[key].as_tensor())
        torch.testing.assert_close(done[key].affine, expected[key].affine)
    assert done["cut"].tolist() == [0, int((item["image"][0] > 0).sum()), 0, 0]


def test_size_is_in_mm_and_in_voxels_of_the_trained_spacing():
    item = case(spacing=0.5)
    assert cropped(item, (10.0, 8.0))["image"].shape == (2, 20, 16, 6)
    assert cropped(item, None, size=(10, 8), spacing=(1.0, 1.0))["image"].shape == (2, 20, 16, 6)
    assert cropped(item, (99.0, 99.0), size=(10, 8))["image"].shape == (2, 10, 8, 6)  # nobody knows: its own voxels
    assert cropped(item, None)["image"] is item["image"]


@pytest.mark.parametrize("corner", [(0, 0), (35, 0), (0, 26), (35, 26)])
def test_crop_moves_to_hold_the_prompt_and_grows_only_where_it_does_not_fit(corner, caplog):
    i, j = corner
    one = (slice(i, i + 4), slice(j, j + 4), slice(1, 2))
    item = case(prompt=one)
    done = cropped(item)
    assert done["image"].shape == (2, 24, 20, 6) and done["prompt"].sum() == 16
    assert torch.equal(done["image"][0][done["prompt"][0] > 0], item["image"][0][item["prompt"][0] > 0])
    across = case(prompt=one)
    across["prompt"][0, 5:35, 12:14, 3] = 1  # both do not fit along the first axis
    grown = cropped(across)
    assert grown["prompt"].sum() == across["prompt"].sum() and grown["image"].shape[2:] == (20, 6)
    assert 30 <= grown["image"].shape[1] <= 35 + 4 and "the crop grows" in caplog.text


def test_crop_holds_as_much_foreground_as_it_can_and_counts_the_rest(caplog):
    beside = case(inside=(slice(0, 20), slice(12, 30)), label=(slice(0, 3), slice(12, 15), slice(0, 1)))
    done = cropped(beside)
    assert done["cut"].tolist() == [0, 20 * 18 * 6, 0, 9]
    wide = case(inside=(slice(2, 38), slice(6, 24)), label=(slice(0, 4), slice(8, 10), slice(0, 1)))
    wide["image"][:, 2:12] = 0
    wide["image"][:, 2, 8, 0] = 7  # a speck far from the rest
    done = dict(zip(CUT, cropped(wide)["cut"].tolist(), strict=True))
    assert done["image_of"] == 26 * 18 * 6 + 1 and done["image"] == 2 * 18 * 6 + 1
    assert done["label"] == done["label_of"] == 8
    assert "P1: the crop leaves out 217 of 2809 voxels of the image's foreground and 8 of 8 voxels of the label" in (
        caplog.text
    )


def test_foreground_of_an_image_with_noise_all_over_is_what_lies_above_its_mean():
    item = case(inside=(slice(0, 16), slice(6, 24)))
    item["image"] += torch.rand_like(item["image"])
    assert int(cropped(item)["cut"][0]) == 0


def test_training_holds_the_label_of_which_prompts_are_drawn():
    item = case(label=(slice(36, 40), slice(0, 2), slice(2, 3)))
    [crop] = for_training([CropInPlaned(KEYS, (24.0, 20.0), allow_missing_keys=True)])
    assert crop(item)["label"].sum() == 8
    assert cropped(item)["label"].sum() == 0  # a test's label tells nothing


def test_boxes_of_a_2d_image_are_held():
    image = torch.zeros(1, 40, 30, 1)
    image[:, 10:30, 5:25] = 1
    item = {"case": "P1", "image": MetaTensor(image, affine=torch.eye(4)), "boxes": [[26.5, 1.25, 29.5, 4.0]]}
    item["image"].meta["original_affine"] = np.eye(4)
    done = cropped(item, held=["boxes", "label"])
    shift = done["image"].affine[:2, 3].tolist()
    assert done["image"].shape == (1, 24, 20, 1) and shift[0] <= 1 and shift[1] == 10
    with pytest.raises(PromptError, match="P1: nothing is left of boxes"):
        cropped({**item, "boxes": [[50.0, 50.0, 60.0, 60.0]]}, held=["boxes"])


def test_lost_prompt_is_refused_and_a_whole_slice_is_cropped(monkeypatch):
    whole = case(prompt=(slice(None),) * 3)
    assert cropped(whole, held=())["prompt"].shape == (1, 24, 20, 6)
    assert cropped(whole)["prompt"].shape == (1, 40, 30, 6)
    monkeypatch.setattr("samseg_monai.transforms.crop._place", lambda foreground, size, held: (10, 10 + size))
    with pytest.raises(PromptError, match="P1: the crop cuts 4 of 4 prompted voxels off"):
        cropped(case(prompt=(slice(0, 2), slice(0, 2), slice(0, 1))))


TRAINED = {"median": [1.0, 1.0], "min": [0.9, 0.9], "max": [1.1, 1.1]}


@pytest.mark.parametrize("spacing", [0.86, 1.0, 1.15])
def test_cases_within_the_trained_range_stay_as_they_are(spacing):
    item = case(spacing=spacing)
    assert ResampleInPlaned("image", TRAINED)(item)["image"] is item["image"]
    assert ResampleInPlaned("image", TRAINED, wanted=False)(case(spacing=3.0))["image"].shape == (2, 40, 30, 6)
    assert ResampleInPlaned("image", None)(case(spacing=3.0))["image"].shape == (2, 40, 30, 6)


@pytest.mark.parametrize(("spacing", "nearest"), [(0.43, False), (0.43, True), (2.5, True)])
def test_a_mask_comes_back_on_the_grid_of_its_image(spacing, nearest, caplog):
    """A disc in a resampled, moved crop, as a network would find it, goes back to where it lies in the file."""
    item = case((90, 84, 4), spacing, (slice(0, 60), slice(20, 80)), prompt=(slice(4, 20), slice(30, 41), slice(1, 3)))
    chain = Compose(
        [
            Orientationd(["image", "prompt"], axcodes="LPS", labels=None),
            ResampleInPlaned(KEYS, TRAINED, allow_missing_keys=True),
            CropInPlaned(KEYS, (30.0 * spacing, 40.0 * spacing), allow_missing_keys=True),
        ]
    )
    for batch in DataLoader(Dataset([item], chain), batch_size=1):
        assert batch["image"].shape[2:] == (round(30 * spacing), round(40 * spacing), 4)
        batch["pred"] = MetaTensor(batch["prompt"].as_tensor().float()).copy_meta_from(batch["image"])
        [found] = decollate_batch(batch)
        torch.testing.assert_close(found["image"].pixdim[:2], torch.ones(2).double(), atol=0.02, rtol=0)
        back = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=nearest)(found)["pred"]
    assert back.shape == (1, 90, 84, 4)
    torch.testing.assert_close(back.affine, torch.as_tensor(item["image"].affine))
    one, other = back.as_tensor() > 0.5, item["prompt"].as_tensor() > 0
    dice = 2 * float((one & other).sum()) / float(one.sum() + other.sum())
    assert dice > 0.85 and f"in the plane {spacing:.3g} x {spacing:.3g} mm, trained on 1 x 1 mm" in caplog.text


def test_a_prompt_of_one_voxel_survives():
    item = case(spacing=0.3, prompt=(slice(7, 8), slice(11, 12), slice(0, 1)), label=(slice(0, 9), slice(0, 9)))
    done = ResampleInPlaned(KEYS, TRAINED)(item)
    assert done["prompt"].sum() == 1 and done["prompt"].dtype == done["label"].dtype == torch.uint8
    assert done["prompt"].shape == (1, 12, 9, 6) and done["label"].sum() == 9 * 6


def test_random_crops_never_lose_a_prompt_and_invert_exactly(caplog):
    caplog.set_level(logging.ERROR)
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(8, 40, 2)) + (3,)
        ends = [sorted(rng.integers(0, side + 1, 2)) for side in shape[:2]]
        where = tuple(slice(int(a), int(b) + 1) for a, b in ends)
        item = case(shape, inside=tuple(slice(int(rng.integers(0, 6)), None) for _ in range(2)), prompt=where)
        crop = CropInPlaned(KEYS, tuple(map(float, rng.integers(3, 45, 2))), allow_missing_keys=True)
        done = crop(item)
        assert done["prompt"].sum() == item["prompt"].sum()
        back = crop.inverse({"prompt": done["prompt"].clone()})["prompt"]
        assert torch.equal(back.as_tensor(), item["prompt"].as_tensor())
