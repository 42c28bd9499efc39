"""Eight organs whose scores are known by hand, sent through the whole evaluation of the abdomen's bundles."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from samseg_monai.data.datalists.label_maps import BTCV as LABELS
from samseg_monai.data.datalists.label_maps import ORGANS, labels_in
from samseg_monai.errors import DataError
from samseg_monai.workflow import run_workflow
from tests.helpers.audit_networks import Mixed

LADDER, PAPER = (
    Path(__file__).parents[2] / "bundles" / f"abdomen_segmentation_{name}" for name in ("ladder", "ladder_paper")
)
RAW = {name: value for value, name in LABELS.items()}  # what the files hold
BODY_HU, OTHER_HU = 80, 275
HU = dict(zip(ORGANS, (-85, -50, -15, 20, 140, 175, 210, 245), strict=True))
SHAPE, SPACING_MM = (64, 48, 12), (0.8, 1.1, 3.0)  # right, anterior, superior
DIAGONAL_MM = math.dist((0, 0, 0), [n * s for n, s in zip(SHAPE, SPACING_MM, strict=True)])
PERFECT = {"_target_": "tests.helpers.audit_networks.KnownOrgans", "hu": list(HU.values())}
EMPTY = {"_target_": "tests.helpers.audit_networks.NoOrgans", "num_classes": 8}
AXES = {"whole": "LAS", "turned": "PIR", "odd": "RAI"}


def cuboids() -> dict[str, tuple[slice, slice, slice]]:
    """A cuboid of 10 x 12 x 6 voxels for each organ, beside each other in two rows; right kidney on the right."""
    order = ("spleen", "left kidney", "pancreas", "aorta", "stomach", "gallbladder", "right kidney", "liver")
    corners = [(3 + 16 * (i // 2), 6 + 24 * (i % 2), 3) for i in range(8)]
    return {
        n: (slice(x, x + 10), slice(y, y + 12), slice(z, z + 6)) for n, (x, y, z) in zip(order, corners, strict=True)
    }


def moved(where, *, x=0, z=0):
    return tuple(slice(s.start + by, s.stop + by) for s, by in zip(where, (x, 0, z), strict=True))


def write_case(folder: Path, case: str, image: np.ndarray, label: np.ndarray, axes: str) -> dict:
    """Store arrays given along right, anterior, superior in another orientation, a little off the origin."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-21.5, -30.0, 7.25)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    for array, name in ((image, f"{case}.nii.gz"), (label, f"{case}-label.nii.gz")):
        nib.save(nib.Nifti1Image(array, affine).as_reoriented(turn), folder / name)
    files = {"image": f"{case}.nii.gz", "label": f"{case}-label.nii.gz", "reference": f"{case}-label.nii.gz"}
    return {"case": case, "patient": case, **files}


def write_datalist(folder: Path, items: list[dict], coding: str = "btcv13") -> None:
    header = {"name": "audit", "labels": labels_in(coding), "label_coding": coding}
    datalist = {**header, "testing": items, "training": [], "validation": [], "hashes": {}}
    (folder / "datalist.json").write_text(json.dumps(datalist))


def blank(shape: tuple[int, int, int], *, air: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a body with ``air`` voxels around it."""
    image = np.full(shape, BODY_HU, dtype=np.int16)
    image[:air], image[len(image) - air :] = -1000, -1000
    return image, np.zeros(shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> SimpleNamespace:
    """Three cases of one HU per organ; ``expected``: what a network that knows the HU predicts, in the files' axes."""
    folder = tmp_path_factory.mktemp("ct")
    items, expected = [], {}
    for case, axes in AXES.items():
        image, label = blank(SHAPE)
        for organ, where in cuboids().items():
            if case == "odd" and organ == "pancreas":
                continue  # in neither image nor label
            seen = where
            if case == "odd":
                seen = moved(where, x=2) if organ == "liver" else moved(where, z=1) if organ == "spleen" else where
            image[seen] = HU[organ]
            if case != "odd" or organ != "gallbladder":  # there to be seen, but not in the label
                label[where] = RAW[organ]
        for organ, x in (("oesophagus", 4), ("inferior vena cava", 30)):  # of no interest to the eight
            image[x : x + 8, 20:30, :2], label[x : x + 8, 20:30, :2] = OTHER_HU, RAW[organ]
        items.append(write_case(folder, case, image, label, axes))
        stored = np.asarray(nib.load(folder / f"{case}.nii.gz").dataobj)
        expected[case] = np.zeros(stored.shape, dtype=np.uint8)
        for number, organ in enumerate(ORGANS, 1):
            expected[case][stored == HU[organ]] = number
    write_datalist(folder, items)
    return SimpleNamespace(folder=folder, expected=expected)


def exact(bundle: Path) -> dict:
    """Sizes at which no slice is resampled on its way to the network."""
    size = max(SHAPE)
    return {"image_size": size, "store_size": size} if bundle == PAPER else {"image_size": size}


def evaluate(bundle: Path, data: Path, output: Path, network: dict, **overrides) -> SimpleNamespace:
    """Rows by (case, organ) and metrics, under the honest and under the published rules."""
    shared = {"dataset_dir": str(data), "output_dir": str(output), "network_def": network, "loaded": "$None"}
    run_workflow([bundle / "configs" / "evaluate.json"], {**shared, **overrides})
    found = {}
    for policy, prefix in (("honest", ""), ("transunet", "transunet_")):
        with open(output / "evaluation" / f"{prefix}cases.csv", newline="") as stream:
            rows = {(row["case"], row["class"]): row for row in csv.DictReader(stream)}
        metrics = json.loads((output / "evaluation" / f"{prefix}metrics.json").read_text())["metrics"]
        found[policy] = SimpleNamespace(rows=rows, metrics=metrics)
    return SimpleNamespace(**found, predictions=output / "evaluation" / "predictions")


def numbers(row: dict, *columns: str) -> tuple[float, ...]:
    return tuple(float(row[column]) for column in columns)


HONEST = ("dice", "hd95_mm", "hd95_medpy_mm", "nsd_1mm", "nsd_2mm")
TRANSUNET = ("dice_transunet", "hd95_transunet_voxel")


@pytest.fixture(scope="module", params=[LADDER, PAPER], ids=lambda p: p.name)
def perfect(request, ct, tmp_path_factory) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("perfect")
    return evaluate(request.param, ct.folder, output, PERFECT, **exact(request.param), save_predictions=True)


@pytest.mark.parametrize("case", ["whole", "turned"])
def test_perfect_prediction_scores_one_for_every_organ_in_every_orientation(perfect, case):
    for organ in ORGANS:
        assert numbers(perfect.honest.rows[case, organ], *HONEST) == (1.0, 0.0, 0.0, 1.0, 1.0), organ
        assert numbers(perfect.transunet.rows[case, organ], *TRANSUNET) == (1.0, 0.0), organ


def test_distances_are_in_mm_under_the_honest_rules_and_in_voxels_as_published(perfect):
    """Cuboids of 10 x 12 x 6: the face that lies off by the whole shift is more than 5 % of the surface."""
    honest, published = perfect.honest.rows, perfect.transunet.rows
    assert numbers(honest["odd", "liver"], *HONEST[:3]) == pytest.approx((0.8, 2 * 0.8, 2 * 0.8))
    assert numbers(published["odd", "liver"], *TRANSUNET) == pytest.approx((0.8, 2.0))
    assert numbers(honest["odd", "spleen"], *HONEST[:3]) == pytest.approx((5 / 6, 3.0, 3.0))
    assert numbers(published["odd", "spleen"], *TRANSUNET) == pytest.approx((5 / 6, 1.0))
    assert "hd95_mm" not in published["odd", "liver"] and "hd95_transunet_voxel" not in honest["odd", "liver"]


def test_organs_that_are_not_there_score_as_each_policy_says(perfect):
    invented = perfect.honest.rows["odd", "gallbladder"]
    assert numbers(invented, *HONEST) == pytest.approx((0.0, DIAGONAL_MM, DIAGONAL_MM, 0.0, 0.0))
    assert numbers(perfect.transunet.rows["odd", "gallbladder"], *TRANSUNET) == (1.0, 0.0)
    absent = perfect.honest.rows["odd", "pancreas"]
    assert absent["excluded"] == "True" and math.isnan(float(absent["dice"]))
    published = perfect.transunet.rows["odd", "pancreas"]
    assert published["excluded"] == "False" and numbers(published, *TRANSUNET) == (0.0, 0.0)


def test_means_and_counts_per_organ_say_what_was_left_out(perfect):
    honest, published = perfect.honest.metrics, perfect.transunet.metrics
    assert (honest["n"], honest["n_excluded"]) == (3, 1)
    assert (published["transunet_n"], published["transunet_n_excluded"]) == (3, 0)
    for organ in ORGANS:
        left_out = int(organ == "pancreas")
        assert (honest[f"{organ}_n"], honest[f"{organ}_n_excluded"]) == (3 - left_out, left_out)
        assert (published[f"transunet_{organ}_n"], published[f"transunet_{organ}_n_excluded"]) == (3, 0)
    assert honest["pancreas_dice_mean"] == 1.0 and honest["gallbladder_dice_mean"] == pytest.approx(2 / 3)
    assert published["transunet_pancreas_dice_transunet_mean"] == pytest.approx(2 / 3)
    assert published["transunet_gallbladder_dice_transunet_mean"] == 1.0
    # cases first: seven organs count in the odd one honestly, eight as published
    odd = 4 + 0.8 + 5 / 6
    assert honest["dice_mean"] == pytest.approx((2 + odd / 7) / 3)
    assert published["transunet_dice_transunet_mean"] == pytest.approx((2 + (odd + 1) / 8) / 3)


def test_saved_predictions_lie_on_their_image_and_hold_the_numbers_of_the_classes(perfect, ct):
    assert len(list(perfect.predictions.glob("*.nii.gz"))) == len(AXES)
    for case, expected in ct.expected.items():
        image, found = (nib.load(p) for p in (ct.folder / f"{case}.nii.gz", perfect.predictions / f"{case}_seg.nii.gz"))
        assert found.shape == image.shape and found.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(found.affine, image.affine)
        np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
        assert set(np.unique(expected)) == set(range(9 if case != "odd" else 8))
    label = np.asarray(nib.load(ct.folder / "whole-label.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, *(RAW[organ] for organ in ORGANS), 5, 9}
    wanted = {value: ORGANS.index(name) + 1 if name in ORGANS else 0 for value, name in LABELS.items()}  # 5, 9 become 0
    found = np.asarray(nib.load(perfect.predictions / "whole_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(found, np.vectorize({0: 0, **wanted}.get)(label))


@pytest.mark.parametrize("bundle", [LADDER, PAPER], ids=lambda p: p.name)
def test_empty_prediction_misses_every_organ_and_says_so(bundle, ct, tmp_path):
    result = evaluate(bundle, ct.folder, tmp_path, EMPTY, **exact(bundle))
    for (case, organ), row in result.honest.rows.items():
        if case == "odd" and organ in ("gallbladder", "pancreas"):
            assert row["excluded"] == "True"
        else:
            assert numbers(row, *HONEST) == pytest.approx((0.0, DIAGONAL_MM, DIAGONAL_MM, 0.0, 0.0)), (case, organ)
    # a missed organ gets distance 0 there: the reason why it is never the default
    assert all(numbers(row, *TRANSUNET) == (0.0, 0.0) for row in result.transunet.rows.values())
    assert len(result.honest.rows) == len(result.transunet.rows) == 3 * 8
    assert result.honest.metrics["n_empty_prediction"] == 3 * 8 - 2
    assert result.honest.metrics["dice_mean"] == 0.0
    assert result.honest.metrics["hd95_mm_mean"] == pytest.approx(DIAGONAL_MM)


@pytest.mark.parametrize("bundle", [LADDER, PAPER], ids=lambda p: p.name)
def test_exchanged_kidneys_cost_exactly_the_two_kidneys(bundle, ct, tmp_path):
    write_datalist(tmp_path, json.loads((ct.folder / "datalist.json").read_text())["testing"][:1])
    hu = {**HU, "right kidney": HU["left kidney"], "left kidney": HU["right kidney"]}
    overrides = {**exact(bundle), "datalist": str(tmp_path / "datalist.json")}
    result = evaluate(bundle, ct.folder, tmp_path, {**PERFECT, "hu": list(hu.values())}, **overrides)
    for organ in ORGANS:
        wrong = "kidney" in organ
        assert float(result.honest.rows["whole", organ]["dice"]) == (0.0 if wrong else 1.0)
        assert (float(result.honest.rows["whole", organ]["hd95_mm"]) > 0) == wrong
        assert float(result.transunet.rows["whole", organ]["dice_transunet"]) == (0.0 if wrong else 1.0)
    assert result.honest.metrics["dice_mean"] == pytest.approx(6 / 8)
    assert result.honest.metrics["right kidney_dice_mean"] == result.honest.metrics["left kidney_dice_mean"] == 0.0


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Two organs in each slice, as large as slices of 128 x 112 allow, stored as BTCV stores them."""
    folder = tmp_path_factory.mktemp("large")
    image, label = blank((128, 112, 4), air=0)
    for number, pair in enumerate(zip(ORGANS[:4], ORGANS[4:], strict=True)):
        for organ, x in zip(pair, (6, 68), strict=True):
            where = (slice(x, x + 54), slice(8, 104), slice(number, number + 1))
            image[where], label[where] = HU[organ], RAW[organ]
    write_datalist(folder, [write_case(folder, "large", image, label, "LAS")])
    return folder


@pytest.mark.parametrize(
    ("bundle", "sizes"),
    [(PAPER, {"store_size": 56, "image_size": 128}), (LADDER, {"image_size": 160})],
    ids=["ladder_paper", "ladder"],
)
def test_on_the_way_through_other_sizes_large_organs_stay_where_they_are(bundle, sizes, large, tmp_path):
    """512 -> 224 -> 512 in small: edges may move by a stored pixel, of which an organ is 24 wide and 42 high."""
    result = evaluate(bundle, large, tmp_path, PERFECT, **sizes, save_predictions=True)
    for organ in ORGANS:
        assert float(result.honest.rows["large", organ]["dice"]) > 0.9, organ
        assert float(result.transunet.rows["large", organ]["dice_transunet"]) > 0.9, organ
    image, found = nib.load(large / "large.nii.gz"), nib.load(result.predictions / "large_seg.nii.gz")
    assert found.shape == image.shape and set(np.unique(np.asarray(found.dataobj))) == set(range(9))
    np.testing.assert_array_equal(found.affine, image.affine)


@pytest.mark.parametrize(
    ("bundle", "sizes"),
    [(PAPER, {"store_size": 28, "image_size": 64}), (LADDER, {"image_size": 96})],
    ids=lambda value: getattr(value, "name", ""),
)
def test_evaluated_labels_are_the_largest_of_the_logits(bundle, sizes, ct):
    found = {}
    for labels in (True, False):
        files = [str(bundle / "configs" / f"{name}.json") for name in ("inference", "evaluate")]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        parser.update({**sizes, "dataset_dir": str(ct.folder), "batch_size": 5, "inferer::labels": labels})
        volume = parser.get_parsed_content("dataset")[0]["image"]
        found[labels] = parser.get_parsed_content("inferer")(volume[None], Mixed(8))
    assert found[True].shape == (1, 1, *volume.shape[1:]) and found[False].shape == (1, 9, *volume.shape[1:])
    assert torch.equal(found[True].as_tensor(), found[False].as_tensor().argmax(dim=1, keepdim=True).float())
    assert len(found[True].unique()) == 9


@pytest.mark.parametrize("bundle", [LADDER, PAPER], ids=lambda p: p.name)
def test_a_wrong_label_coding_ends_in_one_readable_sentence(bundle, ct, tmp_path, monkeypatch, capsys):
    """Raw files under the name of a table of eight: values 9 and 11 are not in it."""
    items = json.loads((ct.folder / "datalist.json").read_text())["testing"]
    write_datalist(tmp_path, items, coding="samed")
    shared = {"dataset_dir": str(ct.folder), "datalist": str(tmp_path / "datalist.json"), **exact(bundle)}
    shared |= {"output_dir": str(tmp_path / "out"), "network_def": PERFECT, "loaded": "$None"}
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the bundle sets its own
    config = str(bundle / "configs" / "evaluate.json")
    with pytest.raises(Exception) as caught:
        monai.bundle.run(config_file=[config.replace("evaluate", "inference"), config], **shared)
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("DataError: whole: label has values [9, 11] that the datalist's labels")
    assert said.endswith("prepare the datalist again with the label coding of these files")
    with pytest.raises(DataError, match="label coding") as plain:
        run_workflow([config], shared)
    assert "Traceback" not in str(plain.value) and plain.value.__cause__ is None
    assert not (tmp_path / "out" / "evaluation" / "cases.csv").exists()
