"""LoRALinear: the layer's algebra, its keys and its errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai.adapters import LoRALinear, merge_all
from samseg_monai.errors import AdapterError
from samseg_monai.products import Linear

TARGETS = [(0,), (1,), (0, 2), (0, 1, 2)]


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return nn.Linear(8, 24)


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def trained(base, **arguments):
    """A layer whose updates are not zero any more."""
    layer = LoRALinear(base, **arguments)
    for b in layer.lora_b.values():
        nn.init.normal_(b)
    return layer.eval()


def dense_weight(layer):
    """The merged weight from the definition, one part after the other, in float64."""
    weight = layer.weight.detach().double().clone()
    width = weight.shape[0] // layer.num_parts
    for part in layer.parts:
        a, b = layer.lora_a[str(part)].double(), layer.lora_b[str(part)].double()
        weight[part * width : (part + 1) * width] += layer.scaling * (b @ a)
    return weight


@pytest.mark.parametrize("parts", TARGETS)
def test_an_untrained_layer_changes_nothing(qkv, x, parts):
    assert torch.equal(LoRALinear(qkv, rank=2, parts=parts, num_parts=3)(x), qkv(x))


@pytest.mark.parametrize("parts", TARGETS)
def test_equals_the_dense_layer_of_the_definition(qkv, x, parts):
    layer = trained(qkv, rank=2, alpha=3.0, parts=parts, num_parts=3)
    expected = F.linear(x.double(), dense_weight(layer), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)  # float32 against float64
    assert (layer(x) - qkv(x)).abs().max() > 0.1


def test_only_the_chosen_parts_move(qkv, x):
    moved = (trained(qkv, rank=2, parts=(0, 2), num_parts=3)(x) - qkv(x)).abs().amax((0, 1)).reshape(3, 8)
    assert (moved[[0, 2]] > 0).all() and (moved[1] == 0).all()


def test_shares_the_tensors_and_keeps_the_keys_of_its_base(qkv):
    layer = LoRALinear(qkv, rank=2, parts=(0, 2), num_parts=3)
    assert layer.weight is qkv.weight and layer.bias is qkv.bias
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a.0", "lora_a.2", "lora_b.0", "lora_b.2"]
    assert layer.lora_names() == ["lora_a.0", "lora_a.2", "lora_b.0", "lora_b.2"]


def test_a_plain_checkpoint_loads_after_the_layer_was_installed(qkv, x):
    plain = nn.Linear(8, 24)
    layer = LoRALinear(qkv, rank=2, num_parts=3)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == [] and result.missing_keys == layer.lora_names()
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "scaling"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "alpha": 8, "rank_stabilised": True}, 4.0),
        ({"rank": 4, "rank_stabilised": True}, 2.0),
    ],
)
def test_scaling_is_alpha_over_rank_or_over_its_root(qkv, arguments, scaling):
    assert LoRALinear(qkv, **arguments).scaling == scaling


def test_a_starts_kaiming_uniform_with_slope_root_five(qkv):
    a = LoRALinear(nn.Linear(400, 400), rank=64).lora_a["0"]
    bound = math.sqrt(6 / ((1 + 5) * 400))  # gain sqrt(2 / (1 + 5)), times sqrt(3 / fan_in)
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_dropout_acts_on_the_update_alone_and_only_in_training(qkv, x):
    layer = trained(qkv, rank=2, parts=(0,), num_parts=3, dropout=0.5)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first[..., :8], second[..., :8])
    assert torch.equal(first[..., 8:], qkv(x)[..., 8:])


@pytest.mark.parametrize("bias", [True, False])
def test_merge_gives_a_plain_layer_with_the_same_output(x, bias):
    layer = trained(nn.Linear(8, 24, bias=bias), rank=3, parts=(0, 2), num_parts=3, rank_stabilised=True)
    before = layer.weight.detach().clone()
    plain = layer.merge()
    assert type(plain) is Linear
    torch.testing.assert_close(plain(x), layer(x), atol=1e-5, rtol=0)
    assert torch.equal(layer.weight, before)


def test_merge_all_leaves_no_adapter_behind(x):
    model = nn.Sequential(trained(nn.Linear(8, 8), rank=2), nn.Sequential(nn.GELU(), trained(nn.Linear(8, 3), rank=3)))
    before = model(x)
    assert merge_all(model) == 2
    assert [type(m).__name__ for m in model.modules()] == ["Sequential", "Linear", "Sequential", "GELU", "Linear"]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)


def test_keeps_device_type_and_mode_of_its_base():
    layer = LoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16).eval(), rank=2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and not layer.training
    assert LoRALinear(nn.Linear(8, 8, device="meta"), rank=2).lora_a["0"].is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be 1 to 8 .* got 0"),
        ({"rank": 9}, "rank must be 1 to 8 for a 8-to-24 update, got 9"),
        ({"rank": 2, "num_parts": 5}, "24 do not split into 5 equal parts"),
        ({"rank": 2, "num_parts": 3, "parts": (3,)}, r"0 .. 2, got \(3,\)"),
        ({"rank": 2, "parts": ()}, r"got \(\)"),
        ({"rank": 2, "num_parts": 3, "parts": (0, 0)}, "different numbers"),
        ({"rank": 2, "dropout": 1.0}, "dropout must be .* got 1.0"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be greater than 0, got 0.0"),
    ],
)
def test_wrong_arguments_say_what_is_needed(qkv, arguments, message):
    with pytest.raises(AdapterError, match=message):
        LoRALinear(qkv, **arguments)


def test_all_problems_are_listed_at_once(qkv):
    with pytest.raises(AdapterError) as error:
        LoRALinear(qkv, rank=0, dropout=2.0, alpha=-1.0)
    assert len(re.findall("^  - ", str(error.value), re.MULTILINE)) == 3


def test_adapting_an_adapted_layer_is_refused(qkv):
    with pytest.raises(AdapterError, match="already"):
        LoRALinear(LoRALinear(qkv, rank=2), rank=2)
    with pytest.raises(AdapterError, match="got Conv2d"):
        LoRALinear(nn.Conv2d(1, 1, 1), rank=2)
