"""Volumes that are validated again and again: what is kept changes no number, and picked slices are those picked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Lambdad, Orientationd, RandShiftIntensityd

from samseg_monai.choices import IGNORE
from samseg_monai.data.slices import AllSlices, EveryNth, KeptVolumes, MaxArea, RandomN, kept
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import SimulatedPromptd

RAS = np.diag([1.0, 2.0, 3.0, 1.0])
# stored with slices along the first axis, upside down: of another shape and order than what is cut
TURNED = np.array([[0, 0, 1.0, 0], [0, 2.0, 0, 0], [-3.0, 0, 0, 33.0], [0, 0, 0, 1.0]])
KEYS = ["image", "label", "prompt"]


def case(number, affine=RAS, dtype=torch.uint8):
    """A case of 12 slices; of the second to sixth in the patient, from below, some are labelled."""
    torch.manual_seed(number)
    label = torch.zeros(1, 8, 10, 12)
    label[:, 2:5, 3 : 6 + number, 2:6] = 1
    label[:, 6, 6, 4] = 2
    volumes = {"image": torch.randn(2, 8, 10, 12), "label": label.to(dtype)}
    if affine is TURNED:
        volumes = {key: v.permute(0, 3, 2, 1).flip(1).contiguous() for key, v in volumes.items()}
    loaded = {key: MetaTensor(v, affine=torch.as_tensor(affine)) for key, v in volumes.items()}
    return {**loaded, "reference": loaded["label"].clone(), "case": f"c{number}", "cut": torch.tensor([1, 2, 3, 4])}


def transforms(prompted=True):
    prompts = [SimulatedPromptd(seed=0)] if prompted else []
    return Compose([Orientationd(KEYS, axcodes="RAS", labels=None, allow_missing_keys=True), *prompts])


def without_ids(history):
    """The history of a batch of one, in which each of two equal transforms has its own id."""
    return [{k: str(v) for k, v in step.items() if k != "id"} for step in history[0] if isinstance(step, dict)]


def bare(tensor):
    return tensor.as_subclass(torch.Tensor)


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if not isinstance(value, torch.Tensor):
            assert value == other[key], key
            continue
        assert value.dtype == other[key].dtype and torch.equal(bare(value), bare(other[key])), key
        if isinstance(value, MetaTensor):
            assert torch.equal(value.affine, other[key].affine), key
            mine, theirs = (without_ids(t.applied_operations) for t in (value, other[key]))
            assert mine == theirs, key


@pytest.mark.parametrize("affine", [RAS, TURNED], ids=["RAS", "turned"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_kept_case_is_the_case_where_anybody_looks(affine, dtype, prompted):
    calls = []
    data = [case(n, affine, dtype) for n in range(2)]
    counted = Compose([Lambdad("label", lambda x: calls.append(1) or x), *transforms(prompted).transforms])
    dataset = KeptVolumes(data, counted)
    plain = KeptVolumes(data, transforms(prompted), rate=0)
    for epoch in range(3):
        for found, whole in zip(DataLoader(dataset), DataLoader(plain), strict=True):
            if prompted and epoch:
                seen = (whole["prompt"] > 0).flatten(0, 3).any(0) | (whole["label"] > 0).flatten(0, 3).any(0)
                assert 0 < seen.sum() < 12 and not found["image"][..., ~seen].any()
                whole["image"][..., ~seen] = 0
            same(found, whole)
    assert len(calls) == 2 and 0 < dataset.cache_bytes < 2 * data[0]["image"].nbytes * (0.6 if prompted else 1.1)
    assert plain.cache_bytes == 0


def test_what_is_kept_is_as_much_as_was_asked_for_or_fits(monkeypatch):
    data = [case(n) for n in range(4)]
    half = KeptVolumes(data, transforms(), rate=0.5)
    for _ in range(2):
        list(half)
    assert sorted(half._kept) == [0, 1]
    monkeypatch.setattr(kept, "MOST_BYTES", half.cache_bytes + 100)
    fitting = KeptVolumes(data, transforms())
    list(fitting)
    assert sorted(fitting._kept) == [0, 1] and fitting.cache_bytes <= kept.MOST_BYTES
    everything = KeptVolumes(data, transforms(), rate=1)
    list(everything)
    assert len(everything._kept) == 4


def test_random_transforms_are_drawn_in_every_epoch():
    drawing = KeptVolumes([case(0)], [*transforms().transforms, RandShiftIntensityd("image", 0.5, prob=1.0)])
    assert not torch.equal(drawing[0]["image"], drawing[0]["image"]) and drawing.cache_bytes == 0


@pytest.mark.parametrize("affine", [RAS, TURNED], ids=["RAS", "turned"])
@pytest.mark.parametrize("picker", [MaxArea(), EveryNth(3), RandomN(2), AllSlices()], ids=repr)
def test_picked_slices_are_those_of_training_and_nothing_else_is_judged(picker, affine):
    dataset = KeptVolumes([case(0, affine), case(1, affine)], transforms(), picker=picker, seed=7)
    first = [dataset[index] for index in range(2)]
    for index, item in enumerate(first):
        label = item["label"].as_tensor()
        candidates = picker.candidates(label)
        numbers = item["slices"].nonzero()[:, 0].tolist()
        assert set(numbers) <= set(candidates)
        assert len(numbers) == len(picker.draw(candidates, np.random.default_rng(0)))
        # on its own grid the reference says the same of the picked slices, and nothing of others
        back = Orientationd("reference", axcodes="RAS", labels=None)({"reference": item["reference"]})["reference"]
        expected = torch.where(item["slices"], label, IGNORE)
        assert torch.equal(back.as_tensor(), expected)
        again = dataset[index]
        assert torch.equal(again["slices"], item["slices"]) and torch.equal(again["reference"], item["reference"])
        numbers = [z for z in numbers if label[..., z].any()]  # others have no prompt, so no network sees them
        assert torch.equal(again["image"][..., numbers], item["image"][..., numbers])
    assert dataset.cache_bytes > 0


def test_what_cannot_be_kept_or_picked_is_refused():
    for wrong, how in (("rate", {"rate": 1.5}), ("seed", {"seed": -1})):
        with pytest.raises(ConfigError, match=f"KeptVolumes: {wrong} must"):
            KeptVolumes([case(0)], transforms(), **how)
    unlabelled = {key: value for key, value in case(0).items() if key != "label"}
    with pytest.raises(DataError, match="slices are picked of 'label'"):
        KeptVolumes([unlabelled], Compose([]), picker=MaxArea())[0]
    shifted = {**case(0), "reference": MetaTensor(torch.zeros(1, 8, 10, 11), affine=torch.as_tensor(RAS))}
    with pytest.raises(DataError, match="not those of the reference; set picker to null"):
        KeptVolumes([shifted], Compose([]), picker=MaxArea())[0]
