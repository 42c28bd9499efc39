"""SamSegmenter: equal to segment_anything where both can do it, and exact about everything else."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from samseg_monai.errors import ConfigError, WeightsError
from samseg_monai.networks import EMPTY_LOGIT, SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import SPECS
from samseg_monai.strategies import LoRA, ZeroShot
from samseg_monai.training.owned import count_trainable
from tests.helpers.reference_sam import reference_sam

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def image():
    return torch.randn(2, 1, 40, 64)


@pytest.fixture
def boxes():
    return torch.tensor([[5.0, 6, 40, 30], [20, 2, 60, 38]])


def tiny(*args, **kwargs):
    """The same random weights each time."""
    torch.manual_seed(0)
    return SamSegmenter("tiny", *args, **kwargs)


def count_encoder_calls(network):
    """Batch sizes the encoder will have seen."""
    seen = []
    network.sam.image_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


@torch.no_grad()
def test_equals_segment_anything_on_a_grey_image_with_a_box(boxes):
    network, theirs = tiny(input_scale="sam"), reference_sam(SPECS["tiny"])
    theirs.load_state_dict(network.sam.state_dict(), strict=True)
    grey = torch.randint(0, 256, (2, 1, 40, 64)).float()
    batch = [
        {"image": picture.expand(3, -1, -1), "original_size": (40, 64), "boxes": box[None]}
        for picture, box in zip(grey, boxes, strict=True)
    ]
    output = theirs(batch, multimask_output=False)
    expected = [theirs.postprocess_masks(o["low_res_logits"], (40, 64), (40, 64)) for o in output]
    # fused against plain attention, and one resize less, in float32
    torch.testing.assert_close(network(grey, boxes), torch.cat(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_boxes_it_runs_sam_without_a_prompt(boxes):
    network, theirs = tiny(prompt="none", input_scale="sam"), reference_sam(SPECS["tiny"])
    theirs.load_state_dict(network.sam.state_dict())
    grey = torch.randint(0, 256, (1, 1, 40, 64)).float()
    output = theirs([{"image": grey[0].expand(3, -1, -1), "original_size": (40, 64)}], multimask_output=False)[0]
    expected = theirs.postprocess_masks(output["low_res_logits"], (40, 64), (40, 64))
    torch.testing.assert_close(network(grey), expected, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="prompt='none'"):
        network(grey, boxes[:1])


@torch.no_grad()
def test_scans_are_averaged_as_logits(boxes):
    image = torch.randn(2, 4, 40, 64)
    each = [tiny()(image[:, [scan]], boxes) for scan in range(4)]
    torch.testing.assert_close(tiny(scans=4)(image, boxes), torch.stack(each).mean(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_three_equal_channels_equal_one_grey_scan(image, boxes):
    three = tiny(scans=3, scan_mode="channels")(image.expand(-1, 3, -1, -1), boxes)
    torch.testing.assert_close(three, tiny()(image, boxes), atol=1e-6, rtol=0)
    channels = torch.randn(2, 3, 40, 64)
    network = tiny(scans=3, scan_mode="channels")
    seen = count_encoder_calls(network)
    assert not torch.allclose(network(channels, boxes), network(channels.flip(1), boxes), atol=1e-4)
    assert seen == [2, 2]


@torch.no_grad()
def test_a_batch_equals_a_loop_over_its_images(image, boxes):
    single = [tiny()(image[[i]], boxes[[i]]) for i in range(2)]
    torch.testing.assert_close(tiny()(image, boxes), torch.cat(single), atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_boxes_are_joined_by_their_largest_logit_and_encoded_once(boxes):
    network = tiny(scans=2)
    image = torch.randn(2, 2, 40, 64)
    seen = count_encoder_calls(network)
    other = torch.tensor([[1.0, 1, 9, 9], [NAN, NAN, NAN, NAN]])
    logits = network(image, torch.stack([boxes, other], dim=1))
    assert seen == [4]
    first, second = network(image, boxes), network(image[:1], other[:1])
    torch.testing.assert_close(logits[0], torch.maximum(first[0], second[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], first[1], atol=1e-5, rtol=0)
    assert (logits[0] > first[0] + 1e-4).any()


@torch.no_grad()
def test_an_image_without_a_box_is_empty_and_never_encoded(image, boxes):
    network = tiny()
    expected = network(image, boxes)
    seen = count_encoder_calls(network)
    boxes[1, 2] = NAN
    logits = network(image, boxes)
    assert seen == [1]
    torch.testing.assert_close(logits[0], expected[0], atol=1e-5, rtol=0)
    assert (logits[1] == EMPTY_LOGIT).all()
    assert (network(image, torch.full((2, 3, 4), NAN)) == EMPTY_LOGIT).all()
    assert seen == [1]


def test_a_training_batch_without_any_box_still_reaches_every_owned_tensor(image):
    network = tiny(LoRA(2, decoder=True)).train()
    logits = network(image, torch.full((2, 4), NAN))
    assert (logits == EMPTY_LOGIT).all()
    logits.sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert gradients.keys() == set(network.owned)
    assert all((gradient == 0).all() for gradient in gradients.values())


@torch.no_grad()
def test_k_classes_give_k_and_background_maps(image, boxes):
    network = tiny(num_classes=4)
    boxes[1] = NAN
    logits = network(image, boxes)
    assert logits.shape == (2, 5, 40, 64) and network.channels_out == 5
    assert (logits[1].argmax(0) == 0).all() and (logits[1, 1:] == EMPTY_LOGIT).all()
    both = network(image, torch.stack([boxes, boxes.roll(1, 0)], 1))
    assert both.shape == logits.shape


@torch.no_grad()
def test_k_classes_join_boxes_by_smallest_background(image, boxes):
    network = tiny(num_classes=2)
    first, second = network(image, boxes), network(image, boxes.flip(0))
    both = network(image, torch.stack([boxes, boxes.flip(0)], 1))
    torch.testing.assert_close(both[:, 1:], torch.maximum(first, second)[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, :1], torch.minimum(first, second)[:, :1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_stored_embedding_replaces_the_encoder(boxes):
    network = tiny(scans=2)
    image = torch.randn(2, 2, 40, 64)
    embedding = network.encode(image)
    expected = network(image, boxes)
    seen = count_encoder_calls(network)
    for given in (embedding, embedding.unflatten(0, (2, 2))):
        torch.testing.assert_close(network(image, boxes, given), expected, atol=1e-6, rtol=0)
    boxes[0] = NAN
    torch.testing.assert_close(network(image, boxes, embedding)[1], expected[1], atol=1e-5, rtol=0)
    assert seen == []


@torch.no_grad()
def test_a_side_network_sees_the_image_the_embedding_and_the_taps(image, boxes):
    class Side(nn.Module):
        taps = (0, 1)

        def forward(self, image, embedding, taps):
            self.shapes = [tuple(image.shape), tuple(embedding.shape), *(tuple(tap.shape) for tap in taps)]
            return embedding * self.factor

    network = tiny()
    expected = network(image, boxes)
    network.side = Side()
    network.side.factor = 1.0
    torch.testing.assert_close(network(image, boxes), expected, atol=1e-6, rtol=0)
    assert network.side.shapes == [(2, 3, 64, 64), (2, 32, 4, 4), (2, 4, 4, 32), (2, 4, 4, 32)]
    network.side.factor = 0.0
    assert not torch.allclose(network(image, boxes), expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (33, 20)])
def test_rectangular_input_gives_logits_of_the_input_size(boxes, shape):
    image, square, oblong = torch.randn(2, 1, *shape), tiny(), tiny(rectangular=True)
    grid = tuple(-(-side // 16) for side in shape)
    assert oblong.encode(image).shape[-2:] == grid and square.encode(image).shape[-2:] == (4, 4)
    assert oblong(image, boxes).shape == square(image, boxes).shape == (2, 1, *shape)
    if shape == (64, 64):
        torch.testing.assert_close(oblong(image, boxes), square(image, boxes), atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_follows_normalisation():
    network = tiny(input_scale="sam")
    prepared = network._prepare(torch.zeros(1, 1, 40, 30))
    expected = -network.sam.pixel_mean.flatten() / network.sam.pixel_std.flatten()
    torch.testing.assert_close(prepared[0, :, 0, 0], expected)
    assert prepared.shape == (1, 3, 64, 64) and (prepared[..., 40:, :] == 0).all() and (prepared[..., 30:] == 0).all()


@torch.no_grad()
def test_a_slice_by_itself_is_brought_to_zero_to_one():
    network, plain = tiny(input_scale="slice", scans=2), tiny(input_scale="unit", scans=2)
    image, boxes = torch.randn(2, 2, 64, 48), torch.tensor([[3.0, 4, 40, 50], [1, 2, 20, 60]])
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    torch.testing.assert_close(network(image, boxes), plain((image - low) / (high - low), boxes))
    torch.testing.assert_close(network(7 * image + 3, boxes), network(image, boxes), atol=1e-4, rtol=0)
    assert network(torch.zeros(1, 2, 64, 48), boxes[:1]).isfinite().all()


def test_bf16_runs_the_encoder_only_and_stays_close(image, boxes):
    full, mixed = tiny(), tiny(autocast="bf16")
    logits = mixed(image, boxes)
    assert logits.dtype == torch.float32 and {p.dtype for p in mixed.parameters()} == {torch.float32}
    difference = (logits - full(image, boxes)).abs().max() / full(image, boxes).std()
    assert 0 < difference < 0.1  # bf16 keeps 8 bits; two blocks and a neck lose a few of them
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a trainer's own autocast leaves the decoder in float32 too
        torch.testing.assert_close(full(image, boxes), logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_meta_tensors_and_integers_are_taken_and_plain_floats_returned(boxes):
    image = torch.randint(0, 256, (2, 1, 40, 64), dtype=torch.uint8)
    logits = tiny(input_scale="sam")(MetaTensor(image), MetaTensor(boxes))
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, tiny(input_scale="sam")(image.float(), boxes))


def test_checkpointing_gives_the_same_gradients(image, boxes):
    gradients = []
    for checkpointing in (False, True):
        network = tiny(LoRA(2), checkpointing=checkpointing).train()
        network(image, boxes).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scan_mode": "sum"}, "scan_mode: got 'sum'; choose one of 'mean_logits', 'mean_prob"),
        ({"input_scale": "255"}, "input_scale: got '255'"),
        ({"prompt": "point"}, "prompt: got 'point'"),
        ({"autocast": "fp16"}, "autocast: got 'fp16'; choose one of None, 'bf16', 'bf16_all'"),
        ({"low_res_training": True}, "low_res_training: got true with prompts"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"scans": 4, "scan_mode": "channels"}, "needs exactly 3"),
        ({"image_size": 50}, "multiple of its patch size 16"),
    ],
)
def test_wrong_arguments_say_what_is_needed(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SamSegmenter("tiny", **arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 40, 64)], r"image: got shape \(2, 3, 40, 64\), expected \(B, 1, H, W\)"),
        ([(1, 40, 64)], r"image: got shape \(1, 40, 64\)"),
        ([(2, 1, 65, 64)], "at most 64"),
        ([(2, 1, 40, 64), (1, 4)], r"boxes: got shape \(1, 4\), expected \(B, 4\) or \(B, N, 4\) with B=2"),
        ([(2, 1, 40, 64), (2, 5)], r"boxes: got shape \(2, 5\)"),
        ([(2, 1, 40, 64), (2, 4), (1, 2, 32, 4, 3)], r"embedding: got .*\(2, 32, 4, 3\), expected \(2, 32, 4, 4\)"),
        ([(2, 1, 40, 64), (2, 4), (2, 32, 3, 4)], r"embedding: got .*\(2, 32, 3, 4\), expected \(2, 32, 4, 4\)"),
    ],
)
def test_wrong_input_says_what_was_got_and_expected(shapes, message):
    with pytest.raises(ConfigError, match=message):
        tiny()(*(torch.zeros(shape) for shape in shapes))


def test_load_base_remembers_what_it_loaded(tmp_path):
    other = build_sam("tiny")
    torch.save(other.state_dict(), tmp_path / "tiny.pth")
    network = tiny(LoRA(2))
    assert network.base_sha256 is None
    report = network.load_base(tmp_path / "tiny.pth")
    assert network.base_sha256 == report.sha256 and len(report.sha256) == 64
    assert all(torch.equal(network.sam.state_dict()[name], value) for name, value in other.state_dict().items())
    assert count_trainable(network) > 0
    network.load_base("random")
    assert network.base_sha256 == "random"
    with pytest.raises(WeightsError, match="sam_checkpoint"):
        network.load_base(tmp_path / "absent.pth")


def test_a_new_mask_head_that_nobody_trains_is_refused(tmp_path):
    torch.save(build_sam("tiny").state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ConfigError, match="num_classes=8 needs a new mask head"):
        tiny(LoRA(2), num_classes=8).load_base(tmp_path / "tiny.pth")
    with pytest.raises(ConfigError, match="use a strategy that trains the decoder"):
        tiny(num_classes=8).load_base(tmp_path / "tiny.pth")
    for strategy in (LoRA(2), ZeroShot()):  # of a random start, too, nobody trains the masks
        with pytest.raises(ConfigError, match="use a strategy that trains the decoder"):
            tiny(strategy, num_classes=8).load_base("random")
    for strategy in (LoRA(2, decoder=True), ZeroShot(random_masks=True)):  # the second is noise on purpose
        tiny(strategy, num_classes=8).load_base("random")
        report = tiny(strategy, num_classes=8).load_base(tmp_path / "tiny.pth")
        assert any(name.startswith("mask_decoder.mask_tokens") for name in report.skipped)


def test_owned_normalisation_keeps_learning_its_statistics():
    network = tiny()
    network.side = nn.BatchNorm2d(32)
    network.owned = ["side.running_mean"]
    assert network.train().side.training
    network.owned = []
    assert not network.train().side.training
