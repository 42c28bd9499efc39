"""Several processes (gloo) do what one does: evaluate exactly, learn within 1e-5; rank 0 alone writes and talks."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from samseg_monai.bundles import build_bundle
from samseg_monai.checkpoints import read_card
from samseg_monai.errors import TrainingError
from samseg_monai.handlers import SameBuffers
from samseg_monai.handlers.resume import hold_folder
from tests.conftest import TINY
from tests.docs.test_docs import commands, run_line
from tests.helpers.forked import ITERATION, forked
from tests.training.test_kill_resume import resume, same

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "multi_gpu.md"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")
TALK, BAR = r"\d\d:\d\d:\d\d INFO", r"\d+%"  # as logging.conf has it (MONAI says a line before it reads that)
TRAIN = {"epochs": 3, "lr": 0.01, "val_interval": 1, "strategy::rank": 2, "clip_norm": 0.5, "ema": 0.5}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: build_bundle(*name, folder) / "configs" for name in (("meningioma", "lora"), ("abdomen", "ladder"))}


@pytest.fixture(scope="module")
def split(phantoms, tmp_path_factory):
    """The phantoms with four cases to train, one to validate (fewer than processes) and three to test (uneven)."""
    content = json.loads((phantoms / "datalist.json").read_text())
    cases = content["training"] + content["validation"] + content["testing"]
    content |= {"training": cases[:4], "validation": cases[4:5], "testing": cases[5:]}
    path = tmp_path_factory.mktemp("split") / "datalist.json"
    path.write_text(json.dumps(content))
    return {**TINY, "dataset_dir": str(phantoms), "datalist": str(path)}


@pytest.fixture(scope="module")
def trained(bundles, split, tmp_path_factory):
    """The same LoRA by one process with batches of four and by two with batches of two."""
    configs, folders = bundles["meningioma", "lora"], {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"by{ranks}")
        run("train", configs, {**split, **TRAIN, "batch_size": 4 // ranks}, folders[ranks], ranks)
    return folders


def run(config, configs, overrides, folder, ranks, *, die=None, code=0):
    base = [configs / "inference.json"] if config == "evaluate" else []
    files = [*base, configs / f"{config}.json", *([configs / f"multi_gpu_{config}.json"] if ranks > 1 else [])]
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    codes = forked().run(files, {**overrides, "output_dir": str(folder)}, logs / config, ranks=ranks, die=die)
    texts = [(logs / f"{config}.{r}").read_text(encoding="utf-8", errors="replace") for r in range(ranks)]
    assert codes[0 if die is None else die["rank"]] == code, "\n".join(text[-3000:] for text in texts)
    return texts


def rows(folder):
    with open(folder / "history.csv", newline="") as stream:
        return {(int(row["epoch"]), row["name"]): float(row["value"]) for row in csv.DictReader(stream)}


@needs_fork
def test_two_processes_learn_what_one_does_from_batches_as_large_together(trained):
    one, two = (resume(trained[ranks]) for ranks in (1, 2))
    assert one["epoch_length"] == two["epoch_length"] == 1
    for name, tensor in one["network"].items():
        torch.testing.assert_close(two["network"][name], tensor, rtol=0, atol=1e-5)
    moved = [float(tensor.abs().max()) for name, tensor in one["network"].items() if ".lora_b." in name]  # from zero
    assert max(moved) > 1e-3
    assert rows(trained[2]) == pytest.approx(rows(trained[1]), abs=1e-5)
    assert {(3, "train_loss"), (3, "val_dice"), (3, "val_loss"), (3, "lr")} <= rows(trained[2]).keys()


@needs_fork
@pytest.mark.parametrize(("section", "cases"), [("testing", 3), ("validation", 1)])
def test_two_processes_evaluate_like_one_also_uneven_and_with_nothing_for_one_of_them(
    section, cases, trained, bundles, split, tmp_path
):
    configs = bundles["meningioma", "lora"]
    for ranks in (1, 2):
        results = {"results_dir": str(tmp_path / str(ranks)), "section": section, "save_predictions": True}
        results |= {"allow_seen": True}  # validation has chosen the epoch
        run("evaluate", configs, {**split, **results, "strategy::rank": 2}, trained[1], ranks)
    for name in ("cases.csv", "ellipse_cases.csv", "metrics.json", "ellipse_metrics.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    assert json.loads((tmp_path / "2" / "metrics.json").read_text())["cases"] == cases
    images = [sorted(path.name for path in (tmp_path / n / "predictions").iterdir()) for n in "12"]
    assert images[0] == images[1] and len(images[0]) == 3 * cases


@needs_fork
def test_only_rank_0_writes_and_talks(trained):
    folder = trained[2]
    logs = [(folder / "logs" / f"train.{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert re.search(TALK, logs[0]) and re.search(BAR, logs[0])
    assert not re.search(f"{TALK}|{BAR}", logs[1]), logs[1]
    alone, together = ({path.name for path in trained[ranks].iterdir()} for ranks in (1, 2))
    assert alone == together
    events = [len(list((trained[ranks] / "tensorboard").iterdir())) for ranks in (1, 2)]
    assert events[0] == events[1] > 0
    card = json.loads((folder / "run_card.json").read_text())
    assert (card["processes"], card["status"]) == (2, "completed")


@needs_fork
@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_of_two_processes_survives_the_death_of_either(rank, trained, bundles, split, tmp_path):
    configs, settings = bundles["meningioma", "lora"], {**split, **TRAIN, "batch_size": 2}
    die = {"at": ITERATION, "call": 3, "rank": rank}
    run("train", configs, settings, tmp_path, 2, die=die, code=-signal.SIGKILL)
    assert resume(tmp_path)["epoch"] in (1, 2)  # rank 0 may have been about to write the second
    run("train", configs, settings, tmp_path, 2)
    same(resume(tmp_path), resume(trained[2]))
    assert rows(tmp_path) == rows(trained[2])
    assert (tmp_path / "adapter.safetensors").read_bytes() == (trained[2] / "adapter.safetensors").read_bytes()


@needs_fork
def test_a_ladder_with_uneven_batches_and_stored_embeddings_trains_on_two_processes(bundles, abdomen, tmp_path):
    settings = {
        **TINY, "dataset_dir": str(abdomen), "strategy::side_weights": "random", "epochs": 2, "batch_size": 2,
        "val_interval": 1, "lr": 0.001, "schedule": {"warmup": 0, "decay": "poly", "power": 0.9},
        "embeddings::variants": 2, "embeddings::cache_dir": str(tmp_path / "embeddings"),
        "slices::picker": {"_target_": "samseg_monai.data.slices.EveryNth", "n": 6},
    }  # fmt: skip
    logs = run("train", bundles["abdomen", "ladder"], settings, tmp_path, 2)
    saved = resume(tmp_path)
    assert saved["epoch"] == 2 and saved["epoch_length"] == 3  # 9 slices: 5 for each (one twice), in 2, 2 and 1
    assert any("running_mean" in name for name in saved["network"])
    kept = [path.relative_to(tmp_path / "embeddings") for path in (tmp_path / "embeddings").rglob("*.safetensors")]
    assert {len(path.parts) for path in kept} == {1, 2}  # of the cases to train, and of slices of the validated volume
    assert not re.search(f"{TALK}|{BAR}", logs[1]), logs[1]
    assert read_card(tmp_path)["metrics"]["epoch"] in (1, 2)


def _buffers(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = nn.BatchNorm1d(3)
    network.running_mean.fill_(rank)
    engine = Engine(lambda engine, batch: None)
    SameBuffers(network).attach(engine)
    engine.run([0])
    torch.save(network.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@needs_fork
def test_before_a_validation_all_processes_get_the_statistics_of_rank_0(tmp_path):
    torch.multiprocessing.start_processes(_buffers, (str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert float(one["running_mean"].sum()) == 0


@needs_fork
def test_two_trainings_never_share_a_folder_and_a_killed_one_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr("samseg_monai.handlers.resume.PATIENCE", 0.1)
    ready, told = os.pipe()
    other = os.fork()
    if other == 0:
        try:
            lock = hold_folder(tmp_path)
            os.write(told, b"1" if lock is not None and lock.is_locked else b"0")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"1"
    with pytest.raises(TrainingError, match="another process is training into"):
        hold_folder(tmp_path)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    first, second = hold_folder(tmp_path), hold_folder(tmp_path)  # one process may train twice, one after the other
    assert first.is_locked and second.is_locked


@needs_fork
def test_the_page_shows_commands_that_work(trained, phantoms, tmp_path, monkeypatch):
    shown = [line for line in commands(PAGE) if line.startswith("torchrun")]
    page = ROOT / "bundles" / "meningioma_segmentation_lora" / "docs" / "README.md"
    assert len(shown) == 2
    assert shown[0] in commands(page)  # test_docs.py runs it there
    build_bundle("meningioma", "lora", tmp_path)
    shutil.copytree(phantoms, tmp_path / "data" / "brats-men")
    shutil.copytree(trained[1], tmp_path / "runs" / "meningioma_segmentation_lora")
    monkeypatch.chdir(tmp_path)
    run_line(shown[1], monkeypatch)
    results = tmp_path / "runs" / "meningioma_segmentation_lora" / "evaluation"
    assert json.loads((results / "run_card.json").read_text())["processes"] == 2
