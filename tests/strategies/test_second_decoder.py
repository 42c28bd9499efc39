"""H-SAM's second decoder beside its equations, written out, and what it does not go together with."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from samseg_monai.adapters import HierarchicalDecoder
from samseg_monai.adapters.hierarchical import RAREST, _deviations
from samseg_monai.bundles.build import compose_recipes, read_recipe
from samseg_monai.bundles.words import words
from samseg_monai.errors import AdapterError, BundleError, ConfigError
from samseg_monai.export import obstacles
from samseg_monai.export.parts import parts_of, run_parts, to_program
from samseg_monai.networks import SamSegmenter
from samseg_monai.settings import merged
from samseg_monai.strategies import SSF, Adapter, FacT, Ladder, LoRA, Selective
from samseg_monai.training import OnLogitGrid, SegmentationLoss

C, SIDE, MASKS = 32, 4, 3
N = SIDE * SIDE


def drawn(masks=MASKS, batch=2):
    """A decoder, an embedding, what is added to it, position codes, and what a first decoder made of them."""
    torch.manual_seed(0)
    decoder = HierarchicalDecoder(C, masks, N, heads=2, mlp_dim=24).eval()
    shapes = (batch, masks, 4 * SIDE, 4 * SIDE), (batch, masks, C), (batch, C, SIDE, SIDE), (batch, C // 8, 16, 16)
    first = tuple(torch.randn(shape) for shape in shapes)
    return (
        decoder,
        torch.randn(batch, C, SIDE, SIDE),
        torch.randn(1, C, SIDE, SIDE),
        torch.randn(1, C, SIDE, SIDE),
        first,
    )


def attend(q, k, v, layer, heads, mask=None):
    """Multi-head attention of one image, head by head; (n, C), (m, C), (m, C) and (n, m) to (n, C)."""
    q, k, v = (x @ w.weight.T + w.bias for x, w in ((q, layer.q_proj), (k, layer.k_proj), (v, layer.v_proj)))
    width, out = q.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(q[:, part] @ k[:, part].T / width**0.5, 1)
        out.append((weights if mask is None else weights * mask) @ v[:, part])
    return torch.cat(out, 1) @ layer.out_proj.weight.T + layer.out_proj.bias


def by_hand(decoder, embedding, dense, position, first):
    """The equations for one image: embedding (C, h, w) and so on, to logits (M, 16 h, 16 w)."""
    logits, seen, grid, upscaled = first
    prior = F.avg_pool2d(logits[:, 1:-1, 1:-1], 2, 4).flatten(1).softmax(0)  # the four in the middle of each position
    features = seen @ grid.flatten(1)
    x = decoder.norm1(attend(features, features, features, decoder.self_attn, 8))
    x = attend(x, x, x, decoder.self_attn2, 8)
    x = decoder.norm2(x + decoder.mlp(x))
    chosen = (decoder.select.weight[0] @ x + decoder.select.bias).clamp_min(0)
    weight = N * chosen.exp() / chosen.exp().sum()
    image = ((embedding + dense).flatten(1) * (1 + weight)).T
    place, tokens = position.flatten(1).T, decoder.mask_tokens.weight
    for number, layer in enumerate(decoder.transformer.layers):
        own = decoder.mask_tokens.weight
        told = attend(tokens + own, image + place, image, layer.cross_attn_token_to_image, 2, prior)
        tokens = layer.norm2(tokens + told)
        if number == 0:
            tokens = attend(tokens, tokens, tokens, layer.self_attn, 2)
        else:
            tokens = tokens + attend(tokens + own, tokens + own, tokens, layer.self_attn, 2)
        tokens = layer.norm1(tokens)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        told = attend(image + place, tokens + own, tokens, layer.cross_attn_image_to_token, 2, prior.T)
        image = layer.norm4(image + told)
    last = decoder.transformer
    told = attend(tokens + decoder.mask_tokens.weight, image + place, image, last.final_attn_token_to_image, 2)
    tokens = last.norm_final_attn(tokens + told)
    fine = decoder.output_upscaling(image.T.reshape(1, C, SIDE, SIDE))
    fine = decoder.skip_connect(torch.cat([fine, upscaled[None]], 1))[0]
    pairs = zip(decoder.output_hypernetworks_mlps, tokens, strict=True)
    return torch.stack([(mlp(token)[:, None, None] * fine).sum(0) for mlp, token in pairs])


def test_it_computes_its_equations_and_their_gradients():
    decoder, embedding, dense, position, first = drawn()
    embedding.requires_grad_(True)
    found = decoder(embedding, dense.expand_as(embedding), position, first)
    wanted = torch.stack(
        [by_hand(decoder, embedding[i], dense[0], position[0], [part[i] for part in first]) for i in range(2)]
    )
    assert found.shape == (2, MASKS, 16 * SIDE, 16 * SIDE)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    named = [embedding, *decoder.parameters()]
    weights = torch.randn_like(found)
    pairs = (torch.autograd.grad((maps * weights).sum(), named, retain_graph=True) for maps in (found, wanted))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4 * float(theirs.abs().max()) + 2e-5, rtol=0)


def test_of_one_mask_the_background_is_the_other():
    decoder, *given, first = drawn(masks=1)
    both = HierarchicalDecoder(C, 2, N, heads=2, mlp_dim=24).eval()
    both.load_state_dict(decoder.state_dict())
    zero = [torch.cat([torch.zeros_like(part), part], 1) for part in first[:2]]
    maps = both(*given, (*zero, *first[2:]))
    assert torch.equal(decoder(*given, first), maps[:, 1:] - maps[:, :1])


def test_weights_of_positions_learn_from_every_start():
    for seed in range(40):
        torch.manual_seed(seed)
        decoder = HierarchicalDecoder(C, 1, N, heads=2, mlp_dim=24).eval()
        weight = decoder._weight(torch.randn(2, 2, N), torch.rand(2, 2, N))
        assert weight.std() > 0, f"seed {seed}: none of the positions passes the ReLU"


def test_noise_is_for_training_alone_and_strongest_for_the_rarest_class():
    decoder, *given, first = drawn()
    assert torch.equal(decoder(*given, first), decoder(*given, first))
    decoder.train()
    assert not torch.equal(decoder(*given, first), decoder(*given, first))
    prior = torch.tensor(
        [[0.8, 0.8, 0.8, 0.1, 0.1, 0.2], [0.1, 0.1, 0.1, 0.8, 0.8, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1, 0.7]]
    )
    torch.testing.assert_close(_deviations(prior[None])[0], RAREST * torch.tensor([0, 0, 0, 0.5, 0.5, 1]))
    absent = _deviations(prior[None, :, :5])[0]  # nobody has the third class: the second one is the rarest
    torch.testing.assert_close(absent, RAREST * torch.tensor([0.5, 0.5, 0.5, 1, 1]))


def test_training_gives_both_outputs_and_evaluation_their_mean():
    torch.manual_seed(0)
    network = SamSegmenter("tiny", LoRA(2, decoder="hierarchical"), num_classes=2, prompt="none", low_res_training=True)
    image = torch.randn(2, 1, 64, 48)
    low, fine = network.decode(network.encode(image), None)
    whole = (F.interpolate(low, (64, 64), mode="bilinear") + fine) / 2
    torch.testing.assert_close(network(image), whole[..., :48])
    network.train()
    assert [tuple(maps.shape) for maps in network(image)] == [(2, 3, 16, 12), (2, 3, 64, 48)]
    network.low_res_training = False
    assert [tuple(maps.shape) for maps in network(image)] == [(2, 3, 64, 48), (2, 3, 64, 48)]


@pytest.mark.parametrize(("epoch", "weight"), [(1, 0.6), (300, 0.6 ** (0.99**299))])
def test_the_loss_weighs_both_decoders_by_the_epoch(epoch, weight):
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 16, 16)
    label = torch.randint(3, (2, 1, 16, 16))
    loss = OnLogitGrid(SegmentationLoss(["a", "b"]))
    loss.set_epoch(epoch)
    wanted = (1 - weight) * loss(first, label) + weight * loss(second, label)
    torch.testing.assert_close(loss([first, second], label), wanted)


@pytest.mark.slow
def test_an_exported_decoder_computes_the_mean():
    torch.manual_seed(0)
    network = SamSegmenter("tiny", LoRA(2, decoder="hierarchical"), num_classes=2, prompt="none")
    encoder, decoder = parts_of(network)
    image, calls = torch.randn(3, 1, 64, 48), {"encoder": encoder.module, "decoder": to_program(decoder).module()}
    with torch.no_grad():
        found = run_parts([encoder, decoder], calls, {"image": image})
        torch.testing.assert_close(found["logits"][..., :48], network(image), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [LoRA, Adapter, SSF, FacT, partial(Selective, ["<attention>"]), Ladder])
def test_what_does_not_go_together_is_told_and_leaves_the_network_as_it_was(make):
    with pytest.raises(AdapterError, match=r"decoder.* one of .*(got 'second'.*)?'hierarchical'"):
        make(decoder="second")
    network = SamSegmenter("tiny", rectangular=True)
    network.strategy, before = None, list(network.state_dict())
    with pytest.raises(AdapterError, match="whole square"):
        network.adopt(make(decoder="hierarchical"))
    assert list(network.state_dict()) == before and network.second is None
    with pytest.raises(AdapterError, match="built for SAM's single mask"):
        SamSegmenter("tiny", make(decoder="hierarchical"), masks="best")
    network = SamSegmenter("tiny", make(decoder="hierarchical"))
    with pytest.raises(ConfigError, match="a second decoder takes none"):
        network(torch.zeros(1, 1, 64, 64), torch.tensor([[1.0, 2, 30, 40]]))


def test_a_bundle_with_boxes_or_the_best_of_three_masks_is_refused():
    recipe = {**read_recipe("strategies", "h_sam"), "run": {"prompt": {"source": "label"}, "masks": "best"}}
    with pytest.raises(BundleError, match=r"(?s)SAM's decoder alone.*this network takes no boxes; use 'none'"):
        compose_recipes(read_recipe("tasks", "meningioma"), recipe, "both")


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("zero_shot", "no decoder learns in zero-shot; leave it out"),
        ("cnn_only", "goes on from SAM's embedding, which mix 'side' leaves out"),
        ("unet", "a network without SAM has none; leave it out"),
    ],
)
def test_a_bundle_in_which_it_makes_no_sense_says_why(strategy, why):
    recipe = merged(read_recipe("strategies", strategy), {"method": {"decoder": "hierarchical"}})
    with pytest.raises(BundleError, match=f"(?s)strategy::method: decoder.*{why}"):
        compose_recipes(read_recipe("tasks", "abdomen"), recipe, strategy)


@pytest.mark.parametrize("strategy", ["full", "attention", "decoder", "norm", "bias", "ladder", "sam_only", "medsa"])
def test_the_others_are_bundles_of_volumes(strategy):
    recipe = merged(read_recipe("strategies", strategy), {"method": {"decoder": "hierarchical"}})
    recipe["run"] = {**recipe["run"], "prompt": {"source": "none"}}
    settings = compose_recipes(read_recipe("tasks", "abdomen"), recipe, strategy)
    assert not settings.takes_boxes and "a second decoder behind it" in words(settings)["said"]


def test_a_ladder_without_sams_embedding_has_no_second_decoder():
    with pytest.raises(AdapterError, match="which mix='side' leaves out"):
        Ladder(mix="side", decoder="hierarchical")


def test_neither_a_sam_file_nor_sameds_holds_a_second_decoder():
    network = SamSegmenter("tiny", LoRA(2, decoder="hierarchical"), num_classes=2, prompt="none")
    found = obstacles(network)
    assert any("a second decoder" in reason for reason in found["pth"])
    assert found["samed"] == ["decoder 'hierarchical': SAMed has one decoder, here is a second one behind it"]
    assert found["torch"] == []
