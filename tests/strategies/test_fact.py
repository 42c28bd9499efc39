"""FacT: the equation of its update, what blocks have in common, and what other programs cannot hold of it."""

import copy

import pytest
import torch

from samseg_monai.adapters import FacTLinear
from samseg_monai.errors import AdapterError
from samseg_monai.export import obstacles
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.compute import hold_updates
from samseg_monai.strategies import FacT


def network():
    torch.manual_seed(0)
    found = SamSegmenter("tiny", FacT(2, scale=3.0))
    with torch.no_grad():
        for name, tensor in found.named_parameters():
            if name in found.owned:
                tensor.normal_(0, 0.3)
    return found


def test_an_update_is_two_common_factors_around_a_core():
    built = network()
    factors, layers = built.factors, [layer for layer in built.modules() if isinstance(layer, FacTLinear)]
    assert len(layers) == 4 and len({id(layer.shared[0]) for layer in layers}) == 1  # qkv and proj of two blocks
    u, v = factors.u["32"].double(), factors.v["32"].double()
    for layer in layers:
        x = torch.randn(5, 32, dtype=torch.float64)
        rows = [3.0 * v @ layer.core[part].double() @ u for part in layer.core]
        wanted = x @ (layer.weight.double() + torch.cat(rows)).T + layer.bias.double()
        torch.testing.assert_close(layer(x.float()).double(), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.merge()(x.float()).double(), wanted, atol=1e-4, rtol=0)


def test_a_copy_has_factors_of_its_own_and_held_products_follow_them():
    built = network().requires_grad_(False)
    image, boxes = torch.randn(1, 1, 64, 64), torch.tensor([[5.0, 6, 40, 50]])
    before, twin = built(image, boxes), copy.deepcopy(built)
    hold_updates(twin)
    torch.testing.assert_close(twin(image, boxes), before, atol=1e-5, rtol=0)
    with torch.no_grad():
        twin.factors.v["32"].zero_()
    plain = SamSegmenter("tiny")
    plain.sam.load_state_dict({name: built.state_dict()[f"sam.{name}"] for name in plain.sam.state_dict()})
    torch.testing.assert_close(twin(image, boxes), plain(image, boxes), atol=1e-6, rtol=0)
    assert torch.equal(built(image, boxes), before)


def test_what_does_not_fit_is_told():
    with pytest.raises(AdapterError, match=r"scale must be greater than 0, got 0.0"):
        FacT(2, scale=0.0)
    found = obstacles(network())
    assert found["samed"][0].startswith("FacT:") and found["peft"][0].startswith("FacT:") and found["pth"] == []
