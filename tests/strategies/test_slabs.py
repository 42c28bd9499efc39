"""Slabs: slices of a volume that see each other, from the attention layer to whole volumes."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.transforms import RandFlipd, RandGaussianNoised, Resized
from torch import nn

from samseg_monai.adapters.bottleneck import DepthBranch
from samseg_monai.bundles.build import compose
from samseg_monai.data.slices import AllSlices, EveryNth, MaxArea, SliceCollate, SliceDataset
from samseg_monai.errors import AdapterError, ConfigError
from samseg_monai.export import obstacles
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam import tiny_vit
from samseg_monai.settings import dump_settings, read_settings
from samseg_monai.strategies import Adapter

VARIANTS = ("tiny", "tiny_t")
BOXES = torch.tensor([[5.0, 6, 40, 50], [2, 20, 30, 44], [8, 2, 48, 60], [1, 1, 20, 50]])


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def network(variant, depth=2, **arguments):
    """Adapters that are no zeros any more."""
    torch.manual_seed(0)
    made = SamSegmenter(variant, Adapter(3, place="both", scale=0.5, depth=depth), **arguments)
    for name, parameter in made.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture
def image():
    return torch.randn(4, 1, 64, 48, generator=torch.Generator().manual_seed(1))


def attention(made):
    """The last attention layer, its branch, and which rows of ``qkv`` are query, key and value of each head."""
    layer = [module for module in made.modules() if isinstance(getattr(module, "depth", None), DepthBranch)][-1]
    layer = copy.deepcopy(layer).double()
    heads, dim = layer.num_heads, layer.proj.in_features
    rows = torch.arange(3 * dim)
    return layer, rows.view(3, heads, -1) if hasattr(layer, "rel_pos_h") else rows.view(heads, 3, -1).transpose(0, 1)


@pytest.mark.parametrize("views", [1, 2])
def test_a_token_attends_to_those_at_its_place_in_the_slab(variant, views):
    layer, rows = attention(network(variant, depth=3, scans=views))
    branch, dim = layer.depth, layer.proj.in_features
    x = torch.randn(2 * 3 * views, 4, 4, dim, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    branch.enabled = False
    plain = layer(x)
    qkv = layer.qkv(layer.norm(x) if hasattr(layer, "norm") else x)
    expected = torch.zeros_like(plain)
    for slab in range(2):
        for view in range(views):
            own = [slab * 3 * views + number * views + view for number in range(3)]
            for i in own:
                heads = []
                for head in range(layer.num_heads):
                    q, k, v = (qkv[..., rows[part, head]] for part in range(3))
                    logits = torch.stack([(q[i] * k[j]).sum(-1) for j in own]) * q.shape[-1] ** -0.5
                    heads.append(sum(w[..., None] * v[j] for w, j in zip(logits.softmax(0), own, strict=True)))
                mixed = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
                down, up = branch.adapter.down, branch.adapter.up
                hidden = (mixed @ down.weight.T + down.bias).relu()
                expected[i] = hidden @ up.weight.T + up.bias
    torch.testing.assert_close(found - plain, expected, atol=1e-9, rtol=1e-9)
    learned = [x, *branch.parameters()]
    gradients, wanted = (torch.autograd.grad((y**2).sum(), learned) for y in (found, plain + expected))
    torch.testing.assert_close(gradients, wanted, atol=1e-8, rtol=1e-8)


def test_what_does_not_fit_a_branch_is_told():
    with pytest.raises(AdapterError, match=r"(?s)width must be 1 to 65536, got 0.*depth must be at least 2, got 1"):
        DepthBranch(nn.Linear(4, 4), depth=1, width=0)


@torch.no_grad()
def test_slabs_swap_and_turn_with_their_slices_and_do_not_see_each_other(variant, image):
    made = network(variant)
    found = made(image, BOXES)
    for order in ([2, 3, 0, 1], [3, 2, 1, 0], [0, 1, 3, 2]):
        torch.testing.assert_close(made(image[order], BOXES[order]), found[order], atol=1e-5, rtol=0)
    other = image.clone()
    other[1] += 1
    change = (made(other, BOXES) - found).abs().flatten(1).amax(1)
    assert change[0] > 1e-5 and change[1] > 1e-5 and change[2:].max() < 1e-6
    unasked = BOXES.clone()
    unasked[1] = torch.nan  # a slice without a box is a neighbour all the same
    torch.testing.assert_close(made(image, unasked)[[0, 2, 3]], found[[0, 2, 3]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_depth_it_is_the_two_adapters_alone(variant, image):
    deep, flat = network(variant), network(variant, depth=1)
    missing = deep.load_state_dict(flat.state_dict(), strict=False).missing_keys
    assert missing and all(".depth.adapter." in name for name in missing)
    for name in missing:
        deep.get_parameter(name).zero_()
    torch.testing.assert_close(deep(image, BOXES), flat(image, BOXES), atol=0, rtol=0)
    assert "depth" not in flat.strategy.card()["arguments"] and deep.strategy.card()["arguments"]["depth"] == 2


@torch.no_grad()
def test_scans_of_a_slice_do_not_mix(variant, image):
    made = network(variant, scans=2)
    both = torch.cat([image, image.flip(-1)], 1)
    alone = [made.decode(made.encode(both)[view::2].repeat_interleave(2, 0), BOXES)[0] for view in range(2)]
    torch.testing.assert_close(made.decode(made.encode(both), BOXES)[0], (alone[0] + alone[1]) / 2, atol=1e-5, rtol=0)
    single = network(variant)
    torch.testing.assert_close(made.encode(both)[::2], single.encode(image), atol=1e-5, rtol=0)


def test_bands_of_a_processors_cache_keep_slabs_together(image, monkeypatch):
    made = network("tiny_t", prompt="none")
    wanted = made(image).detach()  # with a gradient there are no bands
    monkeypatch.setattr(tiny_vit, "BAND", 1 << 12)
    with torch.no_grad():
        torch.testing.assert_close(made(image), wanted, atol=1e-5, rtol=0)


def test_what_is_no_slab_is_refused(image):
    made = network("tiny")
    with pytest.raises(ConfigError, match="got 3 slices, but this network attends to neighbours in slabs of 2"):
        made(image[:3], BOXES[:3])
    with pytest.raises(ConfigError, match=r"single slice, but .* looks at slabs of 2 slices"):
        SliceVolumeInferer([])(image[:1, ..., None], made, boxes=BOXES[:1, None])
    found = obstacles(made)
    assert all("slabs of 2 slices" in found[name][0] for name in ("torch", "onnx")) and found["ckpt_export"][1:]
    settings = dump_settings(compose("hippocampus", "medsa"))
    settings["task"] |= {"kind": "images", "orientation": None}
    with pytest.raises(ConfigError, match="depth: a 2-D image has no neighbours"):
        read_settings({**settings, "demo": None}, "these")


def resize():
    """As the way back is exact, results of a volume are those of its slices."""
    return Resized(["image", "prompt"], (48, 48), mode=["bilinear", "nearest"], allow_missing_keys=True)


@torch.no_grad()
@pytest.mark.parametrize(("slices", "slabs"), [(8, [0, 4]), (10, [0, 4, 6]), (3, [0])])
def test_a_volume_is_predicted_slab_by_slab(slices, slabs):
    made = network("tiny", depth=4, prompt="none")
    volume = torch.randn(1, 1, 48, 48, slices, generator=torch.Generator().manual_seed(3))
    found = [SliceVolumeInferer([resize()], prompted=False, batch_size=size)(volume, made) for size in (1, 8, 64)]
    expected = torch.full_like(found[0], torch.nan)
    for start in slabs:
        numbers = [min(start + step, slices - 1) for step in range(4)]
        logits = made(volume[0, ..., numbers].permute(3, 0, 1, 2))
        for place, number in enumerate(numbers):
            if expected[..., number].isnan().all():  # the first slab that has it counts
                expected[0, ..., number] = logits[place]
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_slices_without_a_box_are_neighbours_and_stay_empty(caplog):
    made = network("tiny", depth=4)
    volume = torch.randn(1, 1, 48, 48, 10, generator=torch.Generator().manual_seed(3))
    prompt = torch.zeros(1, 1, 48, 48, 10)
    prompt[:, :, 5:30, 8:40, 2:9] = 1
    inferer = SliceVolumeInferer([resize()])
    found = inferer(volume, made, prompt=prompt)
    assert [bool((found[..., z] == -20).all()) for z in range(10)] == [z not in range(2, 9) for z in range(10)]
    fewer = prompt.clone()
    fewer[..., 4] = 0
    wanted = found.clone()
    wanted[..., 4] = -20
    torch.testing.assert_close(inferer(volume, made, prompt=fewer), wanted, atol=1e-5, rtol=0)
    picked = torch.arange(10)[None] == 3
    torch.testing.assert_close(inferer(volume, made, prompt=prompt, slices=picked)[..., 3], found[..., 3])
    assert not caplog.records
    assert (inferer(volume, made, prompt=torch.zeros_like(prompt)) == -20).all()


def case(slices=7):
    """A volume whose slices are their numbers, with a label that is largest in slice 2."""
    ramp = torch.arange(float(slices)).expand(1, 6, 8, slices)
    label = torch.zeros(1, 6, 8, slices)
    label[:, 1:3, 1:4] = 1
    label[:, 1:6, 1:4, 2] = 1
    return {"case": "a", "image": ramp.clone(), "label": label}


@pytest.mark.parametrize(
    ("picker", "depth", "slabs"),
    [
        (MaxArea(), 4, [[1, 2, 3, 4]]),
        (EveryNth(3), 3, [[0, 0, 1], [2, 3, 4], [5, 6, 6]]),
        (AllSlices(), 2, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 6]]),
    ],
)
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_an_item_is_a_slab_around_a_picked_slice(picker, depth, slabs, cache, tmp_path):
    how = {"picker": picker, "depth": depth, "cache": cache, "cache_dir": tmp_path, "progress": False}
    for _ in range(2):  # of what is cached, too
        dataset = SliceDataset([case()], None, **how)
        assert [[item["slice"] for item in dataset[i]] for i in range(len(dataset))] == slabs
        assert [[int(item["image"][0, 0, 0]) for item in dataset[i]] for i in range(len(dataset))] == slabs


@pytest.mark.parametrize("variants", [None, 2])
def test_a_slab_is_augmented_alike_and_differs_between_epochs(variants):
    class Same(torch.nn.Module):
        """Slices that are all the same."""

        def __call__(self, data):
            return {**data, "image": data["image"] * 0 + torch.arange(8.0)[:, None]}

    transforms = [RandFlipd(["image", "label"], prob=0.5, spatial_axis=1), RandGaussianNoised("image", prob=1.0)]
    dataset = SliceDataset(
        [case()], [Same()], transforms, picker=AllSlices(), depth=3, variants=variants, progress=False
    )
    first = dataset[3]
    assert all(torch.equal(item["image"], first[0]["image"]) for item in first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[3][0]["image"], first[0]["image"])
    batch = SliceCollate()([dataset[0], dataset[4]])
    assert batch["slice"].tolist() == [0, 0, 1, 3, 4, 5] and batch["image"].shape == (6, 1, 6, 8)
    assert batch["case"] == ["a"] * 6


def test_embeddings_are_of_single_slices(tmp_path):
    dataset = SliceDataset([case()], None, picker=MaxArea(), depth=2, embedding_dir=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="embeddings are of single slices, got depth 2"):
        dataset.fill(network("tiny"))
