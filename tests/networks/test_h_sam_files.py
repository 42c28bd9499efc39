"""Files of H-SAM, whose forward pass is written anew here from its paper and code, on the file's own names."""

import pytest
import torch
import torch.nn.functional as F

from samseg_monai.checkpoints import load_adapter, load_trained, save_adapter
from samseg_monai.errors import CheckpointError, WeightsError
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.weights import sha256_of
from samseg_monai.strategies import LoRA
from tests.networks.test_foreign_layouts import CLASSES, RANK, adapted, randomise

C, MLP, MASKS, HEADS = 32, 64, CLASSES + 1, 2


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def attention(name, width, inner, *idle):
    """Shapes of an attention; ``idle`` are widths of the normalisations that nobody calls."""
    shapes = linear(f"{name}.out_proj", inner, width)
    for part in "qkv":
        shapes |= linear(f"{name}.{part}_proj", width, inner)
    return shapes | {k: v for n, size in enumerate(idle, 1) for k, v in norm(f"{name}.norm{n}", size).items()}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def second_decoder(width, masks, mlp):
    """Names and shapes of ``mask_decoder2`` for an embedding of 4 x 4 positions."""
    shapes = {"mask_tokens.weight": (masks, width), "output_upscaling.0.weight": (width, width // 4, 2, 2)}
    shapes |= {"output_upscaling.0.bias": (width // 4,), "output_upscaling.3.weight": (width // 4, width // 8, 2, 2)}
    shapes |= {"output_upscaling.3.bias": (width // 8,), "skip_connect.0.weight": (width // 4, width // 8, 2, 2)}
    shapes |= {"skip_connect.0.bias": (width // 8,), "skip_connect.3.weight": (width // 8, width // 16, 2, 2)}
    shapes |= {"skip_connect.3.bias": (width // 16,), **norm("output_upscaling.1", width // 4)}
    shapes |= norm("skip_connect.1", width // 8) | norm("skip_connect.4", width // 16)
    for mask in range(masks):
        for layer in range(5):
            end = width // 16 if layer == 4 else width
            shapes |= linear(f"output_hypernetworks_mlps2.{mask}.layers.{layer}", width, end)
    for layer in (0, 1):
        at = f"transformer2.layers.{layer}"
        shapes |= attention(f"{at}.self_attn", width, width)
        for cross in ("token_to_image", "image_to_token"):
            shapes |= attention(f"{at}.cross_attn_{cross}", width, width, 196, 9, 1024)
        shapes |= {k: v for n in (1, 2, 3, 4) for k, v in norm(f"{at}.norm{n}", width).items()}
        shapes |= linear(f"{at}.mlp.lin1", width, mlp) | linear(f"{at}.mlp.lin2", mlp, width)
    shapes |= attention("transformer2.final_attn_token_to_image", width, width // 2)
    shapes |= norm("transformer2.norm_final_attn", width)
    # what computes nothing
    shapes |= linear("iou_prediction_head.layers.0", width, width) | linear("med_sel.0", masks, 1)
    shapes |= attention("self_attn", 16, 16) | attention("self_attn2", 16, 16) | norm("norm1", 16) | norm("norm2", 16)
    return shapes | linear("mlp.lin1", 16, 2048) | linear("mlp.lin2", 2048, 16)


def h_sam_state(sam, rank, *, mlp):
    """What H-SAM saves of a SAM with two blocks: updates, prompt encoder (twice, some of it more) and both decoders."""
    own, inner = sam.image_encoder.blocks[0].attn.qkv.in_features, sam.mask_decoder.transformer_dim
    state = {f"w_a_{n:03}": torch.randn(rank, own) for n in range(4)}
    state |= {f"w_b_{n:03}": torch.randn(own, rank) / 4 for n in range(4)}
    state |= {name: value for name, value in sam.state_dict().items() if not name.startswith("image_encoder")}
    state |= {f"prompt_encoder.point_embeddings.{n}.weight": torch.randn(1, inner) for n in range(4, 11)}
    twins = {name for name in state if name.startswith("prompt_encoder.")}
    state |= {name.replace("encoder.", "encoder2.", 1): state[name] for name in twins}
    shapes = second_decoder(inner, sam.mask_decoder.num_mask_tokens, mlp)
    return state | {f"mask_decoder2.{name}": torch.randn(shape) / 4 for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(3)
    torch.save(randomise(build_sam("tiny")).state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


@pytest.fixture
def h_sam(base, tmp_path):
    state = h_sam_state(randomise(build_sam("tiny", num_masks=CLASSES)), RANK, mlp=MLP)
    torch.save(state, tmp_path / "epoch_299.pth")
    return state


def network_for(decoder="h_sam", **arguments):
    torch.manual_seed(1)
    options = {"num_classes": CLASSES, "prompt": "none", "input_scale": "unit"} | arguments
    return SamSegmenter("tiny", LoRA(RANK, decoder=decoder), **options)


def attend(state, at, q, k, v, mask=None):
    """Multi-head attention, (B, n, C), (B, m, C), (B, m, C) and (B, n, m) to (B, n, C)."""
    q, k, v = (
        F.linear(x, state[f"{at}.{part}_proj.weight"], state[f"{at}.{part}_proj.bias"]).unflatten(2, (HEADS, -1))
        for part, x in (("q", q), ("k", k), ("v", v))
    )
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    weights = weights if mask is None else weights * mask[:, None]
    found = torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2)
    return F.linear(found, state[f"{at}.out_proj.weight"], state[f"{at}.out_proj.bias"])


def normed(state, at, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{at}.weight"], state[f"{at}.bias"])


def layers(state, at, x, number):
    """An MLP with ReLU between its layers."""
    for layer in range(number):
        x = F.linear(x if layer == 0 else x.relu(), state[f"{at}.{layer}.weight"], state[f"{at}.{layer}.bias"])
    return x


def transformed(state, at, tokens, image, place, mask=None):
    """H-SAM's two-way transformer: tokens look at the image first, then at each other."""
    own = tokens
    back = None if mask is None else mask.mT
    for n in (0, 1):
        now = f"{at}.layers.{n}"
        seen = attend(state, f"{now}.cross_attn_token_to_image", tokens + own, image + place, image, mask)
        tokens = normed(state, f"{now}.norm2", tokens + seen)
        q = tokens if n == 0 else tokens + own
        told = attend(state, f"{now}.self_attn", q, q, tokens)
        tokens = normed(state, f"{now}.norm1", told if n == 0 else tokens + told)
        inner = F.linear(tokens, state[f"{now}.mlp.lin1.weight"], state[f"{now}.mlp.lin1.bias"]).relu()
        inner = F.linear(inner, state[f"{now}.mlp.lin2.weight"], state[f"{now}.mlp.lin2.bias"])
        tokens = normed(state, f"{now}.norm3", tokens + inner)
        seen = attend(state, f"{now}.cross_attn_image_to_token", image + place, tokens + own, tokens, back)
        image = normed(state, f"{now}.norm4", image + seen)
    seen = attend(state, f"{at}.final_attn_token_to_image", tokens + own, image + place, image)
    return normed(state, f"{at}.norm_final_attn", tokens + seen), image


def upscaled(state, at, x, norms):
    """Two transposed convolutions with GELU, and normalisations over channels behind the first ``norms`` of them."""
    for number, conv in enumerate((0, 3)):
        x = F.conv_transpose2d(x, state[f"{at}.{conv}.weight"], state[f"{at}.{conv}.bias"], stride=2)
        if number < norms:
            weight, bias = (state[f"{at}.{conv + 1}.{part}"][:, None, None] for part in ("weight", "bias"))
            off = x - x.mean(1, keepdim=True)
            x = off / (off.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias
        x = F.gelu(x)
    return x


def published(base, state, image):
    """The mean of both decoders' logits, as H-SAM's test script takes it."""
    sam = adapted(base, state)
    embedding = sam.embed(image.expand(-1, 3, -1, -1))
    count = len(image)
    place = sam.prompt_encoder.get_dense_pe().flatten(2).mT.expand(count, -1, -1)
    source = embedding + state["prompt_encoder.no_mask_embed.weight"].reshape(1, C, 1, 1)
    own = torch.cat([state["mask_decoder.iou_token.weight"], state["mask_decoder.mask_tokens.weight"]])
    tokens, grid = transformed(
        state, "mask_decoder.transformer", own.expand(count, -1, -1), source.flatten(2).mT, place
    )
    up = upscaled(state, "mask_decoder.output_upscaling", grid.mT.unflatten(2, (4, 4)), 1)
    hyper = [layers(state, f"mask_decoder.output_hypernetworks_mlps.{i}.layers", tokens[:, 1 + i], 3)
             for i in range(MASKS)]  # fmt: skip
    first = torch.einsum("bmc,bchw->bmhw", torch.stack(hyper, 1), up)
    prior = F.interpolate(first, (4, 4), mode="bilinear").softmax(1).flatten(2)
    own = state["mask_decoder2.mask_tokens.weight"].expand(count, -1, -1)
    # the softmax over the one channel of the self-attention's weights is 1
    tokens, grid = transformed(state, "mask_decoder2.transformer2", own, 2 * source.flatten(2).mT, place, prior)
    both = [upscaled(state, "mask_decoder2.output_upscaling", grid.mT.unflatten(2, (4, 4)), 1), up]
    fine = upscaled(state, "mask_decoder2.skip_connect", torch.cat(both, 1), 2)
    hyper = [layers(state, f"mask_decoder2.output_hypernetworks_mlps2.{i}.layers", tokens[:, i], 5)
             for i in range(MASKS)]  # fmt: skip
    second = torch.einsum("bmc,bchw->bmhw", torch.stack(hyper, 1), fine)
    return (F.interpolate(first, (64, 64), mode="bilinear") + second) / 2


@torch.no_grad()
def test_an_h_sam_file_computes_what_h_sam_computes(base, h_sam, tmp_path):
    path, network = tmp_path / "epoch_299.pth", network_for()
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    told = load_trained(network, checkpoint=path, sam_checkpoint=base)
    assert told.startswith(f"H-SAM file {path}") and "of no use passed over" in told and "sam.pth" in told
    assert (network.base_sha256, network.base_file) == (sha256_of(path), "epoch_299.pth")
    wanted = published(base, h_sam, image)
    torch.testing.assert_close(network(image), wanted, rtol=1e-5, atol=1e-5)
    for name in (
        "w_b_003", "mask_decoder.mask_tokens.weight", "mask_decoder2.mask_tokens.weight",
        "mask_decoder2.transformer2.layers.1.cross_attn_image_to_token.v_proj.bias",
    ):  # fmt: skip
        changed = {**h_sam, name: h_sam[name] * 1.5}  # the comparison sees each part
        assert (published(base, changed, image) - wanted).abs().max() > 1e-4, name
    save_adapter(network, tmp_path / "adapter")
    again = network_for()
    again.load_base(base, start=False)
    load_trained(again, checkpoint=path, sam_checkpoint=base)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(image), network(image))


def test_an_h_sam_file_in_the_wrong_network_says_which_arguments_it_needs(base, h_sam, tmp_path):
    path = tmp_path / "epoch_299.pth"
    cases = [
        (network_for("hierarchical"), "decoder: the file needs 'h_sam', got 'hierarchical'"),
        (network_for("samed"), "decoder: the file needs 'h_sam', got 'samed'"),
        (network_for(num_classes=5), r"num_classes: the file needs 3 \(and the background\), got 5"),
        (network_for(image_size=128), "image_size: the file needs 64, got 128"),
        (SamSegmenter("tiny"), r"LoRA\(rank=2, targets=\['q', 'v'\], decoder='h_sam'\), got ZeroShot"),
    ]
    for network, message in cases:
        with pytest.raises(CheckpointError, match=f"this file of H-SAM does not fit.*(?s:.)*{message}"):
            load_trained(network, checkpoint=path, sam_checkpoint=base)
    with pytest.raises(WeightsError, match=r"is an H-SAM file.* and this one as checkpoint"):
        load_trained(network_for(), checkpoint=path, sam_checkpoint=path)


def test_tensors_of_an_h_sam_file_that_fit_nowhere_are_all_named(base, h_sam, tmp_path):
    path = tmp_path / "epoch_299.pth"
    del h_sam["mask_decoder2.skip_connect.4.bias"], h_sam["w_b_001"]
    torch.save(h_sam | {"mask_decoder2.stranger": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"\(3 problems\)") as error:
        load_trained(network_for(), checkpoint=path, sam_checkpoint=base)
    for text in (
        "second.skip_connect.4.bias: missing in the file",
        "blocks.0.attn.qkv.lora_b.2: missing in the file",
        "second.stranger: in the file, not in the network",
    ):
        assert text in str(error.value)
    h_sam["prompt_encoder2.no_mask_embed.weight"] = h_sam["prompt_encoder2.no_mask_embed.weight"] + 1
    torch.save(h_sam, path)
    with pytest.raises(CheckpointError, match=r"prompt_encoder2\.no_mask_embed\.weight: it is not the same"):
        load_trained(network_for(), checkpoint=path, sam_checkpoint=base)
