"""``samseg compare``: what is run, kept, tried again and put together; numbers against an own computation."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from samseg_monai import files, list_strategies
from samseg_monai.cli import app
from samseg_monai.cli.compare import _shard
from samseg_monai.comparison import perform, performing, plan_names, pooled, read_plan, write_comparison
from samseg_monai.comparison.commands import prepare_lines
from samseg_monai.comparison.plan import PLANS, former
from samseg_monai.comparison.pooling import last_third, rank_shares
from samseg_monai.comparison.results import _escaped
from samseg_monai.errors import BundleError, ConfigError, DataError, WeightsError
from samseg_monai.metrics import write_rows
from samseg_monai.report.runs import RunResult

CASES = {"train": ["a"], "test": [f"case{number:02d}" for number in range(8)]}
MEAN = {"zero_shot": 0.6, "lora": 0.7}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for fold in (0, 1):
        (folder / f"fold{fold}.json").write_text(json.dumps({"fold": fold}))
    shutil.copy(folder / "fold0.json", folder / "datalist.json")
    return folder


def plan_of(data, **changes):
    rows = [
        {"name": "zero_shot", "strategy": "zero_shot"},
        {"name": "lora", "strategy": "lora", "title": "LoRA", "each": {"strategy::rank": [2, 4]}},
    ]
    tasks = [{"recipe": "meningioma", "dataset_dir": "data"}]
    value = {"title": "Ranks", "tasks": tasks, "seeds": [0, 1], "shared": {"image_size": 64}}
    value |= {"backbones": ["tiny"]}
    path = data.parent / "plan.json"
    path.write_text(json.dumps({**value, "weights": {"tiny": "random"}, "rows": rows, **changes}))
    return path


def scores(name: str, seed: int, cases: list[str]) -> dict[str, float]:
    rng = np.random.default_rng([len(name), seed])
    base = np.random.default_rng(5).normal(0, 0.05, 100)
    return {case: float(MEAN[name] + base[int(case[-2:])] + rng.normal(0, 0.02)) for case in cases}


class Runner:
    """In place of the processes: writes what a training and an evaluation leave, and fails where it is told to."""

    def __init__(self):
        self.commands: list[str] = []
        self.failing: str | None = None

    def __call__(self, command, log, threads, gpu, started, lock):
        self.commands.append(command)
        step = "train" if "train.json" in command else "evaluate"
        with log.open("a") as stream:
            stream.write(f"$ {command}\nanswer\n")
        if self.failing and self.failing in command and step == "train":
            log.write_text(log.read_text(encoding="utf-8") + "ConfigError: no such thing\n")
            return 1
        words = command.split()
        told = dict(itertools.pairwise(words))
        seed, name = int(told["--seed"]), "lora" if "_lora/" in command else "zero_shot"
        folder = log.parent
        card = {"strategy": {"name": name, "arguments": {}}, "sam_variant": "tiny", "seed": seed, "status": "completed"}
        card |= {"trainable_parameters": 8 if name == "lora" else 0, "prompt_source": "label", "data_hash": "d"}
        if step == "train":
            (folder / "adapter.safetensors").write_bytes(b"")
            best = {"metric": 0.7 + 0.01 * seed, "epoch": 1}
            card["cases"] = {"training": ["x"] * int(told.get("--training_cases", "20").replace("'$None'", "20"))}
            card |= {"seconds": 60.0 * (1 + seed), "best": best, "peak_memory_mb": {"ram": 2048.0}}
            (folder / "run_card.json").write_text(json.dumps(card))
            points = [f"{epoch},{epoch},train_loss,{1 / epoch}" for epoch in range(1, 10)]
            points += [f"{epoch},{epoch},val_dice,{0.1 * epoch}" for epoch in range(1, 10 if seed else 2)]
            (folder / "history.csv").write_text("\n".join(["epoch,iteration,name,value", *points, ""]))
            return 0
        half = [CASES["test"][:4], CASES["test"][4:]]
        datalist = Path(told["--datalist"]).name
        cases = half[datalist == "fold1.json"] if datalist.startswith("fold") else CASES["test"]
        flags = {"excluded": False, "empty_prediction": False, "empty_reference": False}
        rows = [
            {"case": case, "class": "tumour", "dice": dice, "hd95_mm": 10 * (1 - dice), **flags}
            for case, dice in scores(name, seed, cases).items()
        ]
        (folder / "evaluation").mkdir(exist_ok=True)
        write_rows(rows, folder / "evaluation" / "cases.csv")
        (folder / "evaluation" / "metrics.json").write_text(json.dumps({"policy": "honest"}))
        (folder / "evaluation" / "run_card.json").write_text(json.dumps(card))
        return 0


@pytest.fixture
def runner(monkeypatch):
    found = Runner()
    monkeypatch.setattr(performing, "_run", found)
    return found


def test_runs_are_tasks_times_rows_times_values_times_seeds_and_folds(data):
    runs = read_plan(plan_of(data)).runs()
    assert [run.group for run in runs] == ["zero_shot", "lora_rank2", "lora_rank4", "lora_rank2", "lora_rank4"]
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1]  # nothing learns in the first: one seed
    folds = [str(data / "fold0.json"), str(data / "fold1.json")]
    task = {"recipe": "meningioma", "dataset_dir": "data", "datalists": folds}
    runs = read_plan(plan_of(data, tasks=[task], backbones=["tiny", "tiny_t"])).runs(rows=["lora"])
    assert len(runs) == 2 * 2 * 2 * 2 and {run.fold for run in runs} == {0, 1}
    assert {run.group for run in runs} == {f"lora_{b}_rank{r}" for b in ("tiny", "tiny_t") for r in (2, 4)}
    assert len({run.key for run in runs}) == len(runs)


def test_a_run_is_known_by_what_its_numbers_depend_on_and_not_by_its_name(data):
    def keys(**changes):
        return [run.key for run in read_plan(plan_of(data, **changes)).runs()]

    same = keys(title="Another title")
    renamed = [
        {"name": "none", "strategy": "zero_shot"},
        {"name": "low_rank", "strategy": "lora", "each": {"strategy::rank": [2, 4]}},
    ]
    assert keys(rows=renamed) == same
    assert not set(keys(training={"lr": 0.5})[1:]) & set(same)
    assert not set(keys(shared={"image_size": 128})) & set(same)
    (data / "datalist.json").write_text(json.dumps({"fold": 7}))
    assert not set(keys()) & set(same)


def test_a_changed_image_or_label_makes_another_run(data, runner, monkeypatch):
    for name in ("image.nii", "label.nii", "test.nii"):
        (data / name).write_bytes(b"1")
    lists = {"training": [{"case": "a", "image": ["image.nii"], "label": "label.nii"}]}
    lists["testing"] = [{"case": "b", "image": "test.nii"}]
    (data / "datalist.json").write_text(json.dumps(lists))
    plan, output = read_plan(plan_of(data, seeds=[0])), data.parent / "out"

    def statuses():
        return [one.status for one in perform(plan.runs(), output)]

    assert statuses() == ["done"] * 3
    monkeypatch.setattr(files, "_HASHES", {})  # as in a new process: nothing is read again
    with monkeypatch.context() as context:
        context.setattr(files, "hash_file", lambda path: pytest.fail(f"{path} is read again"))
        assert statuses() == ["kept"] * 3
    os.utime(data / "image.nii", (1, 1))
    assert statuses() == ["kept"] * 3  # contents decide
    (data / "label.nii").write_bytes(b"2")
    assert statuses() == ["kept", "done", "done"]  # nothing is trained in the first
    (data / "test.nii").write_bytes(b"2")
    assert statuses() == ["done"] * 3
    (data / "test.nii").write_bytes(b"1")
    assert statuses() == ["kept"] * 3  # as they were before
    times = (data / "test.nii").stat()
    (data / "test.nii").write_bytes(b"3")
    os.utime(data / "test.nii", ns=(times.st_atime_ns, times.st_mtime_ns))  # a copy that keeps size and time
    assert statuses() == ["done"] * 3
    for wrong in ('{"a": 1}', '{"a": [1e400, 1, "b"]}'):
        (output / performing.HASHES).write_text(wrong)
        with pytest.raises(BundleError, match="expected size, time and sha256 of each file; delete"):
            statuses()


def test_folders_that_tell_no_contents_count_while_no_file_is_younger(data, runner, caplog):
    (data / "test.nii").write_bytes(b"1")
    (data / "datalist.json").write_text(json.dumps({"testing": [{"case": "b", "image": "test.nii"}]}))
    plan, output = read_plan(plan_of(data, seeds=[0])), data.parent / "out"
    for one in perform(plan.runs(), output):
        record = json.loads((one.folder / "done.json").read_text())
        del record["identity"]["data"]
        (one.folder / "done.json").write_text(json.dumps(record))
        one.folder.rename(one.folder.with_name(one.folder.name.replace(one.run.key, one.run.former_keys[0])))
    [first, *_] = outcomes = perform(plan.runs(), output)
    assert {one.status for one in outcomes} == {"kept"} and first.folder.name.endswith(first.run.former_keys[0])
    [told] = [line for line in caplog.messages if "recorded no contents" in line]
    assert all(one.folder.name in told for one in outcomes)
    (first.folder / "done.json").unlink()  # one that was interrupted goes on where it was, and tells what it was of
    [again, *others] = perform(plan.runs(), output)
    assert again.status == "done" and again.folder == first.folder and {one.status for one in others} == {"kept"}
    late = time.time() + 5
    os.utime(data / "test.nii", (late, late))
    assert [one.status for one in perform(plan.runs(), output)] == ["kept", "done", "done"]
    (data / "test.nii").write_bytes(b"2")
    again = perform(plan.runs(), output)[0]
    assert again.status == "done" and again.folder != first.folder


def test_a_dry_run_names_weights_that_are_not_there(data, monkeypatch, tmp_path):
    monkeypatch.setattr("samseg_monai.sam.weights.find.weights_folders", lambda: [tmp_path])
    rows = [{"name": "zero_shot", "strategy": "zero_shot"}]
    plan = plan_of(data, rows=rows, backbones=["vit_b", "tiny_t", "tiny"])
    told = CliRunner().invoke(app, ["compare", str(plan), "--output", str(data.parent / "out"), "--dry-run"]).output
    vit_b, tiny_t = (line for line in told.splitlines() if line.startswith("! "))
    assert "vit_b: its weights are not on this machine; the first run downloads sam_vit_b_01ec64.pth (375 MB" in vit_b
    assert "'tiny_t' has no published weights: set sam_checkpoint to a file or to 'random'" in tiny_t
    # as they are known by when they are there
    [run, *_] = read_plan(plan).runs()
    assert run.identity["weights"] == "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    assert former(run.identity)[1]["weights"] == "weights of vit_b"  # as earlier versions recorded them before


def test_what_is_named_for_both_goes_to_the_config_that_has_it(data):
    rows = [{"name": "a", "strategy": "lora", "each": {"schedule::warmup": [1]}, "shared": {"lesions::dilation": 2}}]
    [job, _] = performing.jobs(read_plan(plan_of(data, rows=rows)).runs(), data.parent / "out")
    train, evaluate = job.commands["train"], job.commands["evaluate"]
    assert "schedule::warmup 1" in train and "schedule::warmup" not in evaluate
    assert "lesions::dilation 2" in evaluate and "lesions::dilation" not in train
    assert "--image_size 64" in train and "--image_size 64" in evaluate


def test_the_word_for_a_random_start_is_no_path(data):
    rows = [{"name": "a", "strategy": "ladder", "shared": {"strategy::side_weights": "random"}}]
    runs = read_plan(plan_of(data, rows=rows)).runs()
    [job, _] = performing.jobs(runs, data.parent / "out")
    assert "strategy::side_weights random" in job.commands["train"]
    assert runs[0].identity["files"] == {"strategy::side_weights": "random"}


def test_everything_wrong_in_a_plan_is_told_before_anything_runs(data, runner):
    with pytest.raises(ConfigError) as told:
        read_plan(plan_of(data, rows=[{"name": "a", "strategy": "lora", "trainig": {}}], seeds=[], nothing=1))
    for word in ("trainig: no such key; did you mean training?", "seeds: got []", "nothing: no such key"):
        assert word in str(told.value)
    with pytest.raises(
        ConfigError,
        match=r"baseline: got b; the rows are zero_shot, lora[\s\S]*under 'backbones'[\s\S]*named elsewhere",
    ):
        read_plan(plan_of(data, baseline="b", training={"output_dir": "x"}, shared={"sam_variant": "tiny"}))
    wrong = [
        {"name": "a", "strategy": "lora", "training": {"epohcs": 3}},
        {"name": "b", "strategy": "lora", "shared": {"image_size": "large"}},
    ]
    with pytest.raises(ConfigError, match=r"a: epohcs \(did you mean epochs\?\)[\s\S]*b: image_size: got 'large'"):
        perform(read_plan(plan_of(data, rows=wrong)).runs(), data.parent / "out")
    with pytest.raises(ConfigError, match=r"a: schedule::warmup: of another config of this bundle"):
        plan = plan_of(data, rows=[{"name": "a", "strategy": "lora", "evaluation": {"schedule::warmup": 3}}])
        perform(read_plan(plan).runs(), data.parent / "out")
    each = [{"name": "a", "strategy": "lora", "each": {"lr": [0.1, 0.2]}}]
    with pytest.raises(ConfigError, match=r"each: lr is set elsewhere in the plan"):
        read_plan(plan_of(data, rows=each, training={"lr": 0.3}))
    assert not runner.commands
    with pytest.raises(DataError, match=r"no such folder"):
        read_plan(plan_of(data, tasks=[{"recipe": "meningioma", "dataset_dir": "nowhere"}])).runs()
    for name in ("fold0", "fold1"):
        (data / f"{name}.json").write_text(json.dumps({"testing": [{"case": "a"}, {"case": name}]}))
    folds = [str(data / "fold0.json"), str(data / "fold1.json")]
    tasks = [{"recipe": "meningioma", "dataset_dir": "data", "datalists": folds}]
    with pytest.raises(DataError, match="1 cases are in section testing of several datalists, first a"):
        read_plan(plan_of(data, tasks=tasks)).runs()
    with pytest.raises(WeightsError, match=r"nowhere\.pth: no such file"):
        read_plan(plan_of(data, weights={"tiny": "nowhere.pth"})).runs()
    with pytest.raises(ConfigError, match="~no_such_user/x: nobody of that name"):
        read_plan(plan_of(data, tasks=[{"recipe": "meningioma", "dataset_dir": "~no_such_user/x"}]))
    with pytest.raises(DataError, match="give --dataset-dir"):
        read_plan(plan_of(data, tasks=[{"recipe": "meningioma"}])).runs()
    with pytest.raises(ConfigError, match=r"no plan 'honour'; give a \.json file, or one of costs, few_shot, honours"):
        read_plan("honour")
    with pytest.raises(ConfigError, match="loRa: no such row"):
        read_plan(plan_of(data)).runs(rows=["loRa"])


def test_what_is_there_is_kept_and_what_failed_is_tried_again(data, runner):
    plan, output = read_plan(plan_of(data)), data.parent / "out"
    runner.failing = "--strategy::rank 4"
    told = []
    outcomes = perform(plan.runs(), output, workers=2, tell=told.append)
    assert [one.status for one in outcomes] == ["done", "done", "failed", "done", "failed"]
    assert "ConfigError: no such thing" in outcomes[2].error and any("no such thing" in line for line in told)
    text = write_comparison(output, plan, outcomes)
    assert "2 runs are missing" in text and "LoRA, rank 2, mean of 2 seeds" in text and "rank 4" not in text
    with pytest.raises(BundleError, match=r"lora_rank4_seed0[\s\S]*lora_rank4_seed1"):
        performing.raise_failed(outcomes)
    before = len(runner.commands)
    runner.failing = None
    outcomes = perform(plan.runs(), output)
    assert [one.status for one in outcomes] == ["kept", "kept", "done", "kept", "done"]
    assert len(runner.commands) == before + 4
    # a training that had come to its end before the command was interrupted is not made again
    folder = outcomes[1].folder
    (folder / "done.json").unlink()
    assert [one.status for one in perform(plan.runs(), output)] == ["kept", "done", "kept", "kept", "kept"]
    assert "evaluate.json" in runner.commands[-1] and len(runner.commands) == before + 5


def test_shards_share_the_runs_and_a_folder_in_use_is_left_alone(data, runner):
    plan, output = read_plan(plan_of(data)), data.parent / "out"
    first = perform(plan.runs(), output, shard=_shard("0/2"))
    assert [one.status for one in first] == ["done", "elsewhere", "done", "elsewhere", "done"]
    second = perform(plan.runs(), output, shard=_shard("1/2"))
    assert [one.status for one in second] == ["kept", "done", "kept", "done", "kept"]
    for text in ("2/2", "a/2", "1"):
        with pytest.raises(ConfigError, match="give I/N"):
            _shard(text)
    (second[0].folder / "done.json").unlink()
    with performing._locked(second[0].folder):
        assert perform(plan.runs(), output)[0].status == "busy"


def test_numbers_of_a_row_are_means_over_seeds_paired_by_case(data, runner, monkeypatch):
    monkeypatch.chdir(data.parent)  # commands on pages are told from here
    folds = [str(data / "fold0.json"), str(data / "fold1.json")]
    tasks = [{"recipe": "meningioma", "dataset_dir": "data", "datalists": folds}]
    plan, output = read_plan(plan_of(data, tasks=tasks)), data.parent / "out"
    write_comparison(output, plan, perform(plan.runs(), output))
    found = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["tasks"]["meningioma"]
    assert found["baseline"] == "zero_shot" and found["missing"] == {}
    row, base = found["rows"]["lora_rank2"], scores("zero_shot", 0, CASES["test"])
    # the two folds draw anew for each half of the cases
    halves = [CASES["test"][:4], CASES["test"][4:]]
    seeds = [{k: v for half in halves for k, v in scores("lora", seed, half).items()} for seed in (0, 1)]
    base = {k: v for half in halves for k, v in scores("zero_shot", 0, half).items()}
    per_case = {case: statistics.mean(its[case] for its in seeds) for case in base}
    assert row["dice_mean"] == pytest.approx(statistics.mean(per_case.values()))
    assert row["dice_of_seeds"]["1"] == pytest.approx(statistics.mean(seeds[1].values()))
    assert row["dice_sd_of_seeds"] == pytest.approx(statistics.stdev(row["dice_of_seeds"].values()))
    gap = row["minus_zero_shot"]["dice"]
    assert gap["mean"] == pytest.approx(statistics.mean(per_case[c] - base[c] for c in base)) and gap["n"] == 8
    assert row["folds"] == 2 and row["validation"] == pytest.approx(0.705) and row["peak_mb"] == 2048
    assert row["minutes_training"] == pytest.approx(1.5) and found["chosen_on_validation"] == "lora_rank2"
    assert found["rows"]["zero_shot"]["dice_sd_of_seeds"] is None
    with (output / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 8 and {line["fold"] for line in lines} == {"0", "1"}
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "mean of 2 seeds" in page and str(data) not in page and "means over training seeds" in page
    latex = (output / "comparison.tex").read_text(encoding="utf-8")
    assert latex.count(r"\\") == 4 and r"\toprule" in latex and "LoRA, rank 2, mean of 2 seeds & 8 &" in latex
    head, _, *body = (output / "comparison.md").read_text(encoding="utf-8").splitlines()[2:-2]
    cells = [dict(zip(head.split(" | "), line.split(" | "), strict=True)) for line in body]
    shown = next(line for line in cells if line["| row"].startswith("| LoRA, rank 2"))
    assert shown["Dice"] == f"{row['dice_mean']:.3f}" and shown["validation"] == "0.705" and shown["seeds"] == "2"
    assert f"{gap['mean']:+.3f}" in shown.values() and shown["verdict"] == gap["verdict"]


def test_the_end_of_a_training_is_judged_by_a_line(data, runner):
    rng = np.random.default_rng(0)
    epochs = list(range(1, 31))
    rising = {epoch: 0.7 + 0.01 * epoch + 0.001 * rng.normal() for epoch in epochs}
    third = np.array(epochs[20:])
    slope, _ = np.polyfit(third, [rising[epoch] for epoch in third], 1)
    found = last_third({"val_dice": rising, "train_loss": dict.fromkeys(epochs, 0.5)})
    assert found["dice"] == pytest.approx(9 * slope) and found["loss"] == 0 and found["converged"] is False
    noisy = {epoch: 0.7 + 0.1 * rng.normal() for epoch in epochs}
    assert last_third({"val_dice": noisy})["converged"] is True
    falling = {"train_loss": {epoch: 0.5 - 0.01 * epoch for epoch in epochs}, "val_dice": {30: 0.5}}
    found = last_third(falling)
    assert found["loss"] == pytest.approx(-0.09 / np.mean([0.5 - 0.01 * epoch for epoch in third]))
    assert (found["dice"], found["converged"]) == (None, False)
    nothing = {"dice": None, "loss": None, "converged": None}
    assert last_third({"train_loss": {1: 0.5, 2: 0.4}}) == last_third({}) == nothing


def test_rows_of_several_numbers_of_training_cases_are_a_curve(data, runner):
    rows = [
        {"name": "zero_shot", "strategy": "zero_shot"},
        {"name": "lora", "strategy": "lora", "each": {"training_cases": [1, 5, None], "strategy::rank": [2]}},
    ]
    plan, output = read_plan(plan_of(data, rows=rows)), data.parent / "out"
    text = write_comparison(output, plan, perform(plan.runs(), output))
    found = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["tasks"]["meningioma"]
    assert [(one["row"], one["n"]) for one in found["curve"]] == [("lora_rank2", n) for n in (1, 5, 20)]
    row = found["rows"]["lora_training_casesall_rank2"]
    assert found["curve"][2]["mean"] == pytest.approx(statistics.mean(row["dice_of_seeds"].values()))
    assert found["curve"][2]["sd"] == row["dice_sd_of_seeds"] and row["training_cases"] == 20
    assert [one["converged"] for one in row["ends"]] == [False, False]
    assert row["ends"][1]["dice"] == pytest.approx(0.2) and "no, +0.200" in text


def test_folds_may_share_no_case(data, runner):
    plan, output = read_plan(plan_of(data)), data.parent / "out"
    outcomes = perform(plan.runs(), output)
    results = [RunResult.load(one.folder / "evaluation", name="lora") for one in outcomes[1:3]]
    with pytest.raises(DataError, match="8 cases are tested in several folds"):
        pooled("lora", None, {(0, 0): results[0], (0, 1): results[1]})


def test_shares_of_ranks_are_those_of_a_bootstrap(data, runner):
    plan, output = read_plan(plan_of(data)), data.parent / "out"
    outcomes = perform(plan.runs(), output)
    results = {one.run: RunResult.load(one.folder / "evaluation", name=one.run.group) for one in outcomes}
    from samseg_monai.comparison.results import rows_of

    rows = rows_of(results)
    shares = rank_shares(rows, draws=300)
    assert shares == rank_shares(rows, draws=300)
    assert [sum(its) for its in shares.values()] == pytest.approx([1, 1, 1])
    assert shares["zero_shot"][2] == 1.0  # far below the others in every draw
    assert sum(its[0] for its in shares.values()) >= 1
    assert rank_shares([rows[0]]) == {"zero_shot": [1.0]}
    assert all(math.isfinite(row.spread) for row in rows[1:]) and math.isnan(rows[0].spread)


def test_the_plan_of_costs_has_every_strategy_of_sam_that_trains(data):
    rows = {row.strategy for row in read_plan("costs").rows}
    others = {"zero_shot", "bias", "norm", "ladder"}  # the last three cost what attention and ladder_paper do
    assert {*list_strategies()} - others <= rows
    sizes = {run.training["batch_size"] * getattr(run.settings.strategy.method, "depth", 1)
             for run in read_plan("costs").runs(dataset_dir=data) if run.settings.has_sam}  # fmt: skip
    assert sizes == {12}


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.json")))
def test_plans_of_the_package_can_be_run_as_they_are(name, data, tmp_path):
    assert name in plan_names()
    plan = read_plan(name)
    found = performing.jobs(plan.runs(dataset_dir=data), tmp_path / "out")
    assert found and plan.text and all(f"--seed {plan.seeds[0]}" in one.commands["evaluate"] for one in found[:1])
    places = [value for run in plan.runs(dataset_dir=data) for key, value in run.training.items() if "dir" in key]
    assert set(places) <= {"embeddings"}  # of the current folder, not of the package


def test_the_honours_plan_has_each_scan_alone(data):
    """Its figure 6: zero-shot and LoRA on t1n, t1c, t2w and t2f, beside the rows of all four."""
    runs = {run.group: run for run in read_plan("honours").runs(dataset_dir=data)}
    for row, beside in (("zero_shot_alone", "zero_shot"), ("lora_alone", "lora_rank64")):
        alone = [run for name, run in runs.items() if run.row.name == row]
        assert [run.shared["scans"] for run in alone] == [[scan] for scan in runs[beside].settings.task.scans]
        assert all(run.title and run.title.endswith(f"scans {run.shared['scans'][0]}") for run in alone)
    assert alone[0].settings.trains and "strategy::rank" in alone[0].shared


def test_the_command_lists_and_performs(data, runner):
    """It begins with what the plan says of itself, such as how its data have to be prepared."""
    plan = plan_of(data, text=["Prepare the data with --validation 0."])
    words = ["compare", str(plan), "--output", str(data.parent / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Ranks: 5 runs" in done.output and "  Prepare the data with --validation 0.\n" in done.output
    assert "Dice minus zero-shot" in done.output
    runner.failing = "--strategy::rank 4"
    (data / "datalist.json").write_text(json.dumps({"fold": 9}))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "runs are missing in the table" in str(done.exception)


@pytest.mark.whole
@pytest.mark.parametrize("where", ["threads", "ray"])
def test_real_runs_are_compared(where, phantoms, tmp_path):
    if where == "ray":
        pytest.importorskip("ray")
    sizes = {"image_size": 64, "crop_size": [32, 36]}
    rows = [
        {"name": "zero_shot", "strategy": "zero_shot"},
        {"name": "lora", "strategy": "lora", "shared": {"strategy::rank": 2}, "training": {"epochs": 1}},
    ]
    tasks = [{"recipe": "meningioma", "dataset_dir": str(phantoms)}]
    plan_file = tmp_path / "plan.json"
    plan = {"tasks": tasks, "rows": rows, "shared": sizes, "backbones": ["tiny"], "weights": {"tiny": "random"}}
    plan_file.write_text(json.dumps(plan))
    plan, output = read_plan(plan_file), tmp_path / "out"
    outcomes = perform(plan.runs(), output, workers=2, ray_address="local" if where == "ray" else None)
    assert [(one.status, one.error) for one in outcomes] == [("done", "")] * 2
    write_comparison(output, plan, outcomes, figures_dir=tmp_path / "figures")
    found = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["tasks"]["meningioma"]["rows"]
    assert found["lora"]["n"] == 2 and found["lora"]["minus_zero_shot"]["dice"]["verdict"] == "too few cases"
    assert Path(output, "report.html").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"cases.svg", "ranks.png", "agreement.svg"}
    assert [one.status for one in perform(plan.runs(), output)] == ["kept", "kept"]


@pytest.mark.whole
def test_the_lines_of_a_page_make_it_again_from_the_data_on(phantoms, tmp_path):
    data, plan_file, output = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "plan.json", tmp_path / "out"
    words = ["prepare", "brats-men", "--src", data, "--output", data / "datalist.json", "--fractions", "0.5,0.25,0.25"]
    app([str(word) for word in [*words, "--seed", "4"]], standalone_mode=False)
    row = {"name": "lora", "strategy": "lora", "shared": {"strategy::rank": 2}, "training": {"epochs": 1}}
    plan = {"tasks": [{"recipe": "meningioma", "dataset_dir": str(data)}], "backbones": ["tiny"], "rows": [row]}
    plan |= {"weights": {"tiny": "random"}, "shared": {"image_size": 64, "crop_size": [32, 36]}}
    plan_file.write_text(json.dumps({**plan, "evaluation": {"save_predictions": True}}))
    app(["compare", str(plan_file), "--output", str(output)], standalone_mode=False)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="viewer">') == 2
    lines = [html.unescape(line) for line in re.findall(r"<code>(.*?)</code>", page) if not line.startswith("#")]
    told = [" ".join(line.split()[:2]) for line in lines]
    assert told == ["samseg prepare", "samseg bundle", "python -m", "python -m", "samseg compare"]
    datalist, results = (data / "datalist.json").read_bytes(), (output / "cases.csv").read_bytes()
    (data / "datalist.json").unlink()
    shutil.rmtree(output)
    for line in lines:
        words = [sys.executable, "-m", "samseg_monai"] if line.startswith("samseg") else [sys.executable]
        subprocess.run([*words, *shlex.split(line)[1:]], check=True, capture_output=True)
    assert (data / "datalist.json").read_bytes() == datalist
    assert (output / "cases.csv").read_bytes() == results


@pytest.mark.parametrize("more", [["--validation", "0"], ["--validation", "2", "--seed", "5"]])
def test_the_line_that_prepares_synapse_draws_the_split_that_was_used(more, tmp_path):
    """The recipe's own line takes three patients out, where SAM-LST and SAMed train on all 18."""
    data = tmp_path / "the data"
    app(["phantom", "btcv", "--cases", "10", "--shape", "40,32,16", "--output", str(data)], standalone_mode=False)
    words = ["prepare", "synapse", "--src", str(data), "--output", str(data / "datalist.json"), "--allow-missing"]
    app([*words, *more], standalone_mode=False)
    before = (data / "datalist.json").read_bytes()
    recipe = "samseg prepare synapse --src data/synapse --output data/synapse/datalist.json --validation 3"
    line, told = prepare_lines([recipe], data, [data / "datalist.json"])
    assert told.endswith(files.hash_file(data / "datalist.json")) and line.count("--validation") == 1
    (data / "datalist.json").unlink()
    app([*shlex.split(line)[1:], "--allow-missing"], standalone_mode=False)
    assert (data / "datalist.json").read_bytes() == before


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ({"by": "file", "file": "my split.json"}, "--split-file 'my split.json'"),
        ({"by": "volume", "order": "name", "fractions": [0.5, 0.25, 0.25]}, "--fractions 0.5,0.25,0.25 --by-name"),
        ({"by": "volume", "order": "name", "counts": [3, 1, 2]}, "--split 3,1,2"),
        (
            {"by": "volume", "fractions": [0.6, 0.2, 0.2], "seed": 3},
            "--fractions 0.6,0.2,0.2 --seed 3",
        ),
    ],
)
def test_other_splits_are_told_by_the_options_that_make_them(split, options, tmp_path):
    (tmp_path / "datalist.json").write_text(json.dumps({"split": split, "label_coding": "own"}))
    [line, _] = prepare_lines(["samseg prepare folders --src data/own"], tmp_path, [tmp_path / "datalist.json"])
    assert line == f"samseg prepare folders --src {tmp_path} {options}"


def test_rows_that_a_table_cannot_tell_apart_are_refused(data):
    rows = [
        {"name": "lora", "strategy": "lora", "each": {"strategy::rank": [2, 4]}},
        {"name": "lora_rank2", "strategy": "lora", "shared": {"strategy::rank": 2, "batch_size": 2}},
    ]
    for changes in ({"rows": rows}, {"seeds": [0, 0]}, {"backbones": ["tiny", "tiny"]}):
        with pytest.raises(ConfigError, match="cannot tell these runs apart"):
            read_plan(plan_of(data, **changes)).runs()


def test_a_row_that_is_called_otherwise_is_not_run_again(data, runner):
    output = data.parent / "out"
    perform(read_plan(plan_of(data)).runs(), output)
    count = len(runner.commands)
    rows = [{"name": "ladders", "strategy": "lora", "each": {"strategy::rank": [2, 4]}}]
    outcomes = perform(read_plan(plan_of(data, rows=rows)).runs(), output)
    assert {one.status for one in outcomes} == {"kept"} and len(runner.commands) == count


def interrupted(folder: Path, found: list[performing.Job]) -> None:
    """A command of a group of its own, with two long trainings at a time."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    performing.jobs = lambda runs, output: found
    performing._gpus = list
    with pytest.raises(KeyboardInterrupt):
        performing.perform([None] * len(found), folder, workers=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a command")
def test_an_interrupted_command_leaves_no_process_and_folders_that_go_on(tmp_path):
    sleep = "python -c 'import time; print(1, flush=True); time.sleep(60)'"
    found = [performing.Job(n, str(tmp_path / n), {"train": sleep}, {}, {"n": n}) for n in ("a", "b", "c")]
    command = multiprocessing.get_context("fork").Process(target=interrupted, args=(tmp_path, found))
    command.start()
    logs = [tmp_path / name / "log.txt" for name in ("a", "b")]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and "\n1" in log.read_text(encoding="utf-8") for log in logs):
        assert command.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(command.pid, signal.SIGINT)  # the command alone: it has to end the others
    command.join(30)
    assert command.exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pid, 0)  # nobody of its group is left
    assert not (tmp_path / "c").exists()  # has not begun
    for log in logs:
        assert not (log.parent / "done.json").exists()
        with performing._locked(log.parent) as lock:
            assert lock is not None


def test_latex_knows_its_own_signs():
    assert _escaped('<a> "b" 5 %_|') == r"\textless{}a\textgreater{} ''b'' 5 \%\_\textbar{}"


def test_a_process_that_outlives_the_command_keeps_its_folder(tmp_path):
    processes = []
    with performing._locked(tmp_path) as lock:
        command = "python -c 'input()'"
        code = performing._run(f"{command} x", tmp_path / "log.txt", 1, None, processes.append, lock)
        assert code and len(processes) == 1  # nothing to read
        sleeping = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    with performing._locked(tmp_path) as lock:
        assert lock is None
    sleeping.communicate(b"\n")
    with performing._locked(tmp_path) as lock:
        assert lock is not None
