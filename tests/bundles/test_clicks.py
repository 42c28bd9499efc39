"""Clicks through a bundle: trained on, evaluated, given by a person; and where there can be none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from samseg_monai import bundles
from samseg_monai.bundles.build import compose
from samseg_monai.errors import BundleError, PromptError, SamsegError
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
    assert found.prompt_source.startswith("clicks given by a person (boxes.json") and found.boxes["kind"] == "points"
    with pytest.raises(PromptError, match="prompts of the file are points, but prompt::kind is 'box'"):
        run_workflow(config("zero_shot", "evaluate", tmp_path), {**TINY, **places})


@pytest.mark.parametrize(
    ("task", "strategy", "settings", "message"),
    [
        ("meningioma", "lora", {}, "clicks are for 2-D images"),
        ("brain_tumour_t1c", "unet_box", {}, "a network without SAM takes no clicks"),
        ("brain_tumour_t1c", "ladder", {}, "a ladder takes no clicks"),
        ("brain_tumour_t1c", "lora", {"source": "image"}, "'image' gives no clicks"),
        ("brain_tumour_t1c", "lora", {"inside": 0}, "greater than or equal to 1"),
    ],
)
def test_clicks_are_refused_where_there_can_be_none(task, strategy, settings, message, tmp_path):
    value = dump_settings(compose(task, strategy))
    value["run"]["prompt"] |= {"kind": "points", **settings}
    with pytest.raises(SamsegError, match=message):
        read_settings(value, "here")


def test_a_readme_tells_how_to_click(tmp_path):
    value = dump_settings(compose("brain_tumour_t1c", "lora"))
    value["run"]["prompt"]["kind"] = "both"
    bundles.write_bundle(read_settings(value, "here"), tmp_path)
    text = (tmp_path / "docs" / "README.md").read_text()
    assert "Boxes with clicks are the prompts." in text and '"inside": [[170, 140]]' in text
