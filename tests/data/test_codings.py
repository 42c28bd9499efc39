"""Label codings are those in circulation, told apart by name; labels are recoded to classes without losing geometry."""

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientationd

from samseg_monai.data.datalists import labels_of, read_datalist
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.label_maps import (
    ABDOMEN,
    CODINGS,
    ORGANS,
    OTHER,
    absent_labels,
    coding_hint,
    fitting,
    implausible_sizes,
    labels_in,
)
from samseg_monai.data.datalists.label_maps import BTCV as LABELS
from samseg_monai.data.slices import AllSlices, Foreground, MaxArea
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import (
    RandMirroredd,
    RecodeLabeld,
    SimulatedBoxesd,
    SimulatedPromptd,
    UnpromptedIgnoredd,
    resized_slices,
    stored_slices,
)

EIGHT = ("samed", "merit", "transunet")
OBLIQUE = torch.tensor(
    [[-0.9, 0.1, 0.0, 20.0], [0.1, 0.8, -0.3, -7.0], [0.0, 0.4, 2.5, 3.0], [0, 0, 0, 1]], dtype=torch.float64
)


def recode(values, coding="btcv13", classes=ORGANS, case="case0001", **settings):
    return RecodeLabeld("label", labels_in(coding), classes, **settings)({"label": values, "case": case})["label"]


def test_every_coding_of_eight_organs_has_each_organ_once():
    for coding in EIGHT:
        assert sorted(ABDOMEN[coding].values()) == sorted(ORGANS)
        assert list(ABDOMEN[coding]) == list(range(1, 9))
    assert ABDOMEN["btcv13"] == LABELS
    assert sorted(set(ABDOMEN["totalsegmentator"].values()) - {OTHER}) == sorted(ORGANS)
    assert list(ABDOMEN["totalsegmentator"]) == list(range(1, 118))


def test_raw_labels_become_the_classes_of_the_published_table():
    # SAMed's hashmap, as its preprocessing has it: every raw value -> class
    published = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 0, 6: 5, 7: 6, 8: 7, 9: 0, 10: 0, 11: 8, 12: 0, 13: 0}
    assert recode(torch.arange(14)).tolist() == list(published.values())


def test_the_codings_of_eight_differ_where_their_sources_say():
    # index = value in the file, entry = class in SAMed's order
    assert recode(torch.arange(9), "samed").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert recode(torch.arange(9), "merit").tolist() == [0, 1, 2, 3, 4, 8, 5, 6, 7]
    assert recode(torch.arange(9), "transunet").tolist() == [0, 7, 4, 3, 2, 5, 8, 1, 6]
    assert recode(torch.tensor([5, 52, 7, 8, 117]), "totalsegmentator").tolist() == [5, 7, 8, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64])
def test_the_table_does_what_a_comparison_per_value_does(dtype):
    values = torch.randint(0, 14, (1, 9, 11, 7)).to(dtype)
    expected = torch.zeros(values.shape, dtype=torch.uint8)
    for value, name in LABELS.items():
        if name in ORGANS:
            expected[values == value] = ORGANS.index(name) + 1
    recoded = recode(values)
    assert recoded.dtype == torch.uint8
    assert torch.equal(recoded, expected)


def test_volumes_longer_than_a_chunk_are_recoded_to_their_end(monkeypatch):
    values = torch.arange(14).repeat(5)[None, None]
    whole = recode(values)
    monkeypatch.setattr("samseg_monai.transforms.labels._CHUNK", 9)
    assert torch.equal(recode(values), whole)


def test_names_decide_and_not_positions():
    labels = {"0": "background", "1": "left lobe", "3": "left lobe", "7": "vessel", "-2": "outside"}
    transform = RecodeLabeld("label", labels, ["vessel", "left lobe"])
    assert transform({"label": torch.tensor([0, 1, 3, 7, -2])})["label"].tolist() == [0, 2, 2, 1, 0]


def test_geometry_and_history_of_the_label_are_kept():
    label = MetaTensor(torch.randint(0, 14, (1, 6, 5, 4)).float(), affine=OBLIQUE)
    orient = Orientationd(["label"], axcodes="RAS", labels=None)
    oriented = orient({"label": label, "case": "a"})
    data = RecodeLabeld("label", labels_in("btcv13"), ORGANS)(oriented)
    assert torch.equal(data["label"].affine, oriented["label"].affine)
    assert len(data["label"].applied_operations) == 1
    back = orient.inverse(data)["label"]
    assert torch.equal(back.affine, OBLIQUE)
    assert torch.equal(back.as_subclass(torch.Tensor), recode(label).as_subclass(torch.Tensor))
    assert oriented["label"].max() > 8, "the input must not change"


@pytest.mark.parametrize("value", [14, -1, 255, 300, 1e9])
def test_a_value_that_the_labels_do_not_know_is_refused_with_its_case(value):
    volume = torch.zeros(1, 3, 3, 3)
    volume[0, 1, 1, 1] = value
    with pytest.raises(DataError, match=rf"case0001: label has values \[{value:.0f}\]"):
        recode(volume)


def test_codings_in_which_strange_values_are_legal_are_suggested():
    codings = {coding: labels_in(coding) for coding in ABDOMEN}
    with pytest.raises(DataError, match=r"\[9, 13\].*legal in btcv13, totalsegmentator: prepare"):
        recode(torch.tensor([0, 1, 9, 13]), "samed", codings=codings)


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_labels_that_are_not_whole_are_refused(value):
    with pytest.raises(DataError, match=r"case0001: label has values that are not whole numbers"):
        recode(torch.tensor([0.0, 1.0, value]))


NAMES = {"0": "background", "1": "left lung", "2": "right lung", "255": "Ignored"}


def test_voxels_that_nobody_has_judged_keep_255_all_the_way():
    """Through recoding, mirroring, resizing, picking of slices, prompts and boxes; they are never foreground."""
    label = torch.zeros(1, 8, 8, 3)
    label[:, 1:3, 1:3, 0], label[:, 4:, 4:, :2] = 2, 255
    found = RecodeLabeld("label", NAMES, ["left lung", "right lung"])({"label": label})["label"]
    assert torch.equal(found == 255, label == 255) and found.dtype == torch.uint8
    assert [AllSlices().candidates(found), Foreground().candidates(found)] == [[0, 1, 2], [0]]
    assert MaxArea().candidates(found) == [0]
    mirror = RandMirroredd(["label"], 1, ["left lung", "right lung"], [["left lung", "right lung"]], prob=1.0)
    mirrored = mirror({"label": found[..., 0]})["label"]
    assert torch.equal(mirrored == 255, found[..., 0].flip(2) == 255) and mirrored.unique().tolist() == [0, 1, 255]
    prompt = SimulatedPromptd()({"label": found})["prompt"]
    assert prompt.nonzero()[:, 1:3].amax(0).tolist() == [2, 2] and not prompt[..., 1:].any()
    image = {"label": found[..., :1], "case": "a"}
    assert SimulatedBoxesd()(image)["boxes"].tolist() == [[1, 1, 3, 3]]
    for resize in (resized_slices, stored_slices):
        keys = {"image": torch.zeros(1, 8, 8), "label": found[..., 0], "prompt": prompt[..., 0]}
        large = resize(list(keys), 16)(keys)["label"]
        assert set(large.unique().tolist()) == {0, 2, 255}


def test_one_class_of_all_that_is_foreground_leaves_them_out_too():
    values = torch.tensor([[0.0, 1, 2, 255, -1, 0.4]])
    whole = torch.tensor([[0.0, 1, 2, 255]])
    merge, blind = (RecodeLabeld("label", names, ["lesion"], merged=True) for names in (NAMES, {}))
    assert merge({"label": whole})["label"].tolist() == [[0, 1, 1, 255]]
    assert blind({"label": values})["label"].tolist() == [[0, 1, 1, 1, 0, 0]]
    with pytest.raises(ConfigError, match="ignore: voxels of this name are left out"):
        RecodeLabeld("label", {"0": "background", "1": "ignore"}, ["ignore"])


@pytest.mark.parametrize(("boxes", "ignored"), [([[1, 1, 3, 3], [torch.nan] * 4], False), ([[torch.nan] * 4], True)])
def test_slices_without_a_box_are_out_of_the_loss(boxes, ignored):
    label = torch.ones(1, 4, 4, dtype=torch.uint8)
    found = UnpromptedIgnoredd()({"label": label, "boxes": torch.tensor(boxes)})["label"]
    assert bool((found == 255).all()) is ignored and torch.equal(label, torch.ones_like(label))
    assert torch.equal(UnpromptedIgnoredd()({"label": label})["label"], label)  # a network without boxes


def test_classes_that_the_labels_lack_are_listed_at_once():
    with pytest.raises(ConfigError, match="2 problems") as error:
        RecodeLabeld("label", labels_in("samed"), ["liver", "oesophagus", "background"])
    assert "oesophagus: no value" in str(error.value)
    assert "background: no value" in str(error.value)
    with pytest.raises(ConfigError, match="liver: named twice"):
        RecodeLabeld("label", labels_in("samed"), ["liver", "liver"])
    with pytest.raises(ConfigError, match="list of 1 to 253"):
        RecodeLabeld("label", labels_in("samed"), "liver")
    with pytest.raises(ConfigError, match="labels must be"):
        RecodeLabeld("label", {"one": "liver"}, ["liver"])


def test_missing_labels_are_skipped_only_when_asked():
    transform = RecodeLabeld(["label", "reference"], labels_in("samed"), ORGANS, allow_missing_keys=True)
    assert set(transform({"label": torch.ones(2)})) == {"label"}
    with pytest.raises(KeyError):
        RecodeLabeld(["label", "reference"], labels_in("samed"), ORGANS)({"label": torch.ones(2)})


def test_a_hint_names_the_narrowest_other_codings():
    assert "one of samed, merit, transunet: name it with --label-coding" in coding_hint(range(9), "btcv13")
    assert "looks like btcv13:" in coding_hint(range(14), "samed")
    assert "looks like totalsegmentator:" in coding_hint([0, 52], "btcv13")
    assert coding_hint([118], "btcv13") == ""
    assert fitting([0]) == list(ABDOMEN)
    with pytest.raises(ConfigError, match="unknown label coding 'msd'; choose one of 2023, 2021, gtv, btcv13"):
        labels_in("msd")


# rough volumes in ml
SIZES = dict(zip(ORGANS, (200, 170, 170, 30, 1500, 250, 100, 80), strict=True))


@pytest.mark.parametrize("true", EIGHT)
@pytest.mark.parametrize("named", EIGHT)
def test_anatomy_tells_codings_of_eight_apart(true, named):
    cases = [{value: SIZES[name] for value, name in ABDOMEN[true].items()} for _ in range(3)]
    assert bool(implausible_sizes(cases, named)) == (true != named)


def test_organs_that_no_case_has_are_named():
    assert absent_labels([{0: 5, 1: 2}, {0: 3, 3: 1}], {1: "a", 2: "b", 3: "c", 4: OTHER}) == ["no case has b (2)"]
    assert absent_labels([{0: 5, 1: 2}], {1: "a"}) == []


def written(tmp_path, **header):
    (tmp_path / "d.json").write_text(json.dumps({**header, "training": [{"image": "a.nii.gz"}]}))
    return tmp_path / "d.json"


def test_labels_are_read_from_the_datalist(tmp_path):
    path = written(tmp_path, labels={"0": "background", "1": "vessel"}, label_coding="own")
    assert labels_of(path) == {"0": "background", "1": "vessel"}
    with pytest.raises(DataError, match='has no "labels"'):
        labels_of(written(tmp_path))


def test_labels_that_are_not_those_of_their_coding_are_refused(tmp_path):
    for coding in CODINGS:
        read_datalist(written(tmp_path, labels=labels_in(coding), label_coding=coding))
    with pytest.raises(DataError, match="4 problems") as error:
        read_datalist(written(tmp_path, labels=labels_in("merit"), label_coding="samed"))
    assert "labels: 5 is 'pancreas', but 'liver' in samed" in str(error.value)
    short = {value: name for value, name in labels_in("btcv13").items() if value != "13"}
    with pytest.raises(DataError, match="13 is 'absent', but 'left adrenal' in btcv13"):
        read_datalist(written(tmp_path, labels=short, label_coding="btcv13"))
    with pytest.raises(DataError, match="labels: expected"):
        read_datalist(written(tmp_path, labels={"spleen": 1}))


@pytest.mark.realdata
def test_a_real_mask_of_117_classes_keeps_its_eight_organs(realdata):
    from monai.transforms import LoadImage

    mask = LoadImage(ensure_channel_first=True)(realdata / "abdomen_ct" / "example_seg.nii.gz")
    recoded = recode(mask, "totalsegmentator")
    counts = np.bincount(recoded.numpy().ravel(), minlength=9)
    assert counts[1:].min() > 0
    for place, name in enumerate(ORGANS, 1):
        (value,) = [v for v, n in ABDOMEN["totalsegmentator"].items() if n == name]
        assert counts[place] == int((mask == value).sum())
    assert torch.equal(recoded.affine, mask.affine)


def test_a_class_can_be_called_as_brats_calls_one_and_other_names_are_refused_before_reading(tmp_path):
    from samseg_monai.choices import is_label
    from samseg_monai.metrics.rows import read_rows, write_rows

    for name in (
        "NCR/NET",
        "prostate/uterus",
        "edema (peritumoural)",
        "right kidney",
        "Portal and splenic vein",
        "HER2+",
    ):
        assert is_label(name), name
    for name in ("", "a//b", "/a", "a/", "a/../b", "a/.b", "$a", "a\nb", "ä", "a b ", "a\\b"):
        assert not is_label(name), name
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match="no volume in images"):
        prepare_folders(tmp_path, tmp_path / "d.json", labels={"1": "NCR/NET"})
    (tmp_path / "images" / "a.nii").write_bytes(b"")
    (tmp_path / "labels" / "a.nii").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"names that no class can have[\s\S]*'a/../b'"):
        prepare_folders(tmp_path, tmp_path / "d.json", labels={"1": "a/../b", "2": "b"})
    flags = {"excluded": False, "empty_prediction": False, "empty_reference": False}
    rows = [{"case": "c", "class": "NCR/NET", "dice": 0.5, **flags}]
    assert read_rows(write_rows(rows, tmp_path / "cases.csv")) == rows
    with pytest.raises(DataError, match="names, not paths"):
        write_rows([{**rows[0], "case": "NCR/NET"}], tmp_path / "cases.csv")
