"""SAM under other projects' names: any prefix, Hugging Face, and trained networks of SAMed and SAM-LST.

The oracles compute what the other project publishes, written anew here from its paper, and know nothing of our names.
"""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from samseg_monai.adapters import FeatureMap
from samseg_monai.checkpoints import load_adapter, load_trained, save_adapter, save_model
from samseg_monai.errors import CheckpointError, WeightsError
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.vit import ViTSpec
from samseg_monai.sam.weights import is_sam_lst, is_samed, load_sam_weights, read_state, sha256_of
from samseg_monai.sam.weights.read import common_prefix, hugging_face_name
from samseg_monai.strategies import Ladder, LoRA

CLASSES = 3
# a side network as wide as ResNet18's third stage needs SAM's own 256 channels
WIDE = ViTSpec("wide", 16, 2, 2, (1,), window_size=3, image_size=64, decoder_mlp_dim=16, iou_hidden_dim=8)


def randomise(module: nn.Module) -> nn.Module:
    """Draw every tensor, zeros and ones of a fresh network too, such that each still matters for the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def states_equal(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.fixture
def image():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))


# --- prefixes --------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "sam.", "module._orig_mod.", "model.", "model.net.", "sam_model.", "ema.module.sam."]
)
def test_a_prefix_of_all_names_is_dropped_whatever_it_is(prefix, tmp_path):
    state = randomise(build_sam("tiny")).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "sam.pth")
    states_equal(read_state(tmp_path / "sam.pth"), state)
    sam = build_sam("tiny")
    load_sam_weights(sam, tmp_path / "sam.pth")
    states_equal(sam.state_dict(), state)


def test_what_is_no_common_prefix_stays():
    assert common_prefix(["image_encoder.a", "image_encoder.b"]) == ""  # a file with the encoder alone
    assert common_prefix(["net.image_encoder.a"]) == "net."
    assert common_prefix(["net.vision_encoder.a", "net.mask_decoder.b"]) == "net."
    assert common_prefix(["net.image_encoder.a", "net.other.b"]) == ""
    assert common_prefix(["module.conv1.weight", "module.fc.bias"]) == "module."
    assert common_prefix(["backbone.conv1.weight", "backbone.fc.bias"]) == ""  # of no known layout: not ours to drop
    assert common_prefix(["module.sam.alpha", "module.CNN_encoder.conv1.weight"]) == "module."
    assert common_prefix(["net.w_a_000", "net.mask_decoder.b"]) == "net."
    assert common_prefix(["weight"]) == common_prefix([]) == ""


# --- Hugging Face --------------------


# ours to theirs, by hand, from the two public implementations; the first that fits the start of a name
THEIRS = {
    r"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    r"prompt_encoder.point_embeddings": "prompt_encoder.point_embed",
    r"prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    r"prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    r"prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    r"prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    r"prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    r"image_encoder.patch_embed.proj": "vision_encoder.patch_embed.projection",
    r"image_encoder.blocks.(\d+).norm(\d)": r"vision_encoder.layers.\1.layer_norm\2",
    r"image_encoder.blocks": "vision_encoder.layers",
    r"image_encoder.neck.0": "vision_encoder.neck.conv1",
    r"image_encoder.neck.1": "vision_encoder.neck.layer_norm1",
    r"image_encoder.neck.2": "vision_encoder.neck.conv2",
    r"image_encoder.neck.3": "vision_encoder.neck.layer_norm2",
    r"image_encoder.pos_embed": "vision_encoder.pos_embed",
    r"mask_decoder.transformer.layers.(\d).norm(\d)": r"mask_decoder.transformer.layers.\1.layer_norm\2",
    r"mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    r"mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
    r"mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
    r"mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
    r"mask_decoder.(out\w+.\d|iou_prediction_head).layers.0": r"mask_decoder.\1.proj_in",
    r"mask_decoder.(out\w+.\d|iou_prediction_head).layers.1": r"mask_decoder.\1.layers.0",
    r"mask_decoder.(out\w+.\d|iou_prediction_head).layers.2": r"mask_decoder.\1.proj_out",
}


def theirs(name: str) -> str:
    for ours, other in THEIRS.items():
        if re.match(ours, name):
            return re.sub(ours, other, name, count=1)
    return name


@pytest.fixture
def hugging_face():
    """A state dict of ours and the same under Hugging Face's names, with the tensor that lies in two places there."""
    state = randomise(build_sam("tiny")).state_dict()
    named = {theirs(name): value for name, value in state.items()}
    twin = named["shared_image_embedding.positional_embedding"].clone()
    assert len(named) == len(state)
    return state, named | {"prompt_encoder.shared_embedding.positional_embedding": twin}


def test_hugging_faces_names_become_sams_own_one_by_one(hugging_face):
    state, _ = hugging_face
    assert [name for name in state if hugging_face_name(theirs(name)) != name] == []
    assert hugging_face_name("vision_encoder.layers.31.mlp.lin1.weight") == "image_encoder.blocks.31.mlp.lin1.weight"


@pytest.mark.parametrize("prefix", ["", "module.sam."])
def test_a_hugging_face_file_is_read_as_the_official_one(prefix, hugging_face, tmp_path):
    state, named = hugging_face
    save_file({prefix + name: value for name, value in named.items()}, tmp_path / "model.safetensors")
    states_equal(read_state(tmp_path / "model.safetensors"), state)
    del named["prompt_encoder.shared_embedding.positional_embedding"]  # as save_pretrained writes it
    save_file({prefix + name: value for name, value in named.items()}, tmp_path / "saved.safetensors")
    sam = build_sam("tiny")
    assert load_sam_weights(sam, tmp_path / "saved.safetensors").loaded == len(state)
    states_equal(sam.state_dict(), state)


def test_a_hugging_face_file_that_contradicts_itself_or_has_strangers_is_refused(hugging_face, tmp_path):
    _, named = hugging_face
    torch.save(named | {"vision_encoder.stranger": torch.ones(1)}, tmp_path / "stranger.pth")
    with pytest.raises(WeightsError, match=r"1 problem\)(?s:.*)unexpected: image_encoder\.stranger"):
        load_sam_weights(build_sam("tiny"), tmp_path / "stranger.pth")
    named["prompt_encoder.shared_embedding.positional_embedding"] += 1
    torch.save(named, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match=r"shared_embedding\.positional_embedding: another tensor"):
        read_state(tmp_path / "two.pth")


def test_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 128}  # fmt: skip
    # transformers puts the decoder's eps at 1e-6, segment_anything has torch's 1e-5
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
               "layer_norm_eps": 1e-5}  # fmt: skip
    config = transformers.SamConfig(
        vision_config=sizes | vision, prompt_encoder_config=sizes | {"hidden_size": 32}, mask_decoder_config=decoder
    )
    model = randomise(transformers.SamModel(config)).eval()
    model.save_pretrained(tmp_path)
    sam = build_sam("tiny")
    report = load_sam_weights(sam, tmp_path / "model.safetensors")
    assert report.loaded == len(sam.state_dict())

    image = torch.randn(1, 3, 64, 64)
    box, points, labels = torch.tensor([[5.0, 6, 40, 50]]), torch.tensor([[[20.0, 30], [8, 9]]]), torch.tensor([[1, 0]])
    with torch.no_grad():
        expected = model(
            image, input_boxes=box[None], input_points=points[None], input_labels=labels[None], multimask_output=True
        )
        embedding = sam.embed(image)
        # SAM puts points before the corners of the box, with no padding point, as transformers does
        masks, quality = sam.decode(embedding, boxes=box, points=(points, labels), multimask=True)
        torch.testing.assert_close(embedding, model.get_image_embeddings(image), rtol=1e-4, atol=1e-5)
        assert masks.std() > 0.01
        torch.testing.assert_close(masks, expected.pred_masks[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quality, expected.iou_scores[:, 0], rtol=1e-4, atol=1e-5)
        mask = torch.randn(1, 1, 16, 16)
        with_mask = model(image, input_boxes=box[None], input_masks=mask, multimask_output=False).pred_masks[:, 0]
        ours, _ = sam.decode(embedding, boxes=box, masks=mask)
        torch.testing.assert_close(ours, with_mask, rtol=1e-4, atol=1e-5)


# --- SAMed --------------------


RANK = 2


@pytest.fixture
def base(tmp_path):
    torch.save(randomise(build_sam("tiny")).state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


@pytest.fixture
def samed(tmp_path):
    """A SAMed file: two blocks, q and v each, and prompt encoder and mask decoder for three classes."""
    sam = randomise(build_sam("tiny", num_masks=CLASSES))
    state = {f"w_a_{n:03}": torch.randn(RANK, 32) for n in range(4)}
    state |= {f"w_b_{n:03}": torch.randn(32, RANK) / 4 for n in range(4)}
    state |= {name: value for name, value in sam.state_dict().items() if not name.startswith("image_encoder")}
    torch.save(state, tmp_path / "epoch_159.pth")
    return state


def samed_network(rank=RANK, *, classes=CLASSES, **arguments):
    torch.manual_seed(1)
    options = {"targets": ("q", "v"), "decoder": True} | arguments
    return SamSegmenter("tiny", LoRA(rank, **options), num_classes=classes, prompt="none", input_scale="unit")


def all_maps(sam: nn.Module, embedding: torch.Tensor) -> torch.Tensor:
    """What both projects' test scripts compute from an embedding: every mask, enlarged to the image."""
    low, _ = sam.decode(embedding, multimask=None)
    return F.interpolate(low, (64, 64), mode="bilinear", align_corners=False)


def adapted(base, state) -> nn.Module:
    """SAM with what SAMed learnt: updates are added to the first and the last third of what qkv gives."""
    sam = build_sam("tiny", num_masks=CLASSES)
    load_sam_weights(sam, base, allow_new_masks=True)
    sam.load_state_dict({name: value for name, value in state.items() if not name.startswith("w_")}, strict=False)
    for block, module in enumerate(sam.image_encoder.blocks):

        def add(_, inputs, output, block=block):
            q, v = (inputs[0] @ state[f"w_a_{2 * block + i:03}"].T @ state[f"w_b_{2 * block + i:03}"].T for i in (0, 1))
            return output + torch.cat([q, torch.zeros_like(q), v], -1)

        module.attn.qkv.register_forward_hook(add)
    return sam


def published_samed(base, state, image) -> torch.Tensor:
    """SAMed's forward pass."""
    sam = adapted(base, state)
    return all_maps(sam, sam.embed(image.expand(-1, 3, -1, -1)))


@torch.no_grad()
def test_a_samed_file_computes_what_samed_computes(base, samed, image, tmp_path):
    assert is_samed(samed)
    path, network = tmp_path / "epoch_159.pth", samed_network(alpha=RANK)
    told = load_trained(network, checkpoint=path, sam_checkpoint=base)
    assert told.startswith(f"SAMed file {path} ({len(samed)} tensors)") and "sam.pth" in told
    expected = published_samed(base, samed, image)
    torch.testing.assert_close(network(image), expected, rtol=1e-5, atol=1e-5)
    changed = dict(samed, w_b_003=samed["w_b_003"] * 1.5)  # v of the last block: the comparison sees it
    assert (published_samed(base, changed, image) - expected).abs().max() > 1e-3
    got = network.state_dict()
    assert torch.equal(got["sam.prompt_encoder.no_mask_embed.weight"], samed["prompt_encoder.no_mask_embed.weight"])
    assert (network.base_sha256, network.base_file) == (sha256_of(path), "epoch_159.pth")


def test_a_samed_file_in_the_wrong_network_says_which_arguments_it_needs(base, samed, tmp_path):
    path = tmp_path / "epoch_159.pth"
    cases = [
        (samed_network(rank=3), ["rank: the file needs rank=2, got 3"]),
        (samed_network(alpha=4.0), ["alpha: the file needs a scaling of 1, alpha=2 or null"]),
        (samed_network(rank_stabilised=True), ["alpha: the file needs a scaling of 1"]),
        (samed_network(targets=("q", "k")), ["targets: the file needs ['q', 'v'], got ['q', 'k']"]),
        (samed_network(dora=True), ["dora: the file needs dora=False"]),
        (samed_network(classes=5), ["num_classes: the file needs 3 (and the background), got 5"]),
        (samed_network(classes=1), ["num_classes: the file needs 3 (and the background), got 1"]),
        (
            SamSegmenter("tiny"),
            ["strategy: the file needs LoRA(rank=2, targets=['q', 'v'], decoder='samed'), got Zero"],
        ),
        (samed_network(rank=3, alpha=1.0, classes=2, targets=("v",)), ["rank:", "alpha:", "targets:", "num_classes:"]),
        (samed_network(blocks=[1]), ["w_a_002: it adapts q of block 1, the network adapts 1 blocks"]),
    ]
    for network, expected in cases:
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            load_trained(network, checkpoint=path, sam_checkpoint=base)
        assert [text for text in expected if text not in str(error.value)] == []
        states_equal(network.state_dict(), before)  # nothing was loaded, the base file neither
    undecided = LoRA(RANK)
    with pytest.raises(CheckpointError, match=r"decoder: the file needs 'samed' or True, got False"):
        load_trained(SamSegmenter("tiny", undecided), checkpoint=path, sam_checkpoint=base)
    with pytest.raises(CheckpointError, match="has no SAM in it"):
        load_trained(PlainSegmenter(nn.Conv2d(1, 1, 1)), checkpoint=path)


def test_tensors_of_a_samed_file_that_fit_nowhere_are_all_named(base, samed, tmp_path):
    path = tmp_path / "epoch_159.pth"
    del samed["w_b_001"], samed["mask_decoder.iou_token.weight"]
    samed["w_a_002"] = samed["w_a_002"][:, :9]
    torch.save(samed | {"stranger": torch.ones(1), "w_a_004": torch.ones(2, 32)}, path)
    with pytest.raises(CheckpointError, match=r"\(5 problems\)") as error:
        load_trained(samed_network(), checkpoint=path, sam_checkpoint=base)
    for text in (
        "blocks.0.attn.qkv.lora_b.2: missing in the file",
        "sam.mask_decoder.iou_token.weight: missing in the file",
        "blocks.1.attn.qkv.lora_a.0: shape (2, 9) in the file, (2, 32) in the network",
        "stranger: in the file, not in the network",
        "w_a_004: it adapts q of block 2, the network adapts 2 blocks",
    ):
        assert text in str(error.value)
    torch.save(samed | {"sa_a_000": torch.ones(2, 32)}, path)
    with pytest.raises(CheckpointError, match="SAMed_s"):
        load_trained(samed_network(), checkpoint=path, sam_checkpoint=base)


def test_a_samed_file_needs_its_base_and_is_none(base, samed, tmp_path):
    path = tmp_path / "epoch_159.pth"
    with pytest.raises(WeightsError, match=r"sam_checkpoint .* is not a file"):
        load_trained(samed_network(), checkpoint=path, sam_checkpoint=tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"is a SAMed file.* and this one as checkpoint"):
        load_trained(samed_network(), checkpoint=path, sam_checkpoint=path)


def test_an_adapter_trained_on_from_a_samed_file_is_not_taken_for_one_of_the_base(base, samed, tmp_path):
    # SAMed changes the prompt encoder, which no adapter of ours holds: on the base alone it would compute other maps
    network = samed_network()
    load_trained(network, checkpoint=tmp_path / "epoch_159.pth", sam_checkpoint=base)
    save_adapter(network, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"base_sha256: .*epoch_159\.pth"):
        load_trained(samed_network(), checkpoint=tmp_path / "adapter", sam_checkpoint=base)
    save_model(network, tmp_path / "model.pt")  # a whole model does
    again = samed_network()
    load_trained(again, checkpoint=tmp_path / "model.pt")
    states_equal(again.state_dict(), network.state_dict())


def test_other_input_than_the_authors_is_a_warning(base, samed, tmp_path, caplog):
    network = SamSegmenter("tiny", LoRA(RANK, decoder=True), num_classes=CLASSES)
    with caplog.at_level(logging.WARNING):
        load_trained(network, checkpoint=tmp_path / "epoch_159.pth", sam_checkpoint=base)
    assert "images in [0, 1] without prompts; here: input_scale 'zscore', prompt 'box'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_trained(samed_network(), checkpoint=tmp_path / "epoch_159.pth", sam_checkpoint=base)
    assert "without prompts" not in caplog.text


# --- SAM-LST --------------------


class PublishedLadder(nn.Module):
    """SAM-LST with its own attribute names: torchvision's whole ResNet18, the encoder under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.sam = build_sam(WIDE, num_masks=CLASSES)
        self.sam.alpha = nn.Parameter(torch.zeros(1))
        self.CNN_encoder = ResNet(BasicBlock, [2, 2, 2, 2])
        self.sam_encoder = self.sam.image_encoder
        randomise(self.sam)
        for norm in (module for module in self.CNN_encoder.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        net, gate = self.CNN_encoder, torch.sigmoid(self.sam.alpha)
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        x = net.layer3(net.layer2(net.layer1(x)))
        return all_maps(self.sam, gate * self.sam.embed(image) + (1 - gate) * x)


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(3)
    return PublishedLadder().eval()


@pytest.fixture(scope="module")
def ladder_file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("sam_lst") / "epoch_194.pth"
    torch.save({f"module.{name}": value for name, value in published.state_dict().items()}, path)
    return path


def ladder_network(strategy=None, spec=WIDE, *, classes=CLASSES, **options):
    strategy = strategy or Ladder(mix="gate", decoder="upscaling")
    return SamSegmenter(spec, strategy, num_classes=classes, prompt="none", input_scale="unit", **options)


@torch.no_grad()
def test_a_sam_lst_file_computes_what_sam_lst_computes(published, ladder_file, image):
    state = published.state_dict()
    assert is_sam_lst(state)
    network = ladder_network()
    told = load_trained(network, checkpoint=ladder_file)  # without any base file
    twins = sum(name.startswith("sam_encoder.") for name in state)
    idle = sum(name.startswith(("CNN_encoder.layer4.", "CNN_encoder.fc.")) for name in state)
    loaded = len(network.state_dict())
    assert loaded == len(state) - twins - idle and idle == 32
    assert told == f"SAM-LST file {ladder_file} ({loaded} tensors, {twins + idle} of no use passed over)"
    found, wanted = network(image), published(image.expand(-1, 3, -1, -1))
    # random layers make numbers of hundreds: orders of sums differ by millionths of the largest
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert network.side.gate == pytest.approx(float(torch.sigmoid(published.sam.alpha)))
    assert (network.base_sha256, network.base_file) == (sha256_of(ladder_file), "epoch_194.pth")


def test_a_sam_lst_file_in_the_wrong_network_says_what_it_needs(ladder_file, tmp_path):
    plain = ViTSpec("narrow", 16, 2, 2, (1,), window_size=3, image_size=64, prompt_dim=32, decoder_mlp_dim=16,
                    decoder_heads=2, iou_hidden_dim=8)  # fmt: skip
    needs = "strategy: the file needs Ladder(mix='gate', decoder='upscaling') with a ResNetSide, got "
    cases = [
        (ladder_network(Ladder(mix="side")), [needs + "Ladder"]),
        (ladder_network(Ladder(nn.Conv2d(3, 256, 16, 16))), [needs + "Ladder"]),
        (ladder_network(LoRA(2, decoder=True)), [needs + "LoRA"]),
        (ladder_network(classes=5), ["num_classes: the file needs 3 (and the background), got 5"]),
        (ladder_network(image_size=128), ["image_size: the file needs 64, got 128"]),
        (ladder_network(spec=plain), ["side.project.weight: missing in the file", "shape (256, 16, 1, 1) in the file"]),
    ]
    for network, expected in cases:
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            load_trained(network, checkpoint=ladder_file)
        assert [text for text in expected if text not in str(error.value)] == []
        states_equal(network.state_dict(), before)


def test_nothing_but_the_idle_part_of_the_resnet_is_passed_over(published, tmp_path):
    state, path = published.state_dict(), tmp_path / "epoch_1.pth"
    torch.save(state | {"stranger": torch.ones(1), "CNN_encoder.layer5.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"\(2 problems\)") as error:
        load_trained(ladder_network(), checkpoint=path)
    assert "stranger: in the file" in str(error.value) and "side.net.layer5.weight: in the file" in str(error.value)
    table = "sam_encoder.pos_embed"
    torch.save(state | {table: state[table] + 1}, path)
    with pytest.raises(CheckpointError, match=f"{table}: it is not the same as that of sam.image_encoder"):
        load_trained(ladder_network(), checkpoint=path)


def test_a_sam_lst_file_is_no_base(ladder_file):
    with pytest.raises(WeightsError, match=r"is a SAM-LST file.* as checkpoint of a network with .*Ladder"):
        load_sam_weights(build_sam(WIDE), ladder_file)


def test_a_model_of_ours_with_a_side_network_is_still_a_model_of_ours(image, tmp_path):
    network = SamSegmenter("tiny", Ladder(FeatureMap(Stages(), 1)), num_classes=2, prompt="none")
    save_model(network, tmp_path / "model.pt")
    again = SamSegmenter("tiny", Ladder(FeatureMap(Stages(), 1)), num_classes=2, prompt="none")
    assert load_trained(again, checkpoint=tmp_path / "model.pt").startswith("full model")
    states_equal(again.state_dict(), network.state_dict())
    save_adapter(again, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")


class Stages(nn.Module):
    """Two feature maps, the second of stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 32, 4, 4)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(image)
        return [x, self.second(x)]
