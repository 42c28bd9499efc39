"""Clicks through a bundle: trained on, evaluated, given by a person; and where there can be none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from samseg_monai import bundles
from samseg_monai.bundles.build import compose, render
from samseg_monai.data.files.cases import find_cases
from samseg_monai.data.files.drawn_boxes import boxes_from_masks
from samseg_monai.errors import BundleError, ConfigError, DataError, PromptError, SamsegError
from samseg_monai.export import export_network, read_source
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import dump_settings, read_settings
from samseg_monai.workflow import run_workflow
from tests.bundles.test_planar import SCALE, TINY, config, rows, seen_by_network
from tests.helpers.commands import samseg

LEARNT = {"strategy::rank": 2, "prompt::kind": "points", "prompt::inside": 2, "prompt::outside": 1}
SHORT = {"epochs": 2, "val_interval": 1, "batch_size": 3}
CLICKS = {
    "scan_0004": [
        {"inside": [[12.5, 20.5]], "outside": [[30, 35.25]]},
        {"inside": [[38.5, 20]], "box": [33, 15, 43, 26]},
    ],
    "scan_0005": [[2.5, 8.0, 22.0, 31.0]],
    "scan_0006": [{"inside": [[12, 20], [13, 21]]}],
}


@pytest.fixture(scope="module")
def clicked(pictures, tmp_path_factory) -> tuple[Path, list]:
    """Run folder of a training on clicks, and its evaluation; and what the network was given."""
    folder = tmp_path_factory.mktemp("clicks")
    places = {"dataset_dir": str(pictures), "output_dir": str(folder / "out")}
    with pytest.MonkeyPatch.context() as patch:
        calls = seen_by_network(patch)
        for kind, how in (("train", SHORT), ("evaluate", {})):
            run_workflow(config("lora", kind, folder), {**places, **TINY, **LEARNT, **how})
    return folder / "out", calls


def test_training_draws_clicks_anew_and_evaluation_repeats_its_own(clicked):
    run, calls = clicked
    training = [rows_ for rows_ in calls if len(rows_) == 3]
    assert [drawn.shape for drawn in training] == [(3, 1, 13)] * 2 and np.isnan(training[0][..., :4]).all()
    first, second = (np.sort(drawn[:, 0, 4:6], axis=0) for drawn in training)
    np.testing.assert_array_equal(first, second)  # the depth of the object
    assert not np.array_equal(*(np.sort(drawn[:, 0, 7:9], axis=0) for drawn in training))  # any other place in it
    validated = calls[1], calls[3]
    np.testing.assert_array_equal(*validated)
    assert len(rows(run / "evaluation" / "cases.csv")) == 3
    assert not (run / "evaluation" / "ellipse_cases.csv").exists()  # there is no box to draw it in
    found = RunResult.load(run / "evaluation")
    assert found.prompt_source.startswith("GT clicks on GT slices, 2 inside and 1 outside")
    assert found.boxes == {"source": "label", "kind": "points", "inside": 2, "outside": 1, "seed": 0}


def test_a_persons_clicks_and_boxes_of_one_file_reach_the_network(clicked, pictures, tmp_path, monkeypatch, capsys):
    packed = bundles.pack_bundle(clicked[0], tmp_path / "bundle.zip", sam_checkpoint="random")
    (tmp_path / "images").mkdir()
    for name in CLICKS:
        (tmp_path / "images" / f"{name}.png").write_bytes((pictures / "images" / f"{name}.png").read_bytes())
    (tmp_path / "boxes.json").write_text(json.dumps(CLICKS))
    words = ["predict", packed, "--input", tmp_path / "images", "--output"]
    calls = seen_by_network(monkeypatch)
    assert samseg(monkeypatch, *words, tmp_path / "out", "--boxes", tmp_path / "boxes.json") == 0
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == ["boxes and clicks", "boxes", "clicks"]
    assert "prompt: boxes or clicks; device" in "".join(capsys.readouterr())
    assert [call.shape for call in calls] == [(1, 2, 10), (1, 1, 4), (1, 1, 10)]
    np.testing.assert_allclose(calls[0][0, 0, [4, 5, 7, 8]], np.array([12.5, 20.5, 30, 35.25]) * SCALE, atol=1e-4)
    np.testing.assert_allclose(calls[0][0, 1, :4], np.array([33, 15, 43, 26]) * SCALE, atol=1e-4)
    assert calls[0][0, :, 6].tolist() == [1, 1] and np.isnan(calls[0][0, 1, 7:]).all()
    assert samseg(monkeypatch, *words, tmp_path / "whole", "--whole-slice") == 1
    assert "the source 'image' gives no clicks" in capsys.readouterr().err
    with pytest.raises(BundleError, match="no input for clicks"):
        export_network(read_source(packed, sam_checkpoint="random"), "torch", tmp_path / "exported")


def test_an_evaluation_takes_clicks_of_one_kind(pictures, tmp_path):
    table = {name: [{"inside": [[12, 20]]}] for name in CLICKS}
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out"), "prompt::source": "json"}
    places["prompt::boxes"] = str(tmp_path / "boxes.json")
    (tmp_path / "boxes.json").write_text(json.dumps(table))
    run_workflow(config("zero_shot", "evaluate", tmp_path), {**TINY, **places, "prompt::kind": "points"})
    found = RunResult.load(tmp_path / "out" / "evaluation")
    assert found.prompt_source.startswith("clicks of a file (boxes.json") and found.boxes["kind"] == "points"
    with pytest.raises(PromptError, match="prompts of the file are points, but prompt::kind is 'box'"):
        run_workflow(config("zero_shot", "evaluate", tmp_path), {**TINY, **places})


@pytest.mark.parametrize(
    ("task", "strategy", "settings", "message"),
    [
        ("meningioma", "lora", {"store_size": 32}, "clicks cannot follow slices to a store_size"),
        ("brain_tumour_t1c", "unet_box", {}, "a network without SAM takes no clicks"),
        ("brain_tumour_t1c", "ladder", {}, "a ladder takes no clicks"),
        ("brain_tumour_t1c", "lora", {"source": "image"}, "'image' gives no clicks"),
        ("brain_tumour_t1c", "lora", {"inside": 0}, "greater than or equal to 1"),
    ],
)
def test_clicks_are_refused_where_there_can_be_none(task, strategy, settings, message, tmp_path):
    value = dump_settings(compose(task, strategy))
    value["run"]["store_size"] = settings.get("store_size")
    value["run"]["prompt"] |= {"kind": "points", **{k: v for k, v in settings.items() if k != "store_size"}}
    with pytest.raises(SamsegError, match=message):
        read_settings(value, "here")


def test_a_readme_tells_how_to_click(tmp_path):
    value = dump_settings(compose("brain_tumour_t1c", "lora"))
    value["run"]["prompt"]["kind"] = "both"
    bundles.write_bundle(read_settings(value, "here"), tmp_path)
    text = (tmp_path / "docs" / "README.md").read_text()
    assert "Boxes with clicks are the prompts." in text and '"inside": [[170, 140]]' in text


VOLUMES = {"sam_variant": "tiny", "sam_checkpoint": "random", "image_size": 64, "strategy::rank": 2}


@pytest.fixture(scope="module")
def of_volumes(phantoms, tmp_path_factory) -> tuple[Path, list]:
    """As ``clicked``, of volumes: a training on clicks and its evaluation."""
    folder = tmp_path_factory.mktemp("volumes")
    places = {"dataset_dir": str(phantoms), "output_dir": str(folder / "out")}
    learnt = {"prompt::kind": "points", "prompt::inside": 2, "prompt::outside": 1, **VOLUMES, "crop_mm": None}
    configs = bundles.build_bundle("meningioma", "lora", folder) / "configs"
    with pytest.MonkeyPatch.context() as patch:
        calls = seen_by_network(patch)
        run_workflow([configs / "train.json"], {**places, **learnt, **SHORT, "slices::picker": MAX_AREA})
        given = len(calls)
        both = [configs / "inference.json", configs / "evaluate.json"]
        run_workflow(both, {**places, **learnt, "save_predictions": True})
    return folder / "out", [calls[:given], calls[given:]]


MAX_AREA = {"_target_": "samseg_monai.data.slices.MaxArea"}


def test_volumes_are_learnt_from_and_evaluated_by_clicks_in_each_slice(of_volumes):
    run, (training, evaluation) = of_volumes
    assert all(rows_.shape[1:] == (1, 13) and np.isnan(rows_[..., :4]).all() for rows_ in training + evaluation)
    half = len(training) // 2  # an epoch and its validation, twice
    validated = [np.concatenate(calls[-2:]) for calls in (training[:half], training[half:])]
    np.testing.assert_array_equal(*validated)
    table = rows(run / "evaluation" / "cases.csv")
    assert len(table) and not (run / "evaluation" / "ellipse_cases.csv").exists()
    labelled = sum(len(call) for call in evaluation)
    assert 2 < labelled < 12 * len(table)  # slices without the class had no clicks
    found = RunResult.load(run / "evaluation")
    assert found.prompt_source.startswith("GT clicks on GT slices, 2 inside and 1 outside")


def test_a_persons_clicks_on_volumes(of_volumes, phantoms, tmp_path, monkeypatch, capsys):
    """Clicks, boxes, and both, by voxels of the file; the picture shows them, and wrong files are named at once."""
    packed = bundles.pack_bundle(of_volumes[0], tmp_path / "bundle.zip", sam_checkpoint="random")
    folders = sorted(path for path in phantoms.iterdir() if path.is_dir())[:3]
    (tmp_path / "cases").mkdir()
    for folder in folders:
        (tmp_path / "cases" / folder.name).symlink_to(folder)
    one, two, three = (folder.name for folder in folders)
    table = {
        one: [{"slice": 5, "inside": [[12, 20]], "outside": [[30, 35]]}, {"slice": 6, "box": [9, 9, 15, 20]}],
        two: [{"slices": [4, 6], "box": [9, 9, 15, 20]}],
        three: [{"slice": 5, "inside": [[12, 20], [13, 20]]}],
    }
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(table))
    words = ["predict", packed, "--input", tmp_path / "cases", "--boxes", boxes, "--output"]
    calls = seen_by_network(monkeypatch)
    assert samseg(monkeypatch, *words, tmp_path / "out") == 0
    table_of = rows(tmp_path / "out" / "predictions.csv")
    assert [row["prompt"] for row in table_of] == ["boxes and clicks", "boxes", "clicks"]
    assert [row["prompted_slices"] for row in table_of] == ["2", "3", "1"]
    assert [call.shape for call in calls] == [(2, 1, 10), (3, 4), (1, 1, 10)]
    assert {path.name for path in (tmp_path / "out").glob("*_overlay.png")} == {f"{name}_overlay.png" for name in table}
    told = "".join(capsys.readouterr())
    assert "learnt from boxes alone" not in told and "prompt: boxes or clicks; device" in told
    boxes.write_text(json.dumps({three: table[three]}))
    assert samseg(monkeypatch, *words, tmp_path / "carried", "--propagate", "3") == 1  # the others have no prompts
    assert "clicks" in rows(tmp_path / "carried" / "predictions.csv")[2]["prompt"]
    boxes.write_text(json.dumps({one: [{"slice": 5, "inside": [[99, 2]]}], two: [1, 2, 3, 4], three: {"slice": 5}}))
    assert samseg(monkeypatch, *words, tmp_path / "bad") == 1
    told = capsys.readouterr().err
    assert "has clicks that are not [i, j] within 0 to 31 and 0 to 35: [99, 2]" in told
    assert "its boxes must be a list [{" in told and "got an array of shape (4,): [1, 2, 3, 4]" in told
    assert "got {'slice': 5}" in told


def test_a_bundle_that_knows_boxes_alone_warns_of_clicks(pictures, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "scan_0004.png").write_bytes((pictures / "images" / "scan_0004.png").read_bytes())
    (tmp_path / "boxes.json").write_text(json.dumps({"scan_0004": CLICKS["scan_0004"]}))
    for strategy in ("lora", "zero_shot", "clicked"):
        value = dump_settings(compose("brain_tumour_t1c", strategy.replace("clicked", "lora")))
        value["run"]["prompt"]["kind"] = "points" if strategy == "clicked" else "box"
        listed = json.loads(render(read_settings(value, "here"))["configs/inference.json"])["case_list"]
        knows = "clicks=False" not in listed
        assert knows == (strategy != "lora")
        caplog.clear()
        places = {"scans": ["t1c"], "kind": "images", "boxes": tmp_path / "boxes.json", "clicks": knows}
        find_cases(tmp_path / "images", **places)
        lines = [record.getMessage() for record in caplog.records if "boxes alone" in record.getMessage()]
        assert len(lines) == (not knows) and all("clicks are given (scan_0004)" in line for line in lines)


@pytest.mark.parametrize("kind", ["points", "both"])
def test_zero_shot_clicks_on_one_slice_of_each_volume_are_carried(kind, phantoms, tmp_path):
    configs = bundles.build_bundle("meningioma", "zero_shot", tmp_path) / "configs"
    places = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / "out"), **VOLUMES}
    places.pop("strategy::rank")
    how = {"prompt::kind": kind, "prompt::propagate": 3, "prompt::loosen": [0.0, 0.2], "crop_mm": [16.0, 16.0]}
    with pytest.MonkeyPatch.context() as patch:
        calls = seen_by_network(patch)
        run_workflow([configs / "inference.json", configs / "evaluate.json"], {**places, **how})
    cases = len(rows(tmp_path / "out" / "evaluation" / "cases.csv"))
    clicked = [call for call in calls if call.shape[-1] == 7]
    assert len(clicked) == cases and all(len(call) == 1 for call in clicked)
    assert (tmp_path / "out" / "evaluation" / "ellipse_cases.csv").exists() == (kind == "both")
    found = RunResult.load(tmp_path / "out" / "evaluation")
    assert "carried up to 3 slices" in found.prompt_source


def test_clicks_of_numpy_arrays_are_those_of_lists_and_what_is_no_number_is_told(of_volumes, phantoms, tmp_path):
    loaded = bundles.load_bundle(bundles.pack_bundle(of_volumes[0], tmp_path / "bundle.zip", sam_checkpoint="random"))
    case = min(path for path in phantoms.iterdir() if path.is_dir())
    found, _ = loaded.predict(case, boxes=[{"slice": 5, "inside": [[12, 20]]}])
    again, _ = loaded.predict(case, boxes=[{"slice": np.int64(5), "inside": np.array([[12, 20]])}])
    np.testing.assert_array_equal(again, found)
    for wrong in ([{"slice": 5, "inside": [[float("nan"), 2]]}], [{"slice": 5, "inside": [object()]}], 5):
        with pytest.raises(PromptError, match="boxes are no lists of finite numbers: got "):
            loaded.predict(case, boxes=wrong)


@pytest.fixture
def evaluated(phantoms, tmp_path):
    """Evaluates a zero-shot bundle on the test volumes; gives the run."""
    configs = bundles.build_bundle("meningioma", "zero_shot", tmp_path) / "configs"
    places = {"dataset_dir": str(phantoms), "sam_variant": "tiny", "sam_checkpoint": "random", "image_size": 64}

    def run(name, **given):
        out = {"output_dir": str(tmp_path / name), **{key.replace("__", "::"): value for key, value in given.items()}}
        run_workflow([configs / "inference.json", configs / "evaluate.json"], {**places, **out})
        return RunResult.load(tmp_path / name / "evaluation")

    return run


@pytest.mark.parametrize("where", ["datalist", "file"])
def test_volumes_are_evaluated_by_the_clicks_of_a_datalist_or_file(where, phantoms, tmp_path, monkeypatch, evaluated):
    listed = json.loads((phantoms / "datalist.json").read_text())
    clicks = {item["case"]: [{"slice": 5, "inside": [[12, 20]]}] for item in listed["testing"]}
    for item in listed["testing"] if where == "datalist" else ():
        item["boxes"] = clicks[item["case"]]
    for name, content in {"list.json": listed, "clicks.json": clicks}.items():
        (tmp_path / name).write_text(json.dumps(content))
    given = {"datalist": str(tmp_path / "list.json")} if where == "datalist" else {}
    given |= {} if where == "datalist" else {"prompt__boxes": str(tmp_path / "clicks.json")}
    calls = seen_by_network(monkeypatch)
    found = evaluated("out", prompt__source="json", prompt__kind="points", **given)
    assert [call.shape for call in calls] == [(1, 1, 7)] * len(clicks)
    assert found.prompt_source.startswith("clicks of a file" + (" (clicks.json, file " if where == "file" else ""))
    assert (found.boxes["file"] is None) == (where == "datalist")


def test_volumes_are_evaluated_by_the_boxes_of_a_file(phantoms, tmp_path, evaluated):
    """Boxes that were made of the labels give the numbers of those that an evaluation draws itself."""
    items = json.loads((phantoms / "datalist.json").read_text())["testing"]
    drawn = {item["case"]: next(iter(boxes_from_masks([phantoms / item["label"]]).boxes.values())) for item in items}
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(drawn))
    given = {"prompt__source": "json", "prompt__boxes": str(file)}
    assert evaluated("file", **given).rows == evaluated("label", prompt__loosen=[0.0, 0.0]).rows
    assert (tmp_path / "file" / "evaluation" / "ellipse_cases.csv").exists()
    with pytest.raises(ConfigError, match=r"boxes: are those of a prediction; .* by prompt::boxes"):
        evaluated("no", boxes=str(file))
    with pytest.raises(ConfigError, match="prompt::boxes: boxes are given, but prompt::source is 'label'"):
        evaluated("no", prompt__boxes=str(file))
    one, two = list(drawn)[:2]
    file.write_text(json.dumps({**drawn, one: [], two: [{"slice": 99, "box": [0, 0, 5, 5]}]}))
    with pytest.raises(PromptError, match=rf"(?s)of the volumes.*{one}: no boxes.*{two}: .*\[99, 99\] are not"):
        evaluated("no", **given)
    file.write_text(json.dumps({one: drawn[one]}))
    with pytest.raises(DataError, match="without a box"):
        evaluated("no", **given)
