"""Scores of one case against independent oracles (medpy, DeepMind's surface-distance) and against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from medpy.metric import binary as medpy
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import gaussian_filter
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from samseg_monai.errors import ConfigError, DataError
from samseg_monai.metrics import CaseScores, score_case, score_columns
from samseg_monai.metrics.case import score_calibration

SPACINGS = [(1.0, 1.0, 1.0), (0.8, 0.5, 3.0)]


def blobs(seed: int, shape: tuple[int, int, int] = (24, 28, 12)) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping irregular masks that reach the image's border."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.normal(size=(2, *shape)), (0, 3, 3, 1.5))
    both = noise[0] + 0.7 * np.stack([noise[1], -noise[1]])
    prediction, reference = both > np.quantile(both, 0.8)
    return prediction, reference


def cubes(offset: int) -> tuple[np.ndarray, np.ndarray]:
    """A cube of edge 6 and the same cube moved along the first axis."""
    reference, prediction = np.zeros((2, 20, 14, 14), dtype=bool)
    reference[4:10, 4:10, 4:10] = True
    prediction[4 + offset : 10 + offset, 4:10, 4:10] = True
    return prediction, reference


def lines() -> tuple[np.ndarray, np.ndarray]:
    """In one slice: a line of 100 voxels, predicted 10 voxels too long; 110 + 100 edge elements, ten of them astray."""
    reference, prediction = np.zeros((2, 3, 120, 1), dtype=bool)
    reference[1, 5:105] = True
    prediction[1, 5:115] = True
    return prediction, reference


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 4.0, 12.0)])
def test_calibration_is_that_of_its_definition(spacing):
    prediction, reference = blobs(1, (40, 44, 9))
    prediction[:26] = reference[:26] = False
    rng = np.random.default_rng(0)
    probability = rng.beta(0.4, 0.6, prediction.shape)
    probability[30, 30, 4], probability[31, 30, 4] = 1.0, 0.0
    judged = rng.random(prediction.shape) > 0.1
    places = np.argwhere((prediction | reference) & judged)
    low, high = places.min(0) - np.ceil(10 / np.array(spacing)), places.max(0) + np.ceil(10 / np.array(spacing))
    bins, squares = {}, []
    for place in np.ndindex(*prediction.shape):
        if judged[place] and all(low <= place) and all(place <= high):
            p, y = probability[place], float(reference[place])
            bins.setdefault(min(int(p * 15), 14), []).append((p, y))
            squares.append((p - y) ** 2)
    ece = sum(len(its) / len(squares) * abs(np.mean([p - y for p, y in its])) for its in bins.values())
    found = score_calibration(probability, prediction, reference, counts=judged, spacing=spacing)
    assert found == pytest.approx({"ece": ece, "brier": np.mean(squares)}, abs=1e-12) and len(squares) < judged.sum()
    nothing = np.zeros_like(reference)
    found = score_calibration(probability, nothing, nothing, counts=judged, spacing=spacing)
    assert all(math.isnan(value) for value in found.values())
    truth = reference.astype(float)
    assert score_calibration(truth, prediction, reference, counts=judged, spacing=spacing) == {"ece": 0, "brier": 0}


def test_calibration_is_of_all_classes_together_and_stands_in_every_row():
    prediction, reference = blobs(2)
    label = torch.as_tensor(reference.astype(np.float32) * (1 + (np.arange(28) > 13))[None, :, None])[None]
    label[0, 0, 0, :3] = 255
    probability = torch.rand((1, *reference.shape), generator=torch.Generator().manual_seed(0))
    item = {"case": "a", "pred": torch.as_tensor(prediction)[None].float(), "probability": probability,
            "reference": MetaTensor(label, affine=torch.eye(4))}  # fmt: skip
    metric = CaseScores(classes=("one", "two"), surface=False, probability_key="probability")
    metric.update([item])
    metric.compute()
    counts = np.ones_like(reference)
    counts[0, 0, :3] = False
    truth = reference & counts
    expected = score_calibration(probability[0], prediction, truth, counts=counts, spacing=(1, 1, 1))
    assert [(row["ece"], row["brier"]) for row in metric.rows] == [(expected["ece"], expected["brier"])] * 2
    with pytest.raises(DataError, match="no 'probability'"):
        metric.update([{key: value for key, value in item.items() if key != "probability"}])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dice_and_pooled_hd95_equal_medpy(seed, spacing):
    prediction, reference = blobs(seed)
    score = score_case(prediction, reference, spacing_mm=spacing)
    assert score["dice"] == pytest.approx(medpy.dc(prediction, reference), abs=1e-12)
    expected = medpy.hd95(prediction, reference, voxelspacing=spacing)
    assert expected > 0
    assert score["hd95_medpy_mm"] == pytest.approx(expected, rel=1e-6)  # MONAI keeps distances in float32


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_nsd_equals_deepmind_surface_distance(seed, spacing):
    prediction, reference = blobs(seed)
    score = score_case(prediction, reference, spacing_mm=spacing)
    distances = compute_surface_distances(reference, prediction, spacing)
    for name, tolerance in (("nsd_1mm", 1.0), ("nsd_2mm", 2.0)):
        expected = compute_surface_dice_at_tolerance(distances, tolerance)
        assert 0 < expected < 1
        assert score[name] == pytest.approx(expected, rel=1e-5)  # MONAI's table of areas is float32


@pytest.mark.parametrize("spacing", SPACINGS)
def test_cropping_changes_nothing_against_monai_on_the_whole_image(spacing):
    """Masks in the middle and masks on the border, so that both kinds of crop are seen."""
    middle = tuple(np.pad(mask, ((9, 4), (7, 11), (3, 8))) for mask in blobs(7))
    for prediction, reference in (middle, blobs(7)):
        score = score_case(prediction, reference, spacing_mm=spacing)
        batch = [torch.as_tensor(mask)[None, None] for mask in (prediction, reference)]
        hd95 = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=spacing)
        assert score["hd95_mm"] == pytest.approx(float(hd95), rel=1e-6)
        for name, tolerance in (("nsd_1mm", 1.0), ("nsd_2mm", 2.0)):
            nsd = compute_surface_dice(*batch, [tolerance], True, spacing=spacing, use_subvoxels=True)
            assert score[name] == pytest.approx(float(nsd), rel=1e-6)


@pytest.mark.parametrize(("spacing", "hd95"), [((1.0, 1.0, 1.0), 2.0), ((3.0, 1.0, 1.0), 6.0)])
def test_cubes_two_voxels_apart_have_the_hd95_known_by_hand(spacing, hd95):
    """36 of 152 edge voxels lie on the far face, two voxels away: more than 5 %, and nothing lies farther."""
    score = score_case(*cubes(2), spacing_mm=spacing)
    assert score["dice"] == 2 / 3
    assert score["hd95_mm"] == hd95
    assert score["hd95_medpy_mm"] == hd95


def test_the_two_definitions_of_hd95_differ_as_computed_by_hand():
    """Directed: rank 0.95 * 109 = 103.55 of 100 zeros, 1, 2, ... is 4.55. Pooled: rank 198.55 of 200 zeros is 0."""
    score = score_case(*lines(), spacing_mm=(1, 1, 1))
    assert score["hd95_mm"] == pytest.approx(4.55)
    assert score["hd95_medpy_mm"] == 0.0


def test_equal_masks_are_perfect_and_volumes_are_in_ml():
    _, reference = cubes(0)
    score = score_case(reference, reference, spacing_mm=(0.8, 0.5, 3.0))
    assert [score[name] for name in score_columns()] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert score["prediction_ml"] == score["reference_ml"] == pytest.approx(6**3 * 0.8 * 0.5 * 3 / 1000)


@pytest.mark.parametrize(("has_prediction", "has_reference"), [(False, False), (True, False), (False, True)])
def test_honest_policy_on_empty_masks(has_prediction, has_reference):
    cube, _ = cubes(0)
    score = score_case(cube & has_prediction, cube & has_reference, spacing_mm=(1.0, 2.0, 3.0))
    assert (score["empty_prediction"], score["empty_reference"]) == (not has_prediction, not has_reference)
    if not has_prediction and not has_reference:
        assert score["excluded"] is True
        assert all(math.isnan(score[name]) for name in score_columns())
    else:
        diagonal_mm = math.sqrt(20**2 + 28**2 + 42**2)
        assert score["excluded"] is False
        expected = [0.0, diagonal_mm, diagonal_mm, 0.0, 0.0]
        assert [score[name] for name in score_columns()] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("has_prediction", "has_reference", "dice"), [(False, False, 0.0), (True, False, 1.0), (False, True, 0.0)]
)
def test_transunet_policy_on_empty_masks(has_prediction, has_reference, dice):
    cube, _ = cubes(0)
    score = score_case(cube & has_prediction, cube & has_reference, spacing_mm=(1, 2, 3), policy="transunet")
    assert (score["dice_transunet"], score["hd95_transunet_voxel"], score["excluded"]) == (dice, 0.0, False)


def test_transunet_policy_measures_in_voxels_with_medpys_definition():
    prediction, reference = blobs(5)
    score = score_case(prediction, reference, spacing_mm=(0.8, 0.5, 3.0), policy="transunet")
    assert score["dice_transunet"] == pytest.approx(medpy.dc(prediction, reference), abs=1e-12)
    assert score["hd95_transunet_voxel"] == pytest.approx(medpy.hd95(prediction, reference), rel=1e-6)
    assert not {"dice", "hd95_mm", "nsd_1mm"} & score.keys()  # nobody can mix the two up in one column


@pytest.mark.parametrize(("unit", "used"), [("mm", (0.8, 0.5)), ("px", (1.0, 1.0))])
@pytest.mark.parametrize("seed", range(3))
def test_volume_of_one_slice_is_scored_in_two_dimensions(seed, unit, used):
    """In three dimensions every pixel of it would be an edge. In pixels the spacing of the file does not matter."""
    prediction, reference = (mask[:, :, 5:6] for mask in blobs(seed))
    score = score_case(prediction, reference, spacing_mm=(0.8, 0.5, 3.0), unit=unit)
    flat = prediction[..., 0], reference[..., 0]
    assert score["dice"] == pytest.approx(medpy.dc(*flat), abs=1e-12)
    assert score[f"hd95_medpy_{unit}"] == pytest.approx(medpy.hd95(*flat, voxelspacing=used), rel=1e-6)
    planes = (torch.as_tensor(mask)[None, None].float() for mask in flat)
    directed = compute_hausdorff_distance(*planes, include_background=True, percentile=95, spacing=used)
    assert score[f"hd95_{unit}"] == pytest.approx(float(directed), rel=1e-6)
    distances = compute_surface_distances(flat[1], flat[0], used)
    for tolerance in (1, 2):
        expected = compute_surface_dice_at_tolerance(distances, tolerance)
        assert 0 < expected < 1
        assert score[f"nsd_{tolerance}{unit}"] == pytest.approx(expected, rel=1e-5)


def test_empty_image_in_pixels_costs_the_diagonal_of_the_picture():
    reference, nothing = np.ones((30, 40, 1), dtype=bool), np.zeros((30, 40, 1), dtype=bool)
    score = score_case(nothing, reference, spacing_mm=(0.5, 0.5, 7.0), unit="px")
    assert (score["dice"], score["hd95_px"], score["nsd_2px"]) == (0.0, 50.0, 0.0)
    assert (score["prediction_px"], score["reference_px"]) == (0.0, 1200.0)


def test_pixels_are_for_images_and_not_for_lesions():
    with pytest.raises(DataError, match="one slice"):
        score_case(*cubes(1), spacing_mm=(1, 1, 1), unit="px")
    with pytest.raises(ConfigError, match="lesion_wise"):
        CaseScores(unit="px", lesions=True)
    with pytest.raises(ConfigError, match="mm, px"):
        score_columns(unit="inch")


def test_noise_of_an_affine_does_not_push_neighbours_out_of_tolerance():
    """Masks one voxel apart at 1 mm: everything lies within 1 mm, also when the header says 1.0000001."""
    exact = score_case(*cubes(1), spacing_mm=(1.0, 1.0, 1.0))
    assert exact["nsd_1mm"] == 1.0
    assert score_case(*cubes(1), spacing_mm=(1.0000001,) * 3) == exact


@pytest.mark.parametrize("convert", [torch.as_tensor, np.uint8, lambda mask: torch.as_tensor(mask).float()])
def test_kind_of_array_does_not_matter(convert):
    prediction, reference = cubes(2)
    expected = score_case(prediction, reference, spacing_mm=(1, 1, 1))
    got = score_case(convert(prediction), convert(reference), spacing_mm=(1, 1, 1))
    assert got == expected
    assert {type(value) for value in got.values()} == {float, bool}


def test_without_surface_only_dice_is_computed_for_any_masks():
    cube, _ = cubes(0)
    for prediction in (cube, cube & False):
        for policy in ("honest", "transunet"):
            score = score_case(prediction, cube, spacing_mm=(1, 1, 1), surface=False, policy=policy)
            assert [name for name in score if name.startswith(("hd95", "nsd"))] == []
            assert score[score_columns(policy)[0]] == float(prediction.any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((3, 4, 5), bool)}, "differ in shape"),
        ({"prediction": np.zeros((1, 3, 4, 6), bool)}, "must be a volume"),
        ({"reference": np.full((3, 4, 6), 2)}, "other values than 0 and 1"),
        ({"prediction": np.full((3, 4, 6), np.nan)}, "other values than 0 and 1"),
        ({"spacing_mm": (1, 1)}, "three positive numbers"),
        ({"spacing_mm": (1, 0, 1)}, "three positive numbers"),
    ],
)
def test_bad_input_is_refused_with_the_reason(change, message):
    good = {"prediction": np.zeros((3, 4, 6), bool), "reference": np.zeros((3, 4, 6), bool), "spacing_mm": (1, 1, 1)}
    with pytest.raises(DataError, match=message):
        score_case(**(good | change))


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(ConfigError, match="honest, transunet"):
        score_case(*cubes(1), spacing_mm=(1, 1, 1), policy="kind")


ORGANS = ("liver", "spleen", "aorta")


def label_maps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true maps (1, H, W, D) of three organs that overlap in part; nobody has the last class's voxels."""
    (p1, r1), (p2, r2) = (blobs(seed + i) for i in range(2))
    prediction, reference = (
        torch.as_tensor(np.where(a, 1, np.where(b, 2, 0)))[None].float() for a, b in ((p1, p2), (r1, r2))
    )
    return prediction, reference


def scored(prediction, reference, spacing=(0.8, 0.5, 3.0), **options) -> list[dict]:
    metric = CaseScores(classes=ORGANS, **options)
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    metric.update([{"case": "a", "pred": prediction, "reference": MetaTensor(reference, affine=affine)}])
    metric.compute()
    return metric.rows


@pytest.mark.parametrize("policy", ["honest", "transunet"])
def test_every_class_of_a_map_of_labels_is_scored_as_its_own_mask(policy):
    prediction, reference = label_maps(3)
    rows = scored(prediction, reference, policy=policy)
    assert [row["class"] for row in rows] == list(ORGANS)
    for number, row in enumerate(rows, 1):
        masks = (np.asarray(volume[0]) == number for volume in (prediction, reference))
        expected = score_case(*masks, spacing_mm=(0.8, 0.5, 3.0), policy=policy)
        assert str({key: row[key] for key in expected}) == str(expected)  # NaN is NaN
    assert 0 < rows[0][score_columns(policy)[0]] < 1 and rows[2]["excluded"] == (policy == "honest")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float16])
def test_maps_and_channels_of_any_dtype_give_the_same_rows(dtype):
    maps = label_maps(5)
    channels = [torch.cat([(volume == number) for number in (1, 2, 3)]).float() for volume in maps]
    expected = str(scored(*channels))
    assert str(scored(*(volume.to(dtype) for volume in maps))) == expected
    assert str(scored(channels[0], maps[1].to(dtype))) == expected  # one of each
    assert str(scored(MetaTensor(maps[0]).to(dtype), channels[1])) == expected


def test_exchanged_labels_cost_the_exchanged_classes_alone():
    _, reference = label_maps(7)
    reference[0, :3, :3, :3] = 3
    exchanged = torch.tensor([0, 2, 1, 3])[reference.long()]
    assert [row["dice"] for row in scored(exchanged, reference)] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [4, -1, 0.5, math.nan, math.inf])
@pytest.mark.parametrize("key", ["pred", "reference"])
def test_a_channel_that_is_no_map_of_the_classes_is_refused_by_name(key, value):
    """Logits, probabilities or a foreign coding would else be scored: as classes that are hardly there."""
    maps = dict(zip(("pred", "reference"), label_maps(2), strict=True))
    maps[key][0, 3, 4, 5] = value
    with pytest.raises(DataError, match=rf"case a .*\n.*{key} holds other values than the whole numbers 0 to 3"):
        scored(*maps.values())


def test_another_number_of_channels_is_refused():
    with pytest.raises(DataError, match=r"pred has shape \(2, .*needs \(3, H, W, D\).*or one channel of whole numbers"):
        scored(torch.zeros(2, 4, 5, 6), torch.zeros(1, 4, 5, 6))
