"""The comparison on the hippocampus: the page, the committed rows, and the commands that make them."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from samseg_monai.cli import main
from samseg_monai.comparison import read_plan
from samseg_monai.metrics.rows import paired_difference

ROOT = Path(__file__).parents[2]
PAGE, STUDY = ROOT / "docs" / "without_prompts.md", ROOT / "experiments" / "hippocampus"
RESULTS = {"plan": ROOT / "results" / "hippocampus", "few_shot": ROOT / "results" / "hippocampus" / "few_shot"}


def rows_of(name: str) -> dict[str, dict]:
    return json.loads((RESULTS[name] / "comparison.json").read_text("utf-8"))["tasks"]["hippocampus"]["rows"]


def cases_of(name: str) -> list[dict[str, str]]:
    with (RESULTS[name] / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def means(row: str) -> list[dict]:
    """Mean over seeds of each case and class."""
    scores = defaultdict(list)
    for line in cases_of("plan"):
        if line["row"] == row:
            scores[line["case"], line["class"]].append(float(line["dice"]))
    return [{"case": c, "class": k, "dice": statistics.mean(v), "excluded": False} for (c, k), v in scores.items()]


@pytest.mark.parametrize("name", RESULTS)
def test_rows_of_cases_come_to_the_committed_numbers(name):
    cases: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in cases_of(name):
        cases[line["row"]][line["seed"], line["case"]].append(float(line["dice"]))
    assert cases.keys() == rows_of(name).keys()
    for row, found in rows_of(name).items():
        assert found["dice_mean"] == pytest.approx(statistics.mean(map(statistics.mean, cases[row].values()))), row
        assert {int(seed) for seed, _ in cases[row]} == set(found["seeds"]) and found["n"] == 49


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_shows_the_committed_tables(name):
    table = (RESULTS[name] / "comparison.md").read_text(encoding="utf-8").strip()
    assert table in PAGE.read_text(encoding="utf-8")
    for row in rows_of(name).values():
        [line] = [line for line in table.splitlines() if line.startswith(f"| {row['title']} |")]
        assert line.split(" | ")[1] == f"{row['dice_mean']:.3f}"


def test_the_readme_shows_every_row():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for row in rows_of("plan").values():
        name = row["title"].split(", mean of")[0]
        [cells] = [line.split(" | ") for line in lines if line.startswith((f"| {name} | 0.", f"| {name}, no SAM | 0."))]
        shown = [row["classes"]["anterior"]["dice_mean"], row["classes"]["posterior"]["dice_mean"], row["dice_mean"]]
        assert cells[1:4] == [f"{value:.3f}" for value in shown], name
        assert row.get("minus_unet", {}).get("dice", {}).get("verdict", "-") in cells[4], name
        assert cells[5] == f"{len(row['seeds'])} |"


def test_scores_of_the_text_are_those_of_the_rows():
    text = re.sub(r"^\|.*$", "", PAGE.read_text(encoding="utf-8"), flags=re.M)
    known = {"0.858", "0.501", "0.494"}  # the U-Net's on a processor; gates, which cards hold
    sides = [means("cnn_only"), means("ladder_paper")]
    found = paired_difference(*sides)
    known |= {f"{found[name]:.3f}" for name in ("difference", "ci_low", "ci_high")}

    def note(value):
        if isinstance(value, dict):
            for one in value.values():
                note(one)
        elif isinstance(value, list):
            for one in value:
                note(one)
        elif isinstance(value, float):
            known.add(f"{abs(value):.3f}")

    for name in RESULTS:
        note(rows_of(name))
    assert set(re.findall(r"\b0\.\d{3}\b", text)) <= known


@pytest.mark.parametrize("name", RESULTS)
def test_the_plan_is_that_of_the_results(name, tmp_path):
    plan = json.loads((STUDY / f"{name}.json").read_text(encoding="utf-8"))
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [{}], "validation": [], "testing": [{}]}))
    for file in plan["weights"].values():
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    seeds = defaultdict(set)
    for run in read_plan(tmp_path / "plan.json").runs(dataset_dir=tmp_path):
        seeds[run.group].add(run.seed)
    assert {row: set(found["seeds"]) for row, found in rows_of(name).items()} == seeds


def test_the_shown_line_makes_the_split(realdata, tmp_path, monkeypatch):
    [line] = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("samseg prepare")]
    for part in ("images", "labels"):
        (tmp_path / "data" / "hippocampus").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "hippocampus" / part).symlink_to(realdata / "hippocampus" / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with contextlib.suppress(SystemExit):
        main()
    made = json.loads((tmp_path / "data" / "hippocampus" / "datalist.json").read_text(encoding="utf-8"))
    assert [len(made[part]) for part in ("training", "validation", "testing")] == [139, 10, 49]
    assert {item["case"] for item in made["testing"]} == {line["case"] for line in cases_of("plan")}
