"""What a training leaves in MLflow, and the picture of the worst case that every validation leaves in TensorBoard."""

import csv
import importlib.util
import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.io import decode_png

from samseg_monai import handlers
from samseg_monai import pictures as overlay
from samseg_monai.bundles import build_bundle
from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.handlers import tracking, validation
from samseg_monai.handlers.tracking import MlflowRun, flat
from samseg_monai.metrics import CaseScores, mean_dice
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY
from tests.training.test_handlers import trainer

ON_DEMAND = {"ladder": {"strategy::side_weights": "random"}, "unet": {"sam_variant": None, "sam_checkpoint": None}}


@pytest.fixture(scope="module")
def offline():
    """Whatever is done here is done without a network."""

    def refuse(*args, **kwargs):
        raise AssertionError("tracking on sqlite must not open a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "create_connection", refuse)
        yield


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: build_bundle("hippocampus", name, folder) / "configs" for name in ON_DEMAND}


@pytest.fixture(scope="module")
def datalist(hippocampi, tmp_path_factory) -> Path:
    """Two cases to train, three to validate, one to test."""
    content = json.loads((hippocampi / "datalist.json").read_text(encoding="utf-8"))
    items = [item for section in ("training", "validation", "testing") for item in content[section]]
    path = tmp_path_factory.mktemp("list") / "datalist.json"
    parts = {"training": items[:2], "validation": items[2:5], "testing": items[5:]}
    path.write_text(json.dumps({**content, **parts}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def database(offline, tmp_path_factory) -> str:
    """Address of one store for all tests, in a folder that is not there yet: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/store/runs.db"


@pytest.fixture(scope="module")
def tracked(configs, hippocampi, datalist, database, tmp_path_factory) -> SimpleNamespace:
    """Two strategies trained and one evaluated into one store; the ladder's training was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    for strategy, own in ON_DEMAND.items():
        shared = {
            **TINY, "image_size": 32, "crop_size": [24, 28], "dataset_dir": str(hippocampi), "datalist": str(datalist),
            "output_dir": str(folder / strategy), "mlflow::uri": database, "batch_size": 8, **own,
        }  # fmt: skip
        training = {**shared, "val_batch_size": 8, "val_interval": 1 if strategy == "ladder" else 2}
        training["schedule"] = {"warmup": 0, "decay": "poly", "power": 0.9}
        for epochs in (1, 2) if strategy == "ladder" else (2,):
            run_workflow([configs[strategy] / "train.json"], {**training, "epochs": epochs})
    run_workflow(
        [configs["ladder"] / "evaluate.json"],
        {**shared, **ON_DEMAND["ladder"], "output_dir": str(folder / "ladder"), "sam_variant": "tiny",
         "sam_checkpoint": "random"},
    )  # fmt: skip
    return SimpleNamespace(folder=folder, client=MlflowClient(tracking_uri=database))


def runs_of(tracked, experiment: str = "samseg-hippocampus") -> dict:
    """Run by name."""
    number = tracked.client.get_experiment_by_name(experiment).experiment_id
    found = tracked.client.search_runs([number])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(folder: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    with open(folder / "history.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            curves.setdefault(row["name"], {})[int(row["epoch"])] = float(row["value"])
    return curves


def artifact(run, name: str) -> Path:
    return Path(unquote(urlparse(run.info.artifact_uri).path)) / name


def test_all_strategies_are_in_one_experiment_and_every_run_is_closed(tracked):
    runs = runs_of(tracked)
    assert set(runs) == {"ladder", "unet", "ladder, testing"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all(run.info.end_time >= run.info.start_time for run in runs.values())


@pytest.mark.parametrize("strategy", ON_DEMAND)
def test_curves_are_those_of_the_history_file(strategy, tracked):
    run = runs_of(tracked)[strategy]
    curves = history(tracked.folder / strategy)
    assert {"train_loss", "lr", "val_dice", "anterior_dice_mean", "posterior_dice_mean"} <= set(curves)
    assert list(curves["train_loss"]) == [1, 2]
    stored = {name: tracked.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    for name, values in curves.items():
        assert [(p.step, p.value) for p in sorted(stored[name], key=lambda p: p.step)] == sorted(values.items()), name
    extra = {"best", "best_epoch", "gate"} if strategy == "ladder" else {"best", "best_epoch"}
    assert set(stored) == {*curves, *extra}
    assert run.data.metrics["best"] == max(curves["val_dice"].values())
    if strategy == "ladder":
        gates = {point.step: point.value for point in stored["gate"]}
        card = json.loads((tracked.folder / "ladder" / "run_card.json").read_text(encoding="utf-8"))
        assert set(gates) == {1, 2} and gates[2] == card["gate"] and 0 < gates[1] < 1


def test_settings_are_parameters_and_a_resume_says_what_it_changed(tracked):
    runs = runs_of(tracked)
    settings = runs["ladder"].data.params
    assert settings["strategy._target_"] == "samseg_monai.strategies.Ladder"
    assert (settings["strategy.mix"], settings["image_size"], settings["prompt.source"]) == ("gate", "32", "none")
    assert json.loads(settings["classes"]) == ["anterior", "posterior"]
    assert settings["epochs"] == "1" and runs["ladder"].data.tags["resumed.epochs"] == "2"
    assert runs["unet"].data.params["epochs"] == "2"
    assert int(settings["trainable_parameters"]) > 0
    everything = json.dumps([[run.data.params, run.data.tags] for run in runs.values()])
    assert str(tracked.folder) not in everything and str(Path.home()) not in everything
    assert runs["ladder"].data.tags["bundle"] == "hippocampus_segmentation_ladder"


@pytest.mark.parametrize("strategy", ON_DEMAND)
def test_configs_and_card_are_attached(strategy, tracked, database):
    run = runs_of(tracked)[strategy]
    config = json.loads(artifact(run, "configs/train.json").read_text(encoding="utf-8"))
    assert config["epochs"] == 2 and config["mlflow"] == {"uri": None, "experiment": None}
    card = json.loads(artifact(run, "run_card.json").read_text(encoding="utf-8"))
    assert card == json.loads((tracked.folder / strategy / "run_card.json").read_text(encoding="utf-8"))
    assert card["status"] == "completed" and "mlflow" not in card["settings"]
    assert artifact(run, "").is_relative_to(Path(database.removeprefix("sqlite:///")).with_name("runs-artifacts"))


def test_evaluation_lies_below_its_training_with_the_metrics_of_its_file(tracked):
    runs = runs_of(tracked)
    run = runs["ladder, testing"]
    assert run.data.tags["mlflow.parentRunId"] == runs["ladder"].info.run_id
    assert run.data.tags["kind"] == "evaluation" and run.data.params["policy"] == "honest"
    text = (tracked.folder / "ladder" / "evaluation" / "metrics.json").read_text(encoding="utf-8")
    metrics = {name: value for name, value in json.loads(text)["metrics"].items() if value is not None}
    assert "hd95_mm_mean" in metrics or "dice_mean" in metrics
    assert {name: run.data.metrics[name] for name in metrics} == metrics


def test_nothing_is_tracked_unless_it_is_asked_for(configs):
    for name, place in (("train", "train::named_handlers"), ("evaluate", "named_handlers")):
        parser = ConfigParser(ConfigParser.load_config_file(configs["ladder"] / f"{name}.json"))
        assert parser[f"{place}::tracking::_target_"] == "samseg_monai.handlers.Tracking"
        assert parser[f"{place}::tracking::card"] == f"@{place}::run_card"
        assert next(iter(parser[place])) == "run_card" and parser.get_parsed_content(f"{place}::tracking::uri") is None
    quiet = handlers.Tracking(handlers.RunCard(Path("unused"), settings={}), "unused", uri=None)
    engine = Engine(lambda *_: None)
    quiet.attach(engine)
    assert not engine._event_handlers


@pytest.fixture
def store(tmp_path, database) -> SimpleNamespace:
    """A small training with a card, in an experiment of its own; ``go`` runs it with more handlers behind."""
    client, experiment = MlflowClient(tracking_uri=database), f"small {tmp_path.name}"

    def go(*more, epochs: int = 3, experiment: str = experiment) -> None:
        network = nn.Linear(4, 2)
        card = handlers.RunCard(tmp_path, settings={"lr": 0.1}, network=network)
        tracking = handlers.Tracking(card, tmp_path, uri=database, experiment=experiment)
        trainer(network, [card, tracking, handlers.CurveLog(tmp_path), *more], epochs=epochs).run()

    def runs() -> list:
        found = client.get_experiment_by_name(experiment)
        return [] if found is None else client.search_runs([found.experiment_id])

    def losses(run) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train_loss")]

    return SimpleNamespace(
        folder=tmp_path, uri=database, client=client, experiment=experiment, go=go, runs=runs, losses=losses
    )


class At:
    """Does something at the start of an epoch."""

    def __init__(self, epoch, what):
        self.epoch, self.what = epoch, what

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_STARTED(once=self.epoch), self.what)


def raise_(error):
    def act(engine):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "status", "in_card"),
    [(TrainingError("the loss is nan"), "FAILED", "failed"), (KeyboardInterrupt(), "KILLED", "interrupted"),
     (MemoryError("no room"), "FAILED", "failed")],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_a_run_that_ends_early_is_closed_as_what_it_is(error, status, in_card, store):
    with pytest.raises(type(error)) as caught:
        store.go(At(3, raise_(error)))
    assert caught.value is error
    [run] = store.runs()
    assert run.info.status == status and run.info.end_time
    assert store.losses(run) == list(history(store.folder)["train_loss"].items())
    card = json.loads(artifact(run, "run_card.json").read_text(encoding="utf-8"))
    assert card["status"] == in_card == json.loads((store.folder / "run_card.json").read_text())["status"]
    assert run.data.tags["error"].startswith(type(error).__name__)


def test_a_training_that_stops_by_itself_is_finished_and_says_why(store):
    def stop(engine):
        engine.state.stop_reason = "no better validation"
        engine.terminate()

    store.go(At(2, stop))
    [run] = store.runs()
    assert run.info.status == "FINISHED" and run.data.tags["stop_reason"] == "no better validation"


def test_a_store_that_is_away_for_an_epoch_costs_a_warning_and_no_value(store, monkeypatch, caplog):
    def away(self, *args, **kwargs):
        raise MlflowException("database is locked")

    def leave(engine):
        monkeypatch.setattr(MlflowClient, "log_batch", away)

    def return_(engine):
        monkeypatch.undo()

    with caplog.at_level(logging.WARNING):
        store.go(At(2, leave), At(3, return_))
    assert "database is locked" in caplog.text
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert store.losses(run) == list(history(store.folder)["train_loss"].items())
    assert len(store.losses(run)) == 3


def test_only_the_first_process_writes(store, monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    store.go()
    assert not store.runs()
    with pytest.raises(TrainingError, match="nan"):
        store.go(At(1, raise_(TrainingError("nan"))))


def test_a_deleted_experiment_is_refused_and_the_card_says_so(store):
    store.go(epochs=1)
    store.client.delete_experiment(store.client.get_experiment_by_name(store.experiment).experiment_id)
    with pytest.raises(TrainingError, match=r"small.*deleted.*mlflow::experiment"):
        store.go(epochs=1)
    card = json.loads((store.folder / "run_card.json").read_text(encoding="utf-8"))
    assert card["status"] == "failed"


def test_a_resume_goes_on_with_a_new_run_where_the_old_one_is_gone(store):
    first = MlflowRun(store.uri, store.experiment, "a", tags={})
    first.points([("loss", 1, 0.5)])
    again = MlflowRun(store.uri, store.experiment, "a", tags={}, run_id=first.id)
    assert again.id == first.id and again.resumed
    again.points([("loss", 1, 0.7), ("loss", 2, 0.4)])
    points = store.client.get_metric_history(first.id, "loss")
    assert [(p.step, p.value) for p in points] == [(1, 0.5), (2, 0.4)]
    store.client.delete_run(first.id)
    for gone in (first.id, "0" * 32):
        other = MlflowRun(store.uri, store.experiment, "a", tags={}, run_id=gone, parent=gone)
        assert other.id != first.id and not other.resumed
        assert "mlflow.parentRunId" not in store.client.get_run(other.id).data.tags


def test_an_absent_package_is_named_with_its_extra(store, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(ConfigError, match=r"mlflow is not installed: pip install 'samseg-monai\[mlflow\]'"):
        store.go()


@pytest.mark.parametrize("uri", ["runs.db", "/data/mlruns", "file:///mlruns", "sqlite://runs.db", 3])
def test_an_address_that_is_none_is_refused_before_anything_is_loaded(uri, tmp_path):
    with pytest.raises(ConfigError, match="sqlite:///PATH"):
        handlers.Tracking(handlers.RunCard(tmp_path, settings={}), tmp_path, uri=uri)


def test_a_database_that_is_none_is_refused_at_once(tmp_path, monkeypatch):
    """MLflow would try to open it ten times, waiting twice as long each time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "curves.csv").write_text("epoch,iteration,name,value\n")
    (tmp_path / "empty.db").touch()
    tracking.check_address("sqlite:///empty.db")
    for name in ("", ":memory:", "folder", "curves.csv"):
        with pytest.raises(ConfigError, match=f"mlflow::uri sqlite:///{name} (names no|is a)"):
            tracking.check_address(f"sqlite:///{name}")


def test_names_and_values_that_mlflow_would_refuse_are_made_to_fit(store):
    assert flat({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}}
    run = MlflowRun(store.uri, store.experiment, "a", tags={"long": "t" * 20_000})
    run.params({"left (kidney)": "x" * 10_000, **{f"key{i}": i for i in range(250)}, "k" * 300: None})
    run.points([("lr/1", 0, 0.1), ("dice (%)", 0, float("nan")), *((f"m{i}", 0, i) for i in range(1500))])
    run.close("FINISHED")
    data = store.client.get_run(run.id).data
    assert len(data.params) == 252 and data.params["left _kidney_"].endswith("...")
    assert len(data.metrics) == 1502 and data.metrics["lr_1"] == 0.1 and data.metrics["m1499"] == 1499


# --- the worst case ---


def pictures(folder: Path) -> list[tuple[int, np.ndarray]]:
    """Step and picture (H, W, 3) of every validation, out of the event files."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["validation/worst_case"]
    found = []
    for event in events.Images("validation/worst_case"):
        png = torch.frombuffer(bytearray(event.encoded_image_string), dtype=torch.uint8)
        found.append((event.step, decode_png(png).permute(1, 2, 0).numpy()))
    return found


def has_caption(picture: np.ndarray, caption: str) -> bool:
    strip = overlay.legend(caption, picture.shape[1])
    return np.array_equal(picture[-len(strip) :], strip)


@pytest.mark.parametrize("strategy", ON_DEMAND)
def test_every_validation_of_a_training_leaves_one_picture(strategy, tracked):
    folder = tracked.folder / strategy / "tensorboard"
    steps = [step for step, _ in pictures(folder)]
    assert steps == ([1, 2] if strategy == "ladder" else [2])
    # nor do these files, of MONAI's handlers and ours, tell on which machine they were written
    assert all(".run." in path.name and f".{socket.gethostname()}." not in path.name for path in folder.iterdir())


def test_no_password_of_a_store_is_shown():
    with pytest.raises(ConfigError) as caught:
        tracking.check_address("ftp://jane:s3cret@host/runs")
    assert "ftp://host/runs" in str(caught.value) and "s3cret" not in str(caught.value)


def test_the_case_with_the_lowest_dice_of_the_validation_is_shown(configs, hippocampi, datalist, tmp_path):
    parser = ConfigParser(ConfigParser.load_config_file(configs["ladder"] / "train.json"))
    parser.update({
        **TINY, "image_size": 32, "crop_size": [24, 28], "dataset_dir": str(hippocampi), "datalist": str(datalist),
        "output_dir": str(tmp_path), "val_batch_size": 8, "strategy::side_weights": "random",
    })  # fmt: skip
    parser["validate::named_handlers"] = {"worst_case": parser["validate::named_handlers::worst_case"]}
    evaluator = parser.get_parsed_content("validate::evaluator")
    evaluator.run(global_epoch=7)
    rows = evaluator.state.metric_details["val_dice"]
    dice = {}
    for row in rows:
        dice.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.nanmean(values)) for case, values in dice.items()}
    assert len(means) == 3 and len(set(means.values())) == 3
    worst = min(means, key=means.get)
    [(step, picture)] = pictures(tmp_path / "tensorboard")
    assert step == 7
    captions = [f"{worst}: Dice {means[worst]:.3f}, slice {k}{e}" for k in range(9)
                for e in ("", ", empty prediction here")]  # fmt: skip
    assert sum(has_caption(picture, caption) for caption in captions) == 1


def shown(folder: Path, *cases: dict, **options) -> list[tuple[int, np.ndarray]]:
    """Pictures of one validation over ``cases``: dicts of case, image, reference, pred with an affine."""
    engine = Engine(lambda engine, batch: batch)
    handlers.WorstCaseImage(folder, classes=options.pop("classes", ["tumour"]), **options).attach(engine)
    engine.run([[case] for case in cases], max_epochs=1)
    return pictures(folder)


def volumes(case: str, shift: int, axes: str = "RAS", spacing=(1.0, 1.0, 3.0)) -> dict:
    """A cuboid of 8 x 10 x 4 voxels on dark tissue, and a prediction that lies ``shift`` voxels to the patient's right;
    the image is cut to a smaller grid than the reference, and both are stored in some orientation."""
    reference = np.zeros((32, 40, 12), dtype=np.float32)
    reference[6:14, 20:30, 4:8] = 1
    pred = np.roll(reference, shift, axis=0)
    pred[:, 25:, 5] = 0  # most errors are in slice 5
    image = 100 + 50 * reference
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    crop = np.diag([1.0, 1, 1, 1])
    crop[:3, 3] = (2, 4, 1)
    affine = np.diag([*spacing, 1.0])
    stored = {
        "reference": nib.Nifti1Image(reference, affine).as_reoriented(turn),
        "pred": nib.Nifti1Image(pred, affine).as_reoriented(turn),
        "image": nib.Nifti1Image(image[2:30, 4:38, 1:10], affine @ crop),
    }
    arrays = {k: MetaTensor(np.ascontiguousarray(v.dataobj)[None], affine=v.affine) for k, v in stored.items()}
    return {"case": case, **arrays}


def colours(picture: np.ndarray) -> dict[str, np.ndarray]:
    body = picture[: -len(overlay.legend("", picture.shape[1]))].copy()
    body[:, :20], body[:, -20:] = 0, 0  # R and L
    named = {"reference": overlay.REFERENCE, "prediction": overlay.PREDICTION, "both": overlay.BOTH}
    return {name: (body == np.array(colour)).all(axis=2) for name, colour in named.items()}


def test_outlines_lie_where_the_masks_end(tmp_path):
    """40 rows and 32 columns become 384 x 307 pixels: a voxel is 9.6 of them. Front is up, right is on the left."""
    [(_, picture)] = shown(tmp_path, volumes("one", shift=3))
    dice = mean_dice(volumes("one", shift=3)["pred"], volumes("one", shift=3)["reference"], 1)
    assert has_caption(picture, f"one: Dice {dice:.3f}, slice 5")
    assert picture.shape == (384 + len(overlay.legend("", 307)), 307, 3)
    found, voxel = colours(picture), 9.6

    def box(mask):
        rows, columns = np.nonzero(mask)
        return [rows.min() / voxel, (rows.max() + 1) / voxel, columns.min() / voxel, (columns.max() + 1) / voxel]

    assert box(found["reference"] | found["both"]) == pytest.approx([10, 20, 18, 26], abs=0.1)
    assert box(found["prediction"] | found["both"]) == pytest.approx([15, 20, 15, 23], abs=0.1)
    assert 0 < found["both"].sum() < found["reference"].sum()
    bright = picture[int(12.5 * voxel), int(24.5 * voxel)]  # inside the reference, off all lines
    dark = picture[int(30 * voxel), int(10 * voxel)]
    assert len(set(bright)) == 1 and bright[0] > dark[0]
    assert not picture[: int(10 * voxel), int(0.5 * voxel)].any()  # the image was cropped here


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAL"])
def test_the_picture_does_not_know_how_the_file_is_stored(axes, tmp_path):
    [(_, plain)] = shown(tmp_path / "a", volumes("one", shift=3))
    [(_, other)] = shown(tmp_path / "b", volumes("one", shift=3, axes=axes))
    assert np.array_equal(plain[:384], other[:384])


def test_pixels_keep_their_proportions_in_mm(tmp_path):
    [(_, picture)] = shown(tmp_path, volumes("one", shift=3, spacing=(2.0, 1.0, 1.0)))
    assert picture.shape[1] == 384 and len(picture) - len(overlay.legend("", 384)) == pytest.approx(384 * 40 / 64)


def test_of_several_processes_the_worst_of_all_is_shown(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(validation.idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(validation.idist, "all_gather", lambda own: sent.append(own) or [own, own])
    shown(tmp_path / "other", volumes("z", shift=6), volumes("y", shift=1))
    [[theirs]] = sent
    assert theirs.case == "z" and theirs.image.ndim == 2, "only a slice goes from process to process"
    monkeypatch.setattr(validation.idist, "all_gather", lambda own: [own, [theirs]])
    [(_, picture)] = shown(tmp_path / "here", volumes("a", shift=2), volumes("b", shift=3))
    assert has_caption(picture, f"z: Dice {theirs.dice:.3f}, slice {theirs.index}")


def test_equal_cases_are_told_apart_by_name_and_empty_ones_are_passed_over(tmp_path):
    both_empty = volumes("0", shift=0)
    both_empty["pred"] = both_empty["reference"] = both_empty["reference"] * 0
    missed = {**volumes("m", shift=0), "pred": volumes("m", shift=0)["pred"] * 0}
    other = {**missed, "case": "k"}
    [(_, picture)] = shown(tmp_path, both_empty, missed, other, volumes("good", shift=1))
    assert has_caption(picture, "k: Dice 0.000, slice 4, empty prediction here")
    found = colours(picture)
    assert found["reference"].any() and not found["prediction"].any() and not found["both"].any()


@pytest.mark.parametrize("classes", [2, 20])
def test_classes_in_one_volume_or_in_channels_of_their_own_are_one_picture(classes, tmp_path):
    one = volumes("one", shift=3)
    labels = {key: one[key].clone() for key in ("pred", "reference")}
    for volume in labels.values():
        volume[0, 20:, 24:] *= classes
    channels = {k: MetaTensor(torch.cat([v == c + 1 for c in range(classes)]).float(), affine=v.affine)
                for k, v in labels.items()}  # fmt: skip
    names = [str(number) for number in range(classes)]
    for found in (labels, channels):
        scores = CaseScores(classes=names, surface=False)
        scores.reset()
        scores.update([{"case": "one", **found}])
        assert mean_dice(found["pred"], found["reference"], classes) == pytest.approx(scores.compute(), abs=1e-7)
    [(_, first)] = shown(tmp_path / "a", {**one, **labels}, classes=names)
    [(_, second)] = shown(tmp_path / "b", {**one, **channels}, classes=names)
    assert np.array_equal(first, second)


def test_classes_that_were_exchanged_do_not_look_right(tmp_path):
    one = volumes("one", shift=0)
    exchanged = {**one, "pred": 2 * one["reference"]}
    [(_, right)] = shown(tmp_path / "a", {**one, "pred": one["reference"]}, classes=["left", "right"])
    [(_, wrong)] = shown(tmp_path / "b", exchanged, classes=["left", "right"])
    outline, found = colours(right)["both"], colours(wrong)
    assert outline.any() and np.array_equal(found["prediction"], outline) and not found["both"].any()


def test_long_names_are_cut_and_the_colours_can_be_told_apart(tmp_path):
    strip = overlay.legend("x" * 500, 300)
    assert strip.shape[1] == 300 and np.array_equal(strip, overlay.legend("x" * 600, 300))
    # Okabe and Ito's sky blue and orange, by their published numbers
    assert overlay.REFERENCE == (86, 180, 233) and overlay.PREDICTION == (230, 159, 0)
