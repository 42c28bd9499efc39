"""Matrix products by oneDNN against PyTorch's own: the same numbers and gradients, and who computes what."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai import products
from samseg_monai.products import Linear, adopt, fits, linear, times, times_plus

pytestmark = pytest.mark.skipif(not products._available(), reason="this PyTorch or processor has no such product")
LARGE = 160  # 160 * 160 * 32 multiplications are enough


def _layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(LARGE, LARGE, bias=bias)


def _adopted(layer: nn.Linear) -> nn.Linear:
    adopted = copy.deepcopy(layer)
    adopt(nn.Sequential(adopted))
    assert type(adopted) is Linear
    return adopted


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")], ids=lambda names: " ".join(names))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("swapped", [False, True], ids=["dense", "strided"])
def test_an_adopted_layer_and_its_gradients_equal_the_plain_one(bias, frozen, swapped):
    plain = _layer(bias)
    ours = _adopted(plain)
    x = torch.randn(4, 9, LARGE).transpose(0, 1) if swapped else torch.randn(4, 9, LARGE)
    weights = torch.randn(x.shape)
    found = []
    for layer in (plain, ours):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        given = x.detach().clone().requires_grad_()
        out = layer(given)
        (out * weights).sum().backward()
        found.append([out, given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert type(found[1][0].grad_fn).__name__ == "_LinearBackward"  # it was oneDNN that computed it
    assert len(found[0]) == len(found[1])
    for got, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_a_frozen_layer_keeps_no_activation_for_the_backward_pass():
    layer = _adopted(_layer()).requires_grad_(False)
    out = layer(torch.randn(32, LARGE, requires_grad=True))
    assert [saved is None for saved in out.grad_fn.saved_tensors] == [True, False]


@pytest.mark.parametrize("order", ["rows", "columns", "strided"])
def test_any_order_of_the_weight_gives_the_same_product(order):
    """oneDNN takes hundreds of times as long for a weight with gaps, so that one is copied first."""
    weight = torch.randn(64, 48)
    given = {"rows": weight, "columns": weight.t().contiguous().t(), "strided": torch.randn(64, 100)[:, :48]}[order]
    given = given if order != "strided" else given.copy_(weight)
    x, other = torch.randn(7, 48), torch.randn(7, 64)
    torch.testing.assert_close(times(x, given), x @ weight.t(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(times_plus(x, given, other), x @ weight.t() + other, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_left_to_pytorch():
    x, layer = torch.randn(32, LARGE), _adopted(_layer())
    assert fits(x) and not fits(x.double()) and not fits(x.bfloat16()) and not fits(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(x)
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not fits(x)
        assert type(layer(x).grad_fn).__name__ == "AddmmBackward0"
    few = torch.randn(2, LARGE)  # too small to be worth a call
    assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))
    assert linear(torch.randn(0, LARGE), layer.weight).shape == (0, LARGE)
    sizes = {0: torch.export.Dim("rows", min=1, max=4096)}
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=(sizes,))
    assert "mkldnn" not in str(program.graph)
