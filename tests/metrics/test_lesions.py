"""Lesion-wise Dice and HD95: sums done by hand, a literal oracle, and what the official script of BraTS 2023 gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import binary_dilation, generate_binary_structure, label
from surface_distance import compute_robust_hausdorff, compute_surface_distances

from samseg_monai.errors import ConfigError, DataError
from samseg_monai.metrics import (
    CaseScores,
    LesionRules,
    aggregate,
    paired_difference,
    read_rows,
    score_columns,
    score_lesions,
    write_rows,
)
from samseg_monai.report.runs import RunResult
from samseg_monai.report.tables import results_json, table_text

MM = (1.0, 1.0, 1.0)
SHAPE = (40, 36, 24)
PARTS = ("non-enhancing core", "oedema", "enhancing tumour")
CHALLENGES = {"BraTS-MEN": {}, "BraTS-GLI": {"dilation": 3}, "BraTS-MET": {"ignored_mm3": 2.0}}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "brats_lesions.json").read_text(encoding="utf-8"))


def boxes(*corners: tuple, size: tuple[int, int, int] = (4, 4, 4)) -> np.ndarray:
    """Boxes of ``size`` voxels (64 by default) with these lowest corners; a corner may bring its own size."""
    mask = np.zeros(SHAPE, dtype=bool)
    for corner in corners:
        corner, extent = corner if isinstance(corner[0], tuple) else (corner, size)
        mask[tuple(slice(start, start + length) for start, length in zip(corner, extent, strict=True))] = True
    return mask


def found(prediction: np.ndarray, reference: np.ndarray, spacing=MM, **rules) -> tuple[float, ...]:
    """Dice, HD95, TP, FN, FP."""
    return tuple(score_lesions(prediction, reference, spacing_mm=spacing, rules=LesionRules(**rules)).values())


A, B, C = (4, 4, 4), (20, 4, 4), (20, 20, 12)  # corners of boxes far from each other
NOTHING = boxes()


def test_one_lesion_found_exactly():
    """Dice 2 * 64 / (64 + 64) = 1 and no distance, over 1 lesion."""
    assert found(boxes(A), boxes(A)) == (1.0, 0.0, 1, 0, 0)


def test_one_of_two_lesions_missed():
    """Dice (1 + 0) / 2, HD95 (0 + 374) / 2."""
    assert found(boxes(A), boxes(A, B)) == (0.5, 187.0, 1, 1, 0)


def test_a_false_lesion_counts_whatever_its_size():
    """One voxel, far below 50, weighs as much as the lesion: Dice (1 + 0) / (1 + 1), HD95 (0 + 374) / 2."""
    assert found(boxes(A, (B, (1, 1, 1))), boxes(A)) == (0.5, 187.0, 1, 0, 1)


def test_found_missed_and_false_share_one_mean():
    """Lesion A against 48 of its 64 voxels: Dice 2 * 48 / (64 + 48) = 6 / 7, then (6 / 7 + 0 + 0) / 3.

    The face that the prediction lacks lies 1 mm off and is 22 % of A's surface, so the HD95 of A is 1 mm:
    (1 + 374 + 374) / 3.
    """
    scores = found(boxes((A, (3, 4, 4)), C), boxes(A, B))
    assert scores == pytest.approx((2 / 7, 749 / 3, 1, 1, 1))


@pytest.mark.parametrize(("extra", "missed"), [(0, 0), (1, 1)])
def test_a_reference_lesion_of_50_voxels_is_ignored_and_one_of_51_is_not(extra, missed):
    """5 * 5 * 2 = 50. Missed alone: nothing counts, Dice 1 and HD95 0, or Dice 0 / 1 and HD95 374 / 1."""
    small = boxes((B, (5, 5, 2)), ((20, 4, 6), (extra, 1, 1)))
    assert small.sum() == 50 + extra
    assert found(NOTHING, small) == ((0.0, 374.0, 0, 1, 0) if missed else (1.0, 0.0, 0, 0, 0))
    # beside a lesion that is found exactly: (1 + 0) / 2 or 1 / 1
    assert found(boxes(A), small | boxes(A))[0] == (0.5 if missed else 1.0)


def test_a_prediction_on_an_ignored_lesion_is_not_false():
    """The lesion of 50 voxels is found, badly: neither its Dice nor an FP enters (1 + nothing) / 1."""
    assert found(boxes(A, (B, (5, 5, 1))), boxes(A, (B, (5, 5, 2)))) == (1.0, 0.0, 1, 0, 0)


def test_the_volume_that_is_ignored_is_in_mm3():
    """Voxels of 8 mm^3: six are 48 mm^3 and ignored, seven are 56 and count."""
    assert found(NOTHING, boxes((A, (6, 1, 1))), (2.0, 2.0, 2.0)) == (1.0, 0.0, 0, 0, 0)
    assert found(NOTHING, boxes((A, (7, 1, 1))), (2.0, 2.0, 2.0)) == (0.0, 374.0, 0, 1, 0)


def test_reference_lesions_two_voxels_apart_are_one_and_three_apart_are_two():
    """One step of dilation fills 2 voxels between them, of 3 one stays. The prediction is the first of the two.

    One lesion: Dice 2 * 64 / (128 + 64) = 2 / 3. The far face of the second box lies 6 mm away and is 22 % of its
    box's surface, 11 % of both: more than 5, so the HD95 is 6. Two lesions: (1 + 0) / 2 and (0 + 374) / 2.
    """
    first = (4, 4, 4)
    assert found(boxes(first), boxes(first, (10, 4, 4))) == pytest.approx((2 / 3, 6.0, 1, 0, 0))
    assert found(boxes(first), boxes(first, (11, 4, 4))) == (0.5, 187.0, 1, 1, 0)


@pytest.mark.parametrize(("dilation", "apart"), [(1, 2), (2, 4), (3, 6)])
def test_each_step_of_dilation_merges_two_voxels_more(dilation, apart):
    counts = [
        found(NOTHING, boxes(A, (A[0] + 4 + gap, 4, 4)), dilation=dilation)[3] for gap in range(apart - 1, apart + 3)
    ]
    assert counts == [1, 1, 2, 2]


def test_a_prediction_across_two_lesions_matches_both_as_a_whole():
    """A bar of 12 * 4 * 4 = 192 voxels over two boxes 4 voxels apart: Dice of each 2 * 64 / (64 + 192) = 0.5.

    The bar's far end lies 8 mm from each lesion and is 9 % of the bar's surface, more than 5: HD95 8 for both.
    """
    assert found(boxes((A, (12, 4, 4))), boxes(A, (12, 4, 4))) == pytest.approx((0.5, 8.0, 2, 0, 0))


def test_nothing_there_and_nothing_found_is_perfect():
    assert found(NOTHING, NOTHING) == (1.0, 0.0, 0, 0, 0)


def test_two_false_lesions_in_a_case_without_any():
    """Dice 0 / 2, HD95 2 * 374 / 2."""
    assert found(boxes(A, C), NOTHING) == (0.0, 374.0, 0, 0, 2)


def test_components_that_touch_at_a_corner_are_one():
    """26 neighbours: two boxes of the prediction, corner to corner, are one FP and not two, and so of the reference."""
    corner_to_corner = boxes(A, (8, 8, 8))
    assert found(corner_to_corner, NOTHING)[4] == 1
    assert found(NOTHING, corner_to_corner)[3] == 1


def test_dilation_reaches_over_faces_and_edges_but_not_over_corners():
    """A prediction beside the lesion touches its dilation over an edge: a match with Dice 0. Over a corner: none."""
    over_edge, over_corner = (found(boxes(corner), boxes(A)) for corner in ((8, 8, 4), (8, 8, 8)))
    assert over_edge[0] == 0.0 and 0 < over_edge[1] < 10 and over_edge[2:] == (1, 0, 0)
    assert over_corner == (0.0, 374.0, 0, 1, 1)


def test_the_penalty_is_an_argument():
    assert found(boxes(C), boxes(A), penalty_mm=100.0) == (0.0, 100.0, 0, 1, 1)


def test_without_surface_everything_but_hd95_is_there():
    whole = score_lesions(boxes(A, C), boxes(A, B), spacing_mm=MM)
    fast = score_lesions(boxes(A, C), boxes(A, B), spacing_mm=MM, surface=False)
    assert fast == {name: value for name, value in whole.items() if name != "lesion_hd95_mm"}
    assert whole["lesion_dice"] == 1 / 3


def tumours(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true maps of labels (1 core, 2 oedema, 3 enhancing) of a few tumours, near to each other or not.

    A tumour is a ball in a ball in a ball; predictions are moved, grown, shrunk, missing or out of nothing. Whole
    numbers only, so that every machine draws the same.
    """
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    prediction, reference = np.zeros((2, *SHAPE), dtype=np.uint8)

    def ball(volume: np.ndarray, centre: np.ndarray, radius: int) -> None:
        distance = ((grid - centre[:, None, None, None]) ** 2).sum(axis=0)
        for value, r in ((2, radius), (3, radius - 1), (1, radius - 3)):
            if r >= 0:
                volume[distance <= r * r] = value

    for _ in range(rng.integers(1, 6)):
        centre, radius = rng.integers(0, SHAPE), int(rng.integers(1, 6))
        ball(reference, centre, radius)
        if rng.random() < 0.75:
            ball(prediction, centre + rng.integers(-2, 3, 3), radius + int(rng.integers(-1, 2)))
    for _ in range(rng.integers(0, 3)):
        ball(prediction, rng.integers(0, SHAPE), int(rng.integers(0, 3)))
    return prediction, reference


def literal(pred: np.ndarray, ref: np.ndarray, spacing, rules: LesionRules) -> tuple[float, ...]:
    """The published description word by word, one whole volume per lesion."""
    corners, edges = generate_binary_structure(3, 3), generate_binary_structure(3, 2)
    grown = binary_dilation(ref, edges, iterations=rules.dilation)
    extents, n_lesions = label(grown, corners)
    parts, n_parts = label(pred, corners)
    dice, hd95, matched, tp, fn = [], [], set(), 0, 0
    for number in range(1, n_lesions + 1):
        lesion = ref & (extents == number)
        reach = binary_dilation(lesion, edges, iterations=rules.dilation)
        match = set(np.unique(parts[reach])) - {0}
        matched |= match
        if lesion.sum() * math.prod(spacing) <= rules.ignored_mm3:
            continue
        of_match = np.isin(parts, list(match))
        dice.append(2 * (of_match & lesion).sum() / (of_match.sum() + lesion.sum()))
        if match:
            tp += 1
            hd95.append(compute_robust_hausdorff(compute_surface_distances(lesion, of_match, spacing), 95))
        else:
            fn += 1
            hd95.append(rules.penalty_mm)
    fp = n_parts - len(matched)
    count = len(dice) + fp
    if not count:
        return 1.0, 0.0, 0, 0, 0
    return sum(dice) / count, (sum(hd95) + fp * rules.penalty_mm) / count, tp, fn, fp


@pytest.mark.parametrize(
    ("spacing", "rules"), [(MM, LesionRules()), ((0.8, 1.1, 2.5), LesionRules(dilation=3, ignored_mm3=2.0))]
)
def test_thirty_drawn_volumes_equal_the_literal_description(spacing, rules):
    expected = []
    for seed in range(30):
        prediction, reference = (volume > 0 for volume in tumours(seed))
        expected.append(literal(prediction, reference, spacing, rules))
        got = score_lesions(prediction, reference, spacing_mm=spacing, rules=rules)
        assert tuple(got.values()) == pytest.approx(expected[-1], rel=1e-9), seed
    scores = np.array(expected)
    assert (scores[:, 2:].sum(axis=0) > 5).all()  # lesions found, missed and false were all there
    assert ((scores[:, 0] > 0) & (scores[:, 0] < 1)).sum() > 10


@pytest.mark.parametrize("spacing", [MM, (0.8, 1.1, 2.5)])
def test_large_masks_around_small_ones_equal_the_literal_description(spacing):
    """A network that marks everything, or a lesion that is everything: distances come from a map, not from a tree."""
    everything, some = np.ones(SHAPE, dtype=bool), boxes(A, (B, (5, 4, 4)), (C, (9, 9, 9)))
    for pair in ((everything, some), (some, everything)):
        got = tuple(score_lesions(*pair, spacing_mm=spacing).values())
        assert got == pytest.approx(literal(*pair, spacing, LesionRules()), rel=1e-9)


def rows_of(prediction, reference, spacing=MM, classes=PARTS, case="a", **options) -> list[dict]:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    metric = CaseScores(classes=classes, **options)
    reference = MetaTensor(torch.as_tensor(reference), affine=affine)
    metric.update([{"case": case, "pred": torch.as_tensor(prediction), "reference": reference}])
    metric.compute()
    return metric.rows


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_regions_of_brats_equal_the_official_script(challenge):
    """Golden values: ``golden/brats_lesions.json`` says how they were made."""
    assert {value for scores in GOLDEN["scores"].values() for value in scores[challenge]["TC"][2:]} > {0, 1, 2}
    for seed, scores in GOLDEN["scores"].items():
        prediction, reference = (volume[None] for volume in tumours(int(seed)))
        rows = rows_of(prediction, reference, regions="brats", lesions=CHALLENGES[challenge] or True)
        assert [row["class"] for row in rows] == ["WT", "TC", "ET"]
        for row in rows:
            got = [row[f"lesion_{name}"] for name in ("dice", "hd95_mm", "tp", "fn", "fp")]
            assert got == pytest.approx(scores[challenge][row["class"]], rel=1e-9), (seed, row["class"])


def test_regions_are_what_the_classes_allow_in_maps_and_in_channels():
    maps = [volume[None] for volume in tumours(4)]
    channels = [np.concatenate([volume == value for value in (1, 2, 3)]).astype(np.float32) for volume in maps]
    rows = rows_of(*maps, regions="brats")
    assert str(rows_of(*channels, regions="brats")) == str(rows)
    assert str(rows_of(*(volume > 0 for volume in channels), regions="brats")) == str(rows)
    whole = rows_of(*(volume > 0 for volume in maps), classes=["tumour"], regions="brats")
    assert str(whole) == str(rows[:1]) and whole[0]["class"] == "WT"
    two = [np.where(volume == 2, 0, np.where(volume == 3, 2, volume)) for volume in maps]
    assert str(rows_of(*two, classes=[PARTS[0], PARTS[2]], regions="brats")) == str(rows[1:])
    own = rows_of(*maps, regions={"core": [PARTS[0], PARTS[2]]})
    assert str({**own[0], "class": "TC"}) == str(rows[1]) and len(own) == 1
    assert [row["class"] for row in rows_of(*maps)] == list(PARTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lesions": {"dilatation": 1}}, "some of dilation, ignored_mm3, penalty_mm"),
        ({"lesions": 50}, "must be true, false or an object"),
        ({"lesions": {"dilation": 0, "penalty_mm": -1}}, "(?s)whole number of voxels from 1.*penalty_mm must be"),
        ({"lesions": {"ignored_mm3": math.nan}}, "ignored_mm3 must be a number from 0"),
        ({"value": "lesion_dice"}, "not computed here"),
        ({"regions": "brats", "classes": ["liver"]}, "no region of BraTS can be made of liver"),
        ({"regions": {"WT": ["tumor"]}, "classes": ["tumour"]}, r"WT: \['tumor'\]"),
        ({"regions": {"WT": []}, "classes": ["tumour"]}, r"WT: \[\]"),
        ({"regions": "gliomas"}, "null, 'brats' or an object"),
    ],
)
def test_bad_rules_and_regions_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        CaseScores(**options)


def test_bad_masks_are_refused_with_the_reason():
    with pytest.raises(DataError, match="differ in shape"):
        score_lesions(boxes(A)[1:], boxes(A), spacing_mm=MM)
    with pytest.raises(DataError, match="other values than 0 and 1"):
        score_lesions(boxes(A) * 0.5, boxes(A), spacing_mm=MM)


def lesion_cases(**options) -> list[dict]:
    """Three cases: one lesion of two found, one false lesion, nothing at all."""
    masks = {"half": (boxes(A), boxes(A, B)), "false": (boxes(C), NOTHING), "none": (NOTHING, NOTHING)}
    return [
        row
        for case, pair in masks.items()
        for row in rows_of(*(mask[None] for mask in pair), classes=["tumour"], case=case, **options)
    ]


def test_columns_come_behind_the_others_and_only_when_asked_for():
    plain, with_lesions = lesion_cases(), lesion_cases(lesions=True)
    added = ["lesion_dice", "lesion_hd95_mm", "lesion_tp", "lesion_fn", "lesion_fp"]
    assert [*plain[0], *added] == list(with_lesions[0])
    assert str([{key: row[key] for key in plain[0]} for row in with_lesions]) == str(plain)
    assert not any("lesion" in name for name in aggregate(plain))
    assert CaseScores(lesions=True, surface=False).columns == ("dice", "lesion_dice")
    assert CaseScores(lesions=False).columns == score_columns()


def test_means_count_every_case_as_the_official_ranking_does(tmp_path):
    """A case with nothing in it is left out of Dice (honest policy) and is Dice 1, HD95 0 lesion-wise."""
    rows = lesion_cases(lesions=True)
    summary = aggregate(rows)
    assert (summary["n"], summary["n_excluded"], summary["n_lesion_cases"]) == (2.0, 1.0, 3.0)
    assert summary["lesion_dice_mean"] == (0.5 + 0 + 1) / 3
    assert summary["lesion_hd95_mm_mean"] == (187 + 374 + 0) / 3
    assert [summary[f"n_lesion_{name}"] for name in ("tp", "fn", "fp")] == [1.0, 1.0, 1.0]
    assert "lesion_tp_mean" not in summary
    perfect = [{**row, "lesion_dice": 1.0} for row in rows]
    gap = paired_difference(perfect, rows, value="lesion_dice")
    assert (gap["difference"], gap["n"], gap["n_excluded"]) == (0.5, 3.0, 0.0)
    again = read_rows(write_rows(rows, tmp_path / "cases.csv"))
    assert str(again) == str(rows)
    metric = CaseScores(lesions=True, value="lesion_dice")
    metric._own = {row["case"]: [row] for row in rows}
    assert metric.compute() == 0.5


def test_the_report_shows_them_where_a_run_has_them(tmp_path):
    for name, lesions in (("plain", None), ("lesions", True)):
        folder = tmp_path / name
        write_rows(lesion_cases(lesions=lesions), folder / "cases.csv")
        (folder / "metrics.json").write_text("{}")
        (folder / "run_card.json").write_text(json.dumps({"strategy": {"name": name}, "sam_variant": "vit_b"}))
    runs = [RunResult.load(tmp_path / name) for name in ("plain", "lesions")]
    found = results_json(runs)
    assert found["lesions"]["lesion_dice_mean"] == 0.5 and "lesion_dice_mean" not in found["plain"]
    assert "Lesion HD95 mm" in table_text(runs) and "Lesion" not in table_text(runs[:1])
    assert "187.00" in table_text(runs)  # two decimals, as for any distance
