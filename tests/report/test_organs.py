"""The organs' table: the papers' columns, means done by hand, exclusions said, quoted rows marked as such."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from samseg_monai.errors import BundleError
from samseg_monai.metrics import write_rows
from samseg_monai.report.montage import OverlayCase
from samseg_monai.report.organs import PUBLISHED, organ_table, organs_json, organs_text
from samseg_monai.report.page import write_report
from samseg_monai.report.runs import RunResult
from samseg_monai.report.summary import in_short
from samseg_monai.report.tables import results_json, table_text

CLASSES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
COLUMNS = ["aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"]
NAMES = ("ladder", "ladder_paper", "cnn_only", "sam_only", "unet", "zero_shot")
PICO = "pico, not SAM"
QUOTED = "quoted from the paper, not measured here"
NAN = float("nan")
TABLE_I = {  # of SAM-LST: all twelve methods with mean DSC and HD95
    "V-Net": ("68.81", None), "DARR": ("69.77", None), "R50 U-Net": ("74.68", "36.87"), "U-Net": ("76.85", "39.70"),
    "R50 Att-UNet": ("75.57", "36.97"), "R50 ViT": ("71.29", "32.87"), "TransUNet": ("77.48", "31.69"),
    "MTM": ("78.59", "26.56"), "SwinUNet": ("79.12", "21.55"), "SAMed": ("81.88", "20.64"),
    "MISSFormer": ("81.96", "18.20"), "SAM-LST": ("79.45", "35.35"),
}  # fmt: skip


def _rows(dice: dict[str, list[float]], absent: set[tuple[int, str]] = frozenset()) -> tuple[list[dict], list[dict]]:
    """Rows under the honest and the published rules; HD95 is 10 mm for Dice 0 and 0 for Dice 1, 1 mm being 2 voxels.

    ``absent``: (case, class) that neither reference nor prediction has.
    """
    honest, published = [], []
    for name, values in dice.items():
        for case, value in enumerate(values):
            gone = (case, name) in absent
            labels = {"case": f"case{case:04d}", "class": name}
            flags = {"empty_prediction": gone, "empty_reference": gone, "prediction_ml": 1.0, "reference_ml": 1.0}
            score, hd95 = (NAN, NAN) if gone else (value, 10 * (1 - value))
            scores = {"dice": score, "hd95_mm": hd95, "hd95_medpy_mm": hd95, "nsd_1mm": score, "nsd_2mm": score}
            honest.append({**labels, **scores, "excluded": gone, **flags})
            voxel = {"dice_transunet": 0.0 if gone else value, "hd95_transunet_voxel": 0.0 if gone else 2 * hd95}
            published.append({**labels, **voxel, "excluded": False, **flags})
    return honest, published


def _write(folder: Path, rows: tuple[list[dict], list[dict]], name: str = "ladder", **card: object) -> RunResult:
    folder.mkdir(parents=True)
    write_rows(rows[0], folder / "cases.csv")
    write_rows(rows[1], folder / "transunet_cases.csv")
    (folder / "metrics.json").write_text(json.dumps({"policy": "honest"}))
    facts = {
        "sam_variant": "no SAM" if name == "unet" else "pico",
        "prompt_source": "none",
        "phantoms": True,
        "strategy": {"name": name, "arguments": {}},
        "split": {"by": "published 18/12", "validation": 0},
        "settings": {"section": "testing"},
    }
    (folder / "run_card.json").write_text(json.dumps({**facts, **card}))
    return RunResult.load(folder)


def _even(value: float = 0.5, cases: int = 2) -> dict[str, list[float]]:
    return {name: [value] * cases for name in CLASSES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    """Six strategies, eight organs, twelve cases; no case but two has a gallbladder, and none has an aorta."""
    folder = tmp_path_factory.mktemp("organs")
    absent = {(case, "gallbladder") for case in range(2, 12)} | {(case, "aorta") for case in range(12)}
    made = []
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        dice = {organ: rng.uniform(0.2, 0.9, 12).tolist() for organ in CLASSES}
        gate = {"gate": 0.52 + 0.1 * index} if name.startswith("ladder") else {}
        made.append(_write(folder / name, _rows(dice, absent), name, **gate))
    return made


@pytest.fixture(scope="module")
def page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(output, title="t", runs=runs, organs=organ_table(runs)).read_text(encoding="utf-8")


def _table(page: str, name: str) -> list[list[str]]:
    """Cells of one table of the page, row by row, without tags."""
    inside = re.search(rf'<table[^>]*id="{name}">(.*?)</table>', page, re.DOTALL).group(1)
    rows = re.findall(r"<tr.*?</tr>", inside, re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_columns_stand_in_the_order_of_the_papers_whatever_the_order_of_the_classes(runs, page):
    table = organ_table(runs)
    assert re.split(r"  +", organs_text(table).splitlines()[0]) == ["method", "DSC %", "HD95", *COLUMNS]
    assert _table(page, "organs")[0] == ["Method", "DSC %", "HD95", *COLUMNS]
    assert all(list(line.organs) == COLUMNS for line in table.lines)


def test_means_are_over_cases_and_then_over_organs_under_both_rules(tmp_path):
    dice = {**_even(0.5), "liver": [0.9, 0.7], "spleen": [0.3, 0.0]}
    run = _write(tmp_path / "run", _rows(dice, absent={(1, "spleen")}))
    published, honest = organ_table([run]).lines
    # published: the absent spleen counts as 0, liver 80, spleen 15, six organs of 50
    assert published.organs["liver"].dice == pytest.approx(80)
    assert published.organs["spleen"].dice == pytest.approx(15)
    assert published.dice == pytest.approx((6 * 50 + 80 + 15) / 8)
    # in voxels: six of 10, liver (2 + 6) / 2, spleen (14 + 0) / 2
    assert published.hd95 == pytest.approx((6 * 10 + 4 + 7) / 8)
    # honest: the absent spleen is excluded; a run has one mean Dice, that of its cases' means
    assert honest.organs["spleen"].dice == pytest.approx(30)
    assert honest.dice == pytest.approx(((6 * 50 + 90 + 30) / 8 + (6 * 50 + 70) / 7) / 2)
    assert honest.dice == pytest.approx(100 * results_json([run])["ladder"]["dice_mean"])
    assert honest.hd95 == pytest.approx(((6 * 5 + 1 + 7) / 8 + (6 * 5 + 3) / 7) / 2)
    assert (published.organs["spleen"].n, honest.organs["spleen"].n) == (2, 1)


def test_table_shows_the_means(tmp_path):
    dice = {**_even(0.5), "liver": [0.9, 0.7]}
    text = organs_text(organ_table([_write(tmp_path / "run", _rows(dice))]))
    lines = {line.split("  ")[1]: line.split()[-10:] for line in text.splitlines() if line.startswith("  ")}
    organs = ["50.00"] * 4 + ["80.00"] + ["50.00"] * 3
    assert lines["published rules (voxels)"] == ["53.75", "9.25", *organs]
    assert lines["honest rules (mm)"] == ["53.75", "4.62", *organs]


def test_organs_with_excluded_cases_say_how_many_count(tmp_path):
    rows = _rows(_even(0.5, cases=3), absent={(1, "spleen"), (2, "spleen"), (0, "aorta")})
    table = organ_table([_write(tmp_path / "run", rows)])
    published, honest = table.lines
    assert published.remark == ""
    assert honest.remark == "honest rules (mm): aorta n = 2, spleen n = 1 of 3, the others do not count"
    assert honest.remark in organs_text(table)


def test_an_organ_without_a_case_is_a_dash_and_the_mean_is_over_the_others(tmp_path):
    rows = _rows(_even(0.5), absent={(0, "aorta"), (1, "aorta")})
    table = organ_table([_write(tmp_path / "run", rows)])
    published, honest = table.lines
    assert published.dice == pytest.approx(50 * 7 / 8)
    assert honest.dice == pytest.approx(50)
    assert "mean over the other 7 organs" in honest.remark
    line = next(line for line in organs_text(table).splitlines() if line.startswith("  honest rules (mm)  "))
    assert line.split()[-8] == "-"
    assert organs_json(table)["runs"]["ladder"]["honest"]["organs"]["aorta"]["dsc_percent"] is None


def test_a_score_that_is_no_number_is_left_out_and_counted_as_missing(tmp_path):
    honest, published = _rows(_even(0.5))
    published[0]["dice_transunet"] = NAN
    line = organ_table([_write(tmp_path / "run", (honest, published))]).lines[0]
    assert line.dice == pytest.approx(50)
    assert "spleen n = 1 of 2" in line.remark


def test_no_reader_meets_nan(runs, page):
    table = organ_table(runs)
    for text in (organs_text(table), page):
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    json.dumps(organs_json(table), allow_nan=False)


def test_texts_fit_a_terminal(runs):
    for text in (organs_text(organ_table(runs)), table_text(runs)):
        assert max(len(line) for line in text.splitlines()) <= 130


def test_every_quoted_row_is_marked_and_has_a_source(runs, page):
    table = organ_table(runs)
    text = organs_text(table)
    below = text[text.index(QUOTED) :]
    cells = {row[0]: row[1:] for row in _table(page, "organs")}
    for row in PUBLISHED:
        mark = "(quoted*)" if row.second_hand else "(quoted)"
        assert f"  {row.method} {mark}  " in below
        assert row.source in " ".join(below.split())
        assert cells[f"{row.method} {mark}"][:2] == [row.dsc, row.hd95 or "-"]
    entries = organs_json(table)["quoted"]
    assert len(entries) == len(PUBLISHED)
    assert all(entry["quoted"] == QUOTED and entry["source"] for entry in entries)


def test_quoted_means_are_those_of_the_organs_quoted_with_them(runs):
    """But for two rows of SAM-LST's table I; the text says which."""
    whole = {row.method: row for row in PUBLISHED if row.organs}
    assert whole.keys() == {*TABLE_I, "SAMed_h (ViT-H)"}
    odd = {"R50 U-Net": 77.6075, "R50 Att-UNet": 72.10125}
    for name, row in whole.items():
        assert list(row.organs) == COLUMNS and row.agrees == (name not in odd)
        mean = np.mean([float(value) for value in row.organs.values()])
        assert mean == pytest.approx(odd.get(name, float(row.dsc)), abs=0.01)
    assert f"Of {', '.join(odd)} the mean that is printed is not that of the organs" in " ".join(
        organs_text(organ_table(runs)).split()
    )


def test_the_rows_of_the_paper_are_quoted_as_printed():
    rows = {row.method: (row.dsc, row.hd95) for row in PUBLISHED}
    assert rows["SAM-LST"] == ("79.45", "35.35")
    assert {name: rows[name] for name in TABLE_I} == TABLE_I
    organs = {row.method: tuple(row.organs.values()) for row in PUBLISHED if row.organs}
    assert [organs["SAM-LST"][i] for i in (0, 5)] == ["88.05", "63.08"] and organs["MTM"][-1] == "76.81"
    assert rows["SAM-LST, CNN only"] == ("78.05", "29.11")
    assert rows["SAM-LST, SAM only"] == ("58.97", "101.6")
    assert rows["SAM-LST, no fine-tuning"] == ("1.73", "260.98")
    assert rows["H-SAM (ViT-L)"] == ("86.49", None)


def test_runs_say_pico_phantoms_cases_split_and_prompts(runs, page):
    table = organ_table(runs)
    told = "n = 12 phantoms, split: testing, published 18/12, no prompts"
    headings = [line for line in organs_text(table).splitlines() if told in line]
    assert len(headings) == len(NAMES)
    assert sum(PICO in line for line in headings) == len(NAMES) - 1  # the U-Net has no SAM, not even pico
    assert sum(told in row[0] for row in _table(page, "organs")) == len(NAMES)


def test_only_stand_ins_are_said_to_be_incomparable(runs, tmp_path):
    warning = "cannot be compared with the quoted rows"
    assert warning in organs_text(organ_table(runs))
    real = _write(tmp_path / "run", _rows(_even()), sam_variant="vit_b", phantoms=False)
    text = organs_text(organ_table([real]))
    assert warning not in text
    assert "n = 2 cases" in text
    assert "[vit_b]" in text


def test_gate_is_told_where_there_is_one(runs, page):
    line = "gate g = 0.52 (1 = SAM alone, 0 = CNN alone)"
    table = organ_table(runs)
    for text in (organs_text(table), table_text(runs)):
        assert line in text
        assert text.count("gate g = ") == 2
    assert "<strong>Gate.</strong> Ladder (ResNet18 beside SAM): " + line in page
    found = results_json(runs)
    assert {name for name in found if "gate" in found[name]} == {"ladder", "ladder_paper"}
    assert organs_json(table)["runs"]["cnn_only"]["gate"] is None


def test_strategies_have_titles_for_people(runs, tmp_path):
    assert [run.title for run in runs] == [
        "Ladder (ResNet18 beside SAM)",
        "Ladder, as published",
        "CNN only",
        "SAM only (decoder upscaling)",
        "U-Net, no SAM",
        "Zero-shot",
    ]
    side = {"name": "ladder", "arguments": {"side": "somewhere.SwinSide"}}
    assert _write(tmp_path / "run", _rows(_even()), strategy=side).title == "Ladder (SwinSide beside SAM)"
    side["arguments"]["side"] = "samseg_monai.adapters.ladder.ResNetSide"
    narrow = _write(tmp_path / "narrow", _rows(_even()), strategy=side, side_arguments={"width": 32})
    assert narrow.title == "Ladder (ResNet18, width 32 beside SAM)"


def test_summary_says_over_what_the_mean_is_and_that_there_were_no_prompts(runs):
    told = in_short(runs)
    assert told[0] == (
        "6 methods are measured on 12 held-out phantoms. Mean Dice, on this whole page: over the 8 classes of a case, "
        "then over cases."
    )
    assert any(line.startswith("No boxes or other prompts were given") for line in told)


def test_page_has_a_row_for_each_run_and_one_for_each_class(runs, page):
    assert len(_table(page, "results")) == 1 + len(NAMES)
    rows = _table(page, "classes")
    assert [row[0] for row in rows[1:]] == list(CLASSES)
    assert all(PICO in cell for cell in [*rows[0][1:5], rows[0][6]])
    liver = np.mean([row["dice"] for row in runs[0].rows if row["class"] == "liver"])
    assert rows[5][1].startswith(f"{liver:.3f} ± ")
    assert rows[7][1].startswith("- ± -")  # no case has an aorta


def test_terminal_table_holds_the_class_means_of_every_run(runs):
    found = results_json(runs)
    lines = table_text(runs).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Dice by class"))
    assert re.split(r"  +", lines[start])[1:] == list(CLASSES)
    for run, line in zip(runs, lines[start + 2 :], strict=False):
        means = [found[run.name]["classes"][name]["dice_mean"] for name in CLASSES]
        assert line.split()[-8:] == ["-" if mean is None else f"{mean:.3f}" for mean in means]


def test_legend_speaks_of_boxes_only_where_there_are_some(runs, tmp_path):
    image = np.random.default_rng(0).normal(100, 10, (24, 24))
    mask = np.zeros((24, 24), bool)
    mask[5:12, 6:14] = True
    for box, told in ((None, False), ((6, 5, 14, 12), True)):
        boxes = [[] if box is None else [box]]
        case = OverlayCase("case0000", image[None], mask[None], {"ladder": mask[None]}, boxes, {}, (80.0, 120.0))
        page = write_report(tmp_path / "p.html", title="t", runs=runs[:1], montage=[case]).read_text(encoding="utf-8")
        assert ("box given to the network" in page) == told


def test_page_without_organs_has_no_section_of_them(runs, tmp_path):
    page = write_report(tmp_path / "p.html", title="t", runs=runs[:2]).read_text(encoding="utf-8")
    assert 'id="organs"' not in page
    assert "SAM-LST" not in page


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    whole = _write(tmp_path / "a", _rows(_even()), "ladder")
    (whole.folder / "transunet_cases.csv").unlink()
    few = _write(tmp_path / "b", _rows({name: [0.5] for name in CLASSES[:6]}), "cnn_only")
    honest, published = _rows(_even())
    other = _write(tmp_path / "c", (honest, published[:-1]), "sam_only")
    with pytest.raises(BundleError) as caught:
        organ_table([whole, few, other])
    for part in (
        "ladder: no ",
        "transunet_cases.csv",
        "cnn_only, honest: no class aorta, pancreas",
        "differ in case0001",
    ):
        assert part in str(caught.value)


def test_the_row_without_a_network_is_refused(tmp_path):
    folder = _write(tmp_path / "run", _rows(_even())).folder
    with pytest.raises(BundleError, match="leave it out"):
        organ_table([RunResult.load(folder, name="box_ellipse")])
