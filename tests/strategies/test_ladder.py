"""The ladder: equal to the equations of its paper, with any side network, with stored embeddings, in any precision.

``golden/ladder_paper.json`` is written by ``python -m tests.strategies.test_ladder``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import nn
from torchvision.models import resnet18

from samseg_monai.adapters import FeatureMap, GatedSide, ResNetSide
from samseg_monai.checkpoints import load_adapter, load_trained, read_card, save_adapter
from samseg_monai.errors import AdapterError, CheckpointError, ConfigError, WeightsError
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.vit import ViTSpec
from samseg_monai.sam.weights import ENVIRONMENT, KNOWN, WeightsFile, sha256_of
from samseg_monai.strategies import Ladder, LoRA, ZeroShot
from tests.helpers.reference_sam import reference_sam

GOLDEN = Path(__file__).parents[1] / "golden" / "ladder_paper.json"
# the decoder's width is that of SAM and of ResNet18's third stage, so that nothing is projected, as published
PAPER = ViTSpec("narrow", 32, 2, 2, (1,), window_size=3, image_size=64, decoder_mlp_dim=64, iou_hidden_dim=32)
PUBLISHED = {"decoder": "upscaling", "masks": "random"}
EIGHT = {"num_classes": 8, "prompt": "none"}


class SmallSide(nn.Sequential):
    """Stride 16, the channels of SAM "tiny", no running statistics."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 32, 4, 4))


def fill(network, seed=0):
    """Values that depend on names and seed alone, and of a size that keeps every layer's output alive."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(network.state_dict().items()):
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=rng)
            if name.endswith("running_var"):
                values = 1 + 0.2 * values.abs()
            elif tensor.ndim > 1:
                values *= (2 / tensor[0].numel()) ** 0.5
            else:
                values = 0.1 * values + (1 if "norm" in name or "bn" in name else 0) * name.endswith("weight")
            tensor.copy_(values)
    return network


def segmenter(variant="tiny", strategy=None, *, seed=0, **arguments):
    strategy = Ladder(SmallSide()) if strategy is None else strategy
    return fill(SamSegmenter(variant, strategy, **{**EIGHT, **arguments}), seed)


def images(*, width=64):
    return torch.randn(2, 1, 64, width, generator=torch.Generator().manual_seed(5))


def trainable(network):
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def count_encoder_calls(network):
    seen = []
    network.sam.image_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """SAM "tiny" with its own three masks and the single one."""
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(fill(build_sam("tiny"), 3).state_dict(), path)
    return path


# --- the equations of the paper --------------------


def decode_all(sam, embedding):
    """Low-resolution logits of all masks of one image (1, C, h, w), without a prompt."""
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    assert sparse.shape == (1, 0, embedding.shape[1])
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None]
    seen, source = decoder.transformer(embedding + dense, sam.prompt_encoder.get_dense_pe(), tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).view_as(embedding))[0]
    kernels = [network(seen[:, 1 + index]) for index, network in enumerate(decoder.output_hypernetworks_mlps)]
    return torch.stack([(kernel[0, :, None, None] * upscaled).sum(0) for kernel in kernels])[None]


def paper_forward(sam, cnn, alpha, image):
    """Quarter-resolution logits (B, K + 1, h/4, w/4) of padded images (B, 3, h, w): equation 3 and SAM's decoder."""
    features = cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(image))))
    features = cnn.layer3(cnn.layer2(cnn.layer1(features)))
    gate = 1 / (1 + (-alpha).exp())
    mixed = gate * sam.image_encoder(image) + (1 - gate) * features
    return torch.cat([decode_all(sam, one[None]) for one in mixed])


@pytest.fixture(scope="module")
def pair():
    """Ours and theirs with exchanged weights, alpha far from where both halves weigh the same."""
    ours = segmenter(PAPER, Ladder(**PUBLISHED), low_res_training=True)
    ours.side.alpha.data.fill_(0.7)
    sam, cnn = reference_sam(PAPER, masks=8), resnet18()
    sam.load_state_dict(ours.sam.state_dict(), strict=True)
    lacks, unknown = cnn.load_state_dict(ours.side.net.state_dict(), strict=False)
    assert unknown == [] and {name.split(".")[0] for name in lacks} == {"layer4", "fc"}
    return ours, sam, cnn.eval()


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 48])
def test_the_published_ladder_equals_the_equations_of_its_paper(pair, width):
    ours, sam, cnn = pair
    image = images(width=width)
    padded = F.pad(image, (0, 64 - width)).repeat(1, 3, 1, 1)
    low = paper_forward(sam, cnn, torch.tensor(0.7), padded)
    expected = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=False)[..., :width]
    logits = ours.eval()(image)
    assert logits.shape == (2, 9, 64, width) and expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for half in (-20.0, 20.0):  # both halves of the mixture are seen: neither alone gives these logits
        assert (paper_forward(sam, cnn, torch.tensor(half), padded) - low).abs().max() > 0.1


def test_in_training_it_returns_the_decoders_own_logits_and_moves_the_same_statistics(pair):
    ours, sam, cnn = pair
    state = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    image, padded = images(width=48), F.pad(images(width=48), (0, 16)).repeat(1, 3, 1, 1)
    try:
        with torch.no_grad():
            expected = paper_forward(sam, cnn.train(), torch.tensor(0.7), padded)
            logits = ours.train()(image)
        assert logits.shape == (2, 9, 16, 12)
        torch.testing.assert_close(logits, expected[..., :12], atol=1e-4, rtol=0)
        moved = cnn.state_dict()["layer3.1.bn2.running_mean"]
        torch.testing.assert_close(ours.side.net.state_dict()["layer3.1.bn2.running_mean"], moved)
        assert not torch.equal(moved, state["layer3.1.bn2.running_mean"])
    finally:  # the pair is shared
        cnn.load_state_dict(state)
        ours.side.net.load_state_dict({name: state[name] for name in ours.side.net.state_dict()})
        cnn.eval(), ours.eval()


@torch.no_grad()
def golden_facts():
    """Numbers of the published ladder on SAM "tiny" (so with a projection) with filled weights."""
    network = segmenter("tiny", Ladder(**PUBLISHED), seed=11)
    logits = network(images())
    return {
        "gate": network.side.gate,
        "std": logits.std().item(),
        "logits": [round(value, 6) for value in logits[:, :, 5::24, 9::24].flatten().tolist()],
    }


def test_golden_logits_stay():
    golden, found = json.loads(GOLDEN.read_text()), golden_facts()
    assert golden["std"] > 0.1 and len(golden["logits"]) == 2 * 9 * 3 * 3
    assert found["gate"] == pytest.approx(golden["gate"], abs=1e-6)
    assert found["std"] == pytest.approx(golden["std"], abs=1e-4)
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(golden["logits"]), atol=2e-4, rtol=0)


# --- any side network --------------------


SWIN = {
    "_target_": "samseg_monai.adapters.FeatureMap",
    "index": 3,
    "net": {
        "_target_": "monai.networks.nets.swin_unetr.SwinTransformer",
        "in_chans": 3, "embed_dim": 24, "window_size": [7, 7], "patch_size": [2, 2],
        "depths": [1, 1, 1, 1], "num_heads": [3, 3, 3, 3], "spatial_dims": 2,
    },
}  # fmt: skip
CONVNEXT = (
    "$torchvision.models.convnext.ConvNeXt([torchvision.models.convnext.CNBlockConfig(*sizes) "
    "for sizes in ((8, 16, 1), (16, WIDTH, 1), (WIDTH, None, 1))], layer_scale=1.0).features"
)


def from_json(side):
    parser = ConfigParser(
        {
            "imports": ["$import torchvision"],
            "network": {
                "_target_": "samseg_monai.networks.SamSegmenter",
                "sam_variant": "tiny",
                "strategy": {"_target_": "samseg_monai.strategies.Ladder", "side": side},
                **EIGHT,
            },
        }
    )
    parser.parse()
    parser.get_parsed_content("imports")
    return parser.get_parsed_content("network")


@pytest.mark.parametrize(
    ("side", "channels", "idle"),
    [
        (SWIN, 192, "side.net.net.layers4."),  # MONAI always runs its last stage, though the map is taken before it
        (CONVNEXT.replace("WIDTH", "40"), 40, None),
        (CONVNEXT.replace("WIDTH", "32"), 32, None),
    ],
    ids=["swin", "convnext", "convnext of SAM's width"],
)
def test_other_side_networks_come_from_json_and_learn(side, channels, idle):
    network = from_json(side)
    projection = [f"side.project.{name}" for name in ("weight", "bias")] if channels != 32 else []
    assert [name for name in network.owned if name.startswith("side.project")] == projection
    if projection:
        assert network.side.project.weight.shape == (32, channels, 1, 1)
    assert network.side(network._prepare(images()), torch.zeros(2, 32, 4, 4), []).shape == (2, 32, 4, 4)
    target = torch.randint(9, (2, 64, 64))
    F.cross_entropy(network.train()(images()), target).backward()
    still = [n for n, p in trainable(network).items() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []
    left_out = [name for name in network.unused if name.startswith("side.")]
    assert bool(left_out) == (idle is not None)
    assert all(name.startswith(idle) and name not in network.owned for name in left_out)
    assert any(name.startswith("side.net.") for name in trainable(network))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (nn.Conv2d(3, 32, 8, 8), r"Conv2d: an image \(1, 3, 64, 64\) gives shape \(1, 32, 8, 8\), expected \(1, C, 4"),
        (FeatureMap(nn.Conv2d(3, 32, 16, 16), 0), r"FeatureMap: .* gives shape \(32, 4, 4\)"),
        (nn.Conv2d(1, 32, 16, 16), r"Conv2d failed on an image \(1, 3, 64, 64\): .*must map an image \(B, 3, H, W\)"),
        (FeatureMap(nn.Conv2d(3, 32, 16, 16), 7), r"FeatureMap failed on an image .*index"),
    ],
    ids=["stride 8", "three dimensions", "one channel in", "no such map"],
)
def test_a_side_network_that_does_not_fit_says_why_and_leaves_the_segmenter_usable(side, message):
    network = segmenter(strategy=ZeroShot(random_masks=True))
    before, names = network(images()), list(network.state_dict())
    network.merge()  # now it is without a strategy
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        Ladder(side).install(network)
    assert network.side is None and list(network.state_dict()) == names
    assert torch.equal(network(images()), before)
    with pytest.raises(AdapterError, match="side network"):
        SamSegmenter("tiny", Ladder(side), **EIGHT)


def test_a_list_of_feature_maps_needs_a_choice_and_gets_one():
    class Pyramid(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.maps = kind, nn.ModuleList([nn.Conv2d(3, 8, 8, 8), nn.Conv2d(3, 32, 16, 16)])

        def forward(self, image):
            return self.kind((key, layer(image)) for key, layer in enumerate(self.maps))

    def listed(pairs):
        return [value for _, value in pairs]

    with pytest.raises(AdapterError, match=r"gives a list, expected .*samseg_monai\.adapters\.FeatureMap"):
        Ladder(Pyramid(listed)).install(segmenter_without_strategy())
    for kind in (listed, dict):
        assert GatedSide(FeatureMap(Pyramid(kind), 1), 32).net.index == 1
        with pytest.raises(AdapterError, match=r"\(1, 8, 8, 8\)"):
            GatedSide(FeatureMap(Pyramid(kind), 0), 32)
        with pytest.raises(AdapterError, match="FeatureMap failed"):
            GatedSide(FeatureMap(Pyramid(kind), 2), 32)


def segmenter_without_strategy():
    network = SamSegmenter("tiny", **EIGHT)
    network.merge()
    return network


def test_trying_a_side_network_leaves_its_statistics_and_its_mode():
    net = nn.Sequential(nn.Conv2d(3, 32, 16, 16), nn.BatchNorm2d(32)).train()
    GatedSide(net, 32)
    assert net.training and net[1].num_batches_tracked == 0


def test_wrong_arguments_are_all_named_at_once():
    with pytest.raises(AdapterError) as error:
        Ladder(SmallSide(), mix="half", decoder="tokens", masks="own")
    text = str(error.value)
    assert "3 problems" in text and "mix: got 'half'; choose one of 'gate', 'side', 'sam'" in text
    assert "decoder: got 'tokens'; choose one of 'upscaling', 'masks', 'full'" in text and "masks: got 'own'" in text
    with pytest.raises(AdapterError, match="mix='sam' has none"):
        Ladder(SmallSide(), mix="sam")


def test_quarter_resolution_is_for_networks_without_prompts():
    with pytest.raises(ConfigError, match="low_res_training: got true with prompts"):
        SamSegmenter("tiny", Ladder(SmallSide()), low_res_training=True)


# --- embeddings from before --------------------


MIXES = {"gate": lambda: Ladder(SmallSide()), "side": lambda: Ladder(SmallSide(), mix="side"),
         "sam": lambda: Ladder(mix="sam")}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_a_stored_embedding_gives_the_same_output_and_the_encoder_rests(mix, autocast):
    network = segmenter(strategy=MIXES[mix](), scans=2, autocast=autocast)
    image = torch.cat([images(), images().flip(2)], dim=1)
    embedding = network.encode(image)
    seen = count_encoder_calls(network)
    expected = network(image)
    assert seen == ([] if mix == "side" else [4])
    seen.clear()
    for given in (embedding, embedding.unflatten(0, (2, 2))):
        torch.testing.assert_close(network(image, embedding=given), expected, atol=1e-5, rtol=0)
    rounded = network(image, embedding=embedding.bfloat16())
    # eight bits of each embedded value: relative to the spread of the logits a few per cent at most
    assert (rounded - expected).abs().max() / expected.std() < 0.05
    assert seen == []
    other = network(image, embedding=embedding.roll(1, 0))
    assert torch.equal(other, expected) == (mix == "side")


def test_gradients_are_equal_with_and_without_a_stored_embedding():
    network, target = segmenter(strategy=Ladder(SmallSide(), decoder="full"), low_res_training=True).train(), None
    embedding, gradients = network.encode(images()), []
    assert not embedding.requires_grad
    for given in (None, embedding):
        network.zero_grad()
        logits = network(images(), embedding=given)
        target = torch.randint(9, logits[:, 0].shape) if target is None else target
        F.cross_entropy(logits, target).backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(network).items()})
    assert len(gradients[0]) > 50 and max(g.abs().max() for g in gradients[0].values()) > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_an_embedding_is_known_by_everything_it_depends_on_and_nothing_else():
    def identity(**arguments):
        return segmenter(**arguments).embedding_identity()

    network = segmenter()
    first = network.embedding_identity()
    assert json.loads(json.dumps(first)) == first and len(first["encoder_sha256"]) == 64
    network.side.alpha.fill_(2)
    network.side.net[0].weight.add_(1)
    network.sam.mask_decoder.mask_tokens.weight.add_(1)
    assert network.embedding_identity() == first == identity(strategy=Ladder(SmallSide(), mix="side"))
    assert first == identity(strategy=ZeroShot(random_masks=True))
    others = [identity(image_size=32), identity(input_scale="sam"), identity(autocast="bf16"), identity(seed=1)]
    network.sam.image_encoder.neck[0].weight[0, 0].add_(1e-6)
    others.append(network.embedding_identity())
    network.sam.image_encoder.load_state_dict(segmenter(seed=2).sam.image_encoder.state_dict())
    others.append(network.embedding_identity())
    texts = {json.dumps(one, sort_keys=True) for one in [first, *others]}
    assert len(texts) == 7


def test_only_frozen_encoders_have_embeddings_that_last():
    assert segmenter().encoder_frozen and segmenter(strategy=ZeroShot(True)).encoder_frozen
    assert not segmenter(strategy=LoRA(2, decoder=True)).encoder_frozen


# --- what the side network starts from --------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the layout of torchvision's ResNet18, with its last stage and classifier."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save({k: v + 1 if "running" in k else v for k, v in resnet18().state_dict().items()}, path)
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_a_resnet18_file_loads_by_name(published, base):
    network = SamSegmenter("tiny", Ladder(side_weights=str(published)), **EIGHT)
    network.load_base(base)
    state = torch.load(published)
    assert len(network.side.net.state_dict()) == 90
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.side.net.state_dict().items())
    assert network.base_sha256 == sha256_of(base)


def test_a_file_from_before_batches_were_counted_loads_too(published, base, tmp_path):
    state = {k: v for k, v in torch.load(published).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    network = SamSegmenter("tiny", Ladder(side_weights=str(tmp_path / "old.pth")), **EIGHT)
    network.load_base(base)
    assert torch.equal(network.side.net.layer3[1].bn2.running_var, state["layer3.1.bn2.running_var"])


def test_a_file_that_does_not_fit_names_every_tensor_and_loads_none(published, base, tmp_path):
    state = torch.load(published)
    del state["layer3.1.conv2.weight"]
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, tmp_path / "other.pth")
    network = SamSegmenter("tiny", Ladder(side_weights=str(tmp_path / "other.pth")), **EIGHT)
    before = network.side.net.bn1.running_mean.clone()
    with pytest.raises(WeightsError) as error:
        network.load_base(base)
    text = str(error.value)
    assert "does not fit the side network ResNetSide (2 problems)" in text and "other.pth" in text
    assert "conv1.weight: shape (64, 1, 7, 7), the network has (64, 3, 7, 7)" in text
    assert "layer3.1.conv2.weight: missing, the network has (256, 256, 3, 3)" in text
    assert torch.equal(network.side.net.bn1.running_mean, before)
    absent = SamSegmenter("tiny", Ladder(side_weights=str(tmp_path / "absent.pth")), **EIGHT)
    with pytest.raises(WeightsError, match=r"side_weights '.*absent\.pth' is not a file"):
        absent.load_base(base)


def test_random_reads_nothing_and_neither_does_a_network_without_published_weights(base, offline, monkeypatch):
    monkeypatch.setattr("samseg_monai.strategies.ladder.read_state", None)
    for strategy in (Ladder(side_weights="random"), Ladder(SmallSide()), Ladder(mix="sam")):
        network = SamSegmenter("tiny", strategy, **EIGHT)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.startswith("side.")}
        network.load_base(base, download=False)
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_absent_published_weights_are_one_error_with_everything_needed(base, offline, published, monkeypatch):
    network = SamSegmenter("tiny", Ladder(), **EIGHT)
    with pytest.raises(WeightsError) as error:
        network.load_base(base, download=False)
    known = KNOWN["resnet18"]
    facts = [known.url, known.sha256, known.name, "side_weights", "'random'", ENVIRONMENT]
    assert [fact for fact in facts if fact not in str(error.value)] == []
    assert "sam_checkpoint" not in str(error.value)
    network.load_base(base, download=False, start=False)  # an adapter comes next
    assert network.base_sha256 == sha256_of(base)
    named = WeightsFile(published.name, known.url, published.stat().st_size, sha256_of(published))
    monkeypatch.setitem(KNOWN, "resnet18", named)
    monkeypatch.setenv(ENVIRONMENT, str(published.parent))
    network.load_base(base, download=False)
    assert torch.equal(network.side.net.conv1.weight, torch.load(published)["conv1.weight"])


def test_a_trained_ladder_never_looks_for_what_it_started_from(base, offline, published, tmp_path):
    network = SamSegmenter("tiny", Ladder(side_weights=str(published)), **EIGHT)
    network.load_base(base)
    save_adapter(network, tmp_path)
    fresh = SamSegmenter("tiny", Ladder(), **EIGHT)
    assert "strategies.Ladder" in load_trained(fresh, checkpoint=tmp_path, sam_checkpoint=base)
    assert torch.equal(fresh(images()), network(images()))


# --- masks of another number than SAM's --------------------


HEAD = "sam.mask_decoder."


def head_of(network):
    decoder = network.sam.mask_decoder
    return decoder.mask_tokens.weight, [dict(mlp.named_parameters()) for mlp in decoder.output_hypernetworks_mlps]


@pytest.mark.parametrize("classes", [2, 8])
@pytest.mark.parametrize("decoder", ["upscaling", "full"])
def test_sams_own_masks_are_repeated_in_turn(base, classes, decoder):
    network = segmenter(strategy=Ladder(SmallSide(), decoder=decoder, masks="sam"), num_classes=classes)
    quality = network.sam.mask_decoder.iou_prediction_head.layers[2].weight.clone()
    report = network.load_base(base)
    state = torch.load(base)
    tokens, networks = head_of(network)
    assert len(tokens) == len(networks) == classes + 1
    for index in range(classes + 1):
        assert torch.equal(tokens[index], state["mask_decoder.mask_tokens.weight"][index % 4])
        for name, tensor in networks[index].items():
            key = f"mask_decoder.output_hypernetworks_mlps.{index % 4}.{name}"
            assert torch.equal(tensor, state[key]), key
    assert not torch.equal(tokens[0], tokens[1])
    assert {name.split(".")[1] for name in report.skipped if "hypernetworks" not in name} == {"iou_prediction_head"}
    assert torch.equal(network.sam.mask_decoder.iou_prediction_head.layers[2].weight, quality)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ladder(SmallSide(), masks="random"),
        lambda: Ladder(SmallSide(), **PUBLISHED),
        lambda: LoRA(2, decoder=True),
        lambda: ZeroShot(random_masks=True),
    ],
    ids=["ladder", "ladder_paper", "lora", "zero_shot"],
)
def test_elsewhere_a_mask_head_of_another_size_stays_as_it_was_built(base, make):
    network = segmenter(strategy=make())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.startswith(HEAD)}
    report = network.load_base(base)
    kept = {name for name, tensor in before.items() if torch.equal(network.state_dict()[name], tensor)}
    assert kept == {f"sam.{name}" for name in report.skipped} & before.keys()
    assert {name.split(".")[2] for name in kept} == {"mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head"}


@pytest.mark.parametrize("masks", ["sam", "random"])
def test_three_classes_take_sams_masks_as_they_are(base, masks):
    network = segmenter(strategy=Ladder(SmallSide(), masks=masks), num_classes=3)
    report = network.load_base(base)
    assert report.skipped == ()
    state = torch.load(base)
    assert all(torch.equal(network.sam.state_dict()[name], tensor) for name, tensor in state.items())


# --- its card, its gate, its precision --------------------


def test_the_gate_is_a_fact_of_the_card(tmp_path):
    network = segmenter()
    network.base_sha256 = "any"
    network.side.alpha.data.fill_(-0.3)
    gate = torch.sigmoid(torch.tensor(-0.3)).item()
    assert network.strategy.facts(network) == {"gate": pytest.approx(gate, abs=1e-6)}
    save_adapter(network, tmp_path)
    assert read_card(tmp_path)["gate"] == pytest.approx(gate, abs=1e-6)
    for mix in ("side", "sam"):
        other = segmenter(strategy=MIXES[mix]())
        assert other.strategy.facts(other) == {}
    assert SamSegmenter("tiny", Ladder(SmallSide()), **EIGHT).strategy.facts(network) == {"gate": pytest.approx(gate)}


def test_the_card_says_how_the_side_network_was_built():
    sides = {
        ResNetSide(): {},
        ResNetSide(8): {"width": 8},
        FeatureMap(nn.Conv2d(3, 8, 16, stride=16), -1): {
            "net": {
                "_target_": "torch.nn.modules.conv.Conv2d", "in_channels": 3, "out_channels": 8,
                "kernel_size": [16, 16], "stride": [16, 16], "padding": [0, 0], "dilation": [1, 1],
            },
            "index": -1,
        },
    }  # fmt: skip
    for side, built in sides.items():
        assert Ladder(side, mix="side").facts(nn.Module()) == ({"side_arguments": built} if built else {})
    assert Ladder(mix="sam").facts(nn.Module()) == {}


def test_the_card_refuses_another_ladder_but_not_another_start(tmp_path):
    network = segmenter(strategy=Ladder(SmallSide(), masks="sam", side_weights="random"))
    network.base_sha256 = "any"
    save_adapter(network, tmp_path)
    other = segmenter(strategy=Ladder(nn.Conv2d(3, 32, 16, 16), decoder="full", mix="side"))
    same = segmenter(strategy=Ladder(SmallSide(), masks="random"), seed=1)
    other.base_sha256 = same.base_sha256 = "any"
    with pytest.raises(CheckpointError) as error:
        load_adapter(other, tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert {line.removeprefix("  - ").split(":")[0] for line in lines} == {
        "strategy side", "strategy mix", "strategy decoder"
    }  # fmt: skip
    assert "torch.nn.modules.conv.Conv2d" in str(error.value)
    load_adapter(same, tmp_path)
    assert all(torch.equal(same.state_dict()[name], network.state_dict()[name]) for name in network.owned)


@torch.no_grad()
@pytest.mark.parametrize(("autocast", "tolerance"), [("bf16", 0.03), ("bf16_all", 0.06)])
def test_mixed_precision_stays_close_and_returns_float32(autocast, tolerance):
    full, mixed = segmenter(), segmenter(autocast=autocast)
    expected, logits = full(images()), mixed(images())
    assert logits.dtype == torch.float32 and {p.dtype for p in mixed.parameters()} == {torch.float32}
    # bf16 keeps eight bits, and rounds once per layer
    assert 0 < (logits - expected).std() / expected.std() < tolerance


def test_bf16_all_runs_the_decoder_in_bf16_but_never_the_position_codes():
    network, seen = segmenter(autocast="bf16_all"), {}
    decoder = network.sam.mask_decoder
    decoder.register_forward_pre_hook(lambda module, inputs: seen.update(position=inputs[1]))
    decoder.output_upscaling[0].register_forward_hook(lambda module, inputs, output: seen.update(inside=output))
    network(images())
    assert seen["inside"].dtype == torch.bfloat16
    assert torch.equal(seen["position"], network.sam.prompt_encoder.get_dense_pe((4, 4)))
    network.autocast = "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a trainer's own leaves the decoder alone
        network(images())
    assert seen["inside"].dtype == torch.float32 and seen["position"].dtype == torch.float32


def test_mixed_precision_gradients_reach_everything_and_stay_close():
    gradients = {}
    for autocast in (None, "bf16_all"):
        network = segmenter(autocast=autocast, low_res_training=True).train()
        target = torch.arange(2 * 16 * 16).view(2, 16, 16) % 9
        F.cross_entropy(network(images()), target).backward()
        gradients[autocast] = torch.cat([p.grad.flatten() for p in trainable(network).values()])
    assert gradients["bf16_all"].dtype == torch.float32
    assert F.cosine_similarity(gradients[None], gradients["bf16_all"], dim=0) > 0.99


def write_golden() -> None:
    """Write what the published ladder computes now; a change of the file is a change of every trained ladder."""
    GOLDEN.write_text(json.dumps(golden_facts(), indent=1) + "\n")


if __name__ == "__main__":
    write_golden()


def test_a_narrow_resnet_is_a_quarter_of_the_work_and_has_no_published_weights():
    published, narrow = ResNetSide(), ResNetSide(32)
    torchvision_keys = {name: tensor.shape for name, tensor in resnet18().state_dict().items()}
    assert {name: tensor.shape for name, tensor in published.state_dict().items()}.items() <= torchvision_keys.items()
    assert narrow.state_dict().keys() == published.state_dict().keys()
    assert [published.published, narrow.published] == ["resnet18", None]
    assert narrow(images().expand(-1, 3, -1, -1)).shape == (2, 128, 4, 4)
    assert 3.8 < weights_of_convolutions(published) / weights_of_convolutions(narrow) < 4.0  # conv1 halves only
    # nothing to look up: a start without weights needs no word of the user
    segmenter(strategy=Ladder(ResNetSide(8))).load_base("random")
    with pytest.raises(AdapterError, match="width must be at least 1"):
        ResNetSide(0)


def weights_of_convolutions(net: nn.Module) -> int:
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Conv2d))
