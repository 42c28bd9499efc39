"""Rows, tables and the ignite metric: independent of order and processes, honest about empty sets, in a real engine."""

from __future__ import annotations

import csv
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from samseg_monai.errors import ConfigError, DataError
from samseg_monai.metrics import (
    CaseScores,
    aggregate,
    merge_rows,
    paired_difference,
    read_history,
    read_rows,
    score_case,
    score_columns,
    write_rows,
)
from samseg_monai.metrics import rows as rows_module

SHAPE = (10, 8, 4)
SPACING = (0.8, 0.5, 3.0)
# tilted and flipped as real headers are: the norms of the columns are SPACING
TURN = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
AFFINE = TURN @ np.diag([*SPACING, 1.0])


def item(case: str, shift: int, *, channels: int = 1, empty: bool = False) -> dict:
    """``image`` is the prediction of a network that does nothing; it lies ``shift`` voxels beside the reference."""
    reference, image = torch.zeros(2, channels, *SHAPE)
    if not empty:
        reference[:, 1:5, 2:6, 1:3] = 1
        image[:, 1 + shift : 5 + shift, 2:6, 1:3] = 1
    reference = MetaTensor(reference, affine=torch.as_tensor(AFFINE))
    return {"case": case, "image": image, "label": torch.zeros(1, *SHAPE), "reference": reference}


ITEMS = [item("c", 2), item("a", 0), item("d", 0, empty=True), item("b", 1)]


def evaluate(items, *, batch_size=2, **metrics) -> SupervisedEvaluator:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=batch_size),
        network=torch.nn.Identity(),
        key_val_metric={"val_dice": metrics.pop("key", None) or CaseScores()},
        additional_metrics=metrics,
    )
    evaluator.logger.setLevel("ERROR")
    evaluator.run()
    return evaluator


def row(case: str, dice: float, *, name: str = "tumour", excluded: bool = False, **more) -> dict:
    flags = {"excluded": excluded, "empty_prediction": excluded, "empty_reference": excluded}
    return {"case": case, "class": name, "dice": dice, **flags, **more}


def same(a, b) -> bool:
    """Equality in which NaN equals NaN."""
    return str(a) == str(b)


def test_monai_evaluator_publishes_value_aggregates_and_rows():
    state = evaluate(ITEMS).state
    expected = {i["case"]: score_case(i["image"][0], i["reference"].as_tensor()[0], spacing_mm=SPACING) for i in ITEMS}
    rows = state.metric_details["val_dice"]
    assert [r["case"] for r in rows] == ["a", "b", "c", "d"]
    assert all(same({k: v for k, v in r.items() if k not in ("case", "class")}, expected[r["case"]]) for r in rows)
    assert state.metrics["val_dice"] == state.metrics["dice_mean"] == pytest.approx((1 + 0.75 + 0.5) / 3)
    assert state.best_metric == state.metrics["val_dice"]
    assert state.metrics["hd95_mm_mean"] == pytest.approx(np.mean([expected[c]["hd95_mm"] for c in "abc"]))
    assert (state.metrics["n"], state.metrics["n_excluded"], state.metrics["n_empty_prediction"]) == (3.0, 1.0, 0.0)
    assert same(aggregate(rows), {k: v for k, v in state.metrics.items() if k != "val_dice"})
    assert {type(value) for value in state.metrics.values()} == {float}


def test_result_depends_neither_on_order_nor_on_batches():
    reference = evaluate(ITEMS, batch_size=1).state
    for seed in range(3):
        shuffled = random.Random(seed).sample(ITEMS, len(ITEMS))
        state = evaluate(shuffled, batch_size=1 + seed).state
        assert state.metrics == reference.metrics
        assert same(state.metric_details, reference.metric_details)


def test_epochs_do_not_add_up():
    metric = CaseScores(surface=False)
    evaluator = evaluate(ITEMS, key=metric)
    evaluator.run()
    assert len(evaluator.state.metric_details["val_dice"]) == len(ITEMS)


def test_two_metrics_of_one_engine_keep_apart_by_prefix():
    state = evaluate(ITEMS, fast=CaseScores(surface=False, prefix="fast_", pred_key="reference")).state
    assert state.metrics["fast"] == state.metrics["fast_dice_mean"] == 1.0
    assert state.metrics["dice_mean"] == pytest.approx(0.75)
    assert "fast_hd95_mm_mean" not in state.metrics
    with pytest.raises(ConfigError, match="'val_dice' already publishes under prefix ''"):
        evaluate(ITEMS, again=CaseScores())


def test_several_classes_average_over_classes_then_cases():
    two = [item("x", 1, channels=2), item("y", 0, channels=2)]
    for volume in (two[0]["image"], two[0]["reference"]):
        volume[1] = 0  # in case x the second class is in neither mask
    state = evaluate(two, key=CaseScores(classes=("liver", "spleen"))).state
    assert state.metrics["val_dice"] == (0.75 + 1.0) / 2
    assert state.metrics["liver_dice_mean"] == (0.75 + 1.0) / 2
    assert state.metrics["spleen_dice_mean"] == 1.0
    counts = {k: v for k, v in state.metrics.items() if k.endswith(("_n", "n_excluded")) or k == "n"}
    assert counts == {
        "n": 2.0, "n_excluded": 1.0, "liver_n": 2.0, "liver_n_excluded": 0.0, "spleen_n": 1.0, "spleen_n_excluded": 1.0,
    }  # fmt: skip


def test_transunet_policy_and_any_value_can_be_the_key():
    key = CaseScores(policy="transunet")
    metrics = evaluate(ITEMS, key=key).state.metrics
    assert metrics["val_dice"] == metrics["dice_transunet_mean"] == pytest.approx((1 + 0.75 + 0.5 + 0) / 4)
    assert metrics["n_excluded"] == 0
    by_distance = evaluate(ITEMS, key=CaseScores(value="hd95_mm")).state.metrics
    assert by_distance["val_dice"] == by_distance["hd95_mm_mean"] > 0


def test_no_case_that_counts_gives_nan_and_a_warning(caplog):
    with caplog.at_level("WARNING", logger="samseg_monai"):
        metrics = evaluate([item("e", 0, empty=True)]).state.metrics
    assert math.isnan(metrics["val_dice"]) and math.isnan(metrics["hd95_mm_mean"])
    assert (metrics["n"], metrics["n_excluded"]) == (0.0, 1.0)
    assert "no case could be scored" in caplog.text


def test_summary_of_no_rows_is_nan_for_every_score():
    summary = aggregate([])
    assert all(math.isnan(summary[f"{name}_{kind}"]) for name in score_columns() for kind in ("mean", "std", "median"))
    assert summary["n"] == 0.0


def test_summary_equals_the_sums_done_by_hand_in_any_order():
    rows = [row("a", 0.9), row("b", 0.1), row("c", math.nan, excluded=True), row("d", 0.2)]
    expected = {"dice_mean": 0.4, "dice_std": math.sqrt((0.25 + 0.09 + 0.04) / 3), "dice_median": 0.2,
                "n": 3, "n_excluded": 1, "n_empty_prediction": 0}  # fmt: skip
    assert aggregate(rows) == pytest.approx(expected)
    assert {str(aggregate(random.Random(seed).sample(rows, 4))) for seed in range(10)} == {str(aggregate(rows))}


def test_one_missed_case_pulls_the_mean_down_and_is_counted():
    missed = item("m", 0)
    missed["image"] *= 0
    metrics = evaluate([*ITEMS, missed]).state.metrics
    assert (metrics["n"], metrics["n_empty_prediction"]) == (4.0, 1.0)
    assert metrics["dice_mean"] == pytest.approx((1 + 0.75 + 0.5 + 0) / 4)


def test_rows_of_padded_processes_become_one_sorted_list():
    one = merge_rows([[row("a", 0.1), row("b", 0.2), row("c", 0.3)]])
    assert merge_rows([[row("c", 0.3), row("a", 0.1)], [row("b", 0.2), row("c", 0.4)]]) == one
    assert merge_rows([[], []]) == []
    both = [row("a", 0.1, name="x"), row("a", 0.2, name="w")]
    assert merge_rows([both, both]) == both  # classes stay in their order


def _score_a_share(rank: int, store: str, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # three cases for two processes: the sampler repeats the first one
    shares = [[ITEMS[0], ITEMS[2]], [ITEMS[1], ITEMS[0]]]
    state = evaluate(shares[rank], batch_size=1).state
    queue.put((rank, state.metrics, str(state.metric_details)))
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    context = mp.get_context("fork")  # a spawned process would import MONAI again: ten seconds each
    queue = context.SimpleQueue()
    workers = [context.Process(target=_score_a_share, args=(r, str(tmp_path / "store"), queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    one = evaluate(ITEMS[:3]).state
    for _, metrics, details in sorted(queue.get() for _ in workers):
        assert metrics == one.metrics
        assert details == str(one.metric_details)


def test_rows_survive_the_csv_file_exactly(tmp_path):
    rows = evaluate(ITEMS).state.metric_details["val_dice"]
    path = write_rows(rows, tmp_path / "new" / "cases.csv")
    again = read_rows(path)
    assert same(again, rows)
    assert same(aggregate(again), aggregate(rows))
    assert read_rows(write_rows([], tmp_path / "none.csv")) == []


HOSTILE = (
    "=1+1",
    "+x",
    "-x",
    "@SUM(A1)",
    "\t=x",
    "\r=x",
    "\uff1dx",
    "'",
    "'=x",
    "''-x",
    "a=b",
    "x\x1b[2Jy",
    "a\u202eb",
    "-",
)


def test_no_spreadsheet_runs_a_name_and_no_terminal_obeys_it(tmp_path):
    rows = [row(case, -0.25) for case in HOSTILE]
    path = write_rows(rows, tmp_path / "cases.csv")
    assert same(read_rows(path), rows)
    with path.open(newline="", encoding="utf-8") as stream:
        cells = [line["case"] for line in csv.DictReader(stream)]
    assert all(cell[0] not in "=+-@\t\r\uff1d" and cell.isprintable() for cell in cells)
    assert "a=b" in cells and ",-0.25," in path.read_text(encoding="utf-8")  # numbers stay numbers
    # what an earlier version wrote is read as it was meant
    path.write_text("case,class,dice,excluded,empty_prediction,empty_reference\n=1+1,-t,0.5,False,False,False\n")
    assert [(one["case"], one["class"]) for one in read_rows(path)] == [("=1+1", "-t")]


@pytest.mark.parametrize("text", ["", "\\", "\\x1b", "\\\\t", "\x1b\\", "\n'=", "'", "\u2028", "é", "=" * 3])
def test_every_text_comes_back_from_its_cell(text):
    assert rows_module.read_cell(rows_module.write_cell(text)) == text


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", b"case,class\x00,dice\n", b"\x1f\x8b\x08\x00\xa5"])
def test_a_table_that_is_no_text_is_called_so(tmp_path, content):
    path = tmp_path / "cases.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a"):
        read_rows(path)
    points, problems = read_history(path)
    assert points == {} and len(problems) <= 1


def test_tables_saved_by_a_spreadsheet_are_read(tmp_path):
    head, line = "case,class,dice,excluded,empty_prediction,empty_reference", "a,t,0.5,False,False,False"
    path = tmp_path / "cases.csv"
    path.write_text(f"{head}\n{line}\n", encoding="utf-8-sig")
    assert read_rows(path)[0]["case"] == "a"
    path.write_text(f"{head},dice\n{line},0.9\n")
    with pytest.raises(DataError, match="'dice': 2 columns"):
        read_rows(path)


@pytest.mark.parametrize("extra", [{"image": "/data/x/y.nii.gz"}, {"case": "data\\x"}])
def test_paths_do_not_enter_a_table(tmp_path, extra):
    with pytest.raises(DataError, match="names, not paths"):
        write_rows([row("a", 0.5) | extra], tmp_path / "cases.csv")
    assert not (tmp_path / "cases.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,dice\na,0.1\n", "no column 'class'"),
        ("case,class,dice,excluded,empty_prediction,empty_reference\na,t,high,False,False,False\n", "line 2"),
        ("case,class,dice,excluded,empty_prediction,empty_reference\na,t,0.5,maybe,False,False\n", "True or False"),
        ("case,class,dice,excluded,empty_prediction,empty_reference\na,t,0.5\n", "line 2"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_absent_table_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="run evaluate first"):
        read_rows(tmp_path / "cases.csv")


def test_constant_gain_is_told_from_noise():
    rng = np.random.default_rng(3)
    base = rng.uniform(0.4, 0.9, size=30)
    noise = rng.normal(0, 0.02, size=30)
    a = [row(f"c{i:02}", float(v + 0.05 + e)) for i, (v, e) in enumerate(zip(base, noise, strict=True))]
    b = [row(f"c{i:02}", float(v)) for i, v in enumerate(base)]
    gain = paired_difference(a, b)
    assert gain["difference"] == pytest.approx(0.05 + noise.mean())
    half = 2.048407 * noise.std(ddof=1) / math.sqrt(30)  # Student's t of 28 degrees of freedom, from a printed table
    assert gain["ci_high"] - gain["ci_low"] == pytest.approx(2 * half, rel=1e-6)
    assert gain["ci_low"] < gain["difference"] < gain["ci_high"]
    assert gain["verdict"] == "a higher"
    assert paired_difference(b, a)["verdict"] == "b higher"
    assert paired_difference(a[::-1], b) == gain  # independent of order
    jitter = [row(r["case"], r["dice"] + 0.1 * (-1) ** i) for i, r in enumerate(b)]
    assert paired_difference(jitter, b)["verdict"] == "not distinguishable"


def test_equal_runs_and_few_cases_are_not_distinguishable():
    a = [row(f"c{i}", 0.9) for i in range(5)]
    b = [row(f"c{i}", 0.1) for i in range(5)]
    few = paired_difference(a, b)  # five cases prove nothing
    assert few["verdict"] == paired_difference(a, a)["verdict"] == "too few cases"
    assert math.isnan(few["ci_low"]) and math.isnan(few["p"]) and few["difference"] == pytest.approx(0.8)
    more = [row("c5", 0.9)], [row("c5", 0.1)]
    assert paired_difference(a + more[0], b + more[1])["verdict"] == "a higher"
    assert paired_difference(a + more[0], a + more[0])["verdict"] == "not distinguishable"


def test_pairs_that_one_side_excludes_are_left_out_and_counted():
    a = [row("a", 0.5), row("b", math.nan, excluded=True)]
    b = [row("a", 0.25), row("b", 0.0)]
    result = paired_difference(a, b)
    assert (result["difference"], result["n"], result["n_excluded"]) == (0.25, 1.0, 1.0)
    nothing = paired_difference(a[1:], b[1:])
    assert math.isnan(nothing["difference"]) and nothing["verdict"] == "too few cases"


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(DataError, match=r"only in a: b, tumour\n.*only in b: c, tumour"):
        paired_difference([row("a", 1.0), row("b", 1.0)], [row("a", 1.0), row("c", 1.0)])
    with pytest.raises(DataError, match="no score 'nsd_1mm', there are \\['dice'\\]"):
        paired_difference([row("a", 1.0)], [row("a", 1.0)], value="nsd_1mm")
    with pytest.raises(DataError, match="two rows"):
        aggregate([row("a", 1.0), row("a", 0.0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case": "x/y"}, "must be a name"),
        ({"pred": torch.zeros(SHAPE)}, "pred has shape"),
        ({"pred": torch.zeros(2, *SHAPE)}, "needs \\(1, H, W, D\\)"),
        ({"pred": torch.full((1, *SHAPE), 0.3)}, "case a, class tumour: prediction holds other values"),
        ({"reference": torch.zeros(1, *SHAPE)}, "reference has no affine"),
    ],
)
def test_items_that_cannot_be_scored_say_why(change, message):
    good = item("a", 0)
    with pytest.raises(DataError, match=message):
        CaseScores().update([good | {"pred": good["image"]} | change])


def test_absent_keys_and_batches_that_were_not_taken_apart_say_why():
    with pytest.raises(DataError, match="no 'pred'; there are \\['case', 'image', 'label', 'reference'\\]"):
        CaseScores().update([item("a", 0)])
    engine = Engine(lambda _, batch: {"pred": batch})
    CaseScores().attach(engine, "dice")
    with pytest.raises(DataError, match="needs a list of items"):
        engine.run([torch.zeros(1)])


def test_two_cases_of_one_name_are_not_mixed_up():
    with pytest.raises(DataError, match="two different results for case 'a'"):
        evaluate([item("a", 0), item("a", 1)])
    assert evaluate([item("a", 1), item("a", 1)]).state.metrics["n"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": "iou"}, "dice, hd95_mm"),
        ({"value": "hd95_mm", "surface": False}, "not computed here"),
        ({"classes": ()}, "one distinct name"),
        ({"classes": ("a", "a")}, "one distinct name"),
        ({"policy": "kind"}, "unknown metric policy"),
    ],
)
def test_bad_configuration_is_refused_at_once(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CaseScores(**arguments)
