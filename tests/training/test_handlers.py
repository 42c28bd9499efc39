"""Handlers in real MONAI trainers and evaluators, on a linear network and made-up batches."""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import StatsHandler, ValidationHandler
from torch import nn

from samseg_monai import handlers
from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.handlers.keeping import UNSCORED
from samseg_monai.handlers.provenance import config_hash, plain, scrub
from samseg_monai.training import SegmentationLoss

ITEMS = 10


class Rows(Metric):
    """Publishes prepared rows and values, one set for each evaluation."""

    def __init__(self, script):
        self.script = list(script)
        super().__init__()

    def reset(self):
        pass

    def update(self, output):
        pass

    def compute(self):
        return self.script.pop(0)

    def completed(self, engine, name):
        value, rows = self.compute()
        engine.state.metrics[name] = value
        engine.state.metric_details[name] = rows


def items(count=ITEMS):
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(4, generator=generator), "label": torch.randn(2, generator=generator),
         "case": f"case-{i // 3}", "slice": 10 + i}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def trainer(network, train_handlers=(), *, data=None, batch_size=2, lr=0.1, epochs=1, **options):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(Dataset(data or items()), batch_size=batch_size),
        network=network,
        optimizer=torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr),
        loss_function=nn.MSELoss(),
        train_handlers=list(train_handlers),
        **options,
    )


def evaluator(network, script, val_handlers=()):
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items(2)), batch_size=2),
        network=network,
        key_val_metric={"dice": Rows(script)},
        val_handlers=list(val_handlers),
    )


def test_accumulated_gradients_are_clipped_once_as_a_whole(network):
    """5 batches of 2 with 2 accumulated: steps after 2, 4 and (flush) 5, each written out by hand."""
    other = copy.deepcopy(network)
    clip = handlers.GradientClip(max_norm=0.05)
    trainer(network, [clip], accumulation_steps=2).run()

    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    data = items()
    batches = [data[i : i + 2] for i in range(0, ITEMS, 2)]
    for group in (batches[0:2], batches[2:4], batches[4:5]):
        optimizer.zero_grad()
        for batch in group:
            image, label = (torch.stack([item[key] for item in batch]) for key in ("image", "label"))
            (nn.functional.mse_loss(other(image), label) / 2).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        assert norm > 0.05  # or the test would show nothing
        optimizer.step()
    torch.testing.assert_close(list(network.parameters()), list(other.parameters()), rtol=1e-6, atol=1e-7)
    assert clip.last_norm == pytest.approx(float(norm), rel=1e-5)


def slices(count=10, size=6):
    """Slices with labels, of which number 3 has been judged by nobody."""
    draw = torch.Generator().manual_seed(2)
    found = [
        {"image": torch.randn(1, size, size, generator=draw),
         "label": torch.randint(0, 2, (1, size, size), generator=draw).to(torch.uint8)}
        for _ in range(count)
    ]  # fmt: skip
    found[3]["label"].fill_(255)
    return found


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 3), (4, 2), (3, 2)])
def test_accumulated_batches_are_the_big_batch_also_when_cut_short(batch_size, steps):
    """Of 10 slices: a smaller last batch, a leftover group of one batch, and a slice that is out of the loss."""
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 3, padding=1)
    other, data = copy.deepcopy(network), slices()
    run = trainer(network, [handlers.Accumulation(network)], data=data, batch_size=batch_size, accumulation_steps=steps)
    run.loss_function = loss = SegmentationLoss(["tumour"])
    run.run()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for start in range(0, len(data), batch_size * steps):
        group = data[start : start + batch_size * steps]
        optimizer.zero_grad()
        image, label = (torch.stack([item[key] for item in group]) for key in ("image", "label"))
        loss(other(image), label).backward()
        optimizer.step()
    torch.testing.assert_close(list(network.parameters()), list(other.parameters()), rtol=1e-6, atol=1e-7)
    assert not hasattr(run.state, "warnings")  # one batch of their size is what these are


@pytest.mark.parametrize("steps", [1, 2])
def test_what_accumulation_cannot_make_one_batch_is_said(steps):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    run = trainer(network, [handlers.Accumulation(network)], data=slices(), accumulation_steps=steps)
    run.loss_function = SegmentationLoss(["tumour"], batch=True)
    run.run()
    expected = "2 batches per step are not one batch of their size: 1 normalise by the statistics of each batch; Dice"
    assert steps == 1 or run.state.warnings[0].startswith(expected)
    assert hasattr(run.state, "warnings") == (steps > 1)


def test_batches_without_anything_to_learn_are_left_out_of_the_curve(tmp_path, caplog):
    """Slices 2 and 3 of 10 are one batch and out of the loss; the mean is that of the four others."""
    network, data = nn.Conv2d(1, 1, 1), slices()
    data[2]["label"].fill_(255)
    run = trainer(network, [handlers.CurveLog(tmp_path)], data=data, lr=1e-12)
    run.loss_function = loss = SegmentationLoss(["tumour"])
    with caplog.at_level(logging.INFO):
        run.run()
    pairs = [data[start : start + 2] for start in (0, 4, 6, 8)]
    losses = [loss(network(torch.stack([i["image"] for i in p])), torch.stack([i["label"] for i in p])) for p in pairs]
    row = next(row for row in read(tmp_path / "history.csv") if row["name"] == "train_loss")
    assert float(row["value"]) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    assert "(1 of 5 batches have nothing to learn from)" in caplog.text


def test_without_any_scored_validation_the_last_validated_epoch_is_kept(network, tmp_path, monkeypatch, caplog):
    saved = []
    monkeypatch.setattr(
        "samseg_monai.handlers.keeping.save_adapter",
        lambda network, folder, *, metrics: (saved.append(metrics["epoch"]), (folder / "adapter.safetensors").touch()),
    )
    best = handlers.BestAdapter(network, tmp_path)
    validator = evaluator(network, [(value, []) for value in (math.nan, math.nan, 0.5, math.nan, 0.4)], [best])
    card = handlers.RunCard(tmp_path / "run", settings={}, evaluator=validator, best=best)
    for epoch, kept in enumerate([1, 2, 3, 3, 3], start=1):
        validator.run(global_epoch=epoch)
        assert (saved[-1], best.epoch, best.score) == (kept, kept, None if epoch < 3 else 0.5)
        assert card._seen(validator)["warnings"] == ([UNSCORED] if epoch < 3 else [])
    assert "no epoch is known to be the best, the last one is kept" in caplog.text


@pytest.mark.parametrize("alone", [True, False])
def test_clipping_and_checks_see_unscaled_gradients_under_a_scaler(network, alone):
    """The scaler of MONAI's amp works on the CPU too; only the autocast around the forward pass is for CUDA."""
    other = copy.deepcopy(network)
    trainer(other, [handlers.GradientClip(max_norm=0.05)]).run()
    others = [] if alone else [handlers.NonFiniteGuard(), handlers.GradientFlow(network)]
    scaled = trainer(network, [*others, handlers.GradientClip(max_norm=0.05)], amp=True, amp_kwargs={"enabled": False})

    def use_cpu_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    scaled.add_event_handler(Events.STARTED, use_cpu_scaler)
    scaled.run()
    torch.testing.assert_close(list(network.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-7)


def test_clip_refuses_a_norm_that_is_not_positive():
    with pytest.raises(ConfigError, match="got 0"):
        handlers.GradientClip(0)


@pytest.mark.parametrize("decollate", [True, False])
def test_a_nan_loss_names_case_and_slice_and_leaves_the_weights_alone(network, decollate):
    data = items()
    data[5]["image"][0] = float("nan")
    run = trainer(network, [handlers.NonFiniteGuard()], data=data, decollate=decollate)
    before: list[torch.Tensor] = []

    def remember(engine):
        before[:] = [p.detach().clone() for p in network.parameters()]

    run.add_event_handler(IterationEvents.FORWARD_COMPLETED, remember)
    with pytest.raises(TrainingError) as caught:
        run.run()
    text = str(caught.value)
    assert "epoch 1, iteration 3" in text
    assert "case case-1 slice 14, case case-1 slice 15" in text
    assert "the prediction itself is not finite for case case-1 slice 15." in text
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_infinite_gradients_are_found_though_the_loss_is_finite(network):
    network[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="gradients are not finite for case case-0 slice 10"):
        trainer(network, [handlers.NonFiniteGuard()]).run()
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_gradient_flow_reports_groups_and_counts(network, caplog):
    flow = handlers.GradientFlow(network)
    run = trainer(network, [flow])
    with caplog.at_level(logging.INFO, logger="samseg_monai"):
        run.run()
    assert [(row["group"], row["tensors"], row["parameters"]) for row in flow.rows] == [("0", 2, 15), ("2", 2, 8)]
    assert all(row["gradient_norm"] > 0 and row["silent"] == [] for row in flow.rows)
    assert run.state.gradient_flow == flow.rows and json.dumps(flow.rows)
    assert "gradient norm" in caplog.text


class LowRank(nn.Module):
    """x W + x A B with B = 0 at first, as LoRA starts: A has no gradient in the first step."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 2)]).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(4, 2))
        self.lora_b = nn.Parameter(torch.zeros(2, 2))
        self.forgotten = nn.Parameter(torch.ones(3))
        self.dead = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.blocks[0](x) + x @ self.lora_a @ self.lora_b + 0 * self.dead


def test_gradient_flow_waits_for_low_rank_layers_and_names_what_never_learns():
    torch.manual_seed(0)
    network = LowRank()
    run = trainer(network, [handlers.GradientFlow(network)])
    run.optimizer = torch.optim.SGD([network.lora_a, network.forgotten, network.dead], lr=0.1)
    run.optimizer.add_param_group({"params": [network.lora_b]})
    network.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(TrainingError) as caught:
        run.run()
    text = str(caught.value)
    assert run.state.iteration == 2
    assert "3 problems" in text
    assert "extra is trainable but not in the optimiser" in text
    assert "forgotten got no gradient at all" in text
    assert "dead got only zero gradients" in text
    assert "lora" not in text


class Silence:
    """Takes all gradients of the first ``steps`` iterations away, as a batch without any box does."""

    def __init__(self, network, steps):
        self.network, self.steps = network, steps

    def attach(self, engine):
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine):
        if engine.state.iteration <= self.steps:
            for parameter in self.network.parameters():
                parameter.grad.zero_()


def test_gradient_flow_passes_over_steps_that_teach_nothing(network):
    flow = handlers.GradientFlow(network, steps=1)
    trainer(network, [Silence(network, steps=2), flow]).run()
    assert flow.rows and all(row["gradient_norm"] > 0 and not row["silent"] for row in flow.rows)


def test_gradient_flow_gives_up_when_nothing_ever_teaches(network, monkeypatch):
    monkeypatch.setattr(handlers.steps, "MAX_IDLE", 1)
    with pytest.raises(TrainingError, match="only zero gradients"):
        trainer(network, [Silence(network, steps=99), handlers.GradientFlow(network, steps=1)]).run()


def test_gradient_flow_counts_steps_not_batches(network):
    run = trainer(network, accumulation_steps=2)
    seen = []
    flow = handlers.GradientFlow(network)
    flow._report = lambda engine: seen.append(engine.state.iteration)
    flow.attach(run)
    run.run()
    assert seen == [4]


def volumes(**by_class):
    return [
        {"case": f"c{i}", "class": name, "dice": 0.0, "prediction_ml": value, "reference_ml": 1.0}
        for name, values in by_class.items()
        for i, value in enumerate(values)
    ]


def test_collapse_warns_after_patience(network, caplog):
    script = [(0.1, volumes(liver=[0.0, 0.0], spleen=[0.0, 2.0])) for _ in range(4)]
    script[1] = (0.1, volumes(liver=[0.0, 0.1], spleen=[0.0, 0.0]))  # found once: the count starts again
    detector = handlers.CollapseDetector(patience=2)
    validator = evaluator(network, script, [detector])
    run = trainer(network, [ValidationHandler(1, validator)], epochs=4)
    said = []
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: said.append("COLLAPSE" in caplog.text))
    with caplog.at_level(logging.WARNING, logger="samseg_monai"):
        run.run()
    assert said == [False, False, False, True]  # empty in 1, found in 2, empty in 3 and 4
    assert "liver" in caplog.text
    assert "spleen" not in caplog.text
    assert validator.state.collapsed == ["liver"]
    assert detector.state_dict() == {"empty_runs": {"liver": 2, "spleen": 0}}


def test_collapse_forgives_empty_references_and_rows_without_volumes(network):
    rows = [{"case": "a", "class": "x", "prediction_ml": 0.0, "reference_ml": 0.0}, {"case": "b", "class": "y"}]
    detector = handlers.CollapseDetector(patience=1)
    validator = evaluator(network, [(0.5, rows)], [detector])
    validator.run()
    assert detector.empty_runs == {} and not hasattr(validator.state, "collapsed")


def test_early_stop_counts_nan_as_no_improvement_and_resumes_its_patience(network):
    script = [(value, []) for value in (0.5, float("nan"), 0.5, 0.9)]
    stop = handlers.EarlyStop(patience=2)
    run = trainer(network, [ValidationHandler(1, evaluator(network, script, [stop]))], epochs=4)
    stop.set_trainer(run)
    run.run()
    assert run.state.epoch == 3
    again = handlers.EarlyStop(patience=2)
    again.load_state_dict(stop.state_dict())
    assert again.counter == again.patience and again.best_score == 0.5


def test_early_stop_names_the_metrics_there_are(network):
    stop = handlers.EarlyStop(2, metric="val_dice", trainer=trainer(network))
    with pytest.raises(TrainingError, match="no metric 'val_dice'; the evaluator has dice"):
        evaluator(network, [(0.5, [])], [stop]).run()


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_curves_hold_loss_rate_and_metrics_and_survive_a_resume(network, tmp_path, caplog):
    caplog.set_level("INFO")

    def run(script, epochs, start=0):
        validator = evaluator(network, script)
        curves = handlers.CurveLog(tmp_path, evaluator=validator)
        engine = trainer(network, [ValidationHandler(2, validator), curves], epochs=epochs)
        engine.state.epoch, engine.state.iteration = start, start * 5
        engine.run()
        return read(tmp_path / "history.csv")

    first = run([(0.25, []), (0.5, [])], 5)
    assert [row["name"] for row in first if row["epoch"] == "2"] == ["dice", "train_loss", "lr"]
    assert [(r["epoch"], r["iteration"], r["value"]) for r in first if r["name"] == "dice"] == [
        ("2", "10", "0.25"), ("4", "20", "0.5"),
    ]  # fmt: skip
    resumed = run([(0.75, []), (0.875, [])], 6, start=3)  # what came after epoch 3 was lost and is run again
    assert [row["value"] for row in resumed if row["name"] == "dice"] == ["0.25", "0.75", "0.875"]
    assert [row["epoch"] for row in resumed if row["name"] == "lr"] == list("123456")
    assert [row for row in resumed if row["epoch"] < "3"] == [row for row in first if row["epoch"] < "3"]
    assert {row["epoch"] for row in run([], 1)} == {"1"}  # from scratch: anew
    starts = [message for message in caplog.messages if message.startswith("training: 5 batches an epoch, ")]
    assert [start.partition("epoch, ")[2] for start in starts] == [
        "5 epochs", "6 epochs, going on behind epoch 3", "1 epochs"
    ]  # fmt: skip


def test_the_recorded_loss_is_the_mean_over_batches(network, tmp_path):
    other = copy.deepcopy(network)
    trainer(network, [handlers.CurveLog(tmp_path)], lr=1e-12).run()
    data = items()
    image, label = (torch.stack([item[key] for item in data]) for key in ("image", "label"))
    expected = float(nn.functional.mse_loss(other(image), label))
    loss = next(float(row["value"]) for row in read(tmp_path / "history.csv") if row["name"] == "train_loss")
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_log_tells_loss_time_left_and_dice_of_each_class(network, tmp_path, caplog, monkeypatch):
    class Scored:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

        def __call__(self, engine):
            engine.state.metrics |= {"dice_mean": 0.75, "spleen_dice_mean": 0.5, "aorta_dice_mean": 1.0}
            engine.state.metric_details = {"val_dice": [{"case": "a", "class": c} for c in ("spleen", "aorta")]}

    validator = evaluator(network, [(0.5, [])] * 3)
    curves = handlers.CurveLog(tmp_path, evaluator=validator)
    Scored().attach(validator)
    clock = iter(range(0, 10**6, 4000))
    monkeypatch.setattr("samseg_monai.handlers.records.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO"):
        trainer(network, [curves, ValidationHandler(1, validator)], epochs=3).run()
    told = [r.getMessage() for r in caplog.records if r.name == "samseg_monai.handlers.records"]
    assert told.pop(0) == "training: 5 batches an epoch, 3 epochs"
    cost = (
        r"a step takes [\d.e-]+ s, memory so far at most \d+\.\d\d GB of RAM; all steps take .* s more, validations .*"
    )
    assert re.fullmatch(cost, told.pop(0))
    assert [line.split("; ")[-1] for line in told[::2]] == [
        "at most 2 h 13 min left", "at most 66.7 min left", "at most 0 s left",
    ]  # fmt: skip
    assert told[0].startswith("epoch 1 of 3: loss 0.")
    assert told[1] == "epoch 1 of 3: validation Dice 0.750 (spleen 0.500, aorta 1.000)"


def test_the_log_tells_what_the_first_steps_took(network, tmp_path, caplog, monkeypatch):
    """Of the first epoch of the process, the very first step left out; of epochs of a single step nothing."""
    clock = iter([0.0, 20.0] * 3)  # read behind the first step and behind the last one that counts
    counter = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: 0.0)
    monkeypatch.setattr("samseg_monai.training.cost.time", counter)
    for length, epochs, start, told in ((5, 3, 0, ["5", "50 s"]), (8, 601, 1, ["4", "5 h 20 min"]), (1, 3, 0, [])):
        engine = trainer(network, [handlers.CurveLog(tmp_path)], data=items(2 * length), epochs=epochs, lr=1e-12)
        engine.state.epoch, engine.state.iteration = start, start * length
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=2), engine.terminate)
        caplog.clear()
        with caplog.at_level("INFO"):
            engine.run()
        found = [re.match(r"a step takes (.*) s, .* take (.*) more", message) for message in caplog.messages]
        assert [list(match.groups()) for match in found if match] == ([told] if told else [])


class Volumes(nn.Module):
    """Logits (1, 2, 3, D) of a volume are its image."""

    def forward(self, image):
        return image


def losses_of(volumes, *, batch_size=1, postprocessing=None, more=()):
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(volumes), batch_size=batch_size),
        network=Volumes(),
        key_val_metric={"dice": Rows([(0.5, [])])},
        additional_metrics={"val_loss": handlers.ValidationLoss(nn.BCEWithLogitsLoss())},
        postprocessing=postprocessing,
        val_handlers=list(more),
    )
    engine.run()
    return engine.state.metrics


@pytest.fixture
def volume_items():
    """Two volumes of 4 slices: foreground in slice 1; in slices 0 and 3. A prompt in slice 2 of the first."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for case, slices in (("one", [1]), ("two", [0, 3])):
        label = torch.zeros(1, 2, 3, 4)
        label[:, 1, 1:, slices] = 1
        image = torch.randn(1, 2, 3, 4, generator=generator)
        found.append({"case": case, "image": image, "label": label, "prompt": torch.zeros(1, 2, 3, 4)})
    found[0]["prompt"][0, 0, 0, 2] = 1
    return found


def by_hand(volumes, pairs):
    """Binary cross-entropy log(1 + e^x) - x y, mean over pixels, then over (volume, slice) pairs."""
    means = []
    for volume, z in pairs:
        x, y = (volumes[volume][key][..., z].double() for key in ("image", "label"))
        means.append(float((torch.log1p(x.exp()) - x * y).mean()))
    return sum(means) / len(means)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_validation_loss_is_the_mean_over_slices_with_foreground_or_prompt(volume_items, batch_size):
    def spoil(item):
        return {**item, "pred": item["pred"] * 0}  # what comes after the forward pass must not count

    found = losses_of(volume_items, batch_size=batch_size, postprocessing=spoil)["val_loss"]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 3)]
    assert found == pytest.approx(by_hand(volume_items, pairs), rel=1e-6)
    assert found != pytest.approx(by_hand(volume_items, pairs[:1] + pairs[2:]), rel=1e-3)
    for item in volume_items:
        del item["prompt"]
    unprompted = losses_of(volume_items, batch_size=batch_size)["val_loss"]
    assert unprompted == pytest.approx(by_hand(volume_items, pairs[:1] + pairs[2:]), rel=1e-6)


def test_the_validation_loss_of_images_counts_those_with_boxes(volume_items):
    images = [{**item, "boxes": torch.full((2, 4), float("nan"))} for item in volume_items]
    for item in images:
        del item["prompt"]
        item |= {key: item[key][..., 1:2] for key in ("image", "label")}
    # the second has no foreground here: it counts as soon as it has a box
    assert losses_of(images)["val_loss"] == pytest.approx(by_hand(images, [(0, 0)]), rel=1e-6)
    images[1]["boxes"][0] = torch.tensor([0.0, 0.0, 2.5, 1.5])
    assert losses_of(images)["val_loss"] == pytest.approx(by_hand(images, [(0, 0), (1, 0)]), rel=1e-6)


def test_the_validation_loss_is_there_before_handlers_read_metrics_and_goes_into_the_curves(volume_items, tmp_path):
    seen = []

    class Reader:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))

    metrics = losses_of(volume_items, more=[Reader()])
    assert seen[0]["val_loss"] == metrics["val_loss"]
    validator = evaluator(Volumes(), [(0.5, [])])
    curves = handlers.CurveLog(tmp_path, evaluator=validator)
    curves._trainer = SimpleNamespace(state=SimpleNamespace(epoch=0, iteration=7, max_epochs=1))
    validator.state.metrics = dict(metrics)
    curves._validated(validator)
    assert ("val_loss", repr(metrics["val_loss"])) in [(r["name"], r["value"]) for r in read(tmp_path / "history.csv")]


def test_the_validation_loss_of_nothing_is_none_and_of_no_logits_an_error(volume_items, caplog):
    empty = [{**item, "label": item["label"] * 0, "prompt": item["prompt"] * 0} for item in volume_items]
    assert "val_loss" not in losses_of(empty) and "no validated slice has foreground" in caplog.text
    with pytest.raises(TrainingError, match=r"predictions \(1, 1, 2, 3, 4\) and label \(1, 1, 2, 3, 2\)"):
        losses_of([{**item, "label": item["label"][..., :2]} for item in volume_items])
    with pytest.raises(TrainingError, match="names no cases under 'case'"):
        losses_of([{key: item[key] for key in ("image", "label")} for item in volume_items])
    with pytest.raises(ConfigError, match="must be callable"):
        handlers.ValidationLoss("dice")


def test_a_case_that_two_processes_hold_counts_once(volume_items, monkeypatch):
    one, two = handlers.ValidationLoss(nn.MSELoss()), handlers.ValidationLoss(nn.MSELoss())
    one._cases, two._cases = {"a": (3.0, 2), "b": (0.5, 1)}, {"b": (0.5, 1), "c": (4.0, 3)}
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.all_gather", lambda own: [list(one._cases.items()), own])
    engine = SimpleNamespace(state=SimpleNamespace(metrics={}))
    two._publish(engine)
    assert engine.state.metrics == {"val_loss": 7.5 / 6}


def test_the_case_table_holds_rows_and_aggregates(network, tmp_path):
    rows = volumes(tumour=[1.5, 2.5])
    table = handlers.CaseTable(tmp_path, name="dice", prompt_source="label", policy="honest")
    evaluator(network, [(torch.tensor(0.5), rows)], [table]).run()
    table_rows = read(tmp_path / "cases.csv")
    assert [(row["case"], float(row["prediction_ml"])) for row in table_rows] == [("c0", 1.5), ("c1", 2.5)]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {
        "metrics": {"dice": 0.5}, "cases": 2, "cases_file": "cases.csv",
        "prompt_source": "label", "policy": "honest", "precision": None, "epoch": 1,
    }  # fmt: skip


def test_the_case_table_says_which_rows_there_are(network, tmp_path):
    with pytest.raises(TrainingError, match="no per-case rows under 'iou'; metric_details has dice"):
        evaluator(network, [(0.5, [])], [handlers.CaseTable(tmp_path, name="iou")]).run()


def test_the_run_card_tells_the_whole_run(network, tmp_path):
    (tmp_path / "datalist.json").write_text("{}")
    validator = evaluator(network, [(0.5, []), (float("nan"), [])])
    settings = {"lr": 0.1, "dataset_dir": "/somewhere/private/brats", "output_dir": str(tmp_path)}
    card = handlers.RunCard(
        tmp_path / "out", settings=settings, seed=7, prompt_source="label", network=network, evaluator=validator,
        datalist=tmp_path / "datalist.json", facts={"phantoms": True},
    )  # fmt: skip
    run = trainer(network, [card, handlers.GradientFlow(network), ValidationHandler(1, validator)], epochs=2)
    path = tmp_path / "out" / "run_card.json"
    statuses = []
    run.add_event_handler(  # the card is there from the start
        Events.ITERATION_STARTED, lambda engine: statuses.append(json.loads(path.read_text())["status"])
    )
    run.run()
    text = path.read_text()
    written = json.loads(text)
    assert set(statuses) == {"running"}
    assert written["status"] == "completed" and written["epochs"] == 2 and written["seconds"] > 0
    assert written["best"] == {"metric": 0.5, "epoch": 1} and written["metrics"] == {"dice": None}
    assert written["data_hash"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of "{}"
    assert written["trainable_parameters"] == 23 and written["phantoms"] is True and written["seed"] == 7
    assert written["versions"]["monai"] and written["hardware"]["cpu_cores"] >= 1
    assert written["peak_memory_mb"]["ram"] > 10
    assert [row["group"] for row in written["gradient_flow"]] == ["0", "2"]
    assert "/somewhere" not in text and str(tmp_path) not in text and "private" not in text


def test_the_run_card_of_a_failed_run_says_why_also_beside_a_stats_handler(network, tmp_path):
    data = items()
    data[5]["image"][0] = float("nan")
    card = handlers.RunCard(tmp_path, settings={})
    run = trainer(network, [card, StatsHandler(), handlers.NonFiniteGuard()], data=data)
    with pytest.raises(TrainingError):
        run.run()
    written = json.loads((tmp_path / "run_card.json").read_text())
    assert written["status"] == "failed"
    assert written["error"].startswith("TrainingError: epoch 1, iteration 3: the loss is nan for case case-1 slice 14")


def test_a_card_that_cannot_be_written_does_not_hide_why_the_run_failed(network, tmp_path, caplog):
    def fail(engine):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("a file")
        raise TrainingError("the first of all")

    run = trainer(network, [handlers.RunCard(tmp_path / "run", settings={})])
    run.add_event_handler(Events.ITERATION_STARTED, fail)
    with pytest.raises(TrainingError, match="the first of all"):
        run.run()
    assert "the card of this run could not be written: " in caplog.text


def test_an_interrupted_run_and_an_evaluation_get_a_card_too(network, tmp_path):
    def interrupt(engine):
        raise KeyboardInterrupt

    run = trainer(network, [handlers.RunCard(tmp_path, settings={})])
    run.add_event_handler(Events.ITERATION_STARTED, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert json.loads((tmp_path / "run_card.json").read_text())["status"] == "interrupted"
    evaluator(network, [(0.5, [])], [handlers.RunCard(tmp_path, settings={})]).run()
    written = json.loads((tmp_path / "run_card.json").read_text())
    assert written["status"] == "completed" and written["metrics"] == {"dice": 0.5}
    assert written["resumed_from_epoch"] is None


class Gated(nn.Linear):
    """A network whose strategy has learnt one number."""

    def __init__(self):
        super().__init__(4, 2)
        self.strategy = SimpleNamespace(name="ladder", arguments=dict, facts=lambda network: {"gate": network.gate()})

    def gate(self):
        return round(float(self.bias[0]), 6)


def test_the_run_card_records_what_the_strategy_has_learnt_at_the_end(tmp_path):
    """Also through the wrapper of several processes, and also of a run that failed."""
    network = Gated()
    wrapped = nn.DataParallel(network)
    for name, card_of in (("plain", network), ("wrapped", wrapped)):
        before = network.gate()
        trainer(network, [handlers.RunCard(tmp_path / name, settings={}, network=card_of)]).run()
        assert json.loads((tmp_path / name / "run_card.json").read_text())["gate"] == network.gate() != before

    def interrupt(engine):
        if engine.state.iteration == 3:
            raise KeyboardInterrupt

    run = trainer(network, [handlers.RunCard(tmp_path, settings={}, network=network)])
    run.add_event_handler(Events.ITERATION_STARTED, interrupt)
    before = network.gate()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    written = json.loads((tmp_path / "run_card.json").read_text())
    assert written["status"] == "interrupted" and written["gate"] == network.gate() != before


def test_networks_without_a_strategy_have_no_gate_in_their_card(network, tmp_path):
    trainer(network, [handlers.RunCard(tmp_path, settings={}, network=network)]).run()
    assert "gate" not in json.loads((tmp_path / "run_card.json").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/private/case1.nii.gz: unreadable", "case1.nii.gz: unreadable"),
        ("see '/mnt/jane doe/x.nii' and /a/b/c.nii, please", "see 'x.nii' and c.nii, please"),
        ("/mnt/jane doe/brats men", "brats men"),
        ("/home/jane", "~"),
        ("C:\\Users\\jane\\x.nii is bad", "x.nii is bad"),
        ("models/model.pt at https://host.org/a/b 1/2", "models/model.pt at https://host.org/a/b 1/2"),
        ("postgresql://jane:s3cret@db.clinic/runs is away", "postgresql://db.clinic/runs is away"),
        ("https://jane:p@ss@host/a/b?x=1&token=abc&y=2", "https://host/a/b?x=1&token=***&y=2"),
        ("http://host/a@b and s3://bucket/x?sig=abc", "http://host/a@b and s3://bucket/x?sig=***"),
        ("sqlite:////home/jane/runs/x.db cannot be opened", "sqlite:///x.db cannot be opened"),
        ("sqlite:///C:\\Users\\Jane Doe\\x.db", "sqlite:///x.db"),
        ("sqlite:///runs/x.db", "sqlite:///runs/x.db"),
        ("file:///mnt/jane doe/x.nii, bad", "file://x.nii, bad"),
        ("C:\\Users\\Jane Doe\\data sets\\x.nii is bad", "x.nii is bad"),
        ("No space: 'C:\\\\Users\\\\Jane Doe\\\\x y.nii'", "No space: 'x y.nii'"),
        ("C:/Users/Jane Doe/a b/x.nii: bad", "x.nii: bad"),
        ("see C:\\Users\\Jane Doe, please", "see ~, please"),
        ("\\\\server\\Jane Doe\\x.nii is gone", "x.nii is gone"),
    ],
)
def test_scrub_leaves_no_absolute_path(text, expected):
    assert scrub(text) == expected


def test_plain_values_are_json_and_the_config_hash_ignores_places():
    value = {"a": torch.tensor([1.0, float("inf")]), 3: (True, None), "d": torch.device("cpu")}
    assert plain(value) == {"a": [1.0, None], "3": [True, None], "d": "cpu"}
    assert config_hash({"lr": 1, "dataset_dir": "/x/y"}) == config_hash({"dataset_dir": "/z", "lr": 1})
    assert config_hash({"lr": 1}) != config_hash({"lr": 2})


def test_every_handler_can_be_written_in_json(network, tmp_path):
    run = trainer(network)
    arguments = {
        "Accumulation": {"network": "@net"},
        "BestAdapter": {"network": "@net", "output_dir": "@out"},
        "CaseTable": {"output_dir": "@out", "prompt_source": "label"},
        "CollapseDetector": {"patience": 3},
        "CurveLog": {"output_dir": "@out"},
        "EMA": {"network": "@net", "decay": 0.9, "evaluator": "@trainer"},
        "EarlyStop": {"patience": 5, "trainer": "@trainer"},
        "EpochSeeder": {"seed": 0},
        "GradientClip": {"max_norm": 1.0},
        "GradientFlow": {"network": "@net"},
        "LastAdapter": {"network": "@net", "output_dir": "@out"},
        "NonFiniteGuard": {},
        "PredictionTable": {
            "cases": {"_target_": "samseg_monai.data.files.case_list.CaseList"},
            "output_dir": "@out",
            "classes": ["tumour"],
            "prompt_source": "json",
        },
        "ResumeSaver": {"output_dir": "@out", "network": "@net", "optimizer": "$@trainer.optimizer"},
        "RunCard": {"output_dir": "@out", "settings": {"lr": 0.1}},
        "SameBuffers": {"network": "@net"},
        "TensorBoard": {"log_dir": "@out"},
        "Tracking": {
            "card": {"_target_": "samseg_monai.handlers.RunCard", "output_dir": "@out", "settings": {"lr": 0.1}},
            "output_dir": "@out",
            "uri": "sqlite:///runs.db",
        },
        "ValidationLoss": {"loss": "$torch.nn.MSELoss()"},
        "WholeVolumes": {"evaluator": "@trainer", "network": "@net", "best": None},
        "WorstCaseImage": {"log_dir": "@out", "classes": ["tumour"]},
    }
    no_handlers = ["CaseDataset", "CaseEvaluator", "PrepareGiven"]  # they take the place of MONAI's own
    assert sorted([*arguments, *no_handlers]) == sorted(handlers.__all__)
    config = {"net": network, "out": str(tmp_path), "trainer": run, "all": []}
    config["all"] = [{"_target_": f"samseg_monai.handlers.{name}", **given} for name, given in arguments.items()]
    for handler in ConfigParser(config).get_parsed_content("all"):
        handler.attach(run)
    progress = ConfigParser({"bar": {"_target_": "ignite.handlers.ProgressBar", "persist": True}})
    progress.get_parsed_content("bar").attach(run)
