"""What each option of learning changes: DoRA, average of weights, learning rates by part, range test, first block."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from samseg_monai import bundles, cli, handlers
from samseg_monai.adapters import DoRALinear
from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.cli.places import overrides_of
from samseg_monai.cli.range_test import range_test
from samseg_monai.errors import CheckpointError, ConfigError, TrainingError
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.spec import get_spec
from samseg_monai.strategies import Ladder, LoRA
from samseg_monai.training import parameter_groups, warmup_schedule
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY
from tests.strategies.test_strategy_laws import SmallSide, draw_batch

DEEP = dataclasses.replace(get_spec("tiny"), name="deep", depth=4, global_attn_indexes=(1, 3))


def segmenter(strategy, variant="tiny", **arguments):
    torch.manual_seed(0)
    network = SamSegmenter(variant, strategy, **arguments)
    network.load_base("random")
    return network


# --- DoRA -----------------------------------------------------------------------------------------------------------


def drawn_dora(base, **arguments):
    """A layer whose updates and magnitudes are anything."""
    layer = DoRALinear(base, **arguments)
    for tensor in (*layer.lora_b.values(), *layer.magnitude.values()):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


@pytest.mark.parametrize(("parts", "bias"), [((0, 2), True), ((0, 1, 2), False)])
def test_dora_is_the_papers_equation_with_a_constant_norm(parts, bias):
    base = nn.Linear(8, 24, bias=bias).requires_grad_(False)
    layer = drawn_dora(base, rank=2, alpha=6.0, parts=parts, num_parts=3, rank_stabilised=True)
    x, probe = torch.randn(2, 5, 8), torch.randn(2, 5, 24, dtype=torch.float64)
    learned = {name: layer.get_parameter(name) for name in layer.lora_names()}
    mine = torch.autograd.grad((layer(x).double() * probe).sum(), list(learned.values()))

    def oracle(constant):
        leaf = {name: tensor.detach().double().requires_grad_() for name, tensor in learned.items()}
        rows = []
        for part, weight in enumerate(base.weight.double().reshape(3, 8, 8)):
            if part in parts:
                whole = weight + 6 / 2**0.5 * leaf[f"lora_b.{part}"] @ leaf[f"lora_a.{part}"]
                norm = (whole**2).sum(1, keepdim=True).sqrt()
                weight = leaf[f"magnitude.{part}"][:, None] * whole / (norm.detach() if constant else norm)
            rows.append(weight)
        out = F.linear(x.double(), torch.cat(rows), base.bias.double() if bias else None)
        return out, torch.autograd.grad((out * probe).sum(), list(leaf.values()))

    out, gradients = oracle(constant=True)
    torch.testing.assert_close(layer(x).double(), out, atol=1e-5, rtol=1e-5)
    for one, other in zip(mine, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)
    others = oracle(constant=False)[1]
    assert max((a - b).abs().max() for a, b in zip(gradients, others, strict=True)) > 0.1  # section 4.3 is no nothing
    assert (layer(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fresh_dora_layer_changes_nothing_even_of_a_row_without_direction(bf16):
    base = nn.Linear(8, 24)
    with torch.no_grad():
        base.weight[3] = 0
    layer, x = DoRALinear(base, rank=2, parts=(0, 2), num_parts=3), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        assert layer(x).dtype is base(x).dtype
        assert torch.equal(layer(x), base(x))


def test_dora_takes_its_magnitudes_from_the_base_weights_of_the_parts_that_it_adapts():
    layer, plain = DoRALinear(nn.Linear(8, 24), rank=2, parts=(0, 2), num_parts=3), nn.Linear(8, 24)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(layer(torch.eye(8)), plain(torch.eye(8)))
    layer.reset_magnitude()
    assert torch.equal(layer(torch.eye(8)), plain(torch.eye(8)))
    assert sorted(layer.magnitude) == ["0", "2"]
    torch.testing.assert_close(layer.magnitude["2"].detach(), plain.weight[16:].norm(dim=1))
    drawn = drawn_dora(plain, rank=2, parts=(0, 2), num_parts=3)
    moved = (drawn(torch.eye(8)) - plain(torch.eye(8))).abs().amax(0).reshape(3, 8)
    assert (moved[[0, 2]] > 0).all() and (moved[1] == 0).all()
    drawn.reset_lora()
    assert torch.equal(drawn(torch.eye(8)), plain(torch.eye(8)))


def test_cards_of_lora_do_not_know_dora_and_the_two_refuse_each_other(tmp_path):
    assert "dora" not in LoRA(2).card()["arguments"]
    assert LoRA(2, dora=True).card()["arguments"]["dora"] is True
    save_adapter(segmenter(LoRA(2)), tmp_path / "lora")
    save_adapter(segmenter(LoRA(2, dora=True)), tmp_path / "dora")
    with pytest.raises(CheckpointError, match="strategy dora: adapter True, network None"):
        load_adapter(segmenter(LoRA(2)), tmp_path / "dora")
    with pytest.raises(CheckpointError, match="strategy dora: adapter None, network True"):
        load_adapter(segmenter(LoRA(2, dora=True)), tmp_path / "lora")


# --- average of weights ---------------------------------------------------------------------------------------------


class Drawing(Dataset):
    """Five images and masks, each drawn from (epoch, item)."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 5

    def __getitem__(self, index):
        image = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(100 * self.epoch + index))
        return {"image": image, "label": (image > 1).float(), "case": f"c{index}", "slice": index}


class Run:
    """A training as a bundle wires it: 3 batches and 2 steps an epoch; made anew for a resume."""

    def __init__(self, folder, *, decay=0.15, epochs=3, every=1, groups=True, strategy=None, card=False):
        strategy = strategy or LoRA(2, decoder=True)
        self.network = network = segmenter(strategy, image_size=32, prompt="none")
        options = {"layer_decay": 0.5, "scale": [("sam.mask_decoder", 0.1)]} if groups else {}
        self.optimizer = torch.optim.Adam(parameter_groups(network, 0.01, **options), lr=0.01)
        schedule = warmup_schedule(self.optimizer, total=9, warmup=2)
        self.seen: list[dict[str, torch.Tensor]] = []
        score = SimpleNamespace(attach=lambda engine: engine.add_event_handler(Events.EPOCH_COMPLETED, self._score))
        best = handlers.BestAdapter(network, folder, key_metric_name="score")
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"), val_data_loader=DataLoader(Drawing(), batch_size=5), network=network,
            val_handlers=[score, best],
        )  # fmt: skip
        self.ema = None if decay is None else handlers.EMA(network, decay, evaluator=self.evaluator)
        keep = ValidationHandler(1, self.evaluator) if every else handlers.LastAdapter(network, folder, ema=self.ema)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=epochs, network=network, optimizer=self.optimizer,
            train_data_loader=DataLoader(Drawing(), batch_size=2, shuffle=True, generator=torch.Generator()),
            loss_function=nn.BCEWithLogitsLoss(), accumulation_steps=2,
            train_handlers=[
                *([handlers.RunCard(folder, settings={}, network=network, best=best)] if card else []),
                handlers.EpochSeeder(0), keep, LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            ],
        )  # fmt: skip
        if self.ema is not None:
            self.ema.attach(self.trainer)
        self.resume = handlers.ResumeSaver(
            folder, network, optimizer=self.optimizer, lr_scheduler=schedule, best=best, ema=self.ema
        )
        self.resume.attach(self.trainer)

    def learnt(self):
        return {n: p.detach().clone() for n, p in self.network.named_parameters() if p.requires_grad}

    def _score(self, engine):
        self.seen.append(self.learnt())
        engine.state.metrics["score"] = float(len(self.seen))  # each validation is the best so far

    def go(self):
        self.resume.load()
        self.trainer.run()
        return self


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    return SimpleNamespace(folder=folder, run=Run(folder).go())


def test_the_average_is_that_of_a_loop_by_hand_over_the_optimisers_steps(tmp_path):
    run = Run(tmp_path, epochs=2)
    weights = [{name: tensor.double() for name, tensor in run.learnt().items()}]
    run.optimizer.register_step_post_hook(lambda *_: weights.append(run.learnt()))
    run.go()
    assert len(weights) == 1 + 2 * 2  # six batches, two of which fill a step, and one is left over
    average = weights[0]
    for step_number, now in enumerate(weights[1:]):
        d = min(0.15, (1 + step_number) / (10 + step_number))
        average = {name: d * old + (1 - d) * now[name].double() for name, old in average.items()}
    for name, value in run.ema.average.items():
        torch.testing.assert_close(value.double(), average[name], atol=1e-6, rtol=1e-5)
        assert value.dtype is torch.float32
    assert run.ema.steps == 4 and run.ema.average.keys() == run.learnt().keys()
    assert max((run.ema.average[name] - now).abs().max() for name, now in run.learnt().items()) > 1e-4


def test_validation_sees_the_average_and_the_adapter_holds_it_but_training_goes_on_with_its_weights(averaged):
    run, saved = averaged.run, torch.load(averaged.folder / "resume.pt", weights_only=True)
    average = run.ema.state_dict()["average"]
    assert len(run.seen) == 3 and same(run.seen[-1], average)
    adapter = load_file(averaged.folder / "adapter.safetensors")
    assert same({name: adapter[name] for name in average}, average)
    assert same({name: saved["network"][name] for name in average}, run.learnt())
    assert not same(run.learnt(), average)
    assert same(saved["parts"]["ema"]["average"], average) and saved["parts"]["ema"]["steps"] == 6


def test_the_training_itself_is_that_without_an_average(averaged, tmp_path):
    assert same(Run(tmp_path, decay=None).go().learnt(), averaged.run.learnt())


def test_a_resumed_training_ends_with_the_same_average_and_groups(averaged, tmp_path):
    Run(tmp_path, epochs=2).go()
    again = Run(tmp_path).go()
    assert again.trainer.state.iteration == 9 and len(again.seen) == 1
    assert same(again.learnt(), averaged.run.learnt()) and same(again.seen[-1], averaged.run.seen[-1])
    assert again.ema.steps == averaged.run.ema.steps
    rates = [group["lr"] for group in again.optimizer.param_groups]
    assert rates == [group["lr"] for group in averaged.run.optimizer.param_groups] and len(rates) == 3


def test_without_validation_the_adapter_of_the_last_epoch_is_the_average(averaged, tmp_path):
    run = Run(tmp_path, every=0).go()
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert same({name: adapter[name] for name in run.ema.average}, run.ema.average)
    assert same(run.learnt(), averaged.run.learnt())


@pytest.mark.parametrize("every", [0, 1])
def test_the_run_card_tells_the_gate_of_the_weights_that_are_kept(every, tmp_path):
    strategy = Ladder(SmallSide(), side_weights="random")
    run = Run(tmp_path, strategy=strategy, epochs=2, every=every, groups=False, card=True).go()
    card = json.loads((tmp_path / "run_card.json").read_text(encoding="utf-8"))
    kept = load_file(tmp_path / "adapter.safetensors")["side.alpha"]
    assert card["status"] == "completed" and card["gate"] == pytest.approx(torch.sigmoid(kept).item())
    assert abs(card["gate"] - run.network.side.gate) > 1e-4  # the training goes on with other weights


def test_a_validation_that_fails_leaves_the_weights_of_the_training(tmp_path):
    run = Run(tmp_path, epochs=1)
    before = []

    def fail(engine):
        assert same(run.learnt(), run.ema.average)
        raise TrainingError("broken")

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: before.append(run.learnt()))
    run.evaluator.add_event_handler(Events.ITERATION_STARTED, fail)
    with pytest.raises(TrainingError, match="broken"):
        run.go()
    assert same(run.learnt(), before[-1]) and not same(run.learnt(), run.ema.average)


def test_the_average_has_its_own_running_statistics():
    """Those of the training's weights belong to other activations; counts of batches, whole numbers, stay."""
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ema = handlers.EMA(network, 0.5)
    ema._begin(None)
    engine = SimpleNamespace(state=SimpleNamespace(iteration=1, epoch_length=None))
    means = [network[1].running_mean.clone()]
    for step in range(3):
        network(torch.randn(8, 4) + step)
        means.append(network[1].running_mean.clone())
        ema._update(engine)
    expected = means[0]
    for step, mean in enumerate(means[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * mean
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with ema.in_use():
        torch.testing.assert_close(network[1].running_mean, expected)
        assert not torch.equal(network[1].running_var, before["1.running_var"])
    assert same(network.state_dict(), before) and "1.num_batches_tracked" not in ema.average
    old = {"steps": 3, "average": {name: ema.average[name] for name, _ in network.named_parameters()}}
    ema.load_state_dict(old)  # an older file, which has no statistics: they go on from the training's
    assert same(
        {name: ema.average[name] for name in ("1.running_mean", "1.running_var")},
        {name: before[name] for name in ("1.running_mean", "1.running_var")},
    )


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=f"between 0 and 1, got {decay}"):
        handlers.EMA(nn.Linear(1, 1), decay)


# --- learning rates -------------------------------------------------------------------------------------------------


def rates_of(network, groups):
    """Rate of each tensor that learns; each must be in exactly one group."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert found.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    return found


def test_the_defaults_are_the_plain_list_of_what_learns():
    network = segmenter(LoRA(2, decoder=True))
    expected = [p for p in network.parameters() if p.requires_grad]
    for given in (network, nn.DataParallel(network)):  # as DDP wraps it
        found = parameter_groups(given, 0.1)
        assert [id(p) for p in found] == [id(p) for p in expected]


def test_rates_fall_towards_the_input_block_by_block():
    network = segmenter(LoRA(2), DEEP).requires_grad_(True)
    found = rates_of(network, parameter_groups(network, 0.1, layer_decay=0.5))
    for name, rate in found.items():
        block = re.match(r"sam\.image_encoder\.blocks\.(\d)", name)
        if block:
            assert rate == pytest.approx(0.1 / (16, 8, 4, 2)[int(block[1])])
        elif name.startswith(("sam.image_encoder.patch_embed", "sam.image_encoder.pos_embed")):
            assert rate == pytest.approx(0.1 / 32)
        else:
            assert rate == 0.1
    assert len(set(found.values())) == 6


def test_a_factor_counts_for_its_names_and_the_last_of_several(caplog):
    network = segmenter(Ladder(SmallSide(), side_weights="random"), prompt="none", num_classes=2)
    with caplog.at_level(logging.INFO):
        groups = parameter_groups(network, 0.1, scale=[("side", 2), ("side.alpha", 10), ("*.net.*.bias", 3)])
    found = rates_of(network, groups)
    assert groups[0]["lr"] == 0.1 and found["side.alpha"] == 1.0
    assert found["side.net.0.weight"] == 0.2 and found["side.net.1.bias"] == pytest.approx(0.3)
    assert all(rate == 0.1 for name, rate in found.items() if not name.startswith("side."))
    assert "Learning rates of 4 groups" in caplog.text
    assert re.search(r"^  1: side\.alpha \(1 tensor, 1 value\)$", caplog.text, re.MULTILINE)
    assert re.search(r"^  0\.1: sam\.mask_decoder \(\d+ tensors, [\d,]+ values\)$", caplog.text, re.MULTILINE)


def test_layer_decay_and_factors_multiply():
    network = segmenter(LoRA(2))
    found = rates_of(network, parameter_groups(network, 1.0, layer_decay=0.5, scale=[("*.lora_b", 16)]))
    first = "sam.image_encoder.blocks.0.attn.qkv"
    assert (found[f"{first}.lora_a.0"], found[f"{first}.lora_b.2"]) == (0.25, 4.0)


def test_weight_decay_can_be_left_to_matrices():
    network = segmenter(Ladder(SmallSide(), side_weights="random", decoder="full"), prompt="none", num_classes=2)
    groups = parameter_groups(network, 0.1, weight_decay_matrices_only=True)
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    nn.init.ones_(network.side.alpha)
    before["side.alpha"] = torch.ones(1)
    optimizer.step()  # without a gradient nothing but the weight decay moves a tensor
    shrunk = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
    tokens = {"sam.mask_decoder.iou_token.weight", "sam.mask_decoder.mask_tokens.weight"}
    assert tokens < learning.keys() and len(shrunk) > 10
    assert shrunk == {name for name, p in learning.items() if p.ndim > 1} - tokens


def test_the_gate_moves_ten_times_as_fast_with_a_factor_of_ten():
    moved = []
    for scale in ([], [["side.alpha", 10]]):
        network = segmenter(Ladder(SmallSide(), side_weights="random"), prompt="none", num_classes=5).train()
        optimizer = torch.optim.Adam(parameter_groups(network, 0.001, scale=scale), lr=0.001)
        image, _, target = draw_batch(5, "none")
        F.cross_entropy(network(image), target).backward()
        optimizer.step()
        moved.append(abs(network.side.alpha.item()))
    assert moved == [pytest.approx(0.001, rel=0.01), pytest.approx(0.01, rel=0.01)]  # Adam's first step is the rate


def test_a_schedule_keeps_the_ratios():
    network = segmenter(LoRA(2))
    optimizer = torch.optim.SGD(parameter_groups(network, 0.1, layer_decay=0.5), lr=0.1)
    schedule = warmup_schedule(optimizer, total=8, warmup=3, decay="cosine")
    rates = []
    for _ in range(7):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(two == pytest.approx(2 * one) for one, two in rates)
    assert len({one for one, _ in rates}) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"layer_decay": 0.0}, "layer_decay must be"),
        (
            {"scale": [["side.alfa", 10]]},
            r"'side.alfa' matches nothing .*; there is sam\.mask.*, side\.alpha, side\.net\.\*\.weight",
        ),
        ({"scale": [["side", 0]]}, "factor of 'side' must be above 0, got 0"),
        ({"scale": {"side.alpha": 10}}, r'pairs such as \[\["side.alpha", 10\]\], got \'side.alpha\''),
        ({"scale": ["side.alpha", 10]}, "got 'side.alpha' in it.*got 10 in it"),
        ({"scale": [["side", float("inf")]]}, "pairs such as"),
        ({"layer_decay": "0.9"}, "layer_decay must be above 0 and at most 1, got '0.9'"),
        ({"scale": [["side", "fast"]]}, "pairs such as"),
        ({"layer_decay": 0.5}, "nothing of an image encoder learns"),
    ],
)
def test_rules_that_do_not_fit_are_refused_by_name(options, message):
    network = SamSegmenter("tiny", Ladder(SmallSide()), prompt="none")
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        parameter_groups(network, 0.1, **options)


# --- range test -----------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Needs its boxes: half the curvature-2 parabola of one weight, a statistic on the side."""

    def __init__(self):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([1.0]))
        self.norm = nn.BatchNorm1d(1)
        self.rates: list[list[float]] = []
        self.weights: list[float] = []

    def forward(self, image, boxes):
        self.norm(image)
        return self.weight * image.sign() + boxes.sum() + 0 * self.other


def try_rates(network, tmp_path, *, scale=1.0, loss=None, ignored=(), **options):
    data = [{"image": torch.ones(1), "label": torch.zeros(1), "boxes": torch.zeros(4)} for _ in range(4)]
    for index in ignored:
        data[index]["label"].fill_(255)
    optimizer = torch.optim.SGD(
        [{"params": [network.weight], "lr": 0.01}, {"params": [network.other], "lr": 0.1}], lr=0.01
    )
    optimizer.register_step_post_hook(lambda o, *_: network.rates.append([g["lr"] for g in o.param_groups]))
    optimizer.register_step_post_hook(lambda *_: network.weights.append(network.weight.item()))
    found = range_test(
        network, optimizer, loss or (lambda pred, label: scale * (pred - label).square()),
        DataLoader(data, batch_size=2), PrepareBatchExtraInput({"boxes": "boxes"}),
        device=torch.device("cpu"), output_dir=str(tmp_path),
        **{"lr": 0.01, "start_lr": 1e-4, "end_lr": 10.0, "steps": 60, **options},
    )  # fmt: skip
    return found, optimizer


def test_a_range_test_clips_gradients_as_the_training_does(tmp_path):
    steps = {}
    for clip_norm in (None, 0.5):
        network = Shifted()
        network.weights.append(3.0)
        try_rates(network, tmp_path, scale=100.0, clip_norm=clip_norm, end_lr=1e-3, steps=10)
        moved = [abs(a - b) for a, b in itertools.pairwise(network.weights)]
        steps[clip_norm] = [one / rate for one, (rate, _) in zip(moved, network.rates, strict=True)]
    assert steps[None][0] == pytest.approx(600, rel=1e-3) and min(steps[None]) > 200  # the slope of 100 w ** 2
    assert steps[0.5] == pytest.approx([0.5] * 10, rel=1e-2)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_suggested_rate_is_below_that_at_which_descent_diverges(tmp_path, scale):
    found, _ = try_rates(Shifted(), tmp_path, scale=scale)
    assert 0.01 / scale < found < 1 / scale  # gradient descent on scale * w ** 2 diverges above 1 / scale
    rows = list(csv.DictReader((tmp_path / "lr_finder.csv").open(encoding="utf-8")))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == sorted(rates) and rates[0] == pytest.approx(1e-4) and 10 < len(rows) < 60  # it diverged
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")


def test_a_range_test_leaves_everything_as_it_was_and_keeps_the_ratios(tmp_path):
    network = Shifted()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, optimizer = try_rates(network, tmp_path)
    assert same(network.state_dict(), before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1] and not optimizer.state
    assert len(network.rates) > 10 and all(other == pytest.approx(10 * rate) for rate, other in network.rates)
    steps = [rate for rate, _ in network.rates]
    optimizer.step()
    assert network.rates[-1] == [0.01, 0.1]  # nothing is multiplied any more
    assert steps[0] == pytest.approx(1e-4) and steps[1] / steps[0] == pytest.approx(1e5 ** (1 / 59))


def test_a_loss_that_is_not_a_number_ends_the_test_and_one_that_never_falls_is_told(tmp_path):
    with pytest.raises(TrainingError, match="finite for 0 steps only"):
        try_rates(Shifted(), tmp_path, loss=lambda pred, label: pred * torch.nan)
    with pytest.raises(TrainingError, match=r"the loss fell nowhere between 0\.0001 and"):
        try_rates(Shifted(), tmp_path, loss=lambda pred, label: (pred - pred.detach()).square() + 1, steps=12)
    assert (tmp_path / "lr_finder.png").is_file()


def test_batches_without_anything_to_learn_are_left_out_of_a_range_test(tmp_path):
    """A batch of two slices that are to be ignored is no loss of 0: table and suggestion are those of the others."""
    found = {}
    for ignored in ((), (0, 1), (2, 3), (1,)):
        rate, _ = try_rates(Shifted(), tmp_path, loss=left_out, ignored=ignored)
        found[ignored] = rate, (tmp_path / "lr_finder.csv").read_bytes()
    assert found[()] == found[(0, 1)] == found[(2, 3)] and found[(1,)] != found[()]
    with pytest.raises(TrainingError, match="nothing to learn from in any batch"):
        try_rates(Shifted(), tmp_path, loss=left_out, ignored=range(4))


def left_out(pred, label):
    return torch.where(label == 255, 0.0, pred.square())


def test_rates_of_parts_need_one_to_be_multiples_of(tmp_path):
    with pytest.raises(ConfigError, match="lr must be above 0, got 0"):
        try_rates(Shifted(), tmp_path, lr=0.0)


def test_overrides_are_read_as_monai_reads_them():
    words = ["--lr", "0.1", "--strategy::rank=4", "--dataset_dir", "a/b=c", "--scans", "['t1c']", "--epochs", "$1+0"]
    found = {"lr": 0.1, "strategy::rank": 4, "dataset_dir": "a/b=c", "scans": ["t1c"], "epochs": "$1+0"}
    assert overrides_of(words) == found
    for wrong in (["lr", "0.1"], ["--lr"]):
        with pytest.raises(ConfigError, match="overrides are pairs"):
            overrides_of(wrong)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundles.build_bundle("meningioma", "lora", tmp_path_factory.mktemp("bundles"))


def test_find_lr_runs_a_bundle_with_its_boxes(bundle, phantoms, tmp_path, monkeypatch, capsys):
    given = []
    forward = SamSegmenter.forward
    monkeypatch.setattr(
        SamSegmenter, "forward", lambda self, image, boxes=None: given.append(boxes) or forward(self, image, boxes)
    )
    words = [f"--{key}={value}" for key, value in TINY.items()]
    words += ["--dataset_dir", phantoms, "--output_dir", tmp_path, "--strategy::rank", 2, "--batch_size", 2]
    monkeypatch.setattr(sys, "argv", ["samseg", "find-lr", str(bundle), "--steps", "10", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr()
    assert len(given) == 10 and all(boxes.shape == (2, 4) for boxes in given)
    assert re.search(r"suggested: lr \S+ \(the config has 0.0001\)", capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr_finder.csv", "lr_finder.png"]


def test_find_lr_tells_what_is_wrong_in_words(bundle, monkeypatch, capsys):
    for words, message in [
        ([str(bundle), "--start-lr", "1", "--end-lr", "0.1"], "0 < start-lr < end-lr"),
        ([str(bundle), "--end-lr", "inf"], "0 < start-lr < end-lr"),
        (["nowhere"], "BUNDLE: nowhere: no such file or folder"),
        ([str(bundle), "--epohcs", "3", "--dataset_dir", "."], "epohcs"),
    ]:
        monkeypatch.setattr(sys, "argv", ["samseg", "find-lr", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1 and message in capsys.readouterr().err


def test_a_bundle_trains_with_every_option_and_keeps_the_average(bundle, phantoms, tmp_path):
    options = {
        "ema": 0.5, "learning_rates::layer_decay": 0.9, "learning_rates::scale": [["*.lora_b", 2]],
        "learning_rates::weight_decay_matrices_only": True, "strategy::dora": True, "strategy::blocks": [1],
        "strategy::rank": 2, "val_interval": 0, "epochs": 2, "batch_size": 2,
    }  # fmt: skip
    data = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path)}
    run_workflow([bundle / "configs" / "train.json"], {**TINY, **data, **options})
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert same(state["parts"]["ema"]["average"], adapter) and not same(state["network"], adapter)
    groups = state["parts"]["optimizer"]["param_groups"]
    rates = sorted((round(group["lr"] / 0.0001, 6), group.get("weight_decay")) for group in groups)
    assert rates == [(0.9, 0), (0.9, 0.0), (1.8, 0)]
    assert {name.split(".")[3] for name in adapter} == {"1"} and any("magnitude" in name for name in adapter)


# --- gradient from the first adapted block on -----------------------------------------------------------------------


def one_pass(blocks, *, checkpointing=False, to_image=False):
    """Output, gradients of LoRA, whether each block is part of the graph, and how many tensors it keeps for it."""
    network = segmenter(LoRA(2, blocks=blocks), DEEP, image_size=32, prompt="none", checkpointing=checkpointing).train()
    for name, parameter in network.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)
    running: list[int] = []
    in_graph, kept = [], [0] * DEEP.depth

    def leave(block, given, out):
        running.clear()
        in_graph.append(out.requires_grad)

    for index, block in enumerate(network.sam.image_encoder.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: running.append(index))
        block.register_forward_hook(leave)

    def keep(tensor):
        if running:
            kept[running[0]] += 1
        return tensor

    image = torch.randn(1, 1, 32, 32, requires_grad=to_image)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(image)
    passed = list(in_graph)
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return SimpleNamespace(output=output.detach(), gradients=gradients, in_graph=passed, kept=kept)


@pytest.mark.parametrize("blocks", [[2, 3], [3], [0, 3], None])
def test_blocks_before_the_first_adapted_one_keep_nothing_for_the_backward_pass(blocks):
    first = min(blocks or [0])
    found = one_pass(blocks)
    assert found.in_graph == [index >= first for index in range(4)]
    assert [count > 0 for count in found.kept] == found.in_graph
    assert len(found.gradients) == 4 * len(blocks or range(4))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_a_graph_through_all_blocks(checkpointing):
    ended = one_pass([2, 3], checkpointing=checkpointing)
    whole = one_pass([2, 3], checkpointing=checkpointing, to_image=True)
    assert ended.in_graph == [False, False, True, True] and whole.in_graph == [True] * 4
    assert torch.equal(ended.output, whole.output) and same(ended.gradients, whole.gradients)
    assert all(gradient.abs().max() > 0 for gradient in ended.gradients.values())
    if not checkpointing:
        assert sum(whole.kept) > 1.5 * sum(ended.kept)
