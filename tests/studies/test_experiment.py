"""The meningioma experiment: inputs, plan, runner, statistics, table and figures, on made-up rows of slices."""

import csv
import html
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from samseg_monai.bundles import build_bundle
from samseg_monai.bundles.build import recipe_names
from samseg_monai.comparison import read_plan
from samseg_monai.data.datalists import load_datalist
from samseg_monai.errors import ConfigError, DataError, TrainingError
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

HERE = Path(__file__).parents[2] / "experiments" / "meningioma_t1c"
sys.path.insert(0, str(HERE))
make_inputs, plans, records, run, table, figures, pages = map(
    importlib.import_module, ("make_inputs", "plan", "records", "run", "table", "figures", "pages")
)
PLAN, FOLDS = plans.read("plan.json"), plans.read("folds.json")
SIZES = {"meningioma": 77, "glioma": 74, "pituitary": 36}


# inputs


def test_every_slice_is_tested_once_and_blocks_stay_whole():
    blocks = FOLDS["blocks"]
    assert sorted(map(len, blocks.values()), reverse=True) == [21, 15, 14, 13, 5, 3, 3, 2, 1]
    home = {case: name for name, cases in blocks.items() for case in cases}
    tested = [case for fold in FOLDS["folds"] for case in fold["testing"]]
    assert sorted(tested) == sorted(home) and len(tested) == 77
    for fold in FOLDS["folds"]:
        assert 18 <= len(fold["testing"]) <= 21 and 9 <= len(fold["validation"]) <= 11
        of = [{home[case] for case in fold[section]} for section in ("training", "validation", "testing")]
        assert len(of[0] | of[1] | of[2]) == sum(map(len, of)) == 9
        assert len(of[1]) >= 3


def test_blocks_begin_where_ids_grow_by_more_than_twelve():
    blocks = make_inputs.blocks_of(["m_0040", "m_0001", "m_0013", "m_0026"])
    assert blocks == [["m_0001", "m_0013"], ["m_0026"], ["m_0040"]]


def test_folds_are_the_evenest_that_whole_blocks_allow():
    sizes = [8, 4, 4, 3, 3, 2]
    folds = make_inputs.fold_indices(sizes)
    # the largest stays alone; the 16 others in three parts: 4, 4 + 2 and 3 + 3
    assert sorted(sum(sizes[i] for i in fold["testing"]) for fold in folds) == [4, 6, 6, 8]


@pytest.mark.parametrize("kind", SIZES)
def test_box_files_follow_their_laws(kind):
    prefix = "" if kind == "meningioma" else f"{kind}_"
    tight, loose, unseen = (plans.read(f"boxes/{prefix}{law}.json") for law in ("tight", "loose", "unseen"))
    assert len(tight) == SIZES[kind] and list(tight) == sorted(tight) == list(loose) == list(unseen)
    moved = []
    for case, ((x0, y0, x1, y1),) in tight.items():
        width, height = x1 - x0, y1 - y0
        for boxes, least, most in ((loose, 0.0, 0.3), (unseen, -0.13, 0.28)):
            a, b, c, d = boxes[case][0]
            outwards = np.array([(x0 - a) / width, (y0 - b) / height, (c - x1) / width, (d - y1) / height])
            assert (outwards >= least - 0.001).all() and (outwards <= most + 0.001).all()
            assert min(a, b) >= 0 and max(c, d) <= 512
            moved.append((boxes is loose, outwards.mean()))
    assert np.mean([m for of_loose, m in moved if of_loose]) == pytest.approx(0.15, abs=0.02)
    assert np.mean([m for of_loose, m in moved if not of_loose]) == pytest.approx(0.075, abs=0.02)


def test_the_drawn_box_hangs_on_law_and_case_alone_and_stays_in_the_image():
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[30:40, 50:60] = 255
    box = make_inputs.tight_box(mask)
    assert box == [50, 30, 60, 40]
    assert make_inputs.drawn_box(box, mask.shape, "tight", "m_1") == box
    first = make_inputs.drawn_box(box, mask.shape, "loose", "m_1")
    assert first == make_inputs.drawn_box(box, mask.shape, "loose", "m_1")
    assert first != make_inputs.drawn_box(box, mask.shape, "loose", "m_2")
    assert first[2:] == [60, 40] and 47 <= first[0] <= 50


def test_the_shrunken_box_undoes_the_mean_enlargement():
    shrink = next(row for row in PLAN["rows"] if row["name"] == "zero_shot_shrunk_1024")["overrides"]["prompt::shrink"]
    assert 1.3 * (1 - 2 * shrink) == pytest.approx(1, abs=0.001)


@pytest.mark.realdata
def test_committed_inputs_are_what_the_data_give(realdata):
    for name, content in make_inputs.inputs(realdata / "brain_tumour_t1c").items():
        assert (HERE / name).read_text(encoding="utf-8") == make_inputs.as_text(content) + "\n", name


# plan


def test_the_plan_expands_to_runs_with_the_first_seeds_first():
    runs = plans.runs_of(PLAN)
    assert len({one.file for one in runs}) == len(runs)
    assert [one.seed for one in runs] == sorted(one.seed for one in runs)
    rows = {row["name"]: row for row in PLAN["rows"]}
    assert set(PLAN["primary"]["candidates"]) == {n for n, row in rows.items() if row["role"] == "fine-tuned"}
    assert all(rows[name]["role"] == "zero-shot" for name in PLAN["primary"]["baselines"])
    for name, row in rows.items():
        assert ("training" in row) == (row["role"] != "zero-shot"), name
        assert set(row["folds"]) >= {0, 1, 2, 3} or row["role"] in ("curve", "one fold")
        assert row["role"] != "later" or row["seeds"] == [0, 1, 2]
    assert all(rows[name]["seeds"] == [0, 1, 2] for name in ("decoder_512", "decoder_1024", "lora_r64"))


def test_two_rates_are_tried_for_each_row_that_learns_and_see_no_test_slice():
    tries = plans.searches_of(PLAN)
    for row in PLAN["rows"]:
        if "training" in row and row["role"] != "curve":
            rates = {one.training["lr"] for one in tries if one.row["name"] == row["name"]}
            assert len(rates) == 2 and row["training"]["lr"] in rates
    for one in tries:
        assert one.fold == 0 and one.file.startswith("search/")
        assert {section for section, _, _ in plans.evaluations_of(PLAN, one)} == {"validation"}


def test_evaluations_of_a_run():
    rows = {row["name"]: row for row in PLAN["rows"]}

    def of(name, fold=0):
        training = {"epochs": 1} if "training" in rows[name] else {}
        return list(plans.evaluations_of(PLAN, plans.Run(rows[name], fold, 0, name, training)))

    assert of("zero_shot_512") == [
        ("validation", "loose", "none"), *(("testing", law, "none") for law in ("tight", "loose", "unseen"))
    ]  # fmt: skip
    assert len(of("lora_r4")) == 7 and ("testing", "unseen", "last") in of("lora_r4")
    assert of("unet") == [("validation", "none", "best"), ("testing", "none", "best"), ("testing", "none", "last")]
    assert [weights for _, _, weights in of("lora_r4", "all")] == ["last"] * 3


def test_the_fold_of_all_trains_on_meningioma_and_tests_the_others(tmp_path):
    sections = plans.sections_of("all")
    assert len(sections["training"]) == 77 and not sections["validation"] and len(sections["testing"]) == 74 + 36
    row = {**PLAN["rows"][6], "final": {"epochs": 5}, "folds": ["all"]}
    (whole,) = (one for one in plans.runs_of({**PLAN, "rows": [row]}) if one.seed == 0)
    assert whole.training["epochs"] == 5 and whole.training["val_interval"] == 0
    listed = json.loads(plans.write_inputs(tmp_path, "all").read_text())
    assert len(listed["testing"]) == 110
    assert len(json.loads(plans.box_file(tmp_path, "loose").read_text())) == 187


@pytest.mark.parametrize("row", PLAN["rows"], ids=lambda row: row["name"])
def test_every_setting_of_the_plan_replaces_something(row, tmp_path):
    from monai.bundle import ConfigParser

    if PLAN["task"] not in recipe_names("tasks") or row["strategy"] not in recipe_names("strategies"):
        pytest.skip("recipe not there")
    root = build_bundle(PLAN["task"], row["strategy"], tmp_path)
    one = plans.Run(row, row["folds"][0], 0, row["name"], row.get("training", {}))
    shared = {*plans.overrides_of(PLAN, one), "dataset_dir", "datalist", "output_dir"}
    given = {"prompt::source", "prompt::boxes"} if one.prompted else set()
    needed = {"evaluate": {*shared, *given, "section", "results_dir", "save_predictions", "checkpoint"}}
    if one.training:
        needed["train"] = {*shared, *given, *PLAN["training"], *row["training"]}
    for name, keys in needed.items():
        files = ["inference", "evaluate"] if name == "evaluate" else [name]
        parser = ConfigParser(ConfigParser.load_config_files([root / "configs" / f"{n}.json" for n in files]))
        assert not [key for key in sorted(keys) if key not in parser], name


# statistics


def test_the_t_interval_is_the_textbooks():
    # t(0.975, 2) = 4.302653; mean 2, sd 1, n 3
    one = table.t_interval([1.0, 2.0, 3.0])
    half = 4.302653 / np.sqrt(3)
    assert (one.n, one.mean) == (3, 2.0)
    assert (one.low, one.high) == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))
    assert one.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).pvalue)
    assert np.isnan(table.t_interval([0.5]).low)
    assert table.t_interval([0.0, 0.0]).p == 1 and table.t_interval([0.1, 0.1]).p == 0


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, then never below what came before
    assert table.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert table.holm([0.5, 0.9]) == [1.0, 1.0]
    assert table.holm([]) == []


def test_the_interval_of_blocks_covers_and_that_of_slices_does_not():
    """Slices share a shift per block (sd 0.04), with noise of their own (sd 0.02): 95 % must be 95 %."""
    rng = np.random.default_rng(0)
    blocks = {case: name for name, cases in FOLDS["blocks"].items() for case in cases}
    covered, narrow, draws = 0, 0, 600
    for _ in range(draws):
        shift = {name: rng.normal(0, 0.04) for name in FOLDS["blocks"]}
        values = {case: shift[name] + rng.normal(0, 0.02) for case, name in blocks.items()}
        of_blocks = table.t_interval(table.block_means(values, blocks))
        of_slices = table.t_interval(list(values.values()))
        covered += of_blocks.low <= 0 <= of_blocks.high
        narrow += of_slices.low <= 0 <= of_slices.high
    assert covered / draws == pytest.approx(0.95, abs=0.03)
    assert narrow / draws < 0.7


def test_block_means_leave_out_what_has_no_value():
    values, blocks = {"a": 1.0, "b": 3.0, "c": 5.0, "d": np.nan}, {"a": "2", "b": "2", "c": "1", "d": "1"}
    assert table.block_means(values, blocks) == [5.0, 2.0]


# runner

LAW_PENALTY = {"tight": 0.0, "loose": 0.04, "unseen": 0.03, "none": 0.05}
GAIN = {"zero-shot": 0.0, "fine-tuned": 0.05, "without SAM": -0.04, "curve": 0.05, "one fold": 0.03, "later": 0.04}


def fake_rows(one, rng):
    """Rows of slices of a run as the runner writes them: a Dice that hangs on role, law and block."""
    blocks, rows = plans.block_names(), []
    for section, law, weights in plans.evaluations_of(PLAN, one):
        for case in plans.sections_of(one.fold)[section]:
            shift = (int(blocks.get(case, "0")) % 7) / 150
            dice = 0.9 + GAIN[one.row["role"]] - LAW_PENALTY[law] - shift + rng.normal(0, 0.008)
            scores = {"dice": round(dice, 5), "hd95_px": 5.0, "nsd_1px": 0.5, "nsd_2px": 0.7, "empty_prediction": False}
            beside = {"ellipse_dice": 0.75, "ellipse_hd95_px": 20.0} if weights == "none" and one.prompted else {}
            rows.append({"row": one.name, "fold": one.fold, "seed": one.seed, "case": case,
                         "block": blocks.get(case, case), "section": section, "boxes": law, "weights": weights,
                         **scores, **beside})  # fmt: skip
    return rows


def fake_facts(one):
    epochs = one.training.get("epochs", 0)
    rank = one.row["overrides"].get("strategy::rank", 8)
    curves = {
        "train_loss": {str(e): 0.1 + 0.3 / e / rank**0.3 + 0.01 * int(one.fold) for e in range(1, epochs + 1)},
        "val_loss": {str(e): 0.16 + 0.2 / e + 0.001 * e for e in range(1, epochs + 1)},
    }
    return {"row": one.name, "fold": one.fold, "seed": one.seed, "settings": plans.settings_of(PLAN, one),
            "minutes": 3.0, "trainable_parameters": 1000,
            "epochs": epochs, "best": {"metric": 0.9, "epoch": epochs // 2}, "history": curves}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of results of all runs of the folds."""
    folder, rng = tmp_path_factory.mktemp("results"), np.random.default_rng(0)
    for one in plans.runs_of(PLAN):
        if one.fold != "all":
            records.write(fake_rows(one, rng), fake_facts(one), folder / f"{one.file}.csv")
    return folder


def fake_workflow(calls):
    """Stands in for ``monai.bundle run``: notes the call and writes the files that the runner reads."""

    def workflow(configs, overrides):
        name, folder = Path(configs[0]).stem, Path(overrides["output_dir"])
        calls.append((name, overrides))
        results = Path(overrides.get("results_dir", folder))
        results.mkdir(parents=True, exist_ok=True)
        card = {"status": "completed", "seconds": 60.0, "trainable_parameters": 7, "best": {"metric": 0.9, "epoch": 2}}
        (results / "run_card.json").write_text(json.dumps(card))
        if name == "train":
            text = "epoch,iteration,name,value\n1,48,train_loss,0.5\n1,48,val_dice,0.8\n1,48,gate,1.0\n"
            (folder / "history.csv").write_text(text)
            return
        cases = json.loads(Path(overrides["datalist"]).read_text())[overrides["section"]]
        for file in ("cases.csv", "ellipse_cases.csv"):
            with (results / file).open("w", newline="") as stream:
                writer = csv.writer(stream)
                flags = ["excluded", "empty_prediction", "empty_reference"]
                writer.writerow(["case", "class", "dice", "hd95_px", "nsd_1px", "nsd_2px", *flags])
                writer.writerows([[item["case"], "tumour", 0.9, 3.0, 0.5, 0.6, *[False] * 3] for item in cases])

    return workflow


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """The runner with bundles and workflows faked: calls noted in ``calls``; returns the exit's text."""
    calls = []
    monkeypatch.setattr(run, "run_workflow", fake_workflow(calls))
    monkeypatch.setattr(run, "build_bundle", lambda task, strategy, out: Path(out) / strategy)

    def start(*arguments):
        places = ["--data", "data", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        with pytest.raises(SystemExit) as exit_info:
            run.main([*places, *arguments])
        return exit_info.value.code

    start.calls, start.results = calls, tmp_path / "results"
    return start


def test_the_runner_writes_each_run_and_skips_what_is_there(runner):
    assert runner("--rows", "lora_r16", "zero_shot_512") is None
    files = sorted(path.name for path in runner.results.glob("*.csv"))
    assert files == sorted([*(f"lora_r16_fold{k}_seed0.csv" for k in range(4)),
                            *(f"zero_shot_512_fold{k}_seed0.csv" for k in (0, 1, 2, 3, "all"))])  # fmt: skip
    trained = [overrides for name, overrides in runner.calls if name == "train"]
    assert len(trained) == 4 and trained[0]["strategy::rank"] == 16 and trained[0]["keep_last"] is True
    assert trained[0]["sam_variant"] == "vit_t" and trained[0]["prompt::loosen"] == [0.0, 0.3]
    rows = [
        row
        for row in records.read(runner.results).to_dict("records")
        if (row["row"], row["section"]) == ("lora_r16", "testing")
    ]
    assert len(rows) == 77 * 3 * 2 and {row["block"] for row in rows} == set(FOLDS["blocks"])
    facts = next(one for one in records.read_facts(runner.results) if one["row"] == "lora_r16")
    assert facts["history"] == {"train_loss": {"1": 0.5}, "val_dice": {"1": 0.8}} and facts["seconds"] == 60
    assert facts["settings"]["strategy::rank"] == 16 and not plans.outdated(PLAN, [facts])
    assert "best" not in next(one for one in records.read_facts(runner.results) if one["row"] == "zero_shot_512")
    runner.calls.clear()
    (runner.results / "lora_r16_fold2_seed0.csv").unlink()
    assert runner("--rows", "lora_r16", "zero_shot_512") is None
    # trained already: its folder says so, and only the evaluations are done again
    assert [name for name, _ in runner.calls] == ["evaluate"] * 7


def test_a_finished_training_of_another_plan_is_not_taken_for_this_plans(runner):
    runner("--rows", "unet", "--shard", "0/4")
    (runner.results / "unet_fold0_seed0.csv").unlink()
    card = runner.results.parent / "work" / "runs" / "unet_fold0_seed0" / "run_card.json"
    card.write_text(json.dumps({"status": "completed", "settings": {"lr": 0.02, "image_size": 256, "epochs": 40}}))
    runner.calls.clear()
    text = runner("--rows", "unet", "--shard", "0/4")
    assert "lr: 0.02 there, 0.001 in the plan" in text and "epochs" not in text
    assert not runner.calls and not (runner.results / "unet_fold0_seed0.csv").is_file()


def test_last_and_best_weights_come_from_their_own_folders(runner):
    runner("--rows", "unet_box", "--shard", "0/4")
    by_results = {Path(o["results_dir"]).name: o.get("checkpoint", "") for n, o in runner.calls if n == "evaluate"}
    assert by_results["testing_loose_last"].endswith("last") and not by_results["testing_loose_best"]
    assert all("sam_checkpoint" not in overrides for _, overrides in runner.calls)


def test_shards_share_the_runs_and_tries_go_elsewhere(runner):
    assert not runner("--rows", "unet", "--shard", "0/2") and not runner("--rows", "unet", "--shard", "1/2")
    assert len([name for name, _ in runner.calls if name == "train"]) == 4
    assert not any("prompt::boxes" in overrides for _, overrides in runner.calls)
    runner("--rows", "unet", "--search")
    found = sorted(path.name for path in (runner.results / "search").glob("*.csv"))
    assert found == ["unet_lr0.001_fold0_seed0.csv", "unet_lr0.003_fold0_seed0.csv"]
    assert len(records.read(runner.results)) == 77 * 2 + sum(len(fold["validation"]) for fold in FOLDS["folds"])
    assert table.rates(runner.results).splitlines()[0].split() == ["unet_lr0.001", "best", "0.9000"]


def test_a_run_that_fails_is_named_and_the_others_go_on(runner, monkeypatch):
    def failing(configs, overrides):
        if "fold1" in overrides["output_dir"]:
            raise TrainingError("loss is not a number")
        fake_workflow(runner.calls)(configs, overrides)

    monkeypatch.setattr(run, "run_workflow", failing)
    assert runner("--rows", "unet") == "unet_fold1_seed0: loss is not a number"
    assert len(list(runner.results.glob("*.csv"))) == 3
    with pytest.raises(ConfigError, match="lora_r5"):
        run.main(["--data", "data", "--rows", "lora_r5"])


def test_a_training_keeps_its_last_adapter_beside_the_best(phantoms, tmp_path, monkeypatch):
    """With a metric that falls from epoch to epoch the best adapter is the first epoch's, the other the last one's."""
    root = build_bundle("meningioma", "lora", tmp_path / "bundles")
    falling = {1: 0.9, 2: 0.5}
    monkeypatch.setattr("samseg_monai.handlers.keeping.metric_value", lambda engine, *_: falling[engine.state.epoch])
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path / "run"), "strategy::rank": 2}
    training = {"epochs": 2, "val_interval": 1, "keep_last": True}
    run_workflow([root / "configs" / "train.json"], {**overrides, **training})
    best, last = (json.loads((tmp_path / "run" / place / "card.json").read_text()) for place in (".", "last"))
    assert (best["metrics"]["epoch"], last["metrics"]["epoch"]) == (1, 2)
    assert best["adapter_sha256"] != last["adapter_sha256"]
    where = {"checkpoint": str(tmp_path / "run" / "last"), "results_dir": str(tmp_path / "results")}
    run_workflow([root / "configs" / "evaluate.json"], {**overrides, **where})
    assert (tmp_path / "results" / "cases.csv").is_file()


@pytest.mark.realdata
def test_a_folds_datalist_finds_the_files(realdata, tmp_path):
    path = plans.write_inputs(tmp_path, 1)
    items = load_datalist(path, realdata / "brain_tumour_t1c", "testing")
    assert [item["case"] for item in items] == FOLDS["folds"][1]["testing"]


# table


def test_the_table_of_made_up_rows(finished):
    table.main(["--results", str(finished)])
    content, text = json.loads((finished / "table.json").read_text()), (finished / "table.md").read_text()
    lines = {line["row"]: line for line in content["rows"]}
    assert set(lines) == {row["name"] for row in PLAN["rows"] if row["role"] in table.ROLES} | {"inscribed_ellipse"}
    assert all(line["slices"] == 77 for line in lines.values())
    rows = [
        row for row in records.read(finished).to_dict("records") if (row["row"], row["boxes"]) == ("lora_r16", "loose")
    ]
    best = [row["dice"] for row in rows if row["section"] == "testing" and row["weights"] == "best"]
    assert lines["lora_r16"]["dice_loose"] == pytest.approx(np.mean(best))
    assert lines["lora_r16"]["blocks_loose"]["n"] == 9
    by_block = [np.mean([r["dice"] for r in rows if r["block"] == b and (r["section"], r["weights"]) ==
                         ("testing", "best")]) for b in FOLDS["blocks"]]  # fmt: skip
    expected = stats.t.interval(0.95, 8, np.mean(by_block), stats.sem(by_block))
    assert [lines["lora_r16"]["blocks_loose"][k] for k in ("low", "high")] == pytest.approx(expected)
    assert lines["lora_r64"]["seeds"] == 3 and 0 < lines["lora_r64"]["sd_of_seeds"] < 0.01
    assert lines["unet"]["dice_tight"] == lines["unet"]["dice_loose"]
    assert lines["inscribed_ellipse"]["dice_loose"] == pytest.approx(0.75)
    assert lines["lora_r16"]["minutes_per_run"] == 3 and lines["lora_r16"]["empty_loose"] == 0
    compared = content["comparisons"]
    assert compared["chosen"] in PLAN["primary"]["candidates"]
    assert compared["baseline"] in PLAN["primary"]["baselines"]
    assert compared["primary"]["mean"] == pytest.approx(0.05, abs=0.01) and compared["primary"]["n"] == 9
    assert list(compared["criteria"].values()) == [lines[compared["chosen"]]["dice_loose"] >= 0.92, True, True]
    assert all(one["p_holm"] >= one["p"] for one in compared["exploratory"])
    pairs = [(one["row"], one["minus"], one["boxes"]) for one in compared["exploratory"]]
    assert len(set(pairs)) == len(pairs) and ("lora_r64", "lora_r4", "loose") in pairs
    assert (compared["chosen"], "zero_shot_shrunk_1024", "loose") in pairs
    assert "Primary comparison" in text and "LoRA rank 64" in text and "nan" not in text


def test_the_row_and_the_baseline_are_chosen_by_validation_not_by_test(finished, tmp_path):
    rows = records.read(finished)
    validation, favoured = rows["section"] == "validation", rows["row"].isin(("lora_r64", "zero_shot_1024"))
    rows.loc[validation, "dice"] = 0.5 + 0.3 * rows["row"].isin(("full", "zero_shot_512"))[validation]
    rows.loc[~validation & favoured, "dice"] = (rows["dice"] + 0.02).clip(upper=1.0)
    compared = table.comparisons(table.Results(rows, [], PLAN))
    assert (compared["chosen"], compared["baseline"]) == ("full", "zero_shot_512")
    assert compared["best_baseline_on_test"] == "zero_shot_1024"
    gain = compared["gains"]
    assert gain["zero_shot_512"] == pytest.approx(gain["zero_shot_1024"] + 0.02, abs=0.005)
    # 0.05 above what validation chose, 0.03 above the other, which decides
    assert list(compared["criteria"].values())[1] == (gain["zero_shot_1024"] >= 0.03)


def test_results_of_another_plan_are_refused(finished, tmp_path):
    for path in finished.glob("lora_r16_fold0_seed0.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table.build(tmp_path)
    facts = json.loads((tmp_path / "lora_r16_fold0_seed0.json").read_text())
    facts["settings"]["lr"] = 1.0
    (tmp_path / "lora_r16_fold0_seed0.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="lora_r16_fold0_seed0"):
        table.build(tmp_path)


def test_rows_that_lack_slices_take_no_part(finished):
    rows = records.read(finished)
    rows = rows[~((rows["row"] == "full") & (rows["fold"] == "2"))]
    results = table.Results(rows, [], PLAN)
    compared = table.comparisons(results)
    assert compared["missing"] == ["full"] and "full" not in [one["row"] for one in compared["exploratory"]]
    assert table.comparisons(table.Results(rows[:0], [], PLAN))["missing"]


def test_the_pages_show_the_committed_results():
    content, text = table.build(plans.RESULTS)
    assert json.loads((plans.RESULTS / "table.json").read_text(encoding="utf-8"))["rows"]
    written = (plans.RESULTS / "table.md").read_text(encoding="utf-8")
    assert pages.parts(table.PAGE)[1] == text.strip() == written.strip()
    assert pages.parts(table.README)[1] == pages.short_table(content).strip()


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before {pages.END} {pages.BEGIN} after")
    with pytest.raises(DataError, match=r"page.md: needs the lines .* once each, in this order"):
        pages.insert(page, "new")
    page.write_text(f"before {pages.BEGIN} old {pages.END} after")
    pages.insert(page, "new")
    pages.insert(page, "newer")
    assert page.read_text() == f"before {pages.BEGIN}\n\nnewer\n\n{pages.END} after"


def test_transfer_is_reported_apart():
    rng, row = np.random.default_rng(0), PLAN["rows"][0]
    rows = fake_rows(plans.Run(row, "all", 0, row["name"], {}), rng)
    lines = table.transfer_lines(table.Results(pd.DataFrame(rows), [], PLAN))
    assert [(line["kind"], line["slices"]) for line in lines] == [("glioma", 74), ("pituitary", 36)]
    assert table.Results(pd.DataFrame(rows), [], PLAN).rows.empty
    twice = [*rows, *({**one, "seed": 1, "dice": one["dice"] + 0.1} for one in rows)]
    of_seeds = table.transfer_lines(table.Results(pd.DataFrame(twice), [], PLAN))
    assert [line["slices"] for line in of_seeds] == [74, 36]  # a second seed gives no more slices
    for one, mean in zip(lines, of_seeds, strict=True):
        assert mean["dice_loose"] == pytest.approx(one["dice_loose"] + 0.05)
        widths = [x["over_slices_loose_too_narrow"]["high"] - x["dice_loose"] for x in (one, mean)]
        assert widths[0] == pytest.approx(widths[1])


def test_empty_predictions_are_counted_beside_the_distance_that_stands_in_for_them(finished):
    rows = records.read(finished)
    wanted = rows.query("row == 'lora_r16' and boxes == 'loose' and weights == 'best' and section == 'testing'")
    rows.loc[wanted.index[0], ["dice", "hd95_px", "empty_prediction"]] = (0.0, 724.08, True)
    row = next(row for row in PLAN["rows"] if row["name"] == "lora_r16")
    line = table.line_of(table.Results(rows, [{**fake_facts(run), "fold": "0"} for run in plans.runs_of(PLAN)
                                              if run.name == "lora_r16"], PLAN), row)  # fmt: skip
    assert line["empty_loose"] == 1 and line["hd95_px_loose"] > 14
    text = pages.markdown({"weights": "w", "rows": [line], "comparisons": {"missing": []}, "transfer": []})
    assert "(1 empty, as the image's diagonal)" in text


def test_a_table_with_runs_missing_says_that_it_is_provisional(finished, tmp_path):
    for path in finished.glob("*_fold*"):
        if not path.name.startswith("lora_r4_fold1_seed1"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    content, text = table.build(tmp_path)
    assert content["comparisons"]["unfinished"] == ["lora_r4_fold1_seed1"] and "Provisional: 1 runs" in text
    assert "Provisional: 1 runs" in pages.short_table(content)
    whole, text = table.build(finished)
    assert "Provisional" not in text + pages.short_table(whole)


# figures


def test_figures_are_drawn_from_made_up_rows(finished, tmp_path):
    figures.main(["--results", str(finished), "--output", str(tmp_path)])
    names = {"loss_of_ranks.png", "loss_rank_64.png", "dice_of_rows.png", "dice_by_boxes.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 500 and len(np.unique(np.asarray(picture))) > 20


def test_six_slices_are_shown_and_every_one_needs_its_prediction(tmp_path):
    dice = {f"m_{i}": i / 10 for i in range(9)}
    assert figures.pick(dice) == {
        "m_8": "best", "m_7": "best", "m_4": "median", "m_3": "median", "m_1": "worst", "m_0": "worst"
    }  # fmt: skip
    data, predicted, boxes = tmp_path / "data", tmp_path / "predicted", {}
    for i in range(7):
        picture, shift = np.zeros((40, 50), dtype=np.uint8), i % 5
        picture[10:30, 10:30] = 255
        for kind, pixels in (("images", picture // 2), ("labels", picture), ("p", np.roll(picture, shift, 1))):
            folder = predicted if kind == "p" else data / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / (f"m_{i}_seg.png" if kind == "p" else f"m_{i}.png"))
        boxes[f"m_{i}"] = [[8, 8, 33, 32]]
    found = figures.predictions_in([predicted], list(boxes))
    path = figures.save(figures.overlays(data, found, boxes, "made up"), "overlays.png", tmp_path)
    assert path.is_file()
    with pytest.raises(DataError, match="m_9: 0 files"):
        figures.predictions_in([predicted], ["m_9"])


@pytest.mark.parametrize("script", ["run.py", "table.py", "figures.py"])
def test_each_script_starts_by_itself(script):
    command = [sys.executable, str(plans.HERE / script), "--help"]
    done = subprocess.run(command, cwd=plans.HERE.parents[1], capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr


# the example page


def test_the_example_page_shows_the_rows_of_its_plan_and_the_numbers_of_the_table():
    file = HERE.parents[1] / "docs" / "example_report.html"
    page, plan = file.read_text(encoding="utf-8"), plans.read("page.json")
    assert file.stat().st_size < 5e6 and "default-src 'none'" in html.unescape(page)
    table_of = {row["row"]: row for row in json.loads((plans.RESULTS / "table.json").read_text("utf-8"))["rows"]}
    rows = page.split('id="results"')[1].split("</table>")[0].split("<tr")
    texts = [html.unescape(" ".join(re.sub(r"<[^>]*>", " ", row).split())) for row in rows]
    beside = {
        "zero_shot": "zero_shot_best_1024", "zero_shot_shrunk": "zero_shot_shrunk_1024", "lora": "lora_r4",
        "lora_decoder_lora": "lora_r4_decoder_lora", "attention": "attention",
    }  # fmt: skip
    for row in plan["rows"]:
        (text,) = [text for text in texts if f"{row['title']} " in text]
        n, dice = re.search(r" (\d+) (0\.\d{3}) ", text).groups()
        assert n == "77", row
        near = 0.0006 if row["strategy"] == "zero_shot" else 0.01  # what learns was trained for either
        assert float(dice) == pytest.approx(table_of[beside[row["name"]]]["dice_loose"], abs=near), row


@pytest.mark.parametrize("study", ["meningioma_t1c/page.json", "hippocampus/plan.json"])
def test_plans_of_comparisons_expand_with_data_at_their_places(study, tmp_path):
    plan = json.loads((HERE.parent / study).read_text(encoding="utf-8"))
    lists = [name for task in plan["tasks"] for name in task.get("datalists", ["datalist.json"])]
    for number, name in enumerate(lists):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        listed = {"training": [{"case": "t"}], "validation": [{"case": "v"}], "testing": [{"case": f"c{number}"}]}
        (tmp_path / name).write_text(json.dumps(listed))
    for name in [*plan["weights"].values(), *(["loose.json"] if "prompt::boxes" in plan.get("shared", {}) else [])]:
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    runs = read_plan(tmp_path / "plan.json").runs(dataset_dir=tmp_path)
    assert {run.row.name for run in runs} == {row["name"] for row in plan["rows"]}
    assert len(runs) == len(lists) * sum(len(row.get("seeds", plan.get("seeds", [0]))) for row in plan["rows"])
