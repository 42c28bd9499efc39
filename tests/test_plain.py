"""PlainSegmenter: a network without SAM trains, is saved and is refused like any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.nets import UNet
from torch import nn

from samseg_monai.checkpoints import load_adapter, load_trained, read_card, save_adapter, save_model
from samseg_monai.errors import AdapterError, CheckpointError, ConfigError
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.strategies import LoRA, Scratch, ZeroShot
from samseg_monai.trainable import count_trainable


def unet(*, inputs=1, outputs=3, channels=(4, 8)):
    """With batch normalisation: its running statistics belong to what was learnt, and a bias before it is unused."""
    return UNet(2, inputs, outputs, channels=channels, strides=(2,), norm="batch", bias=False)


def plain(net=None, *, seed=0, name="unet", **arguments):
    torch.manual_seed(seed)
    network = PlainSegmenter(net or unet(), Scratch(name), **{"image_size": 32, "num_classes": 2, **arguments})
    network.load_base()
    return network


def learn(network, steps=1):
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(2, network.scans, 20, 28, generator=rng)
    target = torch.randint(network.channels_out, (2, 20, 28), generator=rng)
    optimiser, losses = torch.optim.SGD(network.parameters(), lr=0.1), []
    network.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(network(image), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    network.eval()
    return losses


@pytest.fixture
def image():
    return torch.randn(2, 1, 20, 28)


@torch.no_grad()
def test_it_is_the_network_on_the_padded_square_cut_back(image):
    network = plain()
    logits = network(image)
    assert logits.shape == (2, 3, 20, 28) and network.channels_out == 3 and not network.training
    expected = network.net(F.pad(image, (0, 4, 0, 12)))[..., :20, :28]
    assert torch.equal(logits, expected) and logits.std() > 0.01
    assert plain(unet(outputs=1), num_classes=1)(image).shape == (2, 1, 20, 28)
    mixed = network(MetaTensor(image.double()))
    assert type(mixed) is torch.Tensor and mixed.dtype == torch.float32


def test_everything_learns_and_is_owned_statistics_included():
    network = plain()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert network.owned == list(before) and network.fixed == network.unused == []
    assert count_trainable(network) == sum(p.numel() for p in network.net.parameters())
    losses = learn(network, steps=20)
    assert losses[-1] < 0.95 * losses[0]
    still = {name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == set()
    assert any(name.endswith("running_mean") for name in before)
    assert not network.encoder_frozen  # there is nothing to store embeddings of


@torch.no_grad()
def test_saved_and_loaded_into_a_fresh_network_it_gives_equal_output(image, tmp_path):
    network = plain()
    untrained = network(image)
    with torch.enable_grad():
        learn(network, steps=2)
    save_adapter(network, tmp_path / "adapter")
    path = save_model(network, tmp_path / "model.pt")
    card = read_card(tmp_path / "adapter")
    assert card["strategy"] == {"_target_": "samseg_monai.strategies.Scratch", "arguments": {"name": "unet"}}
    assert (card["sam_variant"], card["base_sha256"], card["prompt"]) == ("no SAM", "random", "none")
    assert card["values"] == sum(tensor.numel() for tensor in network.state_dict().values())
    expected = network(image)
    assert not torch.equal(expected, untrained)
    for load in (
        lambda fresh: load_adapter(fresh, tmp_path / "adapter"),
        lambda fresh: load_trained(fresh, checkpoint=tmp_path / "adapter"),
        lambda fresh: load_trained(fresh, checkpoint=path),
    ):
        fresh = plain(seed=1)
        assert not torch.equal(fresh(image), expected)
        load(fresh)
        assert torch.equal(fresh(image), expected)


def test_without_a_checkpoint_it_is_refused():
    with pytest.raises(CheckpointError, match="nothing trained was found for Scratch"):
        load_trained(plain())


def test_an_adapter_of_a_network_that_never_started_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="never loaded"):
        save_adapter(PlainSegmenter(unet(), image_size=32, num_classes=2), tmp_path)


def test_the_card_refuses_another_network_and_lists_every_difference(tmp_path):
    save_adapter(plain(), tmp_path)
    net = unet(inputs=2, outputs=2)
    other = plain(net, name="segresnet", image_size=48, num_classes=1, scans=2, input_scale="unit")
    with pytest.raises(CheckpointError) as error:
        load_adapter(other, tmp_path)
    keys = {line.removeprefix("  - ").split(":")[0] for line in str(error.value).splitlines()[1:]}
    assert keys == {"num_classes", "image_size", "scans", "input_scale", "strategy name"}


def test_another_layout_of_the_network_is_refused_by_its_tensors(tmp_path):
    save_adapter(plain(), tmp_path)
    other = plain(unet(channels=(4, 6)), seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"shape \(8, .* in the file, \(6, .* in the network"):
        load_adapter(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_an_adapter_of_sam_is_refused(tmp_path):
    sam = SamSegmenter("tiny", LoRA(2))
    sam.load_base("random")
    save_adapter(sam, tmp_path)
    with pytest.raises(CheckpointError, match="sam_variant: adapter 'tiny', network 'no SAM'"):
        load_adapter(plain(), tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 33, 20), r"image: got shape \(2, 1, 33, 20\), expected \(B, 1, H, W\) with H and W at most 32"),
        ((2, 1, 20, 33), "at most 32"),
        ((2, 2, 20, 20), r"got shape \(2, 2, 20, 20\), expected \(B, 1, H, W\)"),
        ((1, 20, 20), r"got shape \(1, 20, 20\)"),
        ((20,), r"got shape \(20,\)"),
    ],
)
def test_wrong_input_says_what_was_got_and_expected(shape, message):
    with pytest.raises(ConfigError, match=message):
        plain()(torch.zeros(shape))


def test_a_network_that_returns_something_else_is_named(image):
    with pytest.raises(ConfigError, match=r"UNet must return logits \(2, 3, 32, 32\), got \(2, 4, 32, 32\); check"):
        plain(unet(outputs=4))(image)
    with pytest.raises(ConfigError, match=r"Conv2d must return logits \(2, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        plain(nn.Conv2d(1, 3, 2, 2))(image)

    class Several(nn.Module):
        def forward(self, image):
            return [image, image]

    with pytest.raises(ConfigError, match=r"Several must return logits \(2, 3, 32, 32\), got a list"):
        plain(Several())(image)


def test_it_has_no_base_weights(tmp_path):
    network = PlainSegmenter(unet(), image_size=32, num_classes=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for checkpoint in (None, "random"):
        network.load_base(checkpoint)
        assert network.base_sha256 == "random"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ConfigError, match=r"sam_checkpoint: got .*sam\.pth, but this network has no SAM in it"):
        network.load_base(tmp_path / "sam.pth")


@pytest.mark.parametrize("strategy", [LoRA(2), ZeroShot()])
def test_a_strategy_that_needs_sam_is_refused(strategy):
    with pytest.raises(AdapterError, match=f"got {type(strategy).__name__}, but UNet has no SAM in it; use Scratch"):
        PlainSegmenter(unet(), strategy, image_size=32, num_classes=2)


def test_wrong_arguments_are_all_named_at_once():
    with pytest.raises(ConfigError) as error:
        PlainSegmenter(unet(), image_size=32, num_classes=0, input_scale="255")
    assert "num_classes: got 0" in str(error.value) and "input_scale: got '255'" in str(error.value)
    assert PlainSegmenter(unet()).strategy.name == "scratch"
