"""Slice pickers, and volumes cached as slices."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from multiprocessing.reduction import ForkingPickler

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, pad_list_data_collate
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    RandFlipd,
    RandGaussianNoised,
    RandRotated,
    Resized,
    ResizeWithPadOrCropd,
)
from torch.utils.data import DataLoader as TorchDataLoader

from samseg_monai.bundles.build import compose, render
from samseg_monai.data.slices import AllSlices, EveryNth, Foreground, MaxArea, RandomN, SliceDataset
from samseg_monai.data.slices.cache import describe, describe_item
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.transforms import BoxFromPromptd, CropInPlaned, SimulatedPromptd

SIZE = (20, 24, 8)
SCANS = ("t1n", "t1c", "t2w", "t2f")
AREAS = [0, 2, 0, 6, 6, 1, 0, 0]  # label voxels per slice of every case


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    """Three cases of four scans as NIfTI; image values are unique, so that a slice can be recognised."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    items = []
    for name in ("a", "b", "c"):
        label = np.zeros(SIZE, dtype=np.uint8)
        for z, area in enumerate(AREAS):
            label[8, 8 : 8 + area, z] = 1 + z % 3
        paths = []
        for scan in SCANS:
            paths.append(str(folder / f"{name}-{scan}.nii.gz"))
            nib.save(nib.Nifti1Image(rng.normal(size=SIZE).astype(np.float32), np.eye(4)), paths[-1])
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{name}-seg.nii.gz")
        items.append({"case": name, "image": paths, "label": str(folder / f"{name}-seg.nii.gz")})
    return items


def load_volumes() -> list:
    return [
        LoadImaged(["image", "label"], image_only=True),
        EnsureChannelFirstd(["image", "label"]),
        ResizeWithPadOrCropd(["image", "label"], spatial_size=(16, 20, -1)),
        SimulatedPromptd(),
    ]


def augment() -> list:
    keys = ["image", "label", "prompt"]
    return [
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandRotated(keys, range_x=0.3, prob=1.0, mode=["bilinear", "nearest", "nearest"]),
        RandGaussianNoised("image", prob=1.0, std=0.1),
        Resized(keys, spatial_size=32, size_mode="longest", mode=["bilinear", "nearest", "nearest"]),
        BoxFromPromptd(),
    ]


def dataset_of(cases, slice_transforms=None, picker=None, **settings) -> SliceDataset:
    volume_transforms = settings.pop("volume_transforms", None) or load_volumes()
    picker = picker or Foreground()
    return SliceDataset(cases, volume_transforms, slice_transforms, picker=picker, progress=False, **settings)


def contents(items) -> list[tuple[str, int, torch.Tensor, torch.Tensor]]:
    return [(item["case"], int(item["slice"]), item["image"], item["boxes"]) for item in items]


def assert_same(left, right) -> None:
    assert len(left) == len(right) > 0
    for (case, number, image, boxes), (case2, number2, image2, boxes2) in zip(left, right, strict=True):
        assert (case, number) == (case2, number2)
        assert torch.equal(image, image2)
        assert torch.equal(boxes.nan_to_num(-1), boxes2.nan_to_num(-1))


LABEL = torch.zeros(1, 3, 10, 8)
for _z, _area in enumerate(AREAS):
    LABEL[0, 0, :_area, _z] = 1


@pytest.mark.parametrize(
    ("picker", "expected"),
    [
        (AllSlices(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (EveryNth(3), [0, 3, 6]),
        (MaxArea(), [3]),
        (Foreground(), [1, 3, 4, 5]),
        (Foreground(min_voxels=2), [1, 3, 4]),
        (RandomN(2), [1, 3, 4, 5]),
        (RandomN(2, min_voxels=0), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=repr,
)
def test_picker_names_its_candidates(picker, expected):
    assert picker.candidates(LABEL) == expected


@pytest.mark.parametrize("picker", [MaxArea(), Foreground(), RandomN(2)], ids=repr)
def test_empty_label_has_no_candidate(picker):
    assert picker.candidates(torch.zeros(1, 3, 3, 4)) == []
    assert picker.draw([], np.random.default_rng(0)) == []


def test_only_random_n_draws_less_than_everything():
    for picker in (AllSlices(), EveryNth(2), MaxArea(), Foreground()):
        assert picker.draw([2, 5, 9], np.random.default_rng(0)) == [2, 5, 9]
    rng = np.random.default_rng(0)
    draws = [RandomN(2).draw([2, 5, 9], rng) for _ in range(60)]
    assert {tuple(draw) for draw in draws} == {(2, 5), (2, 9), (5, 9)}
    assert RandomN(7).draw([2, 5, 9], rng) == [2, 5, 9]


@pytest.mark.parametrize("make", [lambda: EveryNth(0), lambda: RandomN(0), lambda: Foreground(0)])
def test_picker_refuses_zero(make):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        make()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_items_are_the_picked_slices_of_the_transformed_volumes(cases, cache, tmp_path):
    dataset = dataset_of(cases, cache=cache, cache_dir=tmp_path)
    volumes = {item["case"]: Compose(load_volumes())(item) for item in cases}
    assert [(item["case"], item["slice"]) for item in dataset] == [(c, z) for c in "abc" for z in (1, 3, 4, 5)]
    for item in dataset:
        for key, dtype in (("image", torch.float32), ("label", torch.uint8), ("prompt", torch.uint8)):
            assert type(item[key]) is torch.Tensor and item[key].dtype == dtype
            assert torch.equal(item[key], volumes[item["case"]][key][..., item["slice"]].as_tensor().to(dtype))
    assert dataset[-1]["slice"] == 5
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_cache_holds_the_picked_slices_and_nothing_of_the_volume(cases):
    dataset = dataset_of(cases, picker=MaxArea())
    assert dataset.cache_bytes() == 3 * 16 * 20 * (4 * 4 + 1 + 1)  # four float scans, label, prompt
    assert dataset_of(cases, picker=AllSlices()).cache_bytes() == 8 * dataset.cache_bytes()


def test_changing_an_item_does_not_change_the_cache(cases):
    dataset = dataset_of(cases)
    before = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(dataset[0]["image"], before)


def test_draws_depend_on_seed_epoch_and_item_only(cases):
    dataset = dataset_of(cases[:1], augment(), seed=5)
    forwards = contents(dataset[i] for i in range(len(dataset)))
    backwards = contents(dataset[i] for i in reversed(range(len(dataset))))[::-1]
    assert_same(forwards, backwards)
    assert_same(forwards, contents(dataset_of(cases[:1], augment(), seed=5)))
    dataset.set_epoch(1)
    second = contents(dataset)
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(forwards, second, strict=True))
    dataset.set_epoch(0)
    assert_same(forwards, contents(dataset))
    other = contents(dataset_of(cases[:1], augment(), seed=6))
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(forwards, other, strict=True))


def test_unseeded_prompts_of_slices_are_drawn_anew_in_every_epoch(cases):
    slices = [SimulatedPromptd(loosen=(0.0, 0.9)), BoxFromPromptd()]
    dataset = dataset_of(cases, slices, picker=MaxArea())
    drawn = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        drawn.add(tuple(tuple(item["boxes"].tolist()) for item in dataset))
        assert contents(dataset)[0][3].tolist() == dataset[0]["boxes"].tolist()
    assert len(drawn) > 3


def flat(loader) -> list[tuple[str, int, torch.Tensor, torch.Tensor]]:
    batches = [zip(b["case"], b["slice"], b["image"], b["boxes"], strict=True) for b in loader]
    return [(case, int(number), image, boxes) for batch in batches for case, number, image, boxes in batch]


def quick() -> list:
    keys = ["image", "label", "prompt"]
    return [RandFlipd(keys, prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=1.0), BoxFromPromptd()]


def test_workers_and_collates_give_the_same_items(cases):
    dataset = dataset_of(cases[:2], quick(), picker=RandomN(2))
    dataset.set_epoch(3)
    expected = contents(dataset)
    assert_same(expected, flat(DataLoader(dataset, batch_size=3)))  # MONAI's collate, reseeds in this process
    assert_same(expected, flat(DataLoader(dataset, batch_size=3, num_workers=2)))  # MONAI's worker seeds
    assert_same(expected, flat(TorchDataLoader(dataset, batch_size=3)))
    assert_same(expected, flat(DataLoader(dataset, batch_size=3, collate_fn=pad_list_data_collate)))


def test_slices_of_unequal_shape_stay_under_their_boxes_in_a_batch():
    config = json.loads(render(compose("meningioma", "lora"))["configs/train.json"])
    collate = ConfigParser({"collate_fn": config["train"]["dataloader"]["collate_fn"]}).get_parsed_content("collate_fn")
    items = []
    for shape in ((64, 36), (36, 64), (64, 64)):
        prompt = torch.zeros(1, *shape)
        prompt[:, 10:20, 12:20] = 1
        items.append(BoxFromPromptd()({"image": prompt.clone(), "label": prompt.clone(), "prompt": prompt}))
    batch = collate(items)
    assert batch["label"].shape == (3, 1, 64, 64)
    for key in ("image", "label"):
        for found, box in zip(batch[key][:, 0], batch["boxes"], strict=True):
            rows, columns = ((found == 1).any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_persistent_workers_hear_of_a_new_epoch(cases):
    dataset = dataset_of(cases[:1], quick())
    loader = TorchDataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert_same(contents(dataset), flat(loader))


def test_spawned_workers_get_the_cache_without_a_file_descriptor_per_tensor(cases):
    dataset = dataset_of(cases[:1], quick())
    sent = ForkingPickler.dumps(dataset)
    assert all(type(planes) is np.ndarray for planes in dataset._slices[0].values())
    assert_same(contents(dataset), contents(pickle.loads(sent)))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_dataset_survives_pickling(cases, cache, tmp_path):
    dataset = dataset_of(cases[:2], quick(), cache=cache, cache_dir=tmp_path)
    dataset.set_epoch(2)
    assert_same(contents(dataset), contents(pickle.loads(pickle.dumps(dataset))))


def test_random_n_keeps_its_length_and_changes_its_slices(cases):
    dataset = dataset_of(cases, picker=RandomN(2))
    seen = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        drawn = [(item["case"], item["slice"]) for item in dataset]
        assert len(drawn) == len(set(drawn)) == len(dataset) == 6
        assert [case for case, _ in drawn] == ["a", "a", "b", "b", "c", "c"]
        seen.append(tuple(drawn))
    assert len(set(seen)) > 4
    assert {z for drawn in seen for _, z in drawn} == {1, 3, 4, 5}


def test_random_volume_transforms_are_drawn_once_per_case_whatever_the_threads(cases):
    def build(threads: int, order: list[dict], seed: int = 0) -> dict:
        transforms = [*load_volumes(), RandGaussianNoised("image", prob=1.0, std=1.0)]
        dataset = dataset_of(order, volume_transforms=transforms, picker=MaxArea(), num_threads=threads, seed=seed)
        return {item["case"]: item["image"] for item in dataset}

    first, second, other = build(1, cases), build(3, cases[::-1]), build(1, cases, seed=1)
    assert all(torch.equal(first[case], second[case]) for case in "abc")
    assert not any(torch.equal(first[case], other[case]) for case in "abc")


def test_prompt_is_optional(cases):
    without = load_volumes()[:-1]
    for keys in (("image", "label"), ("image", "label", "prompt")):
        item = dataset_of(cases, volume_transforms=without, keys=keys)[0]
        assert set(item) == {"image", "label", "case", "slice"}


def test_disk_cache_is_used_and_a_damaged_file_is_built_again(cases, tmp_path, monkeypatch, caplog):
    expected = contents(dataset_of(cases, [BoxFromPromptd()], cache="disk", cache_dir=tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and all(file.suffix == ".safetensors" for file in files)
    built = []
    original = SliceDataset._build
    monkeypatch.setattr(SliceDataset, "_build", lambda self, i: built.append(i) or original(self, i))
    again = dataset_of(cases, [BoxFromPromptd()], cache="disk", cache_dir=tmp_path)
    assert_same(expected, contents(again))
    assert built == [] and again.cache_bytes() == 0
    files[0].write_bytes(files[0].read_bytes()[:500])  # truncated
    files[1].write_bytes(b"not a cache")
    files[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert_same(expected, contents(dataset_of(cases, [BoxFromPromptd()], cache="disk", cache_dir=tmp_path)))
    assert sorted(built) == [0, 1, 2] and caplog.text.count("built again") == 3
    files[0].unlink()  # behind the back of a dataset in use
    assert_same(expected, contents(again))


def test_disk_cache_never_runs_code(cases, tmp_path):
    dataset_of(cases, cache="disk", cache_dir=tmp_path)

    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("code of a cache file was run",))

    for file in tmp_path.iterdir():
        torch.save({"numbers": [1], "tensors": Harmful()}, file)
    assert len(dataset_of(cases, cache="disk", cache_dir=tmp_path)) == 12


def test_disk_cache_of_other_settings_or_files_is_another_cache(cases, tmp_path):
    def count(**settings) -> int:
        dataset_of(settings.pop("items", cases), cache="disk", cache_dir=tmp_path, **settings)
        return len(list(tmp_path.glob("*.safetensors")))

    assert count() == 3
    assert count(slice_transforms=augment()) == 3  # slice transforms run behind the cache
    assert count(picker=MaxArea()) == 6
    assert count(volume_transforms=[*load_volumes(), NormalizeIntensityd("image")]) == 9
    assert count(volume_transforms=[*load_volumes(), NormalizeIntensityd("image", nonzero=True)]) == 12
    changed = copy.deepcopy(cases[:1])
    changed[0]["label"] = changed[0]["label"].replace("a-seg", "b-seg")
    assert count(items=changed) == 13


@pytest.mark.parametrize("picker", [Foreground(), RandomN(2)])
def test_epochs_of_a_length_are_cut_out_of_passes_over_all_slices(cases, picker):
    one_pass = len(dataset_of(cases, picker=picker))
    data = dataset_of(cases, augment(), picker=picker, length=5, seed=3)
    seen = []
    for epoch in range(2 * one_pass):
        data.set_epoch(epoch)
        seen += [(item["case"], item["slice"]) for item in data]
    assert len(data) == 5 and len(seen) == 10 * one_pass
    passes = [seen[start : start + one_pass] for start in range(0, len(seen), one_pass)]
    assert all(len(set(its)) == one_pass for its in passes) and len({tuple(its) for its in passes}) == 10
    if isinstance(picker, RandomN):  # draws other slices in every pass
        assert len({frozenset(its) for its in passes}) > 1
    data.set_epoch(7)
    again = dataset_of(cases, augment(), picker=picker, length=5, seed=3)
    again.set_epoch(7)
    assert_same(contents(data[i] for i in range(5)), contents(again[i] for i in range(4, -1, -1))[::-1])
    few = dataset_of(cases[:1], augment(), picker=MaxArea(), length=3)
    images = [item["image"] for item in few]
    assert len(images) == 3 and not torch.equal(images[0], images[1])  # one slice, drawn otherwise every time
    with pytest.raises(ConfigError, match="length must be at least 1, got 0"):
        dataset_of(cases, length=0)


def test_changed_file_is_another_case(tmp_path):
    file = tmp_path / "label.nii.gz"
    file.write_bytes(b"1")
    before = describe_item({"case": "a", "label": [str(file)]})
    file.write_bytes(b"22")
    assert describe_item({"case": "a", "label": [str(file)]}) != before


def test_keys_see_settings_and_not_addresses_or_random_state():
    def of(threshold: float = 1.0, **settings) -> list:
        transforms = Compose([*load_volumes(), *augment(), Lambdad("image", func=lambda x: x + threshold, **settings)])
        return describe(transforms)

    assert of() == of()
    assert of() != of(threshold=2.0)
    assert of() != of(overwrite=False)
    used = Compose(augment())
    before = describe(used)
    used.set_random_state(3)
    assert describe(used) == before
    least, most = (describe(f) for f in (lambda x: x.min(), lambda x: x.max()))
    assert least != most


def test_all_failing_cases_are_named_at_once(cases, tmp_path):
    broken = copy.deepcopy(cases)
    broken[0]["label"] = str(tmp_path / "absent.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(b"\x1f\x8b cut")
    broken[2]["image"][1] = str(tmp_path / "cut.nii.gz")
    with pytest.raises(DataError) as caught:
        dataset_of(broken)
    lines = str(caught.value).splitlines()
    assert "2 problems" in lines[0] and len(lines) == 3
    assert lines[1].startswith("  - a: ") and "absent.nii.gz" in lines[1]
    assert lines[2].startswith("  - c: ")


def test_masks_that_uint8_would_alter_are_refused(cases):
    with pytest.raises(DataError, match=r"a: label must hold whole numbers"):
        dataset_of(cases, volume_transforms=[*load_volumes(), Lambdad("label", func=lambda x: x * 0.5)])


def test_missing_key_is_named_with_the_keys_there_are(cases):
    with pytest.raises(DataError, match=r"a: no 'reference' after .* 'image', 'label', 'prompt'"):
        dataset_of(cases, keys=("image", "label", "reference"))


def test_cases_without_a_slice_are_told(cases, caplog):
    erase = Lambdad("label", func=lambda x: x * (float(x.meta["filename_or_obj"].count("b-seg")) > 0))
    with caplog.at_level(logging.WARNING):
        dataset = dataset_of(cases, volume_transforms=[*load_volumes(), erase], picker=MaxArea())
    assert len(dataset) == 1 and "no slice in 2 cases: a, c" in caplog.text
    with pytest.raises(DataError, match="picks no slice in any of 2 cases"):
        dataset_of(cases[::2], volume_transforms=[*load_volumes(), erase], picker=MaxArea())


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_the_crop_leaves_out_is_known_per_case(cache, cases, tmp_path, caplog):
    crop = CropInPlaned(["image", "label"], (6.0, 6.0), held=())
    transforms = [*load_volumes()[:2], crop, SimulatedPromptd()]
    for _ in range(2):  # built, and read again
        dataset = dataset_of(cases, volume_transforms=transforms, cache=cache, cache_dir=tmp_path)
        for name, counts in dataset.cut.items():
            assert name in "abc" and 0 < counts["image"] < counts["image_of"]
            assert 0 < counts["label"] <= counts["label_of"]
        assert len(dataset.cut) == 3 and "cut" not in dataset[0]
    assert "the crop cuts the labels in 3 of 3 cases, at most" in caplog.text
    assert not dataset_of(cases, cache=cache, cache_dir=tmp_path).cut


def test_bad_settings_are_named_at_once(cases):
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*'disc'.*seed.*num_threads"):
        dataset_of(cases, cache="disc", seed=-1, num_threads=0)
    with pytest.raises(ConfigError, match="needs cache_dir"):
        dataset_of(cases, cache="disk")
    with pytest.raises(DataError, match="empty list"):
        dataset_of([])
    with pytest.raises(DataError, match="'case'"):
        dataset_of([{"image": "x"}])
