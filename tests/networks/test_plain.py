"""PlainSegmenter: a network without SAM trains, is saved and is refused like any other."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.nets import UNet
from torch import nn

from samseg_monai.bundles.build import compose, render
from samseg_monai.checkpoints import load_adapter, load_trained, read_card, save_adapter, save_model
from samseg_monai.errors import AdapterError, CheckpointError, ConfigError
from samseg_monai.export import obstacles
from samseg_monai.network_choices import Network
from samseg_monai.networks import EMPTY_LOGIT, BoxEllipse, PlainSegmenter, SamSegmenter
from samseg_monai.settings import dump_settings, read_settings
from samseg_monai.strategies import LoRA, Scratch, ZeroShot
from samseg_monai.training.owned import count_trainable
from samseg_monai.transforms import EllipseFromPromptd


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


NETWORKS = {
    "UNet": {"channels": [4, 8], "strides": [2], "num_res_units": 1},
    "BasicUNetPlusPlus": {"features": [4] * 6},
    "VNet": {},
    "AttentionUnet": {"channels": [4, 8], "strides": [2]},
    "UNETR": {"feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "SegResNet": {"blocks_down": [1, 1], "blocks_up": [1]},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 4, 4]},
    "BoxEllipse": {},
}


def settings_of(task, network, boxes, image_size=64):
    value = dump_settings(compose(task, "unet"))
    value["run"]["image_size"] = image_size
    value["run"]["prompt"]["source"] = "none" if boxes == "none" else "label"
    around = {"boxes": boxes, "crop_size": image_size} if network["name"] != "BoxEllipse" else {}
    value["strategy"]["network"] = {**network, **around}
    return read_settings({**value, "demo": None}, "test")


@pytest.mark.parametrize("task", ["meningioma", "abdomen"])
@pytest.mark.parametrize(
    "name", [get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(Network)[0])]
)
@torch.no_grad()
def test_every_network_of_the_settings_is_built_and_answers(name, task):
    """Through the bundle's train.json: with one class and several, without boxes and with each way to take them."""
    if (name, task) == ("BoxEllipse", "abdomen"):
        return  # for one class only
    for boxes in ("given",) if name == "BoxEllipse" else ("none", "channel", "crop"):
        network = {"name": name, **NETWORKS[name]}
        if (name, task, boxes) == ("VNet", "meningioma", "channel"):
            with pytest.raises(ConfigError, match=r"VNet takes 1, 2, 4, 8 or 16 channels; scans and .* make 5"):
                settings_of(task, network, boxes)
            continue
        settings = settings_of(task, network, boxes)
        config = json.loads(render(settings)["configs/train.json"])
        network = ConfigParser({**config, "device": "cpu"}).get_parsed_content("network_def")
        scans, classes = len(settings.task.scans), len(settings.task.classes)
        given = None if boxes == "none" else torch.tensor([[3.0, 4.0, 20.0, 30.0]] * 2)
        logits = network.train()(torch.randn(2, scans, 48, 40), given)
        assert type(network.net).__name__ == name and network.boxes == boxes
        assert logits.shape == (2, 1 if classes == 1 else classes + 1, 48, 40) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("network", "image_size", "message"),
    [
        ({"name": "UNet"}, 60, "run::image_size: got 60; this UNet needs a multiple of 8"),
        ({"name": "UNet", "strides": [2, 2]}, 64, r"levels \(channels, strides 1 fewer\), got channels 4, strides 2"),
        ({"name": "SwinUNETR"}, 32, "got 32; this SwinUNETR needs a multiple of 32, at least 64"),
        ({"name": "SegResNet", "blocks_up": [1]}, 64, "got blocks_down 4, blocks_up 1"),
        ({"name": "DynUNet", "strides": [1, 4, 4, 4]}, 64, "needs a multiple of 64, at least 128"),
        ({"name": "BasicUNetPlusPlus"}, 16, "needs a multiple of 16, at least 32"),
        ({"name": "DynUNet", "filters": [4]}, 64, "got kernel_size 4, strides 4, filters 1, upsample_kernel_size 3"),
    ],
)
def test_a_network_that_monai_would_not_build_or_run_is_refused_by_the_settings(network, image_size, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("abdomen", network, "none", image_size)


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


NAN = float("nan")


class Seen(nn.Module):
    """Remembers what it is called with and answers with a fixed map of its input."""

    def __init__(self, answer=lambda image: image[:, :1]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.answer, self.calls = answer, []

    def forward(self, *inputs):
        self.calls.append(inputs)
        return self.weight * self.answer(inputs[0])


def boxed(mode, net=None, **arguments):
    return plain(net or Seen(), **{"num_classes": 1, "boxes": mode, **arguments})


def test_the_box_channel_holds_the_union_of_the_pixels_whose_centre_is_inside(image):
    network = boxed("channel")
    boxes = torch.tensor([[[2.0, 1.0, 5.0, 4.0], [3.6, 2.4, 6.51, 3.49]], [[NAN] * 4, [0.5, 0.51, 1.5, 20.0]]])
    logits = network(image, boxes)
    (seen,) = network.net.calls[0]
    expected = torch.zeros(2, 32, 32)
    expected[0, 1:4, 2:5] = 1
    expected[0, 2:3, 4:7] = 1  # centres 4.5 to 6.5 across, 2.5 down
    expected[1, 1:20, 0:1] = 1
    assert seen.shape == (2, 2, 32, 32) and torch.equal(seen[:, 1], expected)
    assert torch.equal(seen[:, :1, :20, :28], image) and torch.equal(logits, image)


@pytest.mark.parametrize("mode", ["channel", "crop", "given"])
def test_an_image_without_a_box_is_empty_and_the_others_do_not_notice(mode, image):
    network = boxed(mode)
    box = torch.tensor([3.0, 2.0, 11.0, 9.0])
    alone = network(image[:1], box[None])
    for boxes in (torch.stack([box, box * NAN]), torch.stack([box, box * NAN])[:, None]):
        both = network(image, boxes)
        assert torch.equal(both[:1], alone) and (both[1] == EMPTY_LOGIT).all() and both.dtype == torch.float32
    assert (network(image, torch.full((2, 3, 4), NAN)) == EMPTY_LOGIT).all()
    several = plain(Seen(lambda image: image[:, :1].expand(-1, 3, -1, -1)), boxes=mode)
    logits = several(image, torch.stack([box, box * NAN]))
    assert (logits[1, 0] == -EMPTY_LOGIT).all() and (logits[1, 1:] == EMPTY_LOGIT).all()


@pytest.mark.parametrize("mode", ["channel", "crop", "given"])
def test_a_batch_without_boxes_still_reaches_every_tensor(mode, image):
    network = BOXED[mode]().train()
    loss = network(image, torch.full((2, 4), NAN)).sum()
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
    network(image, torch.tensor([[3.0, 2.0, 11.0, 9.0], [NAN] * 4])).sum().backward()
    assert sum(bool(p.grad.any()) for p in network.parameters()) == len(list(network.parameters()))


BOXED = {
    "channel": lambda: boxed("channel", UNet(2, 2, 1, channels=(4, 8), strides=(2,), norm=None)),
    "crop": lambda: boxed("crop", UNet(2, 1, 1, channels=(4, 8), strides=(2,), norm=None), crop_size=16),
    "given": lambda: boxed("given", BoxEllipse()),
}


def test_without_boxes_the_box_is_the_whole_slice_and_without_the_mode_boxes_are_refused(image):
    whole = torch.tensor([[0.0, 0.0, 28.0, 20.0]]).expand(2, -1)
    for make in BOXED.values():
        network = make()
        assert torch.equal(network(image), network(image, whole)) and network.prompt == "box"
    with pytest.raises(ConfigError, match="build it with boxes='channel', 'crop' or 'given'"):
        plain()(image, whole)
    with pytest.raises(ConfigError, match=r"boxes: got shape \(1, 4\), expected \(B, 4\)"):
        network(image, whole[:1])


def test_the_crop_is_the_square_around_the_box_and_goes_back_to_its_place():
    """A ramp survives bilinear resampling exactly: the crop's pixels are known, and so are those laid back."""
    x, y = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="xy")
    image = (x + 100 * y)[None, None]
    network = boxed("crop", crop_margin=0.25, crop_size=12)
    box = torch.tensor([[10.5, 13.0, 18.5, 17.0]])  # 8 wide: the square is 12 wide, around (14.5, 15)
    logits = network(image, box)
    ((crop,),) = network.net.calls
    steps = torch.arange(12) + 0.5
    torch.testing.assert_close(crop[0, 0], (8.5 + steps)[None, :] + 100 * (9 + steps)[:, None])
    inside = (x >= 8.5) & (x <= 20.5) & (y > 9) & (y < 21)
    assert (logits[0, 0][~inside] == EMPTY_LOGIT).all()
    deep = (x > 9) & (x < 20) & (y > 9.5) & (y < 20.5)  # at the crop's edge a value is that of its last pixel
    torch.testing.assert_close(logits[0, 0][deep], image[0, 0][deep], rtol=1e-5, atol=1e-3)


def test_a_crop_over_the_edge_sees_zeros_there_and_boxes_are_joined_by_the_largest():
    image = torch.ones(1, 1, 20, 28)
    network = boxed("crop", crop_margin=0.0, crop_size=8)
    network(image, torch.tensor([[-4.0, 0.0, 4.0, 8.0]]))
    ((crop,),) = network.net.calls
    assert (crop[..., :3] == 0).all() and (crop[..., 5:] == 1).all()
    image = torch.randn(1, 1, 20, 28)
    boxes = torch.tensor([[[2.0, 3.0, 10.0, 9.0], [6.0, 5.0, 14.0, 13.0], [NAN] * 4]])
    alone = [network(image, boxes[:, index]) for index in range(2)]
    assert torch.equal(network(image, boxes), torch.maximum(*alone))


@torch.no_grad()
def test_the_ellipse_starts_as_the_one_inscribed_and_is_bounded():
    """Against EllipseFromPromptd, written for masks, on boxes of whole pixels; a float box against its formula."""
    network = boxed("given", BoxEllipse())
    for x0, y0, x1, y1 in ((3, 2, 20, 15), (0, 0, 28, 20), (5, 5, 6, 6), (7, 1, 9, 19)):
        prompt = torch.zeros(1, 20, 28)
        prompt[:, y0:y1, x0:x1] = 1
        expected = EllipseFromPromptd()({"prompt": MetaTensor(prompt)})["ellipse"]
        logits = network(torch.zeros(1, 1, 20, 28), torch.tensor([[x0, y0, x1, y1]]).float())
        assert torch.equal((logits[0] >= 0).float(), expected.as_tensor())
    logits = network(torch.zeros(1, 1, 20, 28), torch.tensor([[3.25, 2.5, 10.75, 9.5]]))
    assert logits[0, 0, 5, 6].item() == pytest.approx(4 * (1 - (0.5 / 3.75) ** 2 - (0.5 / 3.5) ** 2), rel=1e-6)
    tiny = network(torch.zeros(1, 1, 20, 28), torch.tensor([[5.0, 5.0, 5.0, 5.0]]))
    for found in (logits, tiny):
        assert found.isfinite().all() and found.min() >= -20 and found.max() <= 4


def test_the_ellipse_learns_the_law_of_the_boxes_and_tells_it(tmp_path):
    """Tumours that fill 0.8 by 0.6 of their boxes, shifted: the five numbers are found, whatever the image shows."""
    network = boxed("given", BoxEllipse(), name="ellipse")
    assert count_trainable(network) == 5
    rng = torch.Generator().manual_seed(0)
    corner = 2 + 6 * torch.rand(16, 2, generator=rng)
    boxes = torch.cat([corner, corner + 14 + 6 * torch.rand(16, 2, generator=rng)], 1)
    true = boxed("given", BoxEllipse())
    with torch.no_grad():
        true.net.log_axes.copy_(torch.tensor([0.8, 0.6]).log())
        true.net.offset.copy_(torch.tensor([0.05, -0.08]))
        target = (true(torch.zeros(16, 1, 32, 32), boxes) > 0).float()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(network.train()(torch.randn(16, 1, 32, 32), boxes), target)
        loss.backward()
        assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in network.parameters())
        optimiser.step()
    save_adapter(network, tmp_path)
    card = read_card(tmp_path)
    found = [card[key] for key in ("axis_x", "axis_y", "offset_x", "offset_y")]
    assert found == pytest.approx([0.8, 0.6, 0.05, -0.08], abs=0.02) and card["sharpness"] > 4


def test_gradients_of_the_ellipse_stay_finite_far_outside_and_without_area():
    network = boxed("given", BoxEllipse(), image_size=512)
    boxes = torch.tensor([[1.0, 1.0, 1.0, 1.0], [500.0, 500.0, 500.5, 511.0], [400.0, 10.0, 300.0, 5.0]])
    logits = network.train()(torch.zeros(3, 1, 512, 512), boxes)
    F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    assert logits.isfinite().all() and logits.min() >= -20
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    with pytest.raises(ConfigError, match="sharpness: got 0"):
        BoxEllipse(0)


def test_an_adapter_of_another_way_to_take_boxes_is_refused(tmp_path):
    save_adapter(boxed("crop", crop_size=16), tmp_path)
    card = read_card(tmp_path)
    assert (card["boxes"], card["crop_margin"], card["crop_size"], card["prompt"]) == ("crop", 0.5, 16, "box")
    load_adapter(boxed("crop", crop_size=16), tmp_path)
    for other, named in (
        (boxed("channel"), {"boxes", "crop_margin", "crop_size"}),
        (boxed("crop", crop_size=16, crop_margin=0.2), {"crop_margin"}),
        (boxed("none"), {"prompt", "boxes", "crop_margin", "crop_size"}),
    ):
        with pytest.raises(CheckpointError) as error:
            load_adapter(other, tmp_path)
        assert {line.removeprefix("  - ").split(":")[0] for line in str(error.value).splitlines()[1:]} == named


def test_wrong_options_for_boxes_are_named_and_an_export_refuses_them():
    with pytest.raises(ConfigError, match="boxes: got 'mask'; choose one of 'none', 'channel', 'crop', 'given'"):
        boxed("mask")
    with pytest.raises(ConfigError) as error:
        boxed("crop", crop_margin=-1, crop_size=0)
    assert "crop_margin: got -1" in str(error.value) and "crop_size: got 0" in str(error.value)
    assert any("boxes 'crop'" in reason for reason in obstacles(boxed("crop"))["onnx"])
