"""Recomputing the ladder's activations: less is kept for the backward pass, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from samseg_monai.adapters import ResNetSide
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import Ladder


def step(checkpointing: bool):
    """One training step of a fresh network: loss, gradients, buffers, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    network = SamSegmenter(
        "tiny", Ladder(side_weights="random"), num_classes=2, prompt="none", checkpointing=checkpointing
    ).train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(image).square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(network.named_buffers()), sum(kept.values())


def test_checkpointing_changes_memory_alone():
    stored, recomputed = step(False), step(True)
    assert torch.equal(stored[0], recomputed[0])
    assert set(stored[1]) == set(recomputed[1]) and len(stored[1]) > 40
    for name, gradient in stored[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
    for name, buffer in stored[2].items():  # batches count once although they are computed twice
        assert torch.equal(buffer, recomputed[2][name]), name
    assert recomputed[2]["side.net.bn1.num_batches_tracked"] == 1
    assert recomputed[3] < 0.5 * stored[3]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_tells_its_side(checkpointing):
    side = ResNetSide()
    SamSegmenter("tiny", Ladder(side), num_classes=2, prompt="none", checkpointing=checkpointing)
    assert side.checkpointing is checkpointing
