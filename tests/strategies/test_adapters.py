"""Bottlenecks, and scales and shifts: the layers' algebra against its definition, their keys, copies and threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai.adapters import BottleneckLinear, ScaleShift, merge_all
from samseg_monai.errors import AdapterError
from samseg_monai.training.owned import hold_statistics


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def randomise(module):
    """Learned tensors that are no zeros or ones any more."""
    for name, parameter in module.named_parameters():
        if "adapter" in name or "ssf" in name:
            nn.init.normal_(parameter)
    return module


def mlp(scale=0.5):
    """An MLP with a bottleneck beside it."""
    torch.manual_seed(0)
    first, last = BottleneckLinear.beside(nn.Linear(8, 32), nn.Linear(32, 8), width=3, scale=scale, activation="relu")
    return randomise(nn.Sequential(first, nn.GELU(), last))


def beside(module, x):
    """What the definition adds to the output of ``mlp``, in float64."""
    down, up = module[2].adapter.down.double(), module[2].adapter.up.double()
    return 0.5 * (F.relu(x.double() @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def test_behind_a_layer_it_reads_that_layers_output(x):
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    layer = BottleneckLinear(base, width=3, scale=2.0)
    assert torch.equal(layer(x), base(x))  # a fresh one changes nothing
    assert layer.weight is base.weight and list(layer.state_dict())[:3] == ["weight", "bias", "adapter.down.weight"]
    randomise(layer)
    y, down, up = base(x).double(), copy.deepcopy(layer.adapter.down).double(), copy.deepcopy(layer.adapter.up).double()
    expected = y + 2 * (F.gelu(y @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_beside_an_mlp_it_reads_what_the_mlp_reads(x):
    module = mlp()
    module[2].enabled = False
    plain = module(x)
    module[2].enabled = True
    torch.testing.assert_close(module(x).double(), plain.double() + beside(copy.deepcopy(module), x), atol=1e-5, rtol=0)


def test_threads_and_copies_do_not_hear_of_each_others_pass(x):
    module = mlp()
    others = [x + number for number in range(4)]
    expected = [module(other) for other in others]
    inside = threading.Barrier(4)
    module[1].register_forward_hook(lambda *_: (inside.wait(60), None)[1])  # all are between the two layers at once
    found: dict[int, torch.Tensor] = {}

    def run(number):
        found[number] = module(others[number]).detach()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):  # the others' results are 1 and more away
        torch.testing.assert_close(found[number], expected[number].detach(), atol=1e-4, rtol=0)
    module[1]._forward_hooks.clear()
    module[0](x * nn.Parameter(torch.ones(1)))  # a pass that broke off: what it left cannot be copied, and is not
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x), module(x), atol=1e-5, rtol=0)
        assert twin[0].handed is twin[2].handed is not module[0].handed


def test_a_frozen_batch_normalisation_keeps_its_statistics_when_it_is_scaled_and_shifted():
    module = nn.Sequential(nn.BatchNorm2d(3)).train()
    ScaleShift.behind(module[0])
    hold_statistics(module, ["0.ssf.scale", "0.ssf.shift"])
    module(torch.randn(4, 3, 2, 2))
    assert module[0].num_batches_tracked == 0 and module.training
    hold_statistics(module.train(), ["0.weight"])
    assert module[0].training


def test_only_layers_that_fit_are_taken(x):
    with pytest.raises(AdapterError, match="needs linear layers n to m and m to n"):
        BottleneckLinear.beside(nn.Linear(8, 32), nn.Linear(32, 9), width=3)
    with pytest.raises(
        AdapterError, match=r"(?s)width must be 1 to 65536, got 0.*activation must be one of gelu, relu"
    ):
        BottleneckLinear(nn.Linear(8, 8), width=0, activation="tanh")
    with pytest.raises(AdapterError, match="got Conv2d"):
        BottleneckLinear(nn.Conv2d(1, 1, 1), width=1)
    with pytest.raises(AdapterError, match="bottleneck"):
        merge_all(nn.Sequential(BottleneckLinear(nn.Linear(8, 8), width=1)))
    assert not ScaleShift.fits(nn.Conv2d(3, 4, 1, bias=False)) and not ScaleShift.fits(nn.GELU())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 6), (2, 5, 8)),
        (nn.LayerNorm(8), (2, 5, 8)),
        (nn.Conv2d(8, 6, 3), (2, 8, 4, 5)),
        (nn.BatchNorm2d(8).eval(), (2, 8, 4, 5)),
        (nn.GroupNorm(2, 8), (2, 8, 4, 5)),
    ],
)
def test_scale_and_shift_are_those_of_each_channel_and_fold_exactly(layer, shape):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer), torch.randn(*shape)
    plain, keys = layer(x), list(layer.state_dict())
    assert ScaleShift.fits(layer)
    ScaleShift.behind(layer)
    assert torch.equal(layer(x), plain)
    randomise(layer)
    axis = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1
    moved = plain.movedim(axis, -1) * layer.ssf.scale + layer.ssf.shift
    torch.testing.assert_close(layer(x), moved.movedim(-1, axis), atol=1e-6, rtol=1e-6)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x), atol=0, rtol=0)
    layer.ssf.enabled = False
    assert torch.equal(layer(x), plain)
    assert merge_all(nn.Sequential(twin)) == 1
    assert list(twin.state_dict()) == keys and not twin._forward_hooks and not hasattr(twin, "ssf")
    torch.testing.assert_close(twin(x), moved.movedim(-1, axis), atol=1e-5, rtol=1e-5)
