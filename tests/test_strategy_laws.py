"""Laws that every strategy obeys, and counts that are known from elsewhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai import strategies
from samseg_monai.adapters import LoRALinear
from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.errors import AdapterError, CheckpointError
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.strategies import LoRA, Strategy, ZeroShot
from samseg_monai.trainable import count_trainable, owned_state

GOLDEN = Path(__file__).parent / "golden" / "strategy_keys.json"
WIDTH, HIDDEN, DEPTH = 32, 128, 2  # of SAM "tiny": embedding, MLP, number of blocks

# A shift of all keys cancels in the softmax: these biases are used, but their gradient is rounding noise.
ROUNDING_ONLY = "k_proj.bias"


@dataclass(frozen=True)
class Row:
    """One strategy with arguments, and how many values it trains in SAM "tiny"."""

    make: Callable[[], Strategy]
    count: Callable[[SamSegmenter], int]


def decoder_values(network: SamSegmenter) -> int:
    """Values of the mask decoder that make SAM's single mask, summed over modules."""
    decoder = network.sam.mask_decoder
    used = [
        decoder.transformer,
        decoder.iou_token,
        decoder.mask_tokens,
        decoder.output_upscaling,
        decoder.output_hypernetworks_mlps[0],
    ]
    return sum(p.numel() for module in used for p in module.parameters())


ALL_SIX = ("q", "k", "v", "proj", "lin1", "lin2")
ROWS = {
    "zero_shot": Row(ZeroShot, lambda network: 0),
    "lora": Row(lambda: LoRA(2), lambda network: DEPTH * 2 * 2 * WIDTH * 2),
    "lora_all_targets": Row(
        lambda: LoRA(3, alpha=6, targets=ALL_SIX, dropout=0.1, rank_stabilised=True),
        lambda network: DEPTH * 3 * (4 * 2 * WIDTH + 2 * (WIDTH + HIDDEN)),
    ),
    "lora_last_block": Row(lambda: LoRA(2, blocks=[1], targets=["k", "proj"]), lambda network: 2 * 2 * WIDTH * 2),
    "lora_decoder": Row(
        lambda: LoRA(2, decoder=True), lambda network: DEPTH * 2 * 2 * WIDTH * 2 + decoder_values(network)
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(build_sam("tiny").state_dict(), path)
    return path


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture
def build(row, base):
    """Builds the row's network, with the same base weights each time."""

    def build_network(variant="tiny", *, strategy=None, **arguments):
        torch.manual_seed(1)
        network = SamSegmenter(variant, strategy or row.make(), **arguments)
        if variant == "tiny" and not arguments:
            network.load_base(base)
        else:
            network.base_sha256 = "another"
        return network

    return build_network


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(2)
    image = torch.randn(2, 1, 64, 48, generator=rng)
    boxes = torch.tensor([[5.0, 6, 40, 50], [2, 20, 30, 44]])
    return image, boxes, (torch.rand(2, 1, 64, 48, generator=rng) > 0.5).float()


def learn(network, batch, *, steps=1):
    """Train with plain gradient descent; returns the largest absolute gradient that each parameter saw."""
    image, boxes, target = batch
    largest: dict[str, float] = {}
    network.train()
    torch.manual_seed(3)
    for _ in range(steps if network.owned else 0):
        network.zero_grad()
        F.binary_cross_entropy_with_logits(network(image, boxes), target).backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    largest[name] = max(largest.get(name, 0.0), parameter.grad.abs().max().item())
                    parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
    network.eval()
    return largest


class TestStrategyLaws:
    def test_fresh_it_changes_nothing(self, build, base, batch):
        plain = SamSegmenter("tiny")
        plain.load_base(base)
        assert torch.equal(build()(*batch[:2]), plain(*batch[:2]))

    def test_after_a_step_only_owned_tensors_moved_bit_for_bit(self, build, batch):
        network = build()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        learn(network, batch, steps=2)
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved <= set(network.owned)
        assert all(name.endswith(ROUNDING_ONLY) for name in set(network.owned) - moved)

    def test_trains_as_many_values_as_the_formula_says(self, build, row):
        network = build()
        assert count_trainable(network) == row.count(network)
        assert sum(t.numel() for t in owned_state(network, network.owned).values()) == row.count(network)

    def test_every_owned_tensor_has_a_gradient_within_two_steps(self, build, batch):
        network = build()
        largest = learn(network, batch, steps=2)
        assert largest.keys() == set(network.owned)
        dead = [name for name, size in largest.items() if size < 1e-7 and not name.endswith(ROUNDING_ONLY)]
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

    def test_saved_and_loaded_into_a_fresh_network_it_gives_equal_output(self, build, batch, tmp_path):
        network = build()
        untrained = network(*batch[:2])
        learn(network, batch, steps=2)
        save_adapter(network, tmp_path)
        fresh = build()
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(*batch[:2]), network(*batch[:2]))
        assert not network.owned or not torch.equal(network(*batch[:2]), untrained)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"variant": "pico"}, "sam_variant: adapter 'tiny', network 'pico'"),
            ({"num_classes": 2}, "num_classes: adapter 1, network 2"),
            ({"image_size": 32}, "image_size: adapter 64, network 32"),
            ({"scans": 2}, "scans: adapter 1, network 2"),
            ({"strategy": LoRA(5)}, "strategy rank: adapter .*, network 5"),
        ],
    )
    def test_the_card_refuses_another_network(self, build, tmp_path, change, message):
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
            row.make().install(network)
        assert list(network.state_dict()) == before

    def test_merged_it_is_plain_sam_with_equal_output(self, build, batch):
        network = build()
        learn(network, batch, steps=2)
        with torch.no_grad():
            before = network(*batch[:2])
            adapters = sum(isinstance(module, LoRALinear) for module in network.modules())
            assert network.merge() == adapters
            torch.testing.assert_close(network(*batch[:2]), before, atol=1e-5, rtol=0)
        assert not any(isinstance(module, LoRALinear) for module in network.modules())
        assert count_trainable(network) == 0 and network.owned == []
        plain = SamSegmenter("tiny")
        plain.sam.load_state_dict(network.sam.state_dict(), strict=True)
        torch.testing.assert_close(plain(*batch[:2]), before, atol=1e-5, rtol=0)

    def test_keys_are_those_of_the_golden_list(self, build, request):
        golden = json.loads(GOLDEN.read_text())
        assert golden.keys() == ROWS.keys()
        network = build()
        assert network.owned == golden[request.node.callspec.params["row"]]
        assert set(SamSegmenter("tiny").state_dict()) <= set(network.state_dict())

    def test_a_copy_is_equal_and_independent(self, build, batch):
        network = build()
        twin = copy.deepcopy(network)
        before = network(*batch[:2])
        assert torch.equal(twin(*batch[:2]), before)
        learn(twin, batch, steps=2)
        assert torch.equal(network(*batch[:2]), before)

    def test_its_card_builds_it_again(self, row):
        card = json.loads(json.dumps(row.make().card()))
        again = getattr(strategies, card["_target_"].removeprefix("samseg_monai.strategies."))(**card["arguments"])
        assert again.card() == row.make().card()


def test_every_strategy_has_a_row():
    found = [cls for cls in vars(strategies).values() if isinstance(cls, type) and issubclass(cls, Strategy)]
    found.remove(Strategy)
    assert len(found) == 2
    assert {type(row.make()) for row in ROWS.values()} == set(found)
    assert len({cls.name for cls in found}) == len(found)


@pytest.mark.parametrize(
    ("arguments", "classes", "count"),
    [
        # The numbers of SAMed (Zhang and Liu 2023), found by running its code: LoRA on q and v of ViT-B ...
        ({"rank": 4}, 1, 147_456),
        ({"rank": 16}, 1, 589_824),
        ({"rank": 64}, 1, 2_359_296),
        # ... and everything with a gradient, eight organs; SAMed also trains the 256 values of no_mask_embed.
        ({"rank": 4, "decoder": True}, 8, 4_773_760 - 256),
    ],
)
def test_vit_b_trains_the_published_number_of_values(arguments, classes, count):
    with torch.device("meta"):
        network = SamSegmenter("vit_b", LoRA(**arguments), image_size=512, num_classes=classes)
    assert count_trainable(network) == count


def test_each_target_gets_its_own_gradient(base, batch):
    network = SamSegmenter("tiny", LoRA(2, targets=ALL_SIX))
    network.load_base(base)
    names = [name for name in learn(network, batch, steps=2) if ".blocks.0." in name]
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
        ({"blocks": [0, 2]}, r"blocks \[2\] are not in this encoder; it has blocks 0 .. 1"),
        ({"rank": 33}, "rank must be 1 to 32 .* got 33"),
        ({"rank": 0}, "rank must be 1 to 32 .* got 0"),
    ],
)
def test_lora_says_what_does_not_fit(arguments, message):
    with pytest.raises(AdapterError, match=message):
        SamSegmenter("tiny", LoRA(**arguments))


def test_a_refused_strategy_leaves_the_network_as_it_was():
    network = SamSegmenter("tiny", LoRA(2))
    network.merge()
    with pytest.raises(AdapterError, match="rank"):
        LoRA(33, targets=("lin1", "q")).install(network)
    assert not any(isinstance(module, LoRALinear) for module in network.modules())
