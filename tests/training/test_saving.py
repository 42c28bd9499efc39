"""Best adapter, resume file and epoch seeding: an interrupted training ends where an uninterrupted one does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from samseg_monai import handlers
from samseg_monai.errors import CheckpointError, ConfigError, TrainingError
from samseg_monai.handlers.keeping import UNSCORED
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import LoRA
from samseg_monai.training import warmup_schedule

EPOCHS = 5


class Drawing(Dataset):
    """Like SliceDataset: each item is drawn from (epoch, item)."""

    def __init__(self):
        self.epoch = 0
        self.served: list[tuple[int, int]] = []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.served.append((self.epoch, index))
        generator = torch.Generator().manual_seed(100 * self.epoch + index)
        return {"image": torch.randn(4, generator=generator), "label": torch.randn(2, generator=generator)}


class Negative(Metric):
    """Minus the mean loss of the evaluator, or a scripted value, as the score."""

    def __init__(self, script=None):
        self.script = script
        super().__init__()

    def reset(self):
        self.total = 0.0

    def update(self, output):
        for item in output:
            self.total -= float(nn.functional.mse_loss(item["pred"], item["label"]))

    def compute(self):
        return self.total if self.script is None else self.script.pop(0)


class Run:
    """One training as a bundle would wire it; made anew for a resume, as a new process would."""

    def __init__(
        self, folder, *, epochs=EPOCHS, script=None, workers=0, patience=50, width=3, lr=0.05, seeded=True
    ):  # fmt: skip
        torch.manual_seed(1)  # of the process: the weights start alike, then EpochSeeder takes over
        network = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.network, self.data = network, Drawing()
        loader = DataLoader(
            self.data, batch_size=3, shuffle=True, drop_last=True, num_workers=workers,
            generator=torch.Generator() if seeded else None,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        self.schedule = warmup_schedule(self.optimizer, total=EPOCHS * len(loader), warmup=3)
        self.stop = handlers.EarlyStop(patience)
        self.best = handlers.BestAdapter(network, folder)
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Drawing(), batch_size=4),
            network=network,
            key_val_metric={"score": Negative(script)},
            val_handlers=[self.stop, self.best],
        )
        self.curves = handlers.CurveLog(folder, evaluator=self.evaluator)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=loader,
            network=network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            train_handlers=[
                handlers.RunCard(folder, settings={}, evaluator=self.evaluator, best=self.best),
                *([handlers.EpochSeeder(seed=3)] if seeded else []),
                ValidationHandler(2, self.evaluator),
                LrScheduleHandler(self.schedule, print_lr=False, epoch_level=False),
                self.curves,
                handlers.LastAdapter(network, None, best=self.best),
            ],
        )
        self.stop.set_trainer(self.trainer)
        self.resume = handlers.ResumeSaver(
            folder, network, optimizer=self.optimizer, lr_scheduler=self.schedule, best=self.best, early_stop=self.stop
        )
        self.resume.attach(self.trainer)

    def go(self):
        start = self.resume.load()
        self.trainer.run()
        return start


@pytest.fixture(autouse=True)
def plain_adapters(monkeypatch):
    """Networks here are linear: their adapter is their state (the real one has its own test below)."""

    def save(network, folder, *, metrics=None):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), folder / "adapter.safetensors")
        (folder / "card.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr("samseg_monai.handlers.keeping.save_adapter", save)


def cut(run, epoch, *, midway=False):
    """Let the run die right after ``epoch``, or midway in the next (after the first of its two steps)."""

    def die(engine):
        if engine.state.epoch > epoch:
            raise KeyboardInterrupt

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED if midway else Events.ITERATION_STARTED, die)
    with pytest.raises(KeyboardInterrupt):
        run.go()


def history(folder):
    return (folder / "history.csv").read_text()


@pytest.mark.parametrize(("epoch", "midway", "workers"), [(1, False, 0), (2, True, 0), (4, True, 0), (2, True, 2)])
def test_an_interrupted_and_resumed_training_equals_one_that_never_was(tmp_path, epoch, midway, workers):
    whole = Run(tmp_path / "whole")
    assert whole.go() == 0
    first = Run(tmp_path / "cut", workers=workers)
    cut(first, epoch, midway=midway)
    assert first.trainer.state.iteration == 2 * epoch + 1
    torch.manual_seed(999)  # another process: nothing may depend on its random state
    second = Run(tmp_path / "cut", workers=workers)
    assert second.go() == epoch
    assert same_weights(whole, second)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert second.best.state_dict() == whole.best.state_dict()
    assert second.stop.state_dict() == whole.stop.state_dict()
    assert second.evaluator.state.best_metric == whole.evaluator.state.best_metric
    assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    card = json.loads((tmp_path / "cut" / "run_card.json").read_text())
    assert (card["status"], card["resumed_from_epoch"], card["epochs"]) == ("completed", epoch, EPOCHS)


def same_weights(one, other):
    theirs = other.network.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.network.state_dict().items())


def test_a_seeded_training_does_not_depend_on_the_random_state_of_its_process(tmp_path):
    one, other = Run(tmp_path / "one"), Run(tmp_path / "other")
    one.go()
    torch.manual_seed(999)
    other.go()
    assert same_weights(one, other)


def test_a_resume_restores_the_random_state_for_trainings_that_are_not_seeded_by_epoch(tmp_path):
    whole, first = Run(tmp_path / "whole", seeded=False), Run(tmp_path / "cut", seeded=False)
    torch.manual_seed(5)
    whole.go()
    torch.manual_seed(5)
    cut(first, 2, midway=True)
    second = Run(tmp_path / "cut", seeded=False)
    second.go()
    assert same_weights(whole, second)


def test_a_resume_restores_the_loss_scale_of_mixed_precision(tmp_path):
    scales = []

    def run(epochs):
        training = Run(tmp_path, epochs=epochs)
        restore = training.resume._restore_scaler

        def make_scaler(engine):  # as MONAI does when a run begins, but for the CPU
            engine.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
            restore(engine)

        training.trainer.remove_event_handler(restore, Events.STARTED)
        training.trainer.add_event_handler(Events.STARTED, make_scaler)
        training.trainer.amp, training.trainer.amp_kwargs = True, {"enabled": False}
        training.trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: scales.append(engine.scaler.get_scale())
        )
        training.go()

    run(2)
    run(3)
    assert scales == [64.0 * 2**step for step in range(6)]  # doubles with each step; 2 steps an epoch


def test_every_epoch_is_served_its_own_shuffle_and_draws(tmp_path):
    run = Run(tmp_path)
    run.go()
    orders = [[index for epoch, index in run.data.served if epoch == wanted] for wanted in range(1, EPOCHS + 1)]
    assert len(run.data.served) == EPOCHS * 6 and all(len(set(order)) == 6 for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_seeding_reaches_a_distributed_sampler_and_a_loader_without_generator():
    loader = DataLoader(Drawing(), batch_size=7, sampler=DistributedSampler(Drawing(), num_replicas=2, rank=0))
    network = nn.Linear(4, 2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=3, train_data_loader=loader, network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1), loss_function=nn.MSELoss(),
        train_handlers=[handlers.EpochSeeder(0)],
    )  # fmt: skip
    draws = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: draws.append(float(torch.rand(()))))
    trainer.run()
    assert loader.sampler.epoch == 3 and len(set(draws)) == 3


def test_seeding_refuses_workers_it_cannot_reach():
    network = nn.Linear(4, 2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1,
        train_data_loader=DataLoader(Drawing(), batch_size=3, num_workers=1, persistent_workers=True),
        network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1), loss_function=nn.MSELoss(),
        train_handlers=[handlers.EpochSeeder(0)],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="persistent_workers"):
        trainer.run()


def test_a_worse_validation_after_a_resume_leaves_the_best_adapter(tmp_path):
    cut(Run(tmp_path, script=[0.5, 0.75]), 4)
    kept = (tmp_path / "adapter.safetensors").read_bytes()
    second = Run(tmp_path, script=[0.625], epochs=6)
    second.go()
    assert (tmp_path / "adapter.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "card.json").read_text()) == {"metrics": {"score": 0.75, "epoch": 4}}
    assert second.evaluator.state.best_metric_epoch == 4
    best = json.loads((tmp_path / "run_card.json").read_text())["best"]
    assert best == {"metric": 0.75, "epoch": 4}


def test_a_nan_score_is_never_the_best_and_a_lost_adapter_is_saved_anew(tmp_path):
    cut(Run(tmp_path, script=[float("nan"), 0.5]), 4)
    assert json.loads((tmp_path / "card.json").read_text())["metrics"]["epoch"] == 4
    (tmp_path / "adapter.safetensors").unlink()
    Run(tmp_path, script=[0.25], epochs=6).go()
    assert json.loads((tmp_path / "card.json").read_text())["metrics"] == {"score": 0.25, "epoch": 6}


@pytest.mark.parametrize("killed", [None, 1, 3, 4])
def test_where_no_validation_is_scored_the_last_epoch_is_kept_also_after_a_resume(tmp_path, killed):
    """Validations after epochs 2 and 4 of 5: the adapter is of epoch 5, which has none."""
    nan = [float("nan")] * 2
    if killed is not None:
        cut(Run(tmp_path, script=list(nan)), killed)
        card = json.loads((tmp_path / "card.json").read_text()) if killed > 1 else None
        assert card is None or card["metrics"]["epoch"] == killed
    run = Run(tmp_path, script=nan[(killed or 0) // 2 :])
    run.go()
    tensors, card = kept(tmp_path)
    assert card["metrics"] == {"epoch": EPOCHS}
    assert all(torch.equal(tensor, run.network.state_dict()[name]) for name, tensor in tensors.items())
    record = json.loads((tmp_path / "run_card.json").read_text())
    assert record["best"] == {"metric": None, "epoch": EPOCHS} and record["warnings"] == [UNSCORED]


def test_once_a_validation_is_scored_its_epoch_is_kept(tmp_path):
    cut(Run(tmp_path, script=[float("nan")]), 3)
    Run(tmp_path, script=[0.5]).go()
    assert kept(tmp_path)[1]["metrics"] == {"score": 0.5, "epoch": 4}
    assert json.loads((tmp_path / "run_card.json").read_text())["warnings"] == []


def test_patience_goes_on_where_it_was_and_a_stopped_training_is_not_begun_again(tmp_path):
    cut(Run(tmp_path, script=[0.5, 0.25], epochs=20, patience=2), 4)
    second = Run(tmp_path, script=[0.25, 0.9], epochs=20, patience=2)
    second.go()
    assert second.trainer.state.epoch == 6  # one bad validation before the cut, one after
    with pytest.raises(TrainingError, match=r"stopped early after epoch 6 .* patience 2"):
        Run(tmp_path, epochs=20, patience=2).go()


def test_a_finished_training_is_refused_not_repeated_and_can_be_prolonged(tmp_path):
    Run(tmp_path).go()
    before = (tmp_path / "run_card.json").read_text()
    with pytest.raises(TrainingError, match="already trained: 5 of 5 epochs; to go on raise epochs"):
        Run(tmp_path).go()
    assert (tmp_path / "run_card.json").read_text() == before
    longer = Run(tmp_path, epochs=6)
    assert longer.go() == 5 and longer.trainer.state.iteration == 12


def test_after_a_non_finite_loss_nothing_is_written(tmp_path):
    run = Run(tmp_path)
    handlers.NonFiniteGuard().attach(run.trainer)

    def poison(engine):
        if engine.state.epoch == 3:
            engine.state.batch["image"][0] = float("nan")

    run.trainer.add_event_handler(Events.ITERATION_STARTED, poison)
    with pytest.raises(TrainingError, match="epoch 3, iteration 5: the loss is nan"):
        run.go()
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["epoch"] == 2
    assert json.loads((tmp_path / "card.json").read_text())["metrics"]["epoch"] == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_an_adapter_of_an_epoch_that_was_lost_is_not_taken_for_the_best(tmp_path):
    """Killed between adapter and resume file; where numbers are not repeated exactly, the epoch may then end worse."""
    cut(Run(tmp_path, script=[0.5, 0.75]), 3)
    (tmp_path / "resume.pt").replace(tmp_path / "kept.pt")
    content = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert (content["epoch"], content["parts"]["best"]["epoch"]) == (3, 2)
    Run(tmp_path, script=[0.5, 0.75]).go()  # epoch 4 replaces the adapter ...
    (tmp_path / "kept.pt").replace(tmp_path / "resume.pt")  # ... and the kill comes before the file
    second = Run(tmp_path, script=[0.25])
    second.go()
    assert (second.best.score, second.best.epoch) == (0.25, 4)
    assert json.loads((tmp_path / "card.json").read_text())["metrics"] == {"score": 0.25, "epoch": 4}


class Counter:
    """A part with a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"of": [self.value, (self.value,)]}

    def load_state_dict(self, state):
        self.value = state["of"][0]


def test_numbers_of_numpy_become_plain_ones_and_other_objects_are_refused_at_once(tmp_path):
    rate = np.float64(0.05)
    run = Run(tmp_path, epochs=2, lr=rate)
    run.resume.parts["ema"] = Counter(np.float32(0.5))
    run.go()
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert type(saved["parts"]["optimizer"]["param_groups"][0]["lr"]) is float
    assert saved["parts"]["ema"] == {"of": [0.5, (0.5,)]} and type(saved["parts"]["ema"]["of"][0]) is float
    other = Run(tmp_path / "other", epochs=2)
    other.resume.parts["ema"] = Counter(np.zeros(2))
    with pytest.raises(CheckpointError, match=r"could not be resumed from.*parts are optimizer, .*ema"):
        other.go()
    assert not list((tmp_path / "other").glob("*resume*"))


def test_the_last_file_comes_behind_the_cards_last_word(tmp_path, monkeypatch):
    """Else a kill between the two would leave a finished training whose card says that it runs."""
    run, order = Run(tmp_path, epochs=2), []
    real = os.replace

    def watch(source, target):
        real(source, target)
        order.append(json.loads(Path(target).read_text())["status"] if target.suffix == ".json" else target.name)

    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=2), lambda engine: monkeypatch.setattr(os, "replace", watch)
    )
    run.go()
    assert order == ["completed", "resume.pt"]


def test_a_failing_write_leaves_the_file_before_it_whole(tmp_path, monkeypatch):
    run = Run(tmp_path, epochs=2)
    real = torch.save

    def tear(content, stream):
        if isinstance(content, dict) and content.get("epoch") == 2:
            stream.write(b"half")
            raise OSError("disk full")
        real(content, stream)

    monkeypatch.setattr(torch, "save", tear)
    with pytest.raises(OSError, match="disk full"):
        run.go()
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["epoch"] == 1


def test_another_training_is_refused_with_all_differences(tmp_path):
    Run(tmp_path, epochs=2).go()
    other = Run(tmp_path, width=5)
    other.trainer.state.epoch_length = 9
    other.network.num_classes = 8
    start = {name: tensor.clone() for name, tensor in other.network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        other.go()
    text = str(caught.value)
    for line in (
        "num_classes: None in the file, 8 now",
        "batches per epoch: 2 in the file, 9 now",
        "tensor 0.weight: (3, 4) in the file, (5, 4) now",
    ):
        assert line in text
    assert all(torch.equal(start[name], tensor) for name, tensor in other.network.state_dict().items())


@pytest.mark.parametrize("content", [b"PK\x03\x04 not a file of torch", {"weight": 1}, [1.0]], ids=type)
def test_a_damaged_or_foreign_file_is_refused_readably(content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "resume.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "resume.pt")
    with pytest.raises(CheckpointError, match=r"not a resume file .* delete it"):
        Run(tmp_path).go()


def test_a_changed_learning_rate_is_said_not_to_count(tmp_path, caplog):
    Run(tmp_path, epochs=2).go()
    later = Run(tmp_path, epochs=3, lr=0.5)
    later.go()
    assert "learning rate of the file, [0.05]; that of the config, [0.5], is not used" in caplog.text
    assert later.optimizer.param_groups[0]["lr"] < 0.06


def test_the_file_is_written_once_after_every_epoch(tmp_path, monkeypatch):
    run, real, saves = Run(tmp_path, epochs=4), torch.save, []

    def count(content, path):
        saves.extend([content["epoch"]] if "epoch" in content else [])
        real(content, path)

    monkeypatch.setattr(torch, "save", count)
    run.go()
    assert saves == [1, 2, 3, 4]
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["epoch"] == 4


class Images(Drawing):
    """Images and masks for SAM's smallest layout."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(100 * self.epoch + index)
        image = torch.randn(1, 64, 64, generator=generator)
        return {"image": image, "label": (image > 1).float(), "case": f"c{index}", "slice": index}


def test_a_real_segmenter_saves_its_adapter_resumes_only_owned_tensors_and_refuses_another_rank(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real save_adapter
    from samseg_monai.checkpoints import load_adapter, read_card

    def network(rank):
        torch.manual_seed(0)
        segmenter = SamSegmenter("tiny", LoRA(rank=rank), prompt="none")
        segmenter.load_base("random")
        return segmenter

    def parts(rank, epochs):
        net = network(rank)
        loader = DataLoader(Images(), batch_size=4, shuffle=True, generator=torch.Generator())
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        best = handlers.BestAdapter(net, tmp_path)
        validator = SupervisedEvaluator(
            device=torch.device("cpu"), val_data_loader=DataLoader(Images(), batch_size=4), network=net,
            key_val_metric={"score": Negative()}, val_handlers=[best],
        )  # fmt: skip
        trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=epochs, train_data_loader=loader, network=net, optimizer=optimizer,
            loss_function=nn.BCEWithLogitsLoss(),
            train_handlers=[handlers.EpochSeeder(0), handlers.GradientFlow(net), ValidationHandler(1, validator)],
        )  # fmt: skip
        resume = handlers.ResumeSaver(tmp_path, net, optimizer=optimizer, best=best)
        resume.attach(trainer)
        return net, trainer, resume, best

    net, trainer, resume, best = parts(2, 1)
    trainer.run()
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert sorted(saved["network"]) == sorted(net.owned)
    assert saved["card"]["strategy"]["arguments"]["rank"] == 2
    card = read_card(tmp_path)
    assert card["metrics"] == {"score": pytest.approx(best.score), "epoch": 1}
    fresh = network(2)
    load_adapter(fresh, tmp_path)
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fresh(image), net.eval()(image))
    again, trainer, resume, _ = parts(2, 2)
    assert resume.load() == 1
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"strategy: .*'rank': 2.* in the file, .*'rank': 4.* now"):
        parts(4, 2)[2].load()


class LastRun:
    """A training of a fixed number of epochs without validation, as ``val_interval: 0`` wires it."""

    def __init__(self, folder, *, epochs, wrapped=False):
        torch.manual_seed(1)
        self.network = nn.Linear(4, 2)
        owner = nn.DataParallel(self.network) if wrapped else self.network
        self.saved: list[dict] = []
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=epochs, train_data_loader=DataLoader(Drawing(), batch_size=3),
            network=self.network, optimizer=torch.optim.SGD(self.network.parameters(), lr=0.1),
            loss_function=nn.MSELoss(),
            train_handlers=[
                handlers.RunCard(folder, settings={}), handlers.EpochSeeder(0), handlers.LastAdapter(owner, folder),
            ],
        )  # fmt: skip
        handlers.ResumeSaver(folder, self.network, optimizer=self.trainer.optimizer).attach(self.trainer)


def kept(folder):
    with open(folder / "adapter.safetensors", "rb") as stream:  # by its name torch would take it for what it is not
        return torch.load(stream, weights_only=True), json.loads((folder / "card.json").read_text())


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_validation_the_adapter_of_the_last_epoch_is_kept(tmp_path, wrapped):
    run = LastRun(tmp_path, epochs=3, wrapped=wrapped)
    states = []

    def remember(engine):
        states.append({name: tensor.clone() for name, tensor in run.network.state_dict().items()})

    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, remember)
    run.trainer.run()
    tensors, card = kept(tmp_path)
    assert card == {"metrics": {"epoch": 3}}
    assert sorted(tensors) == ["bias", "weight"]
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in tensors.items())
    assert not torch.equal(tensors["weight"], states[1]["weight"])
    assert json.loads((tmp_path / "run_card.json").read_text())["best"] is None  # nothing was compared


def test_a_training_that_is_killed_leaves_the_adapter_of_its_last_whole_epoch(tmp_path):
    run = LastRun(tmp_path, epochs=3)

    def die(engine):
        if engine.state.epoch == 2 and engine.state.iteration == 5:
            raise KeyboardInterrupt

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, die)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    tensors, card = kept(tmp_path)
    assert card["metrics"] == {"epoch": 1}
    resumed = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in resumed["network"].items())


def test_only_the_first_process_writes_the_last_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("samseg_monai.handlers.keeping.idist.get_rank", lambda: 1)
    handlers.LastAdapter(nn.Linear(4, 2), tmp_path)(SimpleNamespace(state=SimpleNamespace(epoch=1)))
    assert not list(tmp_path.iterdir())
