"""What a training costs: measured with the bundle's own parts, multiplied by its data, told in words and tables."""

import csv
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from monai.transforms import LoadImage
from typer.testing import CliRunner

from samseg_monai.bundles import build_bundle
from samseg_monai.cli import app, costs
from samseg_monai.data.datalists import load_datalist
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import LoRA
from samseg_monai.training.cost import RandomVolume, Repeated, duration, spread, whole_training
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
BENCH = import_module("samseg_monai.cli.bench")  # the name is the command's, too
SMALL = {key: value for key, value in TINY.items() if key != "sam_checkpoint"}
WORDS = [f"--{key}={value}" for key, value in SMALL.items()]
LORA = {**SMALL, "strategy::rank": 2, "batch_size": 2}


def here(job, tmp_path, **more):
    """What is measured of a job, in this process."""
    return costs.answer({"steps": 1, "overrides": {}, **job, **more}, tmp_path)


@pytest.fixture
def in_this_process(monkeypatch, tmp_path_factory):
    """Measure without another process; gives the jobs."""
    jobs = []

    def measured(job, *, limit):
        jobs.append(job)
        return costs.answer(job, tmp_path_factory.mktemp("scratch"))

    monkeypatch.setattr(costs, "measured", measured)
    return jobs


@pytest.mark.parametrize("scale", ["zscore", "unit", "sam"])
def test_random_volumes_have_every_class_in_every_slice(scale):
    drawn = RandomVolume(scans=3, classes=4, size=(40.4, 60), depth=2, scale=scale)({"case": "a"})
    assert drawn["image"].shape == (3, 40, 60, 2) and drawn["image"].dtype == torch.float32
    assert drawn["label"].shape == (1, 40, 60, 2) and drawn["label"].dtype == torch.uint8
    assert all(set(drawn["label"][..., z].unique().tolist()) == {0, 1, 2, 3, 4} for z in range(2))
    low, high = drawn["image"].min(), drawn["image"].max()
    assert {"zscore": low < -1, "unit": low >= 0 and high <= 1, "sam": high > 200}[scale]


def test_few_items_stand_for_many():
    assert spread(range(100), 3) == [0, 50, 99] and spread("ab", 3) == ["a", "b"]
    assert [Repeated("abc", 5)[i] for i in range(5)] == list("abcab")
    with pytest.raises(IndexError):
        Repeated("abc", 5)[5]


def test_a_training_is_measured_with_its_own_parts(tmp_path, monkeypatch):
    seen = []
    forward = SamSegmenter.forward

    def noted(self, image, boxes=None, embedding=None):
        seen.append((self.training, self.strategy.rank, image.shape, None if boxes is None else boxes.shape))
        return forward(self, image, boxes, embedding)

    monkeypatch.setattr(SamSegmenter, "forward", noted)
    job = {"task": "meningioma", "strategy": "lora", "overrides": {**LORA, "scans": ["t1c"], "val_batch_size": 3}}
    found = here(job, tmp_path, steps=2)
    assert seen[:3] == [(True, 2, (2, 1, 57, 64), (2, 4))] * 3  # a step that does not count, and two that do
    assert {entry[::2] for entry in seen[3:]} == {(False, (3, 1, 57, 64))}
    assert found["bundle"] == "meningioma_segmentation_lora" and found["batch_size"] == 2
    for name in ("step", "slice"):
        assert found[f"seconds_per_{name}"] > 0 and found[f"processor_seconds_per_{name}"] > 0
    network = SamSegmenter("tiny", LoRA(2), image_size=64)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert found["values_learned"] == sum(p.numel() for p in learned)
    assert found["mb_learned"] == pytest.approx(4e-6 * found["values_learned"])
    assert 0.1 < found["peak_gb"] < 20 and "gpu_gb" not in found


@pytest.mark.parametrize(
    ("task", "strategy", "overrides", "stored"),
    [
        ("abdomen", "ladder", {"batch_size": 2}, True),
        ("abdomen", "ladder_paper", {"batch_size": 2, "store_size": 32, "ema": 0.9}, False),
        ("brain_tumour_t1c", "decoder", {"accumulation_steps": 2, "clip_norm": 1.0}, True),
        ("hippocampus", "norm", {"prompt::per_component": True, "augmentation": "strong"}, False),
        ("meningioma", "full", {"slices::cache": "disk", "slices::cache_dir": "nowhere", "checkpointing": True}, False),
    ],
)
def test_every_kind_of_training_can_be_measured(task, strategy, overrides, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    job = {"task": task, "strategy": strategy, "overrides": {**SMALL, **overrides}, "stored": stored}
    found = here(job, tmp_path / "scratch")
    assert found["seconds_per_step"] > 0 and found["values_learned"] > 0
    assert ("seconds_per_encoded_slice" in found) == found.get("stored", False) == stored
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_networks_without_sam_and_predictions_are_measured(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain = {"image_size": 64, "crop_size": [32, 36], "batch_size": 2}
    found = here({"task": "meningioma", "strategy": "unet_crop", "overrides": plain}, tmp_path / "a")
    assert found["seconds_per_step"] > 0 and found["values_learned"] == found["values"]
    found = here({"task": "meningioma", "strategy": "zero_shot", "overrides": SMALL}, tmp_path / "b")
    assert "seconds_per_step" not in found and found["seconds_per_slice"] > 0 and found["values_learned"] == 0


def test_train_cost_tells_the_whole_training(in_this_process, phantoms, tmp_path):
    bundle = build_bundle("meningioma", "lora", tmp_path)
    words = ["train-cost", str(bundle), *WORDS, "--strategy::rank=2", "--batch_size=3", "--epochs=5", "--steps", "1"]
    done = CliRunner().invoke(
        app, [*words, "--json", "--minutes", "9", "--dataset_dir", str(phantoms)], catch_exceptions=False
    )
    found = json.loads(done.stdout)
    assert in_this_process[0]["count"] and in_this_process[1]["size"] == [32, 36]
    data = found["data"]
    assert (data["training"]["cases"], data["training"]["slices"], data["validation"]["cases"]) == (4, 1.0, 2)
    items = load_datalist(phantoms / "datalist.json", phantoms, "validation")
    # slices that a validation sees: those with a label
    boxed = [int((LoadImage(image_only=True)(item["label"]) > 0).flatten(0, 1).any(0).sum()) for item in items]
    assert data["validation"]["slices"] == sum(boxed) / 2
    minutes = found["minutes"]
    assert (found["slices"], found["steps_per_epoch"], found["validations"]) == (4, 2, 2)
    assert minutes["epoch"] == pytest.approx(2 * found["seconds_per_step"] / 60)
    each = data["validation"]["seconds_per_case"] + sum(boxed) / 2 * found["seconds_per_slice"]
    assert minutes["validation"] == pytest.approx(2 * each / 60)
    assert minutes["whole"] == pytest.approx(5 * minutes["epoch"] + 2 * minutes["validation"] + minutes["reading"])
    assert found["epochs_within"] >= 5
    assert found["slices_gb"] == pytest.approx(4 * (4 * 4 + 1) * 32 * 36 / 1e9)
    told = (
        CliRunner().invoke(app, [*words, "--datalist", str(phantoms / "datalist.json")], catch_exceptions=False).stdout
    )
    assert "tiny, 64 px, batch size 3, 4 scans, on cpu" in told and "random weights" in told
    for row in (r"a step: .*  [\d.e-]+ s", "an epoch .*2 steps", "whole training .*5 epochs, 2 validations"):
        assert re.search(row, told), told
    assert not (bundle / "eval").exists()


def test_a_three_dimensional_network_is_paid_by_patches(in_this_process, hippocampi, tmp_path):
    bundle = build_bundle("hippocampus", "dynunet_3d", tmp_path)
    small = [
        "--patch",
        "[16,16,16]",
        "--network_def::net::filters",
        "[4,4,4,4]",
        "--epochs",
        "2",
        "--slices::picker::n",
        "5",
    ]
    words = ["train-cost", str(bundle), "--dataset-dir", str(hippocampi), "--steps", "1"]
    result = CliRunner().invoke(app, [*words, *small])
    assert result.exit_code == 0, result.output
    assert "16 x 16 x 16 voxels, batch size 2" in result.output and "8 steps" in result.output
    assert re.search(r"training patches +15 of 3 cases", result.output) and "cases of about 9 slices" in result.output
    assert in_this_process[1]["size"] == [21, 28, 9]  # medians


def test_only_picked_slices_are_counted_in_a_validation(phantoms, tmp_path):
    (tmp_path / "scratch").mkdir()
    places = {"dataset_dir": str(phantoms), "validation::picker": {"_target_": "samseg_monai.data.slices.MaxArea"}}
    job = {"task": "meningioma", "strategy": "lora", "overrides": {**SMALL, **places}, "count": True}
    found = here(job, tmp_path / "scratch")["validation"]
    assert found["slices"] == 1 and found["whole"] > 1


def test_cases_of_an_older_config_are_counted(phantoms, tmp_path):
    (tmp_path / "scratch").mkdir()
    bundle = build_bundle("meningioma", "lora", tmp_path)
    path = bundle / "configs" / "train.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    given = config["validate"]["dataset"]
    old = {"_target_": "CacheDataset", "cache_rate": 1.0, "copy_cache": True, "progress": False}
    config["validate"]["dataset"] = {"data": given["data"], "transform": given["transform"], **old}
    path.write_text(json.dumps(config), encoding="utf-8")
    job = {"bundle": str(bundle), "trust": True, "overrides": {**SMALL, "dataset_dir": str(phantoms)}, "count": True}
    assert here(job, tmp_path / "scratch")["validation"]["sample"] == 2


def test_stored_embeddings_are_paid_once():
    data = {"size": [1, 1], "slice_mb": 2.0, "training": {"cases": 30, "slices": 10.0, "seconds_per_case": 1.0},
            "validation": {"cases": 5, "slices": 8.0, "whole": 8.0, "seconds_per_case": 2.0}}  # fmt: skip
    cost = {"batch_size": 8, "epochs": 7, "val_interval": 3, "seconds_per_step": 2.0, "seconds_per_slice": 0.5,
            "seconds_per_encoded_slice": 3.0, "stored": True, "variants": 4}  # fmt: skip
    found = whole_training(cost, data)
    assert (found["slices"], found["steps_per_epoch"], found["validations"]) == (300, 38, 2)
    minutes = found["minutes"]
    assert minutes["embeddings"] == 60 + 2 and minutes["reading"] == 0.5 and minutes["validation"] == 0.5
    assert minutes["whole"] == pytest.approx(7 * 38 * 2 / 60 + 2 * 0.5 + 62.5)
    data["validation"]["whole"] = 20.0  # picked slices choose the epoch, whole volumes are validated once
    found = whole_training(cost, data)
    assert found["minutes"]["last validation"] == 1 and found["minutes"]["validation"] == 0.5
    assert found["minutes"]["whole"] == pytest.approx(minutes["whole"] + 1)
    found = whole_training({**cost, "val_interval": 0, "stored": False}, data)
    assert found["validations"] == 0 and found["minutes"].keys() == {"epoch", "reading", "whole"}
    budget = {**cost, "stored": False, "steps_per_epoch": 30}
    found = whole_training(budget, data, 20.0)
    assert found["steps_per_epoch"] == 30 and found["minutes"]["epoch"] == 1
    assert found["epochs_within"] == int((20 - 1 - 0.5) / (1 + 0.5 / 3))  # whole volumes, reading; a third validation
    assert whole_training(budget, data, 1.0)["epochs_within"] == 0


def test_durations_are_told_as_people_do():
    told = [duration(minutes) for minutes in (0.05, 1.2, 3.42, 89, 320, 5000)]
    assert told == ["3 s", "72 s", "3.42 min", "89 min", "5 h 20 min", "3 days 11 h"]


def test_a_mistake_is_told_in_words(tmp_path, monkeypatch):
    def measured(job, *, limit):
        return {"failed": costs.WRONG, "told": "ConfigError: config: no such key"}

    monkeypatch.setattr(costs, "measured", measured)
    done = CliRunner().invoke(app, ["train-cost", str(tmp_path)])
    assert type(done.exception).__name__ == "ConfigError" and str(done.exception) == "config: no such key"
    out = {"failed": costs.NO_MEMORY, "told": "not enough memory (x); what saves most here: --batch_size 1"}
    monkeypatch.setattr(costs, "measured", lambda job, limit: out)
    done = CliRunner().invoke(app, ["train-cost", str(tmp_path)])
    assert type(done.exception).__name__ == "TrainingError" and str(done.exception) == out["told"]


def test_a_further_config_that_a_bundle_lacks_is_told_by_its_name(in_this_process, tmp_path):
    bundle = build_bundle("meningioma", "lora", tmp_path)
    for command in ("train-cost", "find-lr"):
        done = CliRunner().invoke(app, [command, str(bundle), "--overlay", "nope.json", "--overlay", "demo"])
        assert type(done.exception).__name__ == "ConfigError"
        head, *lines = str(done.exception).splitlines()
        assert head.startswith("--overlay: this bundle's configs are demo, evaluate, inference, ")
        assert lines == ["  - got 'nope.json'"]


def test_runs_of_a_plan_are_forecast_once_for_each_row(monkeypatch, phantoms, tmp_path):
    jobs = []

    def measured(job, *, limit):
        jobs.append(job)
        if job["overrides"]["strategy::rank"] == 3:
            return {"failed": costs.WRONG, "told": "ConfigError: wrong:\n  - two lines"}
        section = {"cases": 6, "sample": 6, "slices": 10.0, "whole": 10.0, "seconds_per_case": 0.0}
        cost = {"batch_size": 1, "epochs": 3, "val_interval": 0, "seconds_per_step": 1.0, "peak_gb": 1.5}
        data = {"size": [4, 4], "slice_mb": 1.0, "training": section, "validation": section}
        return data if job.get("count") else cost

    monkeypatch.setattr(costs, "measured", measured)
    row = {"name": "lora", "strategy": "lora", "each": {"strategy::rank": [2, 3]}}
    tasks = [{"recipe": "meningioma", "dataset_dir": str(phantoms)}]
    plan = {"title": "P", "tasks": tasks, "seeds": [0, 1], "rows": [row], "backbones": ["tiny"]}
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "weights": {"tiny": "random"}}))
    words = ["compare", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out"), "--dry-run", "--minutes", "2"]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert len(jobs) == 2 + 1 and jobs[1]["size"] == [4, 4] and "dataset_dir" not in jobs[1]["overrides"]
    assert len(re.findall(r"train, evaluate +3 min +1 +1.5 +2", told)) == 2
    assert told.count("not measured: wrong:; - two lines") == 2 and "all trainings: about 6 min, 1 at a time" in told


def test_bench_goes_on_behind_what_does_not_fit(monkeypatch, tmp_path):
    ways = {
        "lora": {"seconds_per_step": 1.234, "processor_seconds_per_step": 9.0, "mb_learned": 2.0},
        "ladder": {"failed": costs.NO_MEMORY, "told": "not enough memory"},
        "unet": {"failed": costs.NO_TIME, "told": "takes more than 7 s"},
        "decoder": {"failed": costs.WRONG, "told": "ConfigError: rank\n  too large"},
    }
    machine = {"cpu": "a processor", "versions": {"torch": "9.9"}}
    shared = {"peak_gb": 1.5, "seconds_per_slice": 0.5, "machine": machine, "device": "cpu", "threads": 2}
    jobs = []

    def measured(job, *, limit):
        jobs.append(job)
        return ways[job["strategy"]] if "failed" in ways[job["strategy"]] else {**ways[job["strategy"]], **shared}

    monkeypatch.setattr(costs, "measured", measured)
    words = [
        "bench",
        "--strategies",
        "lora,ladder,unet,decoder",
        "--sam-variants",
        "pico,vit_t",
        "--image-sizes",
        "64,128",
    ]
    words += ["--batches", "1,4", "--limit", "7", "--lr", "0.1", "--output"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "x.md")], catch_exceptions=False)
    assert done.exit_code == 0 and len(jobs) == 8 + 2 * 8 + 4 + 2 * 8
    assert jobs[0]["overrides"] == {
        "lr": 0.1, "sam_variant": "pico", "image_size": 64, "batch_size": 1, "val_batch_size": 1
    }  # fmt: skip
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert text in done.stdout and text.count("| ") > 100
    assert re.search(r"\| lora +\| vit_t \| 128 +\| 4 +\| 1.23 +\| 0.5 +\| 1.50 +\| 2.0 +\|", text)
    assert "- ladder, embeddings stored with pico at 64 px, batch 4: not enough memory" in text
    assert "- unet at 128 px, batch 1: takes more than 7 s" in text and "ConfigError: rank too large" in text
    assert text.rstrip().endswith(
        "random weights and slices; seconds by the clock; a processor, threads: 2; torch 9.9."
    )
    CliRunner().invoke(app, [*words, str(tmp_path / "x.csv"), "--processor-time"], catch_exceptions=False)
    rows = list(csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8")))
    assert len(rows) == 44 and rows[0]["processor_seconds_per_step"] == "9.0" and rows[-1]["failed"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "x.xls")])
    assert "its name ends in .md, .csv, .json" in str(done.exception)


# --- a process of its own -------------------------------------------------------------------------------------------


def test_a_process_of_its_own_measures_and_is_ended_in_time(monkeypatch):
    job = {"task": "meningioma", "strategy": "lora", "overrides": {**LORA, "scans": ["t1c"]}, "steps": 1}
    found = costs.measured(job, limit=600)
    assert found["seconds_per_step"] > 0 and found["peak_gb"] > 0.1, found
    wrong = costs.measured({**job, "overrides": {"bach_size": 2}}, limit=600)
    assert wrong["failed"] == costs.WRONG and "bach_size (did you mean batch_size?)" in wrong["told"]
    late = costs.measured(job, limit=0.01)
    assert late == {"failed": costs.NO_TIME, "told": "takes more than 0.01 s; give it more time: --limit"}
    monkeypatch.setattr(costs, "free_memory", lambda: 1e8)
    assert costs.measured(job, limit=600)["failed"] == costs.NO_MEMORY


@pytest.mark.parametrize("ended", [costs.NO_MEMORY, ""])
def test_a_process_that_was_ended_leaves_what_would_help(ended, tmp_path):
    (tmp_path / "advice.txt").write_text("what saves most here: --batch_size 1", encoding="utf-8")
    found = costs._told(tmp_path, ended, -9)
    assert found["failed"] == costs.NO_MEMORY and found["told"].endswith("; what saves most here: --batch_size 1")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)
def test_memory_that_is_refused_is_told_with_what_would_help(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("samseg_monai.training.cost._trained", fail)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    job = {"task": "meningioma", "strategy": "lora", "overrides": LORA, "steps": 1}
    costs._work(job, str(tmp_path))
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["failed"] == costs.NO_MEMORY
    assert re.match(r"not enough memory \(.*\); what saves most here: --", found["told"])


def test_an_error_nobody_has_foreseen_is_told_by_its_cause_and_place(tmp_path, monkeypatch):
    def fail(*_, **__):
        try:
            {}["deep"]
        except KeyError as error:
            raise RuntimeError("Failed to instantiate\nmany lines\nof a library") from error

    monkeypatch.setattr("samseg_monai.training.cost._trained", fail)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    costs._work({"task": "meningioma", "strategy": "lora", "overrides": LORA, "steps": 1}, str(tmp_path))
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["failed"] == costs.WRONG
    assert re.fullmatch(r"KeyError: 'deep' \(test_cost.py, line \d+\)", found["told"]), found


# --- the page about speed -------------------------------------------------------------------------------------------


def test_commands_of_the_page_run(in_this_process, phantoms, tmp_path, monkeypatch):
    """``samseg bench`` and ``samseg train-cost`` as docs/speed.md shows them, at the smallest sizes."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```$", page, flags=re.S | re.M)).replace("\\\n", " ")
    shown = [line for line in blocks.splitlines() if line.startswith(("samseg bench", "samseg train-cost"))]
    assert {line.split()[1] for line in shown} == {"bench", "train-cost"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "brats-men").symlink_to(phantoms)
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    monkeypatch.chdir(tmp_path)
    for line in shown:
        words = [*shlex.split(line)[1:], "--steps", "1", "--crop_size=[32, 36]"]
        if words[0] == "bench":
            words += [
                "--sam-variants",
                "tiny",
                "--image-sizes",
                "64",
                "--batches",
                "2",
                "--strategies",
                "zero_shot,ladder",
            ]
        else:
            words += [*WORDS, "--strategy::rank=2", "--batch_size=2"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output


def test_numbers_of_the_page_are_those_of_the_files():
    """Rows of both tables, as ``samseg bench`` and benchmarks/memory_settings.py wrote them."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    for name in ("bench_256", "bench_512", "bench_1024"):
        result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        rows = [re.sub(" +", " ", line) for line in BENCH.table(result).splitlines() if line.startswith("| ")]
        assert len(rows) > 4 and all(row in page for row in rows if not row.startswith("| -")), name
    told = dict(re.findall(r"^\| (encoder|all of SAM|frozen encoder|without SAM|prediction) \| (.*) \|$", page, re.M))
    rows = json.loads((results / "memory_settings.json").read_text(encoding="utf-8"))["rows"]
    for learns in {row["learns"] for row in rows}:
        for row in rows:
            if row["learns"] == learns and row["setting"]:
                shown = f"`{row['setting']}` {row['memory_ratio']:.2f} ({row['ratio']:.2f})"
                assert shown in told[learns], shown
