"""Slices as SAM-LST prepares them: resized by splines, augmented by the published law."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy.ndimage import zoom

from samseg_monai.errors import ConfigError
from samseg_monai.transforms import SplineResized

BUNDLES = Path(__file__).parents[2] / "bundles"
DRAWS = 1000
LANDMARKS = {1: (26, 22), 2: (40, 25), 3: (30, 42)}  # no mirror and no quarter turn takes them to themselves


def smooth(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def organs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)


@pytest.mark.parametrize("size", [9, 28, 41])
@pytest.mark.parametrize(("key", "order"), [("image", 3), ("label", 0), ("image", 1)])
def test_every_slice_is_what_scipy_makes_of_it(key, order, size):
    volume = smooth(2, 20, 20, 4) if key == "image" else organs(2, 20, 20, 4)
    found = SplineResized(key, size, order)({key: volume})[key]
    assert found.shape == (2, size, size, 4) and found.dtype == volume.dtype
    for channel in range(2):
        for z in range(4):
            plane = volume[channel, ..., z].numpy()
            # as the published preprocessing and loader write it
            expected = zoom(plane, (size / plane.shape[0], size / plane.shape[1]), order=order)
            np.testing.assert_array_equal(found[channel, ..., z].numpy(), expected)
    alone = SplineResized(key, size, order)({key: volume[..., 2]})[key]
    assert torch.equal(alone, found[..., 2])


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, as on a machine with a GPU."""

    device = torch.device("meta")


def test_a_slice_stays_on_its_device():
    image = smooth(2, 20, 20).as_subclass(Elsewhere)
    assert SplineResized("image", 28)({"image": image})["image"].device.type == "meta"


def test_the_longer_side_gets_the_size_and_the_shorter_follows():
    volume = smooth(1, 20, 13, 2)
    found = SplineResized("image", 30)({"image": volume})["image"]
    assert found.shape == (1, 30, 20, 2)  # 13 * 1.5 = 19.5 and to even
    np.testing.assert_allclose(found[0].numpy(), zoom(volume[0].numpy(), (1.5, 1.5, 1), order=3), atol=1e-5)
    turned = SplineResized("image", 30)({"image": volume.transpose(1, 2)})["image"]
    torch.testing.assert_close(turned.transpose(1, 2), found, atol=1e-5, rtol=0)


def test_corners_stay_where_they_are_other_than_in_monais_resize():
    image = smooth(1, 16, 16)
    found = SplineResized("image", 37)({"image": image})["image"]
    corners = [(r, c) for r in (0, -1) for c in (0, -1)]
    assert [float(found[0, r, c]) for r, c in corners] == pytest.approx([float(image[0, r, c]) for r, c in corners])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_labels_keep_their_numbers_and_their_dtype(dtype):
    label = organs(1, 23, 17, 3).to(dtype)
    for size in (11, 40):
        found = SplineResized("label", size, 0)({"label": label})["label"]
        assert found.dtype == dtype and set(found.unique().tolist()) == set(range(9))
    there_and_back = SplineResized("label", 23, 0)(SplineResized("label", 46, 0)({"label": label}))["label"]
    assert torch.equal(there_and_back, label)


def test_images_are_not_widened_and_inputs_stay_as_they_were():
    image = MetaTensor(smooth(1, 12, 12, 3), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
    before = image.clone()
    found = SplineResized("image", 24)({"image": image, "case": "c"})
    assert found["case"] == "c" and found["image"].dtype == torch.float32 and found["image"].is_contiguous()
    assert not isinstance(found["image"], MetaTensor)  # the affine would be wrong
    assert torch.equal(image, before)


@pytest.mark.parametrize("shape", [(1, 20, 14, 3), (1, 14, 20)])
def test_slices_that_have_the_size_are_handed_on_untouched(shape):
    image = MetaTensor(smooth(*shape))
    assert SplineResized("image", 20)({"image": image})["image"] is image


def test_each_key_has_its_order_and_absent_keys_are_skipped_only_when_asked():
    item = {"image": smooth(1, 10, 10), "label": organs(1, 10, 10)}
    found = SplineResized(["image", "label", "prompt"], 15, [3, 0, 0], allow_missing_keys=True)(item)
    assert sorted(found) == ["image", "label"]
    np.testing.assert_array_equal(found["image"][0].numpy(), zoom(item["image"][0].numpy(), 1.5, order=3))
    np.testing.assert_array_equal(found["label"][0].numpy(), zoom(item["label"][0].numpy(), 1.5, order=0))
    with pytest.raises(KeyError, match="prompt"):
        SplineResized(["image", "prompt"], 15)(item)


@pytest.mark.parametrize(("size", "order"), [(1, 3), (0, 3), (10, [3]), (10, [3, 0, 0]), (10, 6), (10, [3, -1])])
def test_impossible_sizes_and_orders_are_refused_at_once(size, order):
    with pytest.raises(ConfigError, match=r"size must be at least 2 and order .* 2 keys"):
        SplineResized(["image", "label"], size, order)


def augmentation(strategy: str) -> Compose:
    config = BUNDLES / f"abdomen_segmentation_{strategy}" / "configs" / "train.json"
    parser = ConfigParser(ConfigParser.load_config_file(config))
    parser["image_size"] = 320  # the ladder shifts by up to a fortieth of it
    return Compose(parser.get_parsed_content("augmentation_transforms")).set_random_state(seed=11)


def marked() -> torch.Tensor:
    """Three landmarks of 5 x 5 pixels around the middle, and one in each of two corners."""
    label = torch.zeros(1, 64, 64, dtype=torch.uint8)
    for number, (r, c) in LANDMARKS.items():
        label[0, r - 2 : r + 3, c - 2 : c + 3] = number
    label[0, :4, :6], label[0, -2:, -9:] = 4, 5
    return label


def handedness(label: torch.Tensor) -> float:
    """Area that the landmarks span, relative to the drawn one; negative in a mirrored slice."""
    one, two, three = (torch.nonzero(label[0] == n).double().mean(dim=0) for n in LANDMARKS)
    (a, b), (c, d) = (two - one).tolist(), (three - one).tolist()
    (r1, c1), (r2, c2), (r3, c3) = LANDMARKS.values()
    return (a * d - b * c) / ((r2 - r1) * (c3 - c1) - (c2 - c1) * (r3 - r1))


def test_published_augmentation_half_mirrors_quarter_rotates_quarter_stays():
    """Bounds are 4.5 standard deviations: a correct law fails once in 10,000 seeds."""
    label = marked()
    image = 10 * label.float()
    turns = {
        (k, mirror): torch.rot90(label.flip(2) if mirror else label, k, (1, 2)) for k in range(4) for mirror in (0, 1)
    }
    draw, seen, angles = augmentation("ladder_paper"), Counter(), []
    for _ in range(DRAWS):
        result = draw({"image": image.clone(), "label": label.clone()})
        found = result["label"].as_subclass(torch.Tensor)
        assert found.dtype == torch.uint8 and found.shape == label.shape  # else a batch could not be stacked
        # the same nearest pixel in both: with splines or another draw the image would have other values
        assert torch.equal(result["image"].as_subclass(torch.Tensor), 10 * found.float())
        kind = next((kind for kind, turned in turns.items() if torch.equal(turned, found)), "rotated")
        seen[kind] += 1
        if kind == "rotated":
            (r1, c1), (r2, c2) = (torch.nonzero(found[0] == n).double().mean(dim=0).tolist() for n in (1, 2))
            angles.append(np.degrees(np.arctan2(r2 - r1, c2 - c1)))
            assert handedness(found) == pytest.approx(1, abs=0.15)

    def within(count: int, p: float, *, lost: float = 0.0) -> bool:
        return abs(count - p * DRAWS) < 4.5 * (p * (1 - p) * DRAWS) ** 0.5 + lost * DRAWS

    mirrored = [seen[k, 1] for k in range(4)]
    assert within(sum(mirrored), 0.5) and all(within(count, 0.125) for count in mirrored)
    # rotations by less than about half a degree leave all pixels of so small a slice in their place
    assert within(seen[0, 0], 0.25, lost=0.01) and within(seen["rotated"], 0.25, lost=0.01)
    assert sum(seen[k, 0] for k in (1, 2, 3)) == 0  # never a quarter turn alone
    (r1, c1), (r2, c2) = LANDMARKS[1], LANDMARKS[2]
    angles = np.asarray(angles) - np.degrees(np.arctan2(r2 - r1, c2 - c1))
    assert np.abs(angles).max() < 22 and angles.max() > 17 and angles.min() < -17
    assert abs(angles.mean()) < 4.5 * 20 / (3 * len(angles)) ** 0.5


def test_the_ladders_own_augmentation_never_mirrors():
    """Right and left kidney are two classes that differ by their side alone."""
    draw, label, areas = augmentation("ladder"), marked(), []
    assert handedness(label) == 1 and handedness(label.flip(2)) == handedness(label.transpose(1, 2)) == -1
    for _ in range(500):
        result = draw({"image": 10 * label.float(), "label": label.clone()})
        found = result["label"].as_subclass(torch.Tensor)
        assert set(found.unique().tolist()) <= set(range(6))
        areas.append(handedness(found))
        image = result["image"].as_subclass(torch.Tensor)
        inside = torch.nn.functional.max_pool2d((found != 3).float(), 3, 1, 1) == 0  # far from every edge
        assert inside.any() and float(image[inside].std()) < 0.01 * 30  # organ 3 has one value: it moved with its label
        assert 26.9 < float(image[inside].mean()) < 33.1
    assert min(areas) > 0.5 and max(areas) < 1.8  # scales of 0.85 to 1.15 in each direction, and the pixels' own size
    assert np.std(areas) > 0.05
