"""No difference and no verdict between runs that differ in more than their method, and no case that was trained on is
called held out: table, page, JSON and CSV say what differs."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from samseg_monai.cli import app
from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.metrics import write_rows
from samseg_monai.report.comparing import what_differs
from samseg_monai.report.page import write_report
from samseg_monai.report.runs import RunResult
from samseg_monai.report.summary import in_short
from samseg_monai.report.tables import differences, results_json, table_text, write_results

CASES = [f"case{i:02d}" for i in range(9)]
PROMPT = {"source": "label", "loosen": [0.0, 0.3], "seed": 0, "per_component": False}
SETTINGS = {"section": "testing", "policy": "honest", "min_component_mm3": None, "regions": None, "prompt": PROMPT}
CARD = {
    "sam_variant": "vit_b",
    "prompt_source": "label",
    "data_hash": "a" * 64,
    "dataset": "brats",
    "settings": SETTINGS,
}


def run_of(
    folder: Path, name: str, *, dice: float = 0.6, cases: list[str] = CASES, zero: int = 0, **card: object
) -> RunResult:
    """A run whose Dice is ``dice`` with a spread of its own; ``zero`` cases fail."""
    noise = np.random.default_rng(len(name)).normal(0, 0.01, len(cases))
    flags = {"excluded": False, "empty_prediction": False, "empty_reference": False}
    rows = [
        {"case": case, "class": "tumour", "dice": 0.0 if i < zero else dice + float(e), **flags}
        for i, (case, e) in enumerate(zip(cases, noise, strict=True))
    ]
    folder.mkdir(parents=True)
    write_rows(rows, folder / "cases.csv")
    (folder / "metrics.json").write_text(json.dumps({"policy": "honest", "cases": len(cases)}))
    facts = {**CARD, "strategy": {"name": name}, "trainable_parameters": 0 if name == "zero_shot" else 100, **card}
    (folder / "run_card.json").write_text(json.dumps(facts))
    return RunResult.load(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunResult:
    return run_of(tmp_path_factory.mktemp("base") / "run", "zero_shot")


def settings(**changes: object) -> dict:
    return {"settings": {**SETTINGS, **changes}}


def prompt(**changes: object) -> dict:
    return settings(prompt={**PROMPT, **changes})


UNEQUAL = {
    "boxes of another law": (
        prompt(loosen=[0.0, 0.1]),
        "boxes (GT boxes on GT slices, sides enlarged 0 to 10 % against",
    ),
    "boxes drawn anew": (prompt(seed=1), "boxes (seed 1 against seed 0)"),
    "box per component": (prompt(per_component=True), "boxes (per_component True against per_component off)"),
    "boxes of a file": (
        {**prompt(source="json", boxes="a.json"), "prompt_source": "json", "boxes_sha256": "b" * 64},
        "boxes (boxes of a file (a.json, file bbbbbbbb) against GT boxes",
    ),
    "no boxes": ({**prompt(source="none"), "prompt_source": "none"}, "boxes (no prompts against GT boxes"),
    "data": ({"data_hash": "c" * 64}, "data (cccccccc against aaaaaaaa)"),
    "unknown data": ({"data_hash": None}, "data (not recorded against aaaaaaaa)"),
    "section": (settings(section="validation"), "section (validation against testing)"),
    "policy": (settings(policy="transunet"), "policy for empty masks (transunet against honest)"),
    "post-processing": (settings(min_component_mm3=50.0), "smallest component kept (50 against off)"),
    "a changed transform": (settings(**{"prediction_transforms::1::argmax": False}), "post-processing (prediction"),
    "regions": (settings(regions={"whole": [1, 2]}), "regions (whole 1, 2 against off)"),
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_unequal_runs_get_no_difference(kind, base, tmp_path):
    card, text = UNEQUAL[kind]
    run = run_of(tmp_path / "run", "lora", dice=0.9, **card)
    assert any(text in one for one in what_differs(run, base)), what_differs(run, base)
    assert differences([base, run]) == []
    entry = results_json([base, run])["lora"]
    assert "minus_zero_shot" not in entry and entry["not_compared"]["with"] == "zero_shot"
    assert any(text in one for one in entry["not_compared"]["differ_in"])


def test_table_page_json_and_csv_say_what_differs(base, tmp_path):
    other = run_of(tmp_path / "run", "lora", dice=0.9, **settings(min_component_mm3=50.0))
    equal = run_of(tmp_path / "full", "full", dice=0.9)
    runs = [base, other, equal]
    assert [(one.run.name, one.verdict) for one in differences(runs)] == [("full", "better")]
    text = table_text(runs)
    page = write_report(tmp_path / "page.html", title="t", runs=runs).read_text(encoding="utf-8")
    write_results(tmp_path / "results.json", runs)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    for where in (text.replace("\n  ", " "), page):
        assert "LoRA and Zero-shot are not compared; they differ in smallest component kept (50" in where
    assert text.count("better") == 1
    assert rows["lora"]["not_compared.differ_in"].startswith("smallest component kept (50")
    assert rows["lora"]["minus_zero_shot.dice.verdict"] == "" and rows["lora"]["class"] == "tumour"
    assert rows["full"]["minus_zero_shot.dice.verdict"] == "better"
    assert float(rows["full"]["minus_zero_shot.dice.p_holm"]) < 0.05
    assert json.loads((tmp_path / "results.json").read_text())["full"]["minus_zero_shot"]["dice"]["verdict"] == "better"
    # without zero-shot the first row is what others are held against
    assert "not compared" in table_text([equal, other]) and "not compared" not in table_text([equal])


def test_runs_of_other_cases_are_shown_without_a_difference(base, tmp_path):
    run = run_of(tmp_path / "run", "lora", dice=0.9, cases=[*CASES[1:], "new"])
    assert what_differs(run, base) == ["cases (LoRA lacks case00)", "cases (Zero-shot lacks new)"]
    assert "not compared" in table_text([base, run])


def test_equal_runs_differ_in_nothing(base, tmp_path):
    """Other learning settings are the method; what older cards do not say is not made up."""
    assert what_differs(run_of(tmp_path / "run", "lora", seed=5, **settings(epochs=3, lr=1e-3)), base) == []
    old = {"settings": {"section": "testing", "policy": "honest", "prompt": {"source": "label", "loosen": [0.0, 0.3]}}}
    assert what_differs(run_of(tmp_path / "old", "lora", **old), base) == []


def test_verdicts_are_corrected_for_the_number_of_rows(base, tmp_path):
    """One row with p of about 0.03 is a difference alone, and none beside two others that show nothing."""
    alone = run_of(tmp_path / "a", "lora", dice=0.616)
    others = [run_of(tmp_path / name, name) for name in ("norm", "bias_only")]
    [one] = differences([base, alone])
    assert one.p < 0.05 and one.verdict == "better"
    three = {gap.run.name: gap for gap in differences([base, alone, *others])}
    assert three["lora"].p > one.p and three["lora"].verdict == "not distinguishable"
    assert (three["lora"].low, three["lora"].high) == (one.low, one.high)


def test_below_six_cases_there_is_no_interval(tmp_path):
    runs = [run_of(tmp_path / name, name, dice=d, cases=CASES[:5]) for name, d in (("zero_shot", 0.2), ("lora", 0.9))]
    assert [one.verdict for one in differences(runs)] == ["too few cases"]
    assert table_text(runs).count("too few cases") == 3
    page = write_report(tmp_path / "page.html", title="t", runs=runs).read_text(encoding="utf-8")
    assert page.count(">too few cases</span>") == 3 and ">better" not in page and "5 cases are too few" in page
    entry = results_json(runs)["lora"]
    assert entry["dice_ci95"] == [None, None] and entry["interval"] == "too few cases"


def test_failures_are_said_to_make_intervals_too_narrow(base, tmp_path):
    failing = run_of(tmp_path / "run", "lora", dice=0.9, zero=1)
    words = "LoRA: 1 of 9 cases hold a Dice of 0"
    page = write_report(tmp_path / "page.html", title="t", runs=[base, failing]).read_text(encoding="utf-8")
    assert words in page and words in table_text([base, failing])
    assert any(words in line for line in results_json([base, failing])["lora"]["alerts"])
    assert "too narrow" not in table_text([base])


def hashed(*cases: str) -> list[str]:
    return [hashlib.sha256(case.encode()).hexdigest()[:16] for case in cases]


@pytest.mark.parametrize("where", ["run_card.json", "card.json", "../card.json", "../run_card.json"])
def test_cases_that_were_trained_on_are_an_alert(where, base, tmp_path):
    record = {"training": hashed("other", CASES[2], CASES[5]), "validation": hashed(CASES[1])}
    folder = tmp_path / "lora" / "evaluation"
    run_of(folder, "lora", dice=0.9)
    path = folder / where
    card = json.loads(path.read_text()) if path.is_file() else {"status": "completed"}
    path.write_text(json.dumps({**card, "cases": record}))
    (folder.parent / "history.csv").write_text("epoch,iteration,name,value\n1,1,train_loss,0.5\n")
    run = RunResult.load(folder)
    assert run.seen == {"training": [CASES[2], CASES[5]], "validation": [CASES[1]]}
    trained, chosen = run.warnings
    assert trained == "LoRA: 2 of 9 evaluated cases were trained on: case02, case05"
    assert chosen == "LoRA: 1 of 9 evaluated cases chose the epoch (validation): case01"
    page = write_report(tmp_path / "page.html", title="t", runs=[base, run]).read_text(encoding="utf-8")
    assert f'<p class="banner" role="alert">{trained}</p>' in page and f"! {trained}." in table_text([base, run])
    assert "held-out" not in in_short([base, run])[0] and "took no part in that choice" not in page
    assert results_json([base, run])["lora"]["alerts"] == [trained, chosen]
    assert differences([base, run]) == []
    assert "held-out" in in_short([base])[0]


def test_sections_that_weights_have_met_are_not_held_out(tmp_path):
    """Without a record of cases, as in older cards, the section tells; where nothing was learnt there is no alert."""
    of = {
        s: [run_of(tmp_path / s / n, n, **settings(section=s)) for n in ("zero_shot", "lora")]
        for s in ("training", "validation")
    }
    zero, lora = of["training"]
    assert lora.warnings == [
        "LoRA: 9 of 9 evaluated cases were trained on: case00, case01, case02, case03, case04 and 4 more"
    ]
    assert zero.warnings == [] and "held-out" not in in_short([zero])[0]
    assert differences([zero, lora]) == []
    assert "chose the epoch" in of["validation"][1].warnings[0] and differences(of["validation"])


def test_seeds_of_one_strategy_are_rows_and_not_cases(base, tmp_path, capsys):
    folders = [run_of(tmp_path / f"seed{s}", "lora", dice=0.8 + s / 100, seed=s).folder for s in (0, 1)]
    output = tmp_path / "out" / "report.html"
    app(["report", str(base.folder), *map(str, folders), "--output", str(output)], standalone_mode=False)
    results = json.loads(output.with_name("report_results.json").read_text())
    assert list(results) == ["zero_shot", "lora_seed0", "lora_seed1"]
    assert {results[name]["n"] for name in results} == {9}
    assert "LoRA, seed 1" in capsys.readouterr().out
    # two seeds in one table would count every case twice
    path = folders[0] / "cases.csv"
    path.write_text(path.read_text() + "".join((folders[1] / "cases.csv").read_text().splitlines(True)[1:]))
    with pytest.raises(BundleError, match="each training seed"):
        RunResult.load(folders[0])


def test_runs_are_called_as_told_and_stand_in_a_table_for_latex(base, tmp_path, capsys):
    folders = [run_of(tmp_path / name, "lora", dice=dice).folder for name, dice in (("old", 0.8), ("new", 0.9))]
    output = tmp_path / "page.html"
    words = ["report", str(base.folder), *map(str, folders), "--output", str(output)]
    app([*words, "--name", "old=Old scanner", "--name", f"{folders[1]}=New & best"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "Old scanner" in told and "New & best" in told and "page_results.tex" in told
    lines = (tmp_path / "page_results.tex").read_text().splitlines()
    results = json.loads((tmp_path / "page_results.json").read_text())
    [row] = [line for line in lines if r"New \& best" in line]
    [numbers] = [entry for name, entry in results.items() if name.endswith("new")]
    assert f"{numbers['dice_mean']:.3f}" in row and f"{numbers['minus_zero_shot']['dice']['mean']:+.3f}" in row
    assert r"\toprule" in "".join(lines) and sum(line.endswith(r"\\") for line in lines) == 4
    for name, text in (("other=x", "not among the runs"), ("old", "no FOLDER=NAME"), ("old= ", "no FOLDER=NAME")):
        with pytest.raises(ConfigError, match=text):
            app([*words, "--name", name], standalone_mode=False)
    again = run_of(tmp_path / "more" / "old", "lora", dice=0.7).folder
    with pytest.raises(ConfigError, match="old is several runs"):
        app(["report", str(folders[0]), str(again), "--name", "old=x", "--output", str(output)], standalone_mode=False)


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ({"settings": []}, "settings: expected Mapping"),
        ({"settings": {"prompt": "label"}}, "settings.prompt: expected Mapping, got 'label'"),
        ({"cases": {"training": "abc"}}, "cases.training: expected list"),
        ({"gate": "0.5"}, "gate: expected int or float"),
        ({"trainable_parameters": True, "seconds": "x"}, "2 problems"),
        ({"collapsed_classes": 3}, "collapsed_classes: expected list"),
    ],
)
def test_a_card_of_wrong_types_is_named(card, text, tmp_path):
    folder = run_of(tmp_path / "run", "lora").folder
    (folder / "run_card.json").write_text(json.dumps({**CARD, **card}))
    with pytest.raises(BundleError, match="no card of this package") as caught:
        RunResult.load(folder)
    assert text in str(caught.value)


def test_names_are_shown_as_they_are(base, tmp_path):
    """A ``$`` begins no formula in a figure, and an escape sequence reaches neither terminal nor page."""
    hostile = "a $x^2$ \x1b[2J\u202e"
    run = run_of(tmp_path / "run", f"x${hostile}$", dataset=hostile, cases=[*CASES[1:], f"\x1b]0;{hostile}"])
    page = write_report(tmp_path / "page.html", title=hostile, runs=[base, run]).read_text(encoding="utf-8")
    for text in (page, table_text([base, run])):
        assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2j" in text.lower()
    assert "$x^2$" in page[page.index("<svg") :]
    (run.folder / "cases.csv").write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(Exception, match="is not a"):
        RunResult.load(run.folder)
