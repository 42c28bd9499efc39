"""Laws that every strategy obeys, and counts that are known from elsewhere.

The names in ``golden/strategy_keys.json`` are those of adapters that are in use; ``python -m
tests.strategies.test_strategy_laws`` adds those of new rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from samseg_monai import strategies
from samseg_monai.adapters import ADAPTERS, BottleneckLinear, LoRALinear, ResNetSide
from samseg_monai.adapters.hierarchical import look_first
from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.errors import AdapterError, CheckpointError
from samseg_monai.networks import SamSegmenter, disable_adapter
from samseg_monai.sam.build import build_sam
from samseg_monai.strategies import SSF, Adapter, FacT, Ladder, LoRA, Scratch, Selective, Strategy, ZeroShot
from samseg_monai.strategies.base import head_names
from samseg_monai.training.owned import count_trainable, owned_state

GOLDEN = Path(__file__).parents[1] / "golden" / "strategy_keys.json"
WIDTH = 32  # channels of the embedding of both tiny SAMs
# Widths of the blocks with attention, by backbone; the MLP is four times as wide. tiny_t's block 0 has none.
BLOCKS = {"tiny": {0: 32, 1: 32}, "tiny_t": {1: 16, 2: 24, 3: 24, 4: 32}}
CLASSES = {"num_classes": 5, "prompt": "none"}
MASKS = 6  # five classes and the background

RESNET = 2_782_784  # values of ResNet18 up to layer3, as SAM-LST counts them (Chai et al. 2023)
NORMS = {64: 5, 128: 5, 256: 5}  # its batch normalisations, by channels

# A shift of all keys cancels in the softmax: these biases are used, but their gradient is rounding noise.
ROUNDING_ONLY = "k_proj.bias"


@dataclass(frozen=True)
class Row:
    """One strategy with arguments, how many values it trains in a tiny SAM, and in what network.

    ``kept`` counts what its adapter file holds beside those: running statistics, and its own but fixed tensors.
    ``mixed`` says what embedding a fresh network decodes, from SAM's and the side network's. ``noise``: the mask head
    is random on purpose, and nobody keeps it.
    """

    make: Callable[[], Strategy]
    count: Callable[[SamSegmenter], int]
    network: dict[str, Any] = field(default_factory=dict)
    kept: int = 0
    mixed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    noise: bool = False


def decoder_values(network: SamSegmenter) -> int:
    """Values of the mask decoder that make the maps that are returned, summed over modules."""
    decoder = network.sam.mask_decoder
    used = [
        decoder.transformer,
        decoder.iou_token,
        decoder.mask_tokens,
        decoder.output_upscaling,
        decoder.output_hypernetworks_mlps[: network.channels_out],
    ]
    return sum(p.numel() for module in used for p in module.parameters())


def lora_values(network: SamSegmenter, rank: int, of_width: int, *, extra: int = 0, blocks: list[int] | None = None):
    """Of low-rank updates: ``of_width`` is the sum of inputs and outputs of all targets by the width of a block.

    ``extra`` counts what comes with each unit of width besides: magnitudes.
    """
    widths = BLOCKS[network.spec.name]
    return sum((rank * of_width + extra) * widths[index] for index in blocks or widths)


def last_blocks(network: SamSegmenter, part: int) -> list[int]:
    """Numbers of the last blocks with attention, one of ``part``, and one at least."""
    blocks = list(BLOCKS[network.spec.name])
    return blocks[-max(1, len(blocks) // part) :]


def decoder_lora_values(rank: int, width: int = WIDTH) -> int:
    """Of updates to q and v of two self-attentions, width to width, and five of half that width between the two."""
    return rank * (2 * 2 * 2 * width + 5 * 2 * (width + width // 2))


def bottleneck_values(widths: Iterable[int], bottleneck: int, each: int) -> int:
    """2 m d + d + m for each of ``each`` bottlenecks in a block (Houlsby et al. 2019, section 2.1)."""
    return sum(each * (2 * bottleneck * width + width + bottleneck) for width in widths)


def fact_values(network: SamSegmenter, rank: int, targets: int, *, last: bool = False) -> int:
    """Two factors for each width, and a core for each target and block; with lin1 its outputs have a factor, too."""
    widths = list(BLOCKS[network.spec.name].values())
    widths = widths[-1:] if last else widths
    outputs = sum({*widths, *(4 * width for width in widths if last)})
    return rank * (sum(set(widths)) + outputs) + len(widths) * targets * rank * rank


def scale_shift_values(network: SamSegmenter) -> int:
    """Two for each output of every layer with weight and bias (Lian et al. 2022, section 3.2)."""
    widths, neck = BLOCKS[network.spec.name].values(), 2 * WIDTH
    inside = 2 + 3 + 1 + 4 + 1  # two normalisations, qkv, proj, both layers of the MLP
    if network.spec.name == "tiny":
        return 2 * (sum(inside * width for width in widths) + WIDTH + neck)  # with the patch embedding
    # its convolutions have no bias, their normalisations do; a block has one more of these
    stem, stage, merges = 4 + 8, 2 * 32 + 8, 3 * (16 + 24 + 32)
    return 2 * (sum((inside + 1) * width for width in widths) + stem + stage + merges + neck)


def reached(network: SamSegmenter) -> dict[str, int]:
    """Parameters of SAM that the logits depend on, by autograd, and their numbers of values."""
    twin = copy.deepcopy(network).requires_grad_(True)
    image, boxes, _ = draw_batch(network.num_classes, network.prompt)
    named = dict(twin.named_parameters())
    gradients = torch.autograd.grad(twin(image, boxes).sum(), list(named.values()), allow_unused=True)
    return {name: g.numel() for name, g in zip(named, gradients, strict=True) if g is not None}


def full_values(network: SamSegmenter, *, without: str = "nothing") -> int:
    """Of everything that the logits depend on."""
    return sum(count for name, count in reached(network).items() if not name.startswith(without))


def norm_values(network: SamSegmenter) -> int:
    """Of scales and shifts: nine normalisations in the decoder's transformer, one in its upscaling, the encoder's."""
    decoder = 9 * 2 * WIDTH + 2 * (WIDTH // 4)
    neck = 2 * 2 * WIDTH
    if network.spec.name == "tiny":
        return decoder + neck + 2 * 2 * 2 * WIDTH  # two in each of two blocks
    stem, stage, merges = 4 + 8, 2 * 32 + 8, 3 * (16 + 24 + 32)
    blocks = sum(3 * width for width in BLOCKS["tiny_t"].values())  # attention, MLP, convolution
    return decoder + neck + 2 * (stem + stage + merges + blocks)


def attention_values(network: SamSegmenter) -> int:
    """Of the layers that make queries, keys and values, and of that behind the attention."""
    return sum(4 * (width * width + width) for width in BLOCKS[network.spec.name].values())


class SmallSide(nn.Sequential):
    """A side network with statistics that is built in no time; its channels are those of SAM "tiny"."""

    values = 3 * 8 * 16 + 2 * 8 + 8 * WIDTH * 16 + WIDTH
    kept = 2 * 8 + 1

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, WIDTH, 4, 4))


def upscaling_values(width: int) -> int:
    """Of two transposed 2 x 2 convolutions, C to C/4 to C/8 channels, with a normalisation between them."""
    return 4 * width * width // 4 + width // 4 + 2 * width // 4 + 4 * (width // 4) * (width // 8) + width // 8


def head_values(width: int, masks: int) -> int:
    """Of mask tokens, and hyper-networks with three linear layers, C to C to C to C/8."""
    return masks * (width + 2 * (width * width + width) + width * width // 8 + width // 8)


UPSCALING, HEAD = upscaling_values(WIDTH), head_values(WIDTH, MASKS)
CNN = RESNET + 256 * WIDTH + WIDTH  # with the projection to SAM's channels
STATISTICS = sum(number * (2 * channels + 1) for channels, number in NORMS.items())


def second_values(masks: int, width: int = WIDTH, positions: int = 16, mlp: int = 64, even: bool = False) -> int:
    """Of H-SAM's second decoder for 4 x 4 positions, part by part; ``even``: without self-attention."""

    def linear(n: int, m: int) -> int:
        return n * m + m

    def attention(n: int, inner: int) -> int:
        return 3 * linear(n, inner) + linear(inner, n)

    own = 2 * attention(positions, positions) + 2 * 2 * positions + linear(positions, mlp) + linear(mlp, positions)
    block = 3 * attention(width, width) + 4 * 2 * width + linear(width, mlp) + linear(mlp, width)
    last = attention(width, width // 2) + 2 * width
    skip, norms = 4 * (width // 4) * (width // 8) + 4 * (width // 8) * (width // 16), 3 * (width // 8 + width // 16)
    heads = masks * (4 * linear(width, width) + linear(width, width // 16))
    whole = (0 if even else own + linear(masks, 1)) + masks * width + 2 * block + last
    return whole + upscaling_values(width) + skip + norms + heads


ALL_SIX = ("q", "k", "v", "proj", "lin1", "lin2")
ROWS = {
    "zero_shot": Row(ZeroShot, lambda network: 0),
    "lora": Row(lambda: LoRA(2), lambda network: lora_values(network, 2, 2 * 2)),
    "lora_all_targets": Row(
        lambda: LoRA(3, alpha=6, targets=ALL_SIX, dropout=0.1, rank_stabilised=True),
        lambda network: lora_values(network, 3, 4 * 2 + 2 * 5),
    ),
    "lora_last_block": Row(
        lambda: LoRA(2, blocks=[1], targets=["k", "proj"]), lambda network: lora_values(network, 2, 2 * 2, blocks=[1])
    ),
    "dora": Row(lambda: LoRA(2, dora=True), lambda network: lora_values(network, 2, 2 * 2, extra=2)),
    "dora_all_targets": Row(
        lambda: LoRA(3, alpha=6, targets=ALL_SIX, dropout=0.1, rank_stabilised=True, dora=True),
        lambda network: lora_values(network, 3, 4 * 2 + 2 * 5, extra=5 + 4),
    ),
    "lora_decoder": Row(
        lambda: LoRA(2, decoder=True), lambda network: lora_values(network, 2, 2 * 2) + decoder_values(network)
    ),
    "lora_decoder_classes": Row(
        lambda: LoRA(2, decoder=True),
        lambda network: lora_values(network, 2, 2 * 2) + decoder_values(network),
        CLASSES,
    ),
    "samed": Row(
        lambda: LoRA(2, decoder="samed"),
        lambda network: lora_values(network, 2, 2 * 2) + decoder_values(network) + WIDTH,  # and no_mask_embed
        CLASSES,
    ),
    "h_sam": Row(
        lambda: LoRA(2, decoder="hierarchical"),
        lambda network: lora_values(network, 2, 2 * 2) + decoder_values(network) + WIDTH + second_values(MASKS),
        CLASSES,
    ),
    "h_sam_as_published": Row(
        lambda: LoRA(2, decoder="h_sam"),
        lambda network: (
            lora_values(network, 2, 2 * 2) + decoder_values(network) + WIDTH + second_values(MASKS, even=True)
        ),
        CLASSES,
    ),
    "adapter_second_decoder": Row(
        lambda: Adapter(3, decoder="hierarchical"),
        lambda network: (
            bottleneck_values(BLOCKS[network.spec.name].values(), 3, each=2)
            + decoder_values(network)
            + WIDTH
            + second_values(2)
        ),
        {"prompt": "none"},
    ),
    "lora_in_decoder": Row(
        lambda: LoRA(2, decoder="lora"), lambda network: lora_values(network, 2, 2 * 2) + decoder_lora_values(2)
    ),
    "dora_in_decoder_classes": Row(
        lambda: LoRA(2, decoder="lora", dora=True),
        # with a magnitude for each output of q and v, and the head of six masks
        lambda network: lora_values(network, 2, 2 * 2, extra=2) + decoder_lora_values(2) + 9 * WIDTH + HEAD,
        CLASSES,
    ),
    "lora_late_50": Row(
        lambda: LoRA(2, last=0.5),
        lambda network: lora_values(network, 2, 2 * 2, blocks=last_blocks(network, 2)),
    ),
    "lora_late_25": Row(
        lambda: LoRA(2, last=0.25), lambda network: lora_values(network, 2, 2 * 2, blocks=last_blocks(network, 4))
    ),
    "lora_late_8": Row(
        lambda: LoRA(2, last=0.08), lambda network: lora_values(network, 2, 2 * 2, blocks=last_blocks(network, 4))
    ),
    "adapter": Row(
        lambda: Adapter(3), lambda network: bottleneck_values(BLOCKS[network.spec.name].values(), 3, each=2)
    ),
    "adapter_late_decoder": Row(
        lambda: Adapter(3, last=0.25, scale=2.0, decoder=True),
        lambda network: (
            bottleneck_values(list(BLOCKS[network.spec.name].values())[-1:], 3, each=2) + decoder_values(network)
        ),
        CLASSES,
    ),
    "adaptformer": Row(
        lambda: Adapter(3, place="parallel", scale=0.1),
        lambda network: bottleneck_values(BLOCKS[network.spec.name].values(), 3, each=1),
    ),
    "medsa": Row(
        lambda: Adapter(3, place="both", scale=0.1, depth=2),
        lambda network: bottleneck_values(BLOCKS[network.spec.name].values(), 3, each=3),
    ),
    "medsa_alone_decoder_classes": Row(
        lambda: Adapter(3, place="both", blocks=[1], decoder=True),
        lambda network: bottleneck_values([BLOCKS[network.spec.name][1]], 3, each=2) + decoder_values(network),
        CLASSES,
    ),
    "ssf": Row(SSF, scale_shift_values),
    "ssf_decoder_classes": Row(
        lambda: SSF(decoder=True), lambda network: scale_shift_values(network) + decoder_values(network), CLASSES
    ),
    "fact": Row(lambda: FacT(2, scale=10.0), lambda network: fact_values(network, 2, 4)),
    "fact_late_decoder": Row(
        lambda: FacT(2, targets=["v", "lin1"], last=0.25, dropout=0.1, decoder=True),
        lambda network: fact_values(network, 2, 2, last=True) + decoder_values(network),
        CLASSES,
    ),
    "zero_shot_random_masks": Row(lambda: ZeroShot(random_masks=True), lambda network: 0, CLASSES, noise=True),
    "ladder": Row(
        lambda: Ladder(SmallSide()),
        lambda network: SmallSide.values + UPSCALING + HEAD + 1,
        CLASSES,
        kept=SmallSide.kept,
        mixed=lambda sam, side: 0.5 * sam + 0.5 * side,
    ),
    "ladder_full": Row(
        lambda: Ladder(SmallSide(), decoder="full"),
        lambda network: SmallSide.values + decoder_values(network) + 1,
        kept=SmallSide.kept,
        mixed=lambda sam, side: 0.5 * sam + 0.5 * side,
    ),
    "ladder_paper": Row(
        lambda: Ladder(side_weights="random", decoder="upscaling", masks="random"),
        lambda network: CNN + UPSCALING + 1,
        CLASSES,
        kept=STATISTICS + HEAD,
        mixed=lambda sam, side: 0.5 * sam + 0.5 * side,
    ),
    "cnn_only": Row(
        lambda: Ladder(SmallSide(), mix="side", decoder="upscaling", masks="random"),
        lambda network: SmallSide.values + UPSCALING,
        CLASSES,
        kept=SmallSide.kept + HEAD,
        mixed=lambda sam, side: side,
    ),
    "sam_only": Row(
        lambda: Ladder(mix="sam", decoder="upscaling", masks="random"),
        lambda network: UPSCALING,
        CLASSES,
        kept=HEAD,
    ),
    "full": Row(lambda: Selective(["sam"], name="full"), full_values),
    "full_prompts_frozen": Row(
        lambda: Selective(["sam"], frozen=["sam.prompt_encoder"], name="full"),
        lambda network: full_values(network, without="sam.prompt_encoder"),
    ),
    "full_classes": Row(lambda: Selective(["sam"], name="full"), full_values, CLASSES),
    "decoder": Row(lambda: Selective(["sam.mask_decoder"], name="decoder"), decoder_values),
    "attention": Row(
        lambda: Selective(["<attention>"], name="attention"),
        attention_values,
    ),
    "attention_decoder_classes": Row(
        lambda: Selective(["<attention>"], name="attention", decoder=True),
        lambda network: attention_values(network) + decoder_values(network),
        CLASSES,
    ),
    "attention_second_decoder": Row(
        lambda: Selective(["<attention>"], name="attention", decoder="hierarchical"),
        lambda network: attention_values(network) + decoder_values(network) + WIDTH + second_values(2),
        {"prompt": "none"},
    ),
    "full_second_decoder": Row(
        lambda: Selective(["sam"], frozen=["sam.prompt_encoder"], name="full", decoder="hierarchical"),
        lambda network: full_values(network, without="sam.prompt_encoder") + WIDTH,
        CLASSES,
    ),
    "ladder_second_decoder": Row(
        lambda: Ladder(SmallSide(), decoder="hierarchical"),
        lambda network: SmallSide.values + decoder_values(network) + WIDTH + second_values(MASKS) + 1,
        CLASSES,
        kept=SmallSide.kept,
    ),
    "norm": Row(lambda: Selective(["<norm>"], name="norm"), norm_values),
    "bias": Row(
        lambda: Selective(["*.bias"], name="bias"),
        lambda network: sum(count for name, count in reached(network).items() if name.endswith(".bias")),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Files of both tiny SAMs; statistics of batch normalisation are those of no batch."""
    torch.manual_seed(0)
    paths = {}
    for variant in BLOCKS:
        paths[variant] = tmp_path_factory.mktemp("base") / f"{variant}.pth"
        state = build_sam(variant).state_dict()
        for name, tensor in state.items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif variant == "tiny_t" and name.endswith("qkv.weight"):
                tensor *= 4  # else attention is so even that q has next to no gradient
        torch.save(state, paths[variant])
    return paths


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture(params=BLOCKS)
def tiny(request):
    """Name of a tiny SAM: every law holds for every backbone."""
    return request.param


@pytest.fixture(scope="module")
def built():
    """Networks as they were built, by row, backbone and seed: to be copied, which takes a quarter of the time."""
    return {}


@pytest.fixture
def build(row, base, tiny, built, request):
    """Gives the row's network, with the same base weights each time; any other is built for the asking."""

    def build_network(variant=tiny, *, strategy=None, seed=1, **arguments):
        known = (request.node.callspec.params["row"], variant, seed)
        if (variant, strategy, arguments) == (tiny, None, {}) and known in built:
            torch.manual_seed(seed)
            return copy.deepcopy(built[known])
        torch.manual_seed(seed)
        network = SamSegmenter(variant, strategy or row.make(), **{**row.network, **arguments})
        if variant == tiny and not arguments:
            network.load_base(base[tiny])
        else:
            network.base_sha256 = "another"
        if (variant, strategy, arguments) == (tiny, None, {}):
            built[known] = copy.deepcopy(network)
        return network

    return build_network


@pytest.fixture
def batch(row):
    return draw_batch(**row.network)


def draw_batch(num_classes=1, prompt="box"):
    """Two images, their boxes (None without prompts), their targets: a mask, or numbers of classes."""
    rng = torch.Generator().manual_seed(2)
    image = torch.randn(2, 1, 64, 48, generator=rng)
    boxes = torch.tensor([[5.0, 6, 40, 50], [2, 20, 30, 44]]) if prompt == "box" else None
    if num_classes == 1:
        return image, boxes, (torch.rand(2, 1, 64, 48, generator=rng) > 0.5).float()
    return image, boxes, torch.randint(num_classes + 1, (2, 64, 48), generator=rng)


def learning(network):
    """Names of the parameters that learn: what is owned without running statistics and fixed tensors."""
    return {name for name, _ in network.named_parameters()} & set(network.owned) - set(network.fixed)


def learn(network, batch, *, steps=1):
    """Train with plain gradient descent; returns the largest absolute gradient that each parameter saw."""
    image, boxes, target = batch
    largest: dict[str, float] = {}
    network.train()
    torch.manual_seed(3)
    for step in range(steps if network.owned else 0):
        network.zero_grad()
        found = network(image, boxes)
        maps = found if isinstance(found, list) else [found]  # of two decoders
        loss = F.cross_entropy if maps[0].shape[1] > 1 else F.binary_cross_entropy_with_logits
        sum(loss(logits, target) for logits in maps).backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    largest[name] = max(largest.get(name, 0.0), parameter.grad.abs().max().item())
                    size = 0.1 / (1 + step)  # shrinking: a single value must not step to and fro
                    parameter -= size * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
    network.eval()
    return largest


class TestStrategyLaws:
    def test_fresh_it_changes_nothing_but_what_it_mixes_in(self, build, row, base, batch, tiny):
        network, plain = build(), SamSegmenter(tiny, ZeroShot(random_masks=True), **row.network)
        plain.load_base(base[tiny])
        head = {name: tensor for name, tensor in network.state_dict().items() if name in head_names(plain)}
        plain.load_state_dict(head, strict=False)  # started anew where the number of masks is not SAM's
        image, boxes, _ = batch
        if network.second is not None:
            if network.strategy.decoder == "h_sam":
                look_first(plain.sam.mask_decoder.transformer)
            with torch.no_grad():
                first, whole = (each.decode(each.encode(image), boxes)[0] for each in (network, plain))
            assert torch.equal(first, whole)
            return
        if row.mixed is None:
            with torch.no_grad():  # a bias that learns takes another kernel of attention
                assert torch.equal(network(image, boxes), plain(image, boxes))
            return
        padded = F.pad(image.expand(-1, 3, -1, -1), (0, 64 - image.shape[-1]))
        side = network.side.project(network.side.net(padded))
        mixed = row.mixed(plain.encode(image), side)
        assert (mixed - plain.encode(image)).abs().max() > 0.1
        torch.testing.assert_close(network(image, boxes), plain(image, boxes, mixed), atol=1e-6, rtol=0)

    def test_after_a_step_only_owned_tensors_moved_bit_for_bit(self, build, batch):
        network = build()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        learn(network, batch, steps=2)
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved <= set(network.owned) - set(network.fixed)
        assert all(name.endswith(ROUNDING_ONLY) for name in set(network.owned) - set(network.fixed) - moved)

    def test_trains_as_many_values_as_the_formula_says(self, build, row):
        network = build()
        assert count_trainable(network) == row.count(network)
        assert sum(t.numel() for t in owned_state(network, network.owned).values()) == row.count(network) + row.kept

    def test_every_owned_tensor_has_a_gradient_within_two_steps(self, build, batch):
        network = build()
        largest = learn(network, batch, steps=2)
        assert largest.keys() == learning(network)
        least = 1e-7 if network.second is None else 1e-9  # its masks begin alike, and attend to each other evenly
        dead = [name for name, size in largest.items() if size < least and not name.endswith(ROUNDING_ONLY)]
        assert dead == []

    def test_declared_unused_tensors_are_frozen_and_unreachable(self, build, batch):
        network = build()
        parameters = dict(network.named_parameters())
        assert not set(network.unused) & set(network.owned)
        for name in network.unused:
            assert not parameters[name].requires_grad
            parameters[name].requires_grad_(True)
        logits = network(*batch[:2])
        if network.unused:
            used = torch.autograd.grad(logits.sum(), [parameters[name] for name in network.unused], allow_unused=True)
            assert all(gradient is None for gradient in used)

    def test_fixed_tensors_are_kept_in_the_file_and_have_no_gradient(self, build, batch, tmp_path):
        network = build()
        learn(network, batch, steps=1)
        state = load_file(save_adapter(network, tmp_path) / "adapter.safetensors")
        assert state.keys() == set(network.owned)
        assert set(network.fixed) <= set(network.owned) - set(network.unused)
        for name in network.fixed:
            parameter = network.get_parameter(name)
            assert not parameter.requires_grad and parameter.grad is None
            assert torch.equal(state[name], parameter)

    def test_saved_and_loaded_into_a_fresh_network_it_gives_equal_output(self, build, row, batch, tmp_path):
        network = build()
        untrained = network(*batch[:2])
        learn(network, batch, steps=2)
        save_adapter(network, tmp_path)
        fresh = build(seed=1 if row.noise else 4)
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(*batch[:2]), network(*batch[:2]))
        assert not network.owned or not torch.equal(network(*batch[:2]), untrained)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"variant": "pico"}, "sam_variant: adapter 'tiny', network 'pico'"),
            ({"num_classes": 2}, "num_classes: adapter [15], network 2"),
            ({"image_size": 32}, "image_size: adapter 64, network 32"),
            ({"scans": 2}, "scans: adapter 1, network 2"),
            ({"strategy": LoRA(5, decoder=True)}, "strategy rank: adapter .*, network 5"),
        ],
    )
    def test_the_card_refuses_another_network(self, build, tmp_path, change, message, tiny):
        message = message.replace("'tiny'", repr(tiny))
        save_adapter(build(), tmp_path)
        other = build(**change)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(other, tmp_path)

    def test_running_statistics_of_frozen_modules_stay(self, build, batch):
        class Normalise(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(32)

            def forward(self, image, embedding, taps):
                return self.norm(embedding)

        network = build()
        network.side = Normalise().requires_grad_(False)
        network.train()
        network(*batch[:2])
        assert not network.side.norm.training
        assert network.side.norm.num_batches_tracked == 0
        assert torch.equal(network.side.norm.running_mean, torch.zeros(32))

    def test_installing_twice_raises(self, build, row):
        network = build()
        before = list(network.state_dict())
        with pytest.raises(AdapterError, match="installed already"):
            network.adopt(row.make())
        assert list(network.state_dict()) == before

    def test_disabled_it_is_the_frozen_sam_and_afterwards_as_before(self, build, row, base, batch, tiny):
        network, plain = build(), SamSegmenter(tiny, ZeroShot(random_masks=True), **row.network)
        plain.load_base(base[tiny])
        learn(network, batch)
        before, state = network(*batch[:2]), copy.deepcopy(network.state_dict())
        inside = {f"sam.{name}" for name in plain.sam.state_dict()}
        if set(network.owned) & inside:
            with pytest.raises(AdapterError, match="SAM's own tensors in place"), disable_adapter(network):
                pass
        else:
            decoder = network.sam.mask_decoder.state_dict()  # a random head is its own
            plain.sam.mask_decoder.load_state_dict({n: decoder[n] for n in plain.sam.mask_decoder.state_dict()})
            with torch.no_grad(), disable_adapter(network):
                assert torch.equal(network(*batch[:2]), plain(*batch[:2]))
                with disable_adapter(network):
                    pass
                assert torch.equal(network(*batch[:2]), plain(*batch[:2]))
        assert torch.equal(network(*batch[:2]), before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert network.strategy is None or learning(network) == {
            name for name, parameter in network.named_parameters() if parameter.requires_grad
        }

    def test_its_text_names_its_arguments(self, row):
        text = repr(row.make())
        if isinstance(row.make(), Ladder):
            assert text.startswith("Ladder(side=") and "decoder=" in text
        else:
            assert repr(eval(text, vars(strategies))) == text
            assert eval(text, vars(strategies)).card() == row.make().card()

    def test_merged_it_is_plain_sam_with_equal_output(self, build, row, batch, tiny):
        network = build()
        learn(network, batch, steps=2)
        if network.side is not None or network.second is not None:
            owned, before = list(network.owned), network(*batch[:2])
            with pytest.raises(AdapterError, match="a side network" if network.second is None else "a second decoder"):
                network.merge()
            assert network.owned == owned and torch.equal(network(*batch[:2]), before)
            return
        if any(isinstance(module, BottleneckLinear) for module in network.modules()):
            state, before = copy.deepcopy(network.state_dict()), network(*batch[:2])
            with pytest.raises(AdapterError, match="bottleneck"):
                network.merge()
            assert network.state_dict().keys() == state.keys() and torch.equal(network(*batch[:2]), before)
            return
        with torch.no_grad():
            before = network(*batch[:2])
            adapters = sum(isinstance(module, ADAPTERS) for module in network.modules())
            assert network.merge() == adapters
            torch.testing.assert_close(network(*batch[:2]), before, atol=1e-5, rtol=0)
        assert not any(isinstance(module, ADAPTERS) for module in network.modules())
        assert count_trainable(network) == 0 and network.owned == []
        plain = SamSegmenter(tiny, **row.network)
        plain.sam.load_state_dict(network.sam.state_dict(), strict=True)
        torch.testing.assert_close(plain(*batch[:2]), before, atol=1e-5, rtol=0)

    def test_keys_are_those_of_the_golden_list(self, build, row, request, tiny):
        golden = json.loads(GOLDEN.read_text())
        name = request.node.callspec.params["row"]
        assert golden.keys() == BLOCKS.keys() and golden[tiny].keys() <= ROWS.keys()
        network = build()
        assert network.owned == golden[tiny].get(name, build(seed=2).owned)  # a new one has no adapter in use
        assert set(SamSegmenter(tiny, **row.network).state_dict()) <= set(network.state_dict())

    def test_stored_statistics_of_the_encoder_are_used_and_stay_in_training(self, build, batch):
        network = build()
        encoder, image = network.sam.image_encoder, 5 + 3 * torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            before = encoder.eval()(image)
            statistics = {name: t.clone() for name, t in encoder.named_buffers()}
            network.train()
            drawn = [m for m in encoder.modules() if isinstance(m, nn.Dropout)]
            for dropout in drawn:
                dropout.eval()
            assert torch.equal(encoder(image), before)
        assert all(torch.equal(t, statistics[name]) for name, t in encoder.named_buffers())

    def test_recomputed_activations_give_the_same_gradients(self, build, batch):
        kept, recomputed = build(), build()
        recomputed.sam.image_encoder.checkpointing = True
        if isinstance(getattr(recomputed.side, "net", None), ResNetSide):
            recomputed.side.net.checkpointing = True
        seen, again = learn(kept, batch), learn(recomputed, batch)
        assert seen == pytest.approx(again, rel=1e-4, abs=1e-7)
        copy.deepcopy(recomputed)  # nothing of a pass is left in it

    def test_in_bf16_it_stays_close_and_learns_every_tensor_in_float32(self, build, row, batch):
        full, mixed = build(), build()
        mixed.autocast = "bf16_all"
        image, boxes, _ = batch
        wanted = full(image, boxes).detach()
        logits = mixed(image, boxes)
        assert logits.dtype == torch.float32
        off = (logits - wanted).abs()
        # a normalisation over the two channels that tiny's second decoder ends with turns round where they are equal
        assert (off.max() if full.second is None else 10 * off.mean()) < 0.06 * max(1, wanted.abs().max())
        largest = learn(mixed, batch, steps=2)
        assert largest.keys() == learning(mixed)
        assert {p.dtype for p in mixed.parameters()} == {torch.float32}

    def test_a_copy_is_equal_and_independent(self, build, batch):
        network = build()
        twin = copy.deepcopy(network)
        before = network(*batch[:2])
        assert torch.equal(twin(*batch[:2]), before)
        assert learning(twin) == {name for name, p in twin.named_parameters() if p.requires_grad} == learning(network)
        assert [t.dtype for t in twin.state_dict().values()] == [t.dtype for t in network.state_dict().values()]
        learn(twin, batch, steps=2)
        assert torch.equal(network(*batch[:2]), before)
        assert twin.strategy.facts(twin).keys() == network.strategy.facts(network).keys()
        assert not network.strategy.facts(network) or twin.strategy.facts(twin) != network.strategy.facts(network)

    def test_its_card_builds_it_again(self, row):
        card = json.loads(json.dumps(row.make().card()))
        arguments = card["arguments"]
        if arguments.get("side"):  # a network is named by its class
            arguments["side"] = locate(arguments["side"])()
        again = getattr(strategies, card["_target_"].removeprefix("samseg_monai.strategies."))(**arguments)
        assert again.card() == row.make().card()


def test_every_strategy_has_a_row():
    found = [cls for cls in vars(strategies).values() if isinstance(cls, type) and issubclass(cls, Strategy)]
    found.remove(Strategy)
    found.remove(Scratch)  # is for networks without SAM: test_plain.py
    made = [row.make() for row in ROWS.values()]
    assert (
        {ZeroShot, LoRA, Adapter, SSF, FacT, Ladder, Selective} <= {type(strategy) for strategy in made} == set(found)
    )
    names = {strategy.name: type(strategy) for strategy in made}
    assert names == {"dora": LoRA} | {name: kind for name, (kind, _) in strategies.STRATEGIES.items()}
    assert all(names[strategy.name] is type(strategy) for strategy in made)


@pytest.mark.parametrize(
    ("arguments", "classes", "count"),
    [
        # The numbers of SAMed (Zhang and Liu 2023), found by running its code: LoRA on q and v of ViT-B ...
        ({"rank": 4}, 1, 147_456),
        ({"rank": 16}, 1, 589_824),
        ({"rank": 64}, 1, 2_359_296),
        # ... with one magnitude for each of 768 outputs of q and v in twelve blocks (Liu et al. 2024, DoRA) ...
        ({"rank": 4, "dora": True}, 1, 147_456 + 12 * 2 * 768),
        # ... half of it in the last six blocks, a quarter in three, a twelfth in one (Teuber et al. 2025) ...
        ({"rank": 4, "last": 0.5}, 1, 73_728),
        ({"rank": 4, "last": 0.25}, 1, 36_864),
        ({"rank": 4, "last": 0.08}, 1, 12_288),
        # ... updates to q and v of the decoder's seven attention layers ...
        ({"rank": 4, "decoder": "lora"}, 1, 147_456 + 4 * (2 * 2 * 512 + 5 * 2 * 384)),
        # ... and everything with a gradient, eight organs, with and without the 256 values of no_mask_embed.
        ({"rank": 4, "decoder": "samed"}, 8, 4_773_760),
        ({"rank": 4, "decoder": True}, 8, 4_773_760 - 256),
    ],
)
def test_vit_b_trains_the_published_number_of_values(arguments, classes, count):
    with torch.device("meta"):
        network = SamSegmenter("vit_b", LoRA(**arguments), image_size=512, num_classes=classes)
    assert count_trainable(network) == count


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        # two bottlenecks in each of twelve blocks (Houlsby et al. 2019) ...
        (Adapter(64), 12 * 2 * (2 * 64 * 768 + 768 + 64)),
        # ... one of them: AdaptFormer-64 (Chen et al. 2022) ...
        (Adapter(64, place="parallel", scale=0.1), 1_189_632),
        # ... three: Medical SAM Adapter with its space-depth transpose (Wu et al. 2023) ...
        (Adapter(64, place="both", depth=4), 3 * 1_189_632),
        # ... SSF in a ViT-B (Lian et al. 2022: about 0.3 M, with a classifier), whose last norm SAM has not; in its
        # neck it has two
        (SSF(), 205_824 - 2 * 768 + 2 * 2 * 256),
        # ... FacT-TT in q, k, v and proj (Jie and Deng 2023, section 3.3: 2 d r + L m r^2, here m is 4, not 12)
        (FacT(16), 2 * 768 * 16 + 12 * 4 * 16 * 16),
        (Selective(["<attention>"]), 12 * 4 * (768 * 768 + 768)),
    ],
)
def test_vit_b_adapters_train_the_number_of_values_of_the_papers(strategy, count):
    with torch.device("meta"):
        network = SamSegmenter("vit_b", strategy, image_size=512)
    assert count_trainable(network) == count


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        # SAM-LST's code (Chai et al. 2023) at 512 with eight organs, by running it: CNN, output_upscaling, gate
        ({"decoder": "upscaling", "masks": "random"}, 2_782_784 + 73_952 + 1),
        ({"decoder": "upscaling", "masks": "random", "mix": "side"}, 2_782_784 + 73_952),
        ({"decoder": "upscaling", "masks": "random", "mix": "sam"}, 73_952),
        ({"decoder": "masks"}, 2_782_784 + 73_952 + 1 + 9 * (256 + 2 * (256 * 256 + 256) + 256 * 32 + 32)),
    ],
)
def test_vit_b_ladders_train_the_published_number_of_values(strategy, count):
    with torch.device("meta"):
        network = SamSegmenter("vit_b", Ladder(**strategy), image_size=512, num_classes=8, prompt="none")
    assert count_trainable(network) == count
    if network.strategy.name == "ladder_paper":
        assert count == 2_856_737


def test_each_target_gets_its_own_gradient(base):
    network = SamSegmenter("tiny", LoRA(2, targets=ALL_SIX))
    network.load_base(base["tiny"])
    names = [name for name in learn(network, draw_batch(), steps=2) if ".blocks.0." in name]
    expected = [f"attn.qkv.lora_{m}.{part}" for m in "ab" for part in range(3)]
    expected += [f"{path}.lora_{m}.0" for path in ("attn.proj", "mlp.lin1", "mlp.lin2") for m in "ab"]
    assert names == [f"sam.image_encoder.blocks.0.{name}" for name in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q", "w"]}, "'w' is unknown; the options are q, k, v, proj, lin1, lin2"),
        ({"targets": []}, "targets must name"),
        ({"targets": ["q", "q"]}, "targets must name different"),
        ({"blocks": []}, "blocks must be"),
        ({"last": 0.0}, "0 < last <= 1, got 0.0"),
        ({"last": 1.5}, "0 < last <= 1, got 1.5"),
        ({"last": 0.5, "blocks": [0]}, "give one of them"),
        ({"decoder": "all"}, "decoder must be one of False, True, 'lora', 'samed', 'hierarchical', 'h_sam', got 'all'"),
        ({"decoder": "lora", "rank": 17}, "rank must be 1 to 16 .* got 17"),
        ({"blocks": [0, 2]}, r"blocks \[2\] are not in this encoder; it has blocks 0 .. 1"),
        ({"rank": 33}, "rank must be 1 to 32 .* got 33"),
        ({"rank": 0}, "rank must be 1 to 32 .* got 0"),
    ],
)
def test_lora_says_what_does_not_fit(arguments, message):
    with pytest.raises(AdapterError, match=message):
        SamSegmenter("tiny", LoRA(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": "above"}, "place must be one of 'serial', 'parallel', 'both', got 'above'"),
        ({"depth": 2}, "depth must be 1, or with place 'both' more, got 2"),
        ({"depth": 0, "place": "both"}, "depth must be 1, or with place 'both' more, got 0"),
        ({"width": 0}, "width must be 1 to 65536, got 0"),
        ({"scale": 0.0}, "scale must be greater than 0, got 0.0"),
        ({"blocks": [0, 2]}, r"Adapter blocks \[2\] are not in this encoder; it has blocks 0 .. 1"),
        ({"last": 2.0, "blocks": [0]}, "(?s)0 < last <= 1.*give one of them"),
    ],
)
def test_adapter_says_what_does_not_fit(arguments, message):
    with pytest.raises(AdapterError, match=message):
        SamSegmenter("tiny", Adapter(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": []}, "patterns must name something"),
        ({"patterns": "sam"}, "patterns must be a list of names or patterns, got 'sam'"),
        (
            {"patterns": ["sam.mask_decodr"]},
            r"'sam.mask_decodr' matches nothing .* there is sam.image_encoder",
        ),
        ({"patterns": ["sam"], "frozen": ["sam.prompts"]}, "'sam.prompts' matches nothing that the task uses"),
        ({"patterns": ["sam.mask_decoder"], "frozen": ["sam"]}, "leaves nothing of"),
        ({"patterns": ["sam.mask_decoder.iou_prediction_head"]}, "matches nothing that the task uses"),
    ],
)
def test_selective_says_what_does_not_fit(arguments, message):
    with pytest.raises(AdapterError, match=message):
        SamSegmenter("tiny", Selective(**arguments))


def test_only_a_sam_below_an_adapter_can_be_had_back(capsys):
    network = SamSegmenter("tiny", LoRA(2))
    network.load_base("random")
    network.print_trainable_parameters()
    learns = count_trainable(network)
    assert capsys.readouterr().out.startswith(f"{learns:,} of {sum(p.numel() for p in network.parameters()):,} values")
    with pytest.raises(ZeroDivisionError), disable_adapter(network):
        raise ZeroDivisionError
    assert all(layer.enabled for layer in network.modules() if isinstance(layer, LoRALinear))
    network.merge()
    with pytest.raises(AdapterError, match="was merged"), disable_adapter(network):
        pass
    with pytest.raises(AdapterError, match="Conv2d has no SAM"), disable_adapter(nn.Conv2d(1, 1, 1)):
        pass
    network.adopt(LoRA(3))
    assert network.strategy.rank == 3 and count_trainable(network) == learns * 3 // 2


def test_a_side_network_that_learns_alone_can_be_disabled():
    class Beside(Strategy):
        """Shifts SAM's embedding by what it learns."""

        def install(self, segmenter):
            segmenter.side = Shift()
            return ["side.by"]

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(WIDTH, 1, 1))

        def forward(self, image, embedding, taps):
            return embedding + self.by

    torch.manual_seed(0)
    network = SamSegmenter("tiny", Beside())
    torch.manual_seed(0)
    plain = SamSegmenter("tiny")
    image, boxes, _ = draw_batch()
    assert not torch.equal(network(image, boxes), plain(image, boxes))
    with disable_adapter(network):
        assert torch.equal(network(image, boxes), plain(image, boxes))
    assert isinstance(network.side, Shift) and "side.by" in network.state_dict()


def test_a_refused_strategy_leaves_the_network_as_it_was():
    network = SamSegmenter("tiny", LoRA(2))
    network.merge()
    with pytest.raises(AdapterError, match="rank"):
        LoRA(33, targets=("lin1", "q")).install(network)
    assert not any(isinstance(module, LoRALinear) for module in network.modules())


def write_golden() -> None:
    """Add the names that new rows own; a change of those that are there would be one of every adapter saved before."""
    known = json.loads(GOLDEN.read_text())
    keys = {
        tiny: {
            name: known.get(tiny, {}).get(name) or SamSegmenter(tiny, row.make(), **row.network).owned
            for name, row in ROWS.items()
        }
        for tiny in BLOCKS
    }
    GOLDEN.write_text(json.dumps(keys, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
