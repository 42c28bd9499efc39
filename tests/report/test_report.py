"""The report: numbers equal those of the files, nothing is fetched, every row says which SAM, figures are not blank."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageColor

from samseg_monai.errors import BundleError, DataError
from samseg_monai.metrics import paired_difference, write_rows
from samseg_monai.pictures import as_seen
from samseg_monai.report.facts import facts
from samseg_monai.report.figures import all_figures, curves, drawn_cases, looks
from samseg_monai.report.montage import OverlayCase, outline, overlay_cases, pick_cases
from samseg_monai.report.names import prompt_text
from samseg_monai.report.page import write_report
from samseg_monai.report.runs import RunResult, told_apart
from samseg_monai.report.summary import in_short
from samseg_monai.report.tables import (
    dice_of_cases,
    differences,
    measures,
    results_json,
    sizes_of_cases,
    table_text,
)

CASES = [f"case{i:02d}" for i in range(9)]
DICE = {"zero_shot": 0.60, "lora": 0.75, "box_ellipse": 0.60}
PICO = "pico, not SAM"


def _rows(values: list[float], classes: tuple[str, ...] = ("tumour",)) -> list[dict]:
    """One row per case and class; the last case is excluded."""
    rows = []
    for case, value in zip(CASES, values, strict=True):
        gone = case == CASES[-1]
        for shift, name in enumerate(classes):
            score = float("nan") if gone else value - 0.1 * shift
            scores = {"dice": score, "hd95_mm": 20 * (1 - score), "nsd_1mm": score - 0.2, "nsd_2mm": score - 0.1}
            flags = {"excluded": gone, "empty_prediction": gone, "empty_reference": gone}
            rows.append({"case": case, "class": name, **scores, **flags, "prediction_ml": 1.0, "reference_ml": 1.0})
    return rows


def _write_run(folder: Path, rows: list[dict], **card: object) -> Path:
    facts = {"sam_variant": "pico", "prompt_source": "label", "prompt_loosen": [0.0, 0.3], "phantoms": True, "seed": 7}
    folder.mkdir(parents=True)
    write_rows(rows, folder / "cases.csv")
    (folder / "metrics.json").write_text(json.dumps({"policy": "honest"}))
    (folder / "run_card.json").write_text(json.dumps({**facts, "git_commit": "abc1234", "seconds": 12.5, **card}))
    return folder


@pytest.mark.parametrize(
    ("name", "arguments", "title"),
    [
        ("lora", {"rank": 4, "decoder": True}, "LoRA, rank 4 + decoder"),
        ("dora", {"rank": 4, "decoder": "lora"}, "DoRA, rank 4 + DoRA in the decoder"),
        ("lora_late_25", {"rank": 8, "last": 0.25}, "LoRA, rank 8, last 25 % of blocks"),
        ("adaptformer", {"width": 64}, "AdaptFormer"),
        ("adaptformer", {"width": 64, "decoder": True}, "AdaptFormer + decoder"),
        ("fact", {"rank": 16, "decoder": "hierarchical"}, "FacT, rank 16 + second decoder"),
        ("h_sam", {"rank": 5, "decoder": "hierarchical"}, "H-SAM, rank 5"),
        ("h_sam", {"rank": 5, "decoder": "h_sam"}, "H-SAM, rank 5, as published"),
        ("medsa", {"width": 64, "depth": 4}, "Medical SAM Adapter, slabs of 4"),
        ("my_late_25", {"rank": 8}, "my late 25"),
        ("ladder", {"side": ".ResNetSide", "decoder": "hierarchical"}, "Ladder (ResNet18 beside SAM) + second decoder"),
    ],
)
def test_titles_tell_how_low_rank_updates_were_placed(name, arguments, title, tmp_path):
    card = {"strategy": {"name": name, "arguments": arguments}}
    run = RunResult.load(_write_run(tmp_path / "run", _rows([0.5] * len(CASES)), **card))
    assert run.title == title and run.short_title == title.replace(" (ResNet18 beside SAM)", "")


def test_prompts_are_told_by_the_law_or_the_file_that_they_come_from():
    drawn = {"loosen": [0.0, 0.3], "tight": 0.25, "shift": 0.1, "shrink": 0.0, "boxes": "loose.json"}
    assert prompt_text("label", {"loosen": [0.0, 0.3]}) == "GT boxes on GT slices, sides enlarged 0 to 30 %"
    assert prompt_text("label", drawn).endswith("0 to 30 %, 25 % of the boxes tight, shifted by up to 10 %")
    # a law of drawing says nothing about boxes of a file, and the file nothing about who has drawn them
    one, other = (prompt_text("json", {**drawn, "shrink": 0.1154}, digest * 64) for digest in "ab")
    assert one == "boxes of a file (loose.json, file aaaaaaaa), then each side moved inwards by 11.5 %"
    assert one != other and prompt_text("none", drawn) == "no prompts" and prompt_text("image", drawn) == "whole slice"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three evaluations: LoRA clearly better than zero-shot, the ellipse as good as it; LoRA's training lies above."""
    tmp_path = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.05, len(CASES))
    made = {}
    for name, mean in DICE.items():
        values = (mean + base + rng.normal(0, 0.01, len(CASES))).tolist()
        arguments = {"rank": 4} if name == "lora" else {}
        card = {"strategy": {"name": name, "arguments": arguments}, "trainable_parameters": 24576 if arguments else 0}
        made[name] = _write_run(tmp_path / name / "evaluation", _rows(values), **card)
    with open(tmp_path / "lora" / "history.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["epoch", "iteration", "name", "value"])
        for epoch in range(1, 7):
            writer.writerow([epoch, 10 * epoch, "train_loss", 1 / epoch])
            writer.writerow([epoch, 10 * epoch, "val_dice", 0.8 - 0.1 / epoch])
            writer.writerow([epoch, 10 * epoch, "dice_std", 0.05])
    (tmp_path / "lora" / "run_card.json").write_text(json.dumps({"status": "completed", "seconds": 99.0, "epochs": 6}))
    return made


@pytest.fixture(scope="module")
def runs(made: dict[str, Path]) -> list[RunResult]:
    return [RunResult.load(made[name]) for name in ("box_ellipse", "zero_shot", "lora")]


def _altered(folder: Path, to: Path, **changes: object) -> RunResult:
    """A copy of a run with other facts on its card."""
    shutil.copytree(folder, to)
    card = json.loads((to / "run_card.json").read_text())
    (to / "run_card.json").write_text(json.dumps({**card, **changes}))
    return RunResult.load(to)


def _overlay(case: str = CASES[0], **changes: object) -> OverlayCase:
    image = np.random.default_rng(0).normal(100, 10, (2, 40, 50))
    masks = {name: np.zeros((2, 40, 50), bool) for name in ("reference", *DICE)}
    for shift, mask in enumerate(masks.values()):
        mask[0, 5 + shift : 15, 30:44] = True
    reference = masks.pop("reference")
    arguments = {"boxes": [[(28, 3, 46, 17)], []], "dice": dict.fromkeys(DICE, 0.5), "slices": (7, 8), **changes}
    return OverlayCase(case, image, reference, masks, window=(80, 120), **arguments)


class _Page(HTMLParser):
    """Collects addresses that a browser would fetch, ids, and the text of tables by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            if name in found:
                self.fetched.append(found[name] or "")
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "table":
            self._table = self.tables.setdefault(found.get("id") or "", [])
        if self._table is not None and tag == "tr":
            self._table.append([])
        if self._table and tag in ("td", "th"):
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        if self._table and self._table[-1] and tag in ("td", "th"):
            self._table[-1][-1] = self._table[-1][-1].strip()

    def handle_data(self, data: str) -> None:
        if self._table and self._table[-1]:
            self._table[-1][-1] += data.strip("\n")


@pytest.fixture(scope="module")
def page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    montage = [_overlay(case) for case in pick_cases(runs[2]).values()]
    path = write_report(folder / "new" / "report.html", title="T <1>", runs=runs, montage=montage, commands=["a && b"])
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(runs: list[RunResult]) -> dict:
    return results_json(runs)


def test_page_fetches_nothing(page):
    fetched = _Page(page).fetched
    assert sum(address.startswith("data:image/jpeg") for address in fetched) == 3
    assert all(address.startswith(("data:", "#")) for address in fetched)
    assert not re.search(r"@import|url\((?!#)|<script src|https?://|style=", page)


def test_ids_of_the_page_are_unique(page):
    ids = _Page(page).ids
    assert len(ids) > 50
    assert len(ids) == len(set(ids))


def test_every_row_of_every_table_of_results_says_pico(page, runs, results):
    tables = _Page(page).tables
    rows = tables["results"][1:] + tables["differences"][1:]
    assert len(rows) == 3 + 2
    assert all(any(PICO in cell for cell in row) for row in rows)
    assert all(PICO in entry["sam"] for entry in results.values())
    text = [line for line in table_text(runs).splitlines() if line.startswith(("Box", "Zero", "LoRA"))]
    assert len(text) == 3 + 2 + 3
    assert all(PICO in line for line in text)


def test_pixels_and_mm_have_columns_of_their_own(made, tmp_path):
    """Images without a known pixel size beside volumes: no number stands under the other unit's heading."""
    renamed = {"hd95_mm": "hd95_px", "nsd_1mm": "nsd_1px", "nsd_2mm": "nsd_2px"}
    rows = [{renamed.get(key, key): value for key, value in row.items()} for row in _rows([0.5] * len(CASES))]
    folder = _write_run(tmp_path / "pixels" / "evaluation", rows, strategy={"name": "unet", "arguments": {}})
    both = [RunResult.load(made["lora"]), RunResult.load(folder)]
    assert measures(both) == ["dice", "hd95_mm", "hd95_px", "nsd_1mm", "nsd_2mm", "nsd_1px", "nsd_2px"]
    page = write_report(tmp_path / "page.html", title="t", runs=both).read_text(encoding="utf-8")
    assert "HD95 px" in page and "HD95 mm" in page and "within 1 or 2 mm or px" in page
    assert "within 1 or 2 px" in write_report(tmp_path / "page.html", title="t", runs=both[1:]).read_text(
        encoding="utf-8"
    )


def test_banner_says_pico_and_phantoms_only_where_the_cards_do(page, made, tmp_path):
    assert "pico, not SAM: phantoms, not patients" in page
    run = _altered(made["lora"], tmp_path / "real", sam_variant="vit_b", phantoms=False)
    other = write_report(tmp_path / "b.html", title="t", runs=[run]).read_text(encoding="utf-8")
    assert "not SAM" not in other
    assert "not patients" not in other
    assert "vit_b" in other


def test_numbers_of_the_table_are_those_of_the_csv(page, made):
    head, *rows = _Page(page).tables["results"]
    row = dict(zip(head, next(row for row in rows if "LoRA" in row[0]), strict=True))
    with open(made["lora"] / "cases.csv", newline="") as stream:
        cases = [case for case in csv.DictReader(stream) if case["excluded"] == "False"]
    dice = [float(case["dice"]) for case in cases]
    assert row["n"] == "8" and row["Excl."] == "1" and row["Trained values"] == "24,576" and row["Train s"] == "99.0"
    assert (row["Dice"], row["SD"]) == (f"{statistics.fmean(dice):.3f}", f"{statistics.pstdev(dice):.3f}")
    assert row["Median"] == f"{statistics.median(dice):.3f}"
    for name, column, places in (("HD95 mm", "hd95_mm", 2), ("NSD 1 mm", "nsd_1mm", 3), ("NSD 2 mm", "nsd_2mm", 3)):
        assert row[name] == f"{statistics.fmean(float(case[column]) for case in cases):.{places}f}"


def test_interval_of_the_mean_is_over_cases(runs, results, page):
    values = [row["dice"] for row in runs[2].rows if not row["excluded"]]
    half = 2.446912 * statistics.stdev(values) / 8**0.5  # Student's t of 6 degrees of freedom, from a printed table
    mean = statistics.fmean(values)
    np.testing.assert_allclose(results["lora"]["dice_ci95"], (mean - half, mean + half), rtol=1e-6)
    words = "Student t over cases, one training seed"
    assert results["lora"]["interval"] == words
    assert page.count(words) == 2 and table_text(runs).count(words) == 2  # beside both tables


def test_results_json_holds_the_promised_keys_and_valid_json(results):
    result = json.loads(json.dumps(results, allow_nan=False))
    assert set(result) == {"zero_shot", "lora", "box_ellipse"}
    for entry in result.values():
        assert {"dice_mean", "dice_std", "n", "sam", "prompt_source"} <= set(entry)
        assert entry["n"] == 8
        assert entry["prompt_source"].startswith("GT boxes on GT slices")
    assert result["lora"]["dice_mean"] == pytest.approx(0.75, abs=0.05)
    assert result["lora"]["seconds_training"] == 99.0


def test_verdicts_of_differences(page, runs):
    found = {(one.run.name, one.measure): one for one in differences(runs)}
    assert found["lora", "dice"].verdict == "better"
    assert found["lora", "hd95_mm"].verdict == "better"  # smaller, and less is better
    assert found["lora", "hd95_mm"].mean < 0
    ellipse = found["box_ellipse", "dice"]
    assert ellipse.verdict == "not distinguishable"
    assert ellipse.low <= 0 <= ellipse.high
    oracle = paired_difference(runs[2].rows, runs[1].rows, value="dice")
    assert found["lora", "dice"].mean == oracle["difference"]
    row = next(row for row in _Page(page).tables["differences"] if "ellipse" in row[0])
    assert "not distinguishable" in row[2]


def test_worse_is_called_worse(made):
    swapped = [RunResult.load(made["lora"], name="zero_shot"), RunResult.load(made["zero_shot"], name="other")]
    assert {one.verdict for one in differences(swapped, only="dice")} == {"worse"}


def test_several_classes_give_their_mean_and_each(tmp_path):
    values = [0.8] * len(CASES)
    folder = _write_run(tmp_path / "two", _rows(values, ("core", "oedema")), strategy="lora")
    result = results_json([RunResult.load(folder)])["lora"]
    assert result["dice_mean"] == pytest.approx(0.75)
    assert result["classes"]["core"]["dice_mean"] == pytest.approx(0.8)
    assert result["classes"]["oedema"]["dice_mean"] == pytest.approx(0.7)


def test_missing_files_are_all_named_with_the_way_to_make_them(tmp_path):
    with pytest.raises(BundleError) as caught:
        RunResult.load(tmp_path / "none")
    for word in ("run_card.json", "metrics.json", "cases.csv", "3 problems", "evaluate.json"):
        assert word in str(caught.value)


def test_case_counted_twice_is_refused(tmp_path):
    rows = _rows([0.5] * len(CASES))
    folder = _write_run(tmp_path / "twice", [*rows, rows[0]], strategy="lora")
    with pytest.raises(BundleError, match="case00, class tumour: 2 rows"):
        RunResult.load(folder)


def test_two_runs_of_one_name_are_refused(made):
    with pytest.raises(BundleError, match="lora: 2 runs"):
        results_json([RunResult.load(made["lora"]), RunResult.load(made["lora"])])


def test_rows_are_told_apart_by_as_many_folders_as_it_takes(tmp_path):
    folders = [tmp_path / name / "run" / "evaluation" for name in ("one", "other", "zero")]
    for folder, strategy in zip(folders, ("lora", "lora", "zero_shot"), strict=True):
        _write_run(folder, _rows([0.5] * len(CASES)), strategy=strategy, seed=3)
    loaded = [RunResult.load(folder) for folder in folders]
    found = told_apart(loaded, folders)
    assert [run.title for run in found] == ["LoRA, seed 3 (one_run)", "LoRA, seed 3 (other_run)", "Zero-shot"]
    nearer = told_apart(loaded, [folder.parent.parent for folder in folders])
    assert [run.name for run in nearer] == ["lora_seed3_one", "lora_seed3_other", "zero_shot"]


def test_run_that_failed_is_called_so_on_the_page(made, tmp_path):
    run = _altered(made["lora"], tmp_path / "failed", status="failed", error="out of memory")
    page = write_report(tmp_path / "c.html", title="t", runs=[run]).read_text(encoding="utf-8")
    assert "evaluation is failed (out of memory)" in page


def test_provenance_says_what_is_not_recorded(page):
    facts = {row[0]: row[1:] for row in _Page(page).tables["provenance"]}
    assert facts["commit"] == ["abc1234"]
    assert facts["seed"] == ["7"]
    assert facts["empty masks (policy)"] == ["honest"]
    assert facts["data hash"] == ["not recorded"]
    assert facts["training: epochs"] == ["-", "-", "6"]


def test_titles_and_commands_are_escaped(page):
    assert "<h1>T &lt;1&gt;</h1>" in page
    assert "a &amp;&amp; b" in page


def test_curves_show_loss_and_mean_dice_but_no_spread(runs):
    loss, dice = (one.svg() for one in curves(runs))
    assert "train loss" in loss and "validation loss" not in loss  # trainings before it was recorded
    assert ": 0.783 at epoch 6" in dice
    assert dice.count('stroke-width="2"') == 2  # the curve and its sample in the legend
    assert curves(runs[:2]) == []


def test_losses_of_training_and_validation_share_a_panel(runs):
    before = curves(runs[2:])[0].svg().count("<path")
    runs[2].history["val_loss"] = {2: 0.7, 4: 0.4, 6: 0.5}
    loss, dice = (one.svg() for one in curves(runs[2:]))
    assert "Training and validation loss" in loss and "train loss" in loss and "validation loss" in loss
    assert loss.count("<path") > before  # a curve of its own, with its markers
    assert ": 0.783 at epoch 6" in dice  # the Dice curve is still the Dice
    assert "Validation Dice by epoch" in dice and "Training and validation loss by epoch" in loss


def test_a_page_of_many_cases_draws_the_worst_and_says_so(made, tmp_path, monkeypatch):
    known = {"training": [f"{n:016x}" for n in range(500)], "validation": []}
    runs = [_altered(made[name], tmp_path / name, cases=known) for name in ("zero_shot", "lora")]
    whole = _svg(runs)
    monkeypatch.setattr("samseg_monai.report.figures.MOST_DRAWN", 3)
    drawn = _svg(runs)
    counted = len(CASES) - 1  # the last one is excluded
    lowest = {case: min(dice_of_cases(run)[case] for run in runs) for case in CASES[:-1]}
    assert drawn_cases([dice_of_cases(run) for run in runs]) == sorted(sorted(lowest, key=lowest.__getitem__)[:3])
    assert whole.count("<use") - drawn.count("<use") == 2 * (counted - 3)
    assert drawn.count(f"n = {counted}") == 2  # the boxes are of all
    page = write_report(tmp_path / "report.html", title="T", runs=runs).read_text(encoding="utf-8")
    assert f"Of {len(CASES)} cases the 3 with the lowest Dice in any strategy are drawn as points" in page
    assert known["training"][199] in page and known["training"][200] not in page
    assert page.count("... and 300 more, in the file run_card.json") == 2


def test_the_dice_of_picked_slices_is_drawn_as_that(runs):
    runs[2].history.update({"picked_val_dice": {2: 0.5, 4: 0.6, 6: 0.55}, "val_dice": {4: 0.58}})
    assert "picked slices: 0.600 at epoch 4" in curves(runs[2:])[1].svg()


def test_box_plot_has_a_point_per_case_and_strategy(runs):
    svg = _svg(runs)
    for index in range(3):
        assert f"var(--c{index})" in svg
    points = re.findall(r'<g id="cases-points\d">(.*?)</g>\s*</g>', svg, re.DOTALL)
    assert len(points) == 3
    assert all(group.count("<use ") == group.count("<title>") == 8 for group in points)
    assert all(f"<title>{case}: Dice " in points[2] for case in CASES[:-1])


def _svg(runs: list[RunResult], name: str = "cases") -> str:
    return next(one for one in all_figures(runs) if one.name == name).svg()


def _viewers(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def _picture(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_viewers_hold_pictures_outlines_and_boxes(page):
    assert len(_viewers(page)) == 3
    for viewer in _viewers(page):
        assert all(_picture(one).shape == (40, 50) and _picture(one).std() > 5 for one in viewer["images"])
        assert viewer["slices"] == [7, 8] and viewer["boxes"] == ["M56 6H92V34H56z", ""] and viewer["bar"] == [10, 20]
        assert viewer["reference"][1] == "" and set(viewer["predictions"]) == set(DICE)
        left, top, width, height = viewer["close"]
        assert left <= 56 and top <= 6 and left + width >= 92 and top + height >= 34


def test_outlines_run_along_the_edges_of_pixels():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    numbers = [int(n) for n in re.findall(r"-?\d+", outline(mask))]
    points = np.cumsum(np.reshape(numbers, (-1, 2)), axis=0)
    # half pixels: columns 2 to 4 have their edges at 4 and 10, rows 1 and 2 at 2 and 6, corners are cut
    assert points.min(axis=0).tolist() == [4, 2] and points.max(axis=0).tolist() == [10, 6]
    assert outline(np.zeros((4, 6))) == "" and outline(mask).count("z") == 1


def test_pictures_are_radiological():
    volume = np.zeros((4, 6))
    volume[3, 5] = 1  # the patient's right, front
    assert as_seen(volume).shape == (6, 4)
    assert as_seen(volume)[0, 0] == 1  # top left for the viewer


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_letters_are_those_of_the_patient_however_the_file_is_stored(directions, made, tmp_path):
    """A bright block at the patient's right, front and head, in files of several orientations."""
    world = np.zeros(
        (12, 10, 4), np.float32
    )  # x to the left... of RAS: from left to right, from back to front, upwards
    world[9:11, 8:9, 3] = 100.0  # large x: right, large y: front
    world += np.random.default_rng(0).uniform(1, 2, world.shape).astype(np.float32)
    flipped = tuple(axis for axis, way in enumerate(directions) if way < 0)
    affine = np.diag([*(2.0 * np.array(directions)), 1])
    run = _altered(made["lora"], tmp_path / "run")
    case = pick_cases(run)["best"]
    (run.folder / "predictions").mkdir()
    for path, array in (("image", world), ("label", world > 50), (f"run/predictions/{case}_seg", world > 50)):
        stored = nib.Nifti1Image(np.flip(array, flipped).astype(np.float32), affine)
        nib.save(stored, tmp_path / f"{path}.nii.gz")
    files = {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")}
    items = [{"case": c, **files, "boxes": [{"slice": 1, "box": [1, 2, 3, 4]}]} for c in CASES]  # as a datalist may say
    for other in {*CASES} - {case}:
        shutil.copy(*(run.folder / "predictions" / f"{name}_seg.nii.gz" for name in (case, other)))
    montage = overlay_cases(run, [run], items, window=(0, 100))
    page = write_report(tmp_path / "page.html", title="t", runs=[run], montage=montage).read_text(encoding="utf-8")
    viewer = _viewers(page)[0]
    picture = _picture(viewer["images"][viewer["shown"]])
    down, across = np.unravel_index(picture.argmax(), picture.shape)
    assert across < picture.shape[1] / 3 and down < picture.shape[0] / 3  # where R is on the left and A above
    edge = re.search(r'<g class="edge".*?</g>', page)[0]
    letters = {letter: (int(x), int(y)) for x, y, letter in re.findall(r'x="(\d+)" y="(\d+)">(.)<', edge)}
    assert letters["R"][0] < letters["A"][0] < letters["L"][0] and letters["A"][1] < letters["R"][1] < letters["P"][1]


def test_best_median_and_worst_are_ranked_by_dice_without_excluded_cases(runs):
    dice = {row["case"]: row["dice"] for row in runs[2].rows if not row["excluded"]}
    ranked = sorted(dice, key=dice.get)
    assert pick_cases(runs[2]) == {"best": ranked[-1], "median": ranked[3], "worst": ranked[0]}


def test_overlay_of_unequal_shapes_is_refused():
    with pytest.raises(DataError, match=r"prediction of lora: shape \(1, 2, 2\)"):
        OverlayCase("c", np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), {"lora": np.zeros((1, 2, 2))}, [[]], {}, (0, 1))


def test_figures_are_files_too_and_long_names_are_not_cut(runs, tmp_path):
    long = [
        replace(run, label=f"{run.title} with a name that is longer than any line of a legend could be") for run in runs
    ]
    shares = {"zero_shot": [0.25, 0.75, 0], "lora": [0.75, 0.25, 0], "box_ellipse": [0, 0, 1]}
    write_report(tmp_path / "p.html", title="t", runs=long, shares=shares, figures_dir=tmp_path / "f")
    names = {"cases", "ranks", "size", "agreement", "loss", "dice"}
    assert {path.name for path in (tmp_path / "f").iterdir()} == {f"{n}.{s}" for n in names for s in ("svg", "png")}
    for name in names:
        assert np.asarray(Image.open(tmp_path / "f" / f"{name}.png")).std() > 5
        assert "var(--" not in (tmp_path / "f" / f"{name}.svg").read_text(encoding="utf-8")
    figure = next(one for one in all_figures(long) if one.name == "size").figure
    figure.canvas.draw()
    width = figure.bbox.width
    assert all(text.get_window_extent().x1 <= width for text in figure.legends[0].get_texts())


def test_few_shot_curves_join_the_runs_of_a_strategy_by_their_training_cases(made, tmp_path):
    few = [
        replace(
            _altered(made["lora"], tmp_path / str(n), cases={"training": [f"{i:016x}" for i in range(n)]}),
            name=f"lora{n}",
        )
        for n in (1, 5, 20)
    ]
    assert "few_shot" not in {one.name for one in all_figures(few[:1])}
    other = {"name": "lora", "arguments": {"rank": 8}}
    eight = [replace(run, name=f"{run.name}_8", card={**run.card, "strategy": other}) for run in few]
    both = next(one for one in all_figures([*few, *eight]) if one.name == "few_shot")
    assert [line.get_label() for line in both.figure.axes[0].lines] == ["LoRA, rank 4", "LoRA, rank 8"]
    faster = [replace(run, name=f"{run.name}_lr") for run in few]
    tiny = [replace(run, name=f"{run.name}_tiny", card={**run.card, "sam_variant": "tiny"}) for run in few]
    unet = [replace(run, name=f"{run.name}_none", card={**run.card, "sam_variant": None}) for run in few]
    named = [f" [{run.variant}]" for run in (few[0], tiny[0])]
    for others, words in ((faster, ["", " (2)"]), (tiny, named), (unet, ["", " (2)"])):
        drawn = next(one for one in all_figures([*few, *others]) if one.name == "few_shot").figure.axes[0].lines
        assert [one.get_label() for one in drawn] == [f"LoRA, rank 4{word}" for word in words]
        assert [len(one.get_xdata()) for one in drawn] == [3, 3]
    [line] = next(one for one in all_figures(few) if one.name == "few_shot").figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 5, 20]
    assert line.get_ydata() == pytest.approx([results_json([run])[run.name]["dice_mean"] for run in few])


def test_sizes_are_volumes_or_areas_and_their_agreement_is_that_of_bland_and_altman(made, tmp_path):
    rows = [{**row, "prediction_ml": 2.0 + i, "reference_ml": 2.0} for i, row in enumerate(_rows([0.5] * len(CASES)))]
    run = RunResult.load(_write_run(tmp_path / "run", rows, strategy="lora"))
    unit, sizes = sizes_of_cases(run)
    assert unit == "mL" and sizes == {case: (2.0 + i, 2.0) for i, case in enumerate(CASES[:-1])}
    drawn = next(one for one in all_figures([run]) if one.name == "agreement")
    heights = [line.get_ydata()[0] for line in drawn.figure.axes[0].lines]
    spread = 1.96 * statistics.stdev(range(8))
    assert heights == pytest.approx([3.5, 3.5 - spread, 3.5 + spread])
    assert "case03: 3.5 mL, difference +3 mL" in drawn.svg()
    image = _altered(run.folder, tmp_path / "image", label_values={"0": "background"})
    assert sizes_of_cases(image)[0] == "mm\u00b2" and sizes_of_cases(image)[1]["case00"] == (2000.0, 2000.0)


def test_summary_names_the_best_and_what_cannot_be_told_from_it(runs):
    told = in_short(runs)
    assert any(line.startswith("LoRA, rank 4 has the highest mean Dice, 0.7") for line in told)
    assert any("Lower by more than chance" in line and "Zero-shot: 0." in line and "ellipse" in line for line in told)
    assert any("GT boxes on GT slices" in line and "made from the answer" in line for line in told)
    assert any("Not distinguishable from it on these cases: Box ellipse" in line for line in in_short(runs[:2])) or any(
        "Not distinguishable from it on these cases: Zero-shot" in line for line in in_short(runs[:2])
    )


def test_budgets_of_trainings_are_said(runs):
    def budget(*batches):
        cards = [{"iterations": count, "settings": {"batch_size": 8}} if count else {} for count in batches]
        rows = [replace(run, training=card) for run, card in zip(runs, cards, strict=True)]
        return [line for line in in_short(rows) if "budget" in line]

    assert budget(None, None, None) == []
    assert budget(None, 2000, 2000) == ["One training budget for all rows that learn: 2,000 batches of 8."]
    first, second = runs[0].title, runs[2].title
    assert budget(2000, None, 50) == [
        f"Training budgets differ: 2,000 batches of 8: {first}; 50 batches of 8: {second}."
    ]


def test_a_tolerance_below_the_voxel_is_said(runs, made, tmp_path):
    assert not any("tolerance" in line for line in in_short(runs, [_overlay()]))
    thick = in_short(runs, [_overlay(spacing_mm=(1.5, 1.5))])
    assert "NSD within 1 mm: the tolerance lies below the voxel of 1.5 mm." in thick
    far = [_altered(made["lora"], tmp_path / "far", voxel_mm=3.0)]  # slices 3 mm apart, of which no picture is shown
    assert "NSD within 1 mm and 2 mm: the tolerance lies below the voxel of 3 mm." in in_short(far)
    rows = [{**row, "nsd_2mm": row["nsd_1mm"]} for row in _rows([0.5] * len(CASES))]
    same = in_short([RunResult.load(_write_run(tmp_path / "run", rows, strategy="lora"))])
    assert any("these tolerances lie below the voxel" in line for line in same)


def test_settings_left_to_their_default_show_its_value(made, tmp_path):
    arguments = {"rank": 4, "alpha": None, "blocks": None}
    run = _altered(made["lora"], tmp_path / "run", strategy={"name": "lora", "arguments": arguments})
    assert dict(facts([run]))["strategy"] == ["name lora, arguments rank 4, alpha 4, blocks all"]


def _luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1 (WCAG 2.2)."""
    parts = [part / 255 for part in ImageColor.getrgb(colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize(("scheme", "surface"), [("light", "#ffffff"), ("dark", "#17191c")])
def test_colours_of_strategies_have_contrast_and_differ(scheme, surface):
    names = [*DICE, "full", "adapter", "ladder"]
    colours = [getattr(look, scheme) for look in looks(names).values()]
    assert len(set(colours)) == len(names)
    for colour in colours:
        dark, light = sorted((_luminance(colour), _luminance(surface)))
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11
    assert len({look.marker for look in looks(names).values()}) == len(names)


def test_a_strategy_keeps_its_colour_on_every_page():
    assert looks(["lora"])["lora"] == looks(["full", "zero_shot", "lora"])["lora"]
