"""Slices with a fixed number of augmented variants, whose embeddings are computed once."""

from __future__ import annotations

import copy
import csv
import json
import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    MapTransform,
    OneOf,
    RandAffined,
    RandAxisFlipd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandGibbsNoised,
    RandHistogramShiftd,
    RandRicianNoised,
    RandRotate90d,
    RandRotated,
    RandScaleCropd,
    RandScaleIntensityd,
    RandSpatialCropd,
    RandZoomd,
    Resized,
    SpatialPadd,
)
from torch import nn
from torch.nn.parallel import DataParallel

from samseg_monai.bundles import build_bundle
from samseg_monai.data.slices import AllSlices, EveryNth, Foreground, RandomN, SliceCollate, SliceDataset
from samseg_monai.data.slices.cache import describe, encode, frozen_encoder
from samseg_monai.errors import CacheError, ConfigError
from samseg_monai.networks import SamSegmenter
from samseg_monai.training.losses import judged_slices
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

KEYS = ["image", "label"]
DEPTHS = (3, 0, 4)  # slices with foreground of each case, of six


class Encoder(nn.Module):
    """The frozen part of a fake network: a strided convolution per scan; counts the images that it sees."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 4, 8, stride=8)
            self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5))
        self.encoder_frozen = True
        self.seen = 0

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and not self.training and image.device == self.conv.weight.device
        self.seen += len(image)
        return self.conv(image.flatten(0, 1)[:, None])

    def embedding_identity(self) -> dict:
        return {"weights": self.conv.weight.detach().double().sum().item(), "scale": None}

    def forward(self, image: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        if embedding is None:
            with torch.no_grad():
                embedding = self.conv(image.flatten(0, 1)[:, None])
        return self.head(embedding.float().reshape(-1, *embedding.shape[-3:]))


def flips() -> list:
    return [RandFlipd(KEYS, prob=0.5, spatial_axis=0), RandScaleIntensityd("image", factors=0.5, prob=1.0)]


@pytest.fixture
def cases() -> list[dict]:
    rng = np.random.default_rng(0)
    items = []
    for name, foreground in zip("abc", DEPTHS, strict=True):
        label = np.zeros((1, 16, 24, 6), dtype=np.uint8)
        label[0, 4:9, 3:9, :foreground] = 1
        items.append({"case": name, "image": rng.normal(size=(2, 16, 24, 6)).astype(np.float32), "label": label})
    return items


def banked(cases, folder, *, variants: int = 3, transforms=None, picker=None, **settings) -> SliceDataset:
    return SliceDataset(
        cases,
        settings.pop("volume_transforms", None),
        flips() if transforms is None else transforms,
        picker=picker or Foreground(),
        variants=variants,
        embedding_dir=folder,
        progress=False,
        **settings,
    )


def looks(dataset: SliceDataset, epochs: int) -> dict[tuple, list[dict]]:
    """(case, slice) -> its items in the epochs, in order."""
    found: dict[tuple, list[dict]] = {}
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for item in (dataset[i] for i in range(len(dataset))):
            found.setdefault((item["case"], item["slice"]), []).append(item)
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
    )


def test_every_variant_is_seen_once_per_cycle_in_an_order_of_the_slices_own(cases):
    found = looks(banked(cases, None), 12)
    assert len(found) == sum(DEPTHS)
    orders = Counter()
    for items in found.values():
        order = [item["variant"] for item in items]
        assert all(sorted(order[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3))
        orders[tuple(order)] += 1
    assert len(orders) == sum(DEPTHS)  # 6 ** 4 orders; the seed is fixed


def test_a_variant_always_looks_the_same_and_no_two_are_alike(cases):
    found = looks(banked(cases, None), 6)
    for items in found.values():
        by_variant: dict[int, list[dict]] = {}
        for item in items:
            by_variant.setdefault(item["variant"], []).append(item)
        assert all(same(first, second) for first, second in by_variant.values())
        firsts = [pair[0]["image"] for pair in by_variant.values()]
        assert not any(torch.equal(firsts[i], firsts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_one_variant_is_frozen_and_fewer_are_refused(cases):
    for items in looks(banked(cases, None, variants=1), 3).values():
        assert [item["variant"] for item in items] == [0, 0, 0] and same(items[0], items[2])
    with pytest.raises(ConfigError, match="variants must be at least 1, got 0"):
        banked(cases, None, variants=0)


def test_without_a_folder_and_a_number_of_variants_it_is_a_slice_dataset_and_filling_does_nothing(cases):
    network = Encoder()
    network.encoder_frozen = False
    dataset = banked(cases, None, variants=None, seed=2)
    assert dataset.fill(network) == 0
    plain = SliceDataset(cases, None, flips(), picker=Foreground(), seed=2, progress=False)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert all(same(dataset[i], plain[i]) for i in range(len(plain)))


def test_with_a_folder_there_are_eight_variants_unless_told(cases, tmp_path):
    dataset = banked(cases, tmp_path, variants=None)
    assert dataset.variants == 8 and dataset.fill(Encoder()) == 8 * sum(DEPTHS)
    assert all(sorted(i["variant"] for i in items) == list(range(8)) for items in looks(dataset, 8).values())


def test_looks_that_no_epoch_shows_are_not_encoded_unless_told(cases, tmp_path):
    short = banked(cases, tmp_path, variants=None, epochs=2)
    assert short.variants == 2 and short.fill(Encoder()) == 2 * sum(DEPTHS)
    assert banked(cases, tmp_path, variants=None, epochs=20).variants == 8
    assert banked(cases, tmp_path, variants=3, epochs=2).variants == 3  # for a longer training to come
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        banked(cases, tmp_path, epochs=0)


class Turned(MapTransform):
    """Enumerates instead of drawing: variant v is v quarter turns."""

    def __call__(self, data):
        return {**data, **{key: torch.rot90(data[key], data["variant"], (1, 2)) for key in self.keys}}


def test_a_transform_may_enumerate_the_variants(cases):
    for items in looks(banked(cases, None, variants=4, transforms=[Turned(KEYS)]), 4).values():
        upright = [torch.rot90(item["image"], -item["variant"], (1, 2)) for item in items]
        assert all(torch.equal(image, upright[0]) for image in upright)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_filling_adds_the_embedding_and_changes_nothing_else(cases, tmp_path, cache):
    network = Encoder().train()
    dataset = banked(cases, tmp_path / "e", cache=cache, cache_dir=tmp_path / "c")
    before = looks(dataset, 3)
    assert dataset.fill(network, batch_size=4) == network.seen == sum(DEPTHS) * 3
    assert network.training and network.head.training
    for key, items in looks(dataset, 3).items():
        for item, plain in zip(items, before[key], strict=True):
            embedding = item.pop("embedding")
            assert same(item, plain)
            expected = encode(network, [item["image"]])[0].float()
            assert embedding.dtype == torch.bfloat16 and embedding.shape[:2] == (2, 4)
            torch.testing.assert_close(embedding.float(), expected, rtol=2**-8, atol=1e-6)  # bf16 rounds at 2**-9


def test_losses_with_and_without_the_bank_are_equal_within_what_bf16_rounds(cases, tmp_path):
    network = Encoder().eval()
    dataset = banked(cases, tmp_path)
    losses = []
    for fill in (False, True):
        if fill:
            dataset.fill(network)
        batch = next(iter(DataLoader(dataset, batch_size=7)))
        losses.append(network(batch["image"], batch.get("embedding")).square().mean().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_second_start_and_a_wrapped_network_compute_nothing(cases, tmp_path):
    network = Encoder()
    first = banked(cases, tmp_path)
    first.fill(network)
    seen = network.seen
    second = banked(cases, tmp_path)
    assert second.fill(DataParallel(network)) == 0 and network.seen == seen
    assert all(same(first[i], second[i]) for i in range(len(first)))


def test_the_key_knows_weights_transforms_data_picker_seed_variants_and_keys(cases, tmp_path):
    network = Encoder()
    assert banked(cases, tmp_path).fill(network) == 21
    changed = copy.deepcopy(cases)
    changed[0]["image"][0, 0, 0, 5] += 1  # a slice that is not even picked
    assert banked(changed, tmp_path).fill(network) == 9 and banked(cases[:1], tmp_path).fill(network) == 0
    others = [
        banked(cases[::-1], tmp_path),
        banked(cases, tmp_path, variants=2),
        banked(cases, tmp_path, seed=1),
        banked(cases, tmp_path, picker=EveryNth(2)),
        banked(cases, tmp_path, transforms=flips()[:1]),
        banked(cases, tmp_path, transforms=[RandFlipd(KEYS, prob=0.4, spatial_axis=0), flips()[1]]),
        banked(cases, tmp_path, volume_transforms=[lambda d: d]),
        banked([{**case, "prompt": case["label"]} for case in cases], tmp_path),
    ]
    for dataset in others:
        assert dataset.fill(network) == sum(len(numbers) for numbers in dataset._numbers) * dataset.variants
    assert banked(cases, tmp_path).fill(Encoder(1)) == 21
    assert banked(cases, tmp_path).fill(network) == 0


def test_rows_are_of_all_candidates_so_that_a_picker_may_draw_other_ones_in_every_epoch(cases, tmp_path):
    network = Encoder()
    dataset = banked(cases, tmp_path, variants=2, picker=RandomN(2))
    assert dataset.fill(network) == sum(DEPTHS) * 2
    found = looks(dataset, 12)
    assert len(found) > 4
    for items in found.values():
        for item in items:
            torch.testing.assert_close(
                item["embedding"].float(), encode(network, [item["image"]])[0].float(), rtol=2**-8, atol=1e-6
            )


def test_negative_indices_and_the_end_are_as_of_a_list(cases):
    dataset = banked(cases, None)
    assert same(dataset[-1], dataset[len(dataset) - 1])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_persistent_workers_started_after_the_fill_give_the_same_items_in_every_epoch(cases, tmp_path, start, workers):
    network = Encoder()
    dataset = banked(cases, tmp_path, transforms=[RandFlipd(KEYS, prob=0.5)])
    dataset.fill(network)
    loader = DataLoader(
        dataset, batch_size=3, num_workers=workers, persistent_workers=True, multiprocessing_context=start
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        items = [dataset[i] for i in range(len(dataset))]
        batches = list(loader)
        for key in ("image", "label", "embedding", "variant"):
            expected = torch.stack([torch.as_tensor(item[key]) for item in items])
            assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


def test_pickling_takes_the_bank_along_by_its_place(cases, tmp_path):
    dataset = banked(cases, tmp_path)
    small = len(pickle.dumps(dataset))
    dataset.fill(Encoder())
    text = pickle.dumps(dataset)
    assert len(text) < small + 10_000
    assert torch.equal(pickle.loads(text)[2]["embedding"], dataset[2]["embedding"])


def test_a_damaged_row_stops_training_and_its_case_is_built_at_the_next_start(cases, tmp_path):
    network = Encoder()
    dataset = banked(cases, tmp_path)
    dataset.fill(network)
    file = dataset._embeddings[0].path
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    dataset.set_epoch(next(e for e in range(3) if dataset.variant(2, e) == 2))
    with pytest.raises(CacheError, match=rf"row 8 of .*{file.name} is damaged; start again"):
        dataset[2]
    seen = network.seen
    again = banked(cases, tmp_path)
    assert again.fill(network) == DEPTHS[0] * 3 == network.seen - seen
    assert dataset[2]["embedding"].dtype == torch.bfloat16


def test_cases_that_are_whole_are_not_computed_again(cases, tmp_path):
    network = Encoder()
    first = banked(cases, tmp_path)
    first.fill(network)
    first._embeddings[2].path.unlink()
    assert banked(cases, tmp_path).fill(network) == DEPTHS[2] * 3


def test_an_encoder_that_learns_or_is_none_is_refused(cases, tmp_path):
    network = Encoder()
    network.encoder_frozen = False
    with pytest.raises(ConfigError, match=r"the image encoder of this Encoder learns.*freeze the encoder"):
        banked(cases, tmp_path).fill(network)
    with pytest.raises(ConfigError, match="Linear has no encode, embedding_identity, encoder_frozen"):
        banked(cases, tmp_path).fill(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        banked(cases, tmp_path).fill(Encoder(), batch_size=0)
    assert list(tmp_path.iterdir()) == []


def test_slices_of_several_sizes_are_encoded_alone_and_refused_where_their_embeddings_differ():
    encoder = Encoder()
    with pytest.raises(ConfigError, match=r"\(2, 4, 1, 1\), \(2, 4, 2, 1\).*pad"):
        encode(encoder, [torch.zeros(2, 8, 8), torch.zeros(2, 16, 8)])
    assert encode(encoder, [torch.zeros(2, 8, 8), torch.zeros(2, 9, 15)]).shape == (2, 2, 4, 1, 1)


def test_encoding_leaves_every_module_in_the_mode_it_was_in():
    encoder = Encoder().train()
    encoder.head.eval()
    encode(encoder, [torch.zeros(2, 8, 8)])
    assert encoder.training and encoder.conv.training and not encoder.head[1].training


def test_samsegmenter_with_embeddings_of_the_bank_predicts_what_it_predicts_without(cases, tmp_path, caplog):
    torch.manual_seed(0)
    network = SamSegmenter("tiny", scans=2)
    assert frozen_encoder(network) is network
    size = network.image_size
    resize = [Resized(KEYS, spatial_size=size, size_mode="longest", mode=("bilinear", "nearest"))]
    dataset = banked(cases, tmp_path, variants=2, transforms=[RandFlipd(KEYS, prob=0.5), *resize], picker=AllSlices())
    with caplog.at_level(logging.INFO):
        assert dataset.fill(network, batch_size=5) == 18 * 2
    assert "Embedding slices" in caplog.text
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["embedding"].ndim == 5 and batch["embedding"].shape[:2] == (4, 2)
    boxes = torch.tensor([[2.0, 2, 20, 20]]).expand(4, 4)
    with torch.no_grad():
        cached = network(batch["image"], boxes, embedding=batch["embedding"])
        plain = network(batch["image"], boxes)
        encoded = network.encode(batch["image"]).bfloat16().float()
        torch.testing.assert_close(encoded, batch["embedding"].flatten(0, 1).float(), rtol=2**-7, atol=1e-5)
    scale = plain.abs().max()
    assert scale > 0 and (cached - plain).abs().max() < 0.02 * scale  # of bf16's 2**-9 per number of the embedding


RANDOM = [
    RandRotated(KEYS, range_x=0.3, prob=1.0, mode=["bilinear", "nearest"]),
    RandAffined(KEYS, prob=1.0, rotate_range=0.3, scale_range=0.1, translate_range=2),
    OneOf([RandFlipd(KEYS, prob=1.0), RandGaussianNoised("image", prob=1.0), RandRotate90d(KEYS, prob=1.0)]),
    RandZoomd(KEYS, prob=1.0, min_zoom=0.8, max_zoom=1.3),
    RandGaussianSmoothd("image", prob=1.0),
    RandScaleIntensityd("image", factors=0.3, prob=1.0),
    RandGibbsNoised("image", prob=1.0),
    RandRicianNoised("image", prob=1.0),
    RandHistogramShiftd("image", prob=1.0),
    RandSpatialCropd(KEYS, roi_size=(8, 8)),
    RandScaleCropd(KEYS, roi_scale=0.7),
    Compose([RandFlipd(KEYS, prob=0.5), SpatialPadd(KEYS, (30, 30)), Turned(KEYS)]),
]


@pytest.mark.parametrize("transform", RANDOM, ids=lambda t: type(t).__name__)
def test_a_random_transform_is_described_alike_before_and_after_a_dataset_used_it(cases, transform):
    for described in (transform, Compose([transform])):
        before = json.dumps(describe(described))
        dataset = banked(cases, None, transforms=described)
        looks(dataset, 2)
        assert json.dumps(describe(described)) == before == json.dumps(describe(copy.deepcopy(described)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RandRotated(KEYS, range_x=0.3), RandRotated(KEYS, range_x=0.4)),
        (RandRotated(KEYS, range_x=0.3, prob=0.2), RandRotated(KEYS, range_x=0.3, prob=0.3)),
        (RandAffined(KEYS, shear_range=0.1), RandAffined(KEYS, shear_range=0.2)),
        (RandFlipd(KEYS, spatial_axis=0), RandFlipd(KEYS, spatial_axis=1)),
        (RandRotate90d(KEYS, max_k=1), RandRotate90d(KEYS, max_k=3)),
        (RandSpatialCropd(KEYS, roi_size=8), RandSpatialCropd(KEYS, roi_size=9)),
        (RandZoomd(KEYS, min_zoom=0.9), RandZoomd(KEYS, min_zoom=0.8)),
        (RandAxisFlipd(KEYS, prob=0.1), RandAxisFlipd(KEYS, prob=0.2)),
        (OneOf([RandFlipd(KEYS), RandZoomd(KEYS)]), OneOf([RandFlipd(KEYS), RandZoomd(KEYS)], weights=[0.1, 0.9])),
        (OneOf([RandFlipd(KEYS, prob=0.1)]), OneOf([RandFlipd(KEYS, prob=0.2)])),
    ],
)
def test_settings_of_a_random_transform_are_described(one, other):
    assert describe(one) != describe(other)


class Rectangular(Encoder):
    """Fills nothing up to a square, as SAM with ``rectangular``."""

    def embedding_identity(self) -> dict:
        return {**super().embedding_identity(), "rectangular": True}


def test_slices_of_unequal_shape_are_encoded_as_a_batch_of_them_would_be(cases, tmp_path, caplog):
    """Where nobody fills slices up to a square, embeddings of narrow ones are not those of the batch's image."""
    cases[0] = {**cases[0], **{key: cases[0][key][:, :, :16] for key in KEYS}}
    network = Rectangular().eval()
    dataset = banked(cases, tmp_path)
    with caplog.at_level(logging.INFO):
        assert dataset.fill(network) == sum(DEPTHS) * 3
    assert "Slices of 2 sizes are filled up to 16 x 24 pixels" in caplog.text
    assert caplog.text.count("are to be written") == 1  # of two cases
    batch = next(iter(DataLoader(dataset, batch_size=7, collate_fn=SliceCollate())))
    assert batch["image"].shape[-2:] == (16, 24) and (batch["label"][:3, :, :, 16:] == 255).all()
    alone, banked_too = network(batch["image"]), network(batch["image"], batch["embedding"])
    torch.testing.assert_close(alone, banked_too, rtol=2**-6, atol=1e-2)
    again = banked(cases, tmp_path)
    assert again.fill(network) == 0 and torch.equal(again[0]["embedding"], dataset[0]["embedding"])
    equal = banked(cases[1:], tmp_path)
    assert equal.fill(network) == DEPTHS[2] * 3  # they are as they were, and another file


def test_a_batch_is_filled_up_by_what_counts_nowhere():
    items = [{"image": torch.ones(1, 4, size), "label": torch.full((1, 4, size), label), "case": "a"}
             for size, label in ((6, 1), (3, 255))]  # fmt: skip
    batch = SliceCollate()(items)
    assert batch["image"].sum() == 4 * 9 and batch["label"].shape == (2, 1, 4, 6)
    assert judged_slices(batch["label"]).tolist() == [True, False]  # the second slice has no box: it stays out


def test_a_bundle_trains_alike_with_and_without_embeddings_where_a_crop_grows(phantoms, tmp_path):
    """Rectangular, with boxes; of four cases some have a label beyond the crop. One batch holds them all."""
    configs = build_bundle("meningioma", "decoder", tmp_path) / "configs"
    own = {**TINY, "crop_size": [5, 12], "rectangular": True, "scans": ["t1c"], "dataset_dir": str(phantoms)}
    own |= {"epochs": 1, "val_interval": 1, "batch_size": 4, "prompt::loosen": [0.0, 0.0], "schedule::warmup": 0}
    own |= {"slices::picker": {"_target_": "samseg_monai.data.slices.MaxArea"}}
    losses = {}
    for folder in (None, tmp_path / "embeddings"):
        run = tmp_path / ("without" if folder is None else "with")
        cache = {"embeddings::cache_dir": None if folder is None else str(folder)}
        run_workflow([configs / "train.json"], {**own, **cache, "output_dir": str(run)}, echo=False)
        with (run / "history.csv").open(encoding="utf-8", newline="") as stream:
            losses[folder] = {row["name"]: float(row["value"]) for row in csv.DictReader(stream)}
    without, stored = losses.values()
    # embeddings filled up with 0 in place of their slices, as collating them would, are off by 2.4e-4
    assert without["train_loss"] == pytest.approx(stored["train_loss"], rel=2e-5)
    assert without["val_loss"] == pytest.approx(stored["val_loss"], rel=2e-5)


def test_transforms_that_were_used_elsewhere_find_the_same_bank(cases, tmp_path):
    network, transforms = Encoder(), flips()
    used = banked(cases, tmp_path, transforms=transforms)
    used.fill(network)
    looks(used, 2)
    assert banked(cases, tmp_path, transforms=transforms).fill(network) == 0
    assert banked(cases, tmp_path).fill(network) == 0
