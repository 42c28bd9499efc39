"""2-D images from PNG files through a bundle and back to PNG files: train, evaluate, pack, predict."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samseg_monai import bundles, cli
from samseg_monai.errors import ConfigError, DataError, SamsegError
from samseg_monai.handlers import WorstCaseImage
from samseg_monai.handlers.predictions import TABLE
from samseg_monai.networks import SamSegmenter
from samseg_monai.pictures import REFERENCE
from samseg_monai.transforms import SaveImagePngd, ScaleGreysd
from samseg_monai.transforms.saving import overlay_picture
from samseg_monai.workflow import run_workflow
from tests.helpers.commands import samseg
from tests.helpers.pictures import CLASSES, SIZE, make_pictures

TINY = {"sam_variant": "tiny", "sam_checkpoint": "random", "image_size": 64}
SCALE = np.array([64 / 52, 49 / 40] * 2)  # the longer side becomes 64, the other one the next whole number


def config(strategy: str, name: str, folder: Path) -> list[Path]:
    return [bundles.build_bundle("brain_tumour_t1c", strategy, folder) / "configs" / f"{name}.json"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """Run folder of a training and its evaluation with saved predictions."""
    folder = tmp_path_factory.mktemp("run")
    places = {"dataset_dir": str(pictures), "output_dir": str(folder / "out")}
    settings = {**TINY, "strategy::rank": 2, "strategy::decoder": True}
    run_workflow(config("lora", "train", folder), {**places, **settings, "epochs": 2, "val_interval": 1})
    run_workflow(config("lora", "evaluate", folder), {**places, **settings, "save_predictions": True})
    return folder / "out"


def test_training_and_evaluation_write_tables_in_pixels(trained):
    table = rows(trained / "evaluation" / "cases.csv")
    assert [row["case"] for row in table] == ["scan_0004", "scan_0005", "scan_0006"]
    assert {"dice", "hd95_px", "hd95_medpy_px", "nsd_1px", "nsd_2px"} <= set(table[0])
    assert not any(name.endswith("_mm") or name.endswith("_ml") for name in table[0])
    ellipses = rows(trained / "evaluation" / "ellipse_cases.csv")
    assert all(0.3 < float(row["dice"]) < 1 for row in ellipses)


def test_a_report_evaluates_what_was_trained_since(trained, pictures, tmp_path, monkeypatch, capsys):
    run, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(trained, run)
    words = ["report", run, "--output", page, "--sam-checkpoint", "random", "--dataset-dir"]
    table = run / "evaluation" / "cases.csv"
    before = table.read_text()
    os.utime(run / "evaluation" / "metrics.json")  # copies have times of their own
    table.write_text(before.replace("scan_0004", "scan_kept"))
    assert samseg(monkeypatch, *words, str(tmp_path)) == 0  # nothing to evaluate: the data are not asked for
    assert "scan_kept" in table.read_text() and "LoRA, rank 2 + decoder" in capsys.readouterr().out
    late = (run / "evaluation" / "metrics.json").stat().st_mtime + 10
    os.utime(run / "adapter.safetensors", (late, late))
    assert samseg(monkeypatch, *words, "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err and "scan_kept" in table.read_text()
    other = make_pictures(tmp_path / "other", count=8)
    assert samseg(monkeypatch, *words, other) == 1
    assert "not the datalist" in capsys.readouterr().err and "scan_kept" in table.read_text()
    assert samseg(monkeypatch, *words, pictures) == 0
    assert [row["dice"] for row in rows(table)] == [row["dice"] for row in csv.DictReader(io.StringIO(before))]
    assert "Dice" in page.read_text(encoding="utf-8")
    shutil.rmtree(run / "evaluation")
    assert samseg(monkeypatch, *words, pictures) == 0 and table.is_file()
    assert samseg(monkeypatch, "report", run / "evaluation", "--output", page) == 0


def box_file(folder: Path, boxes: dict[str, list[list[float]]]) -> str:
    path = folder / "boxes.json"
    path.write_text(json.dumps(boxes))
    return str(path)


LADDER = {
    "prompt::source": "label",
    "schedule::warmup": 0,
    "low_res_training": False,
    "strategy::side_weights": "random",
}
LADDER["strategy::side"] = {"_target_": "samseg_monai.adapters.ResNetSide", "width": 8}
BOXES = {
    "scan_0004": [[3.25, 9.5, 21.75, 30.125], [33.5, 15.25, 43.0, 27.5]],
    "scan_0005": [[2.5, 8.0, 22.0, 31.0]],
    "scan_0006": [[-2.0, 8.0, 22.0, 55.5]],  # what sticks out is cut off
}


def evaluate(pictures: Path, folder: Path, **settings) -> Path:
    places = {"dataset_dir": str(pictures), "output_dir": str(folder / "out")}
    run_workflow(config("zero_shot", "evaluate", folder), {**TINY, **places, **settings})
    return folder / "out" / "evaluation"


def seen_by_network(monkeypatch) -> list[np.ndarray]:
    """Boxes of every call of the network from now on."""
    calls: list[np.ndarray] = []
    forward = SamSegmenter.forward

    def recorded(self, image, boxes=None, **others):
        calls.append(None if boxes is None else boxes.numpy())
        return forward(self, image, boxes, **others)

    monkeypatch.setattr(SamSegmenter, "forward", recorded)
    return calls


def test_a_box_file_reaches_the_network_times_the_ratio_of_sizes(pictures, tmp_path, monkeypatch):
    calls = seen_by_network(monkeypatch)
    evaluate(pictures, tmp_path, **{"prompt::source": "json", "prompt::boxes": box_file(tmp_path, BOXES)})
    assert len(calls) == 3
    for boxes, found in zip(BOXES.values(), calls, strict=True):
        clipped = np.clip(boxes, 0, (SIZE[1], SIZE[0]) * 2)
        np.testing.assert_allclose(found[0], clipped * SCALE, rtol=0, atol=1e-4)


def test_shrunk_boxes_reach_the_network(pictures, tmp_path, monkeypatch):
    calls = seen_by_network(monkeypatch)
    settings = {"prompt::source": "json", "prompt::boxes": box_file(tmp_path, BOXES), "prompt::shrink": 0.1}
    results = evaluate(pictures, tmp_path, **settings, calibration=True)
    assert all(0 <= float(row["ece"]) <= 1 and 0 < float(row["brier"]) < 1 for row in rows(results / "cases.csv"))
    assert "ece" not in rows(results / "ellipse_cases.csv")[0]
    np.testing.assert_allclose(calls[1][0], np.array([[4.45, 10.3, 20.05, 28.7]]) * SCALE, rtol=0, atol=1e-4)


def test_validation_uses_the_boxes_of_the_file_and_training_draws_its_own(pictures, tmp_path, monkeypatch):
    calls = seen_by_network(monkeypatch)
    settings = {"epochs": 1, "val_interval": 1, "strategy::rank": 2, "batch_size": 3, "prompt::source": "json"}
    settings["prompt::boxes"] = box_file(tmp_path, {"scan_0003": [[1.5, 2.5, 30.0, 31.0]]})
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out")}
    run_workflow(config("lora", "train", tmp_path), {**TINY, **places, **settings})
    assert calls[0].shape == (3, 1, 4) and not (calls[0] == calls[0].round()).all()
    np.testing.assert_allclose(calls[1], np.array([[[1.5, 2.5, 30.0, 31.0]]]) * SCALE, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bank", [False, True])
def test_boxes_are_drawn_anew_in_every_epoch_even_on_stored_embeddings(bank, pictures, tmp_path, monkeypatch):
    """One look at each image has one embedding, but a person would not draw the same box again."""
    calls = seen_by_network(monkeypatch)
    settings = {"epochs": 3, "val_interval": 0, "strategy::rank": 2, "batch_size": 3}
    if bank:
        del settings["strategy::rank"]
        settings |= {"embeddings::cache_dir": str(tmp_path / "bank"), "embeddings::variants": 1, **LADDER}
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out")}
    files = config("ladder" if bank else "lora", "train", tmp_path)
    run_workflow(files, {**TINY, **places, **settings, "prompt::tight": 0.0})
    assert len(calls) == 3
    drawn = np.concatenate([boxes[:, 0] for boxes in calls])
    assert len(np.unique(drawn.round(3), axis=0)) == 9
    assert (drawn[:, 2:] > drawn[:, :2]).all() and drawn.min() >= 0 and drawn.max() <= 64


def test_results_name_the_box_file_by_its_content_and_not_by_its_place(pictures, tmp_path):
    given = {"prompt::source": "json", "prompt::boxes": box_file(tmp_path, BOXES)}
    results = evaluate(pictures, tmp_path, **given)
    card = json.loads((results / "run_card.json").read_text())
    assert card["boxes_sha256"] == hashlib.sha256((tmp_path / "boxes.json").read_bytes()).hexdigest()
    assert card["settings"]["prompt"]["boxes"] == "boxes.json" and card["label_values"] == CLASSES
    texts = [p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".csv")]
    assert len(texts) > 5 and not any(str(tmp_path) in text for text in texts)


def test_components_are_prompts_of_their_own_in_training_and_evaluation(pictures, tmp_path, monkeypatch):
    calls = seen_by_network(monkeypatch)
    settings = {"epochs": 1, "val_interval": 1, "strategy::rank": 2, "batch_size": 3, "prompt::per_component": True}
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out")}
    run_workflow(config("lora", "train", tmp_path), {**TINY, **places, **settings})
    assert calls[0].shape == (3, 8, 4) and np.isnan(calls[0][:, 2:]).all() and not np.isnan(calls[0][:, :2]).any()
    assert calls[1].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("boxes", "settings", "message"),
    [
        ({"scan_0004": [[1, 1, 9, 9]]}, {"prompt::source": "json"}, "scan_0005"),
        (BOXES, {}, "prompt::source to 'json'"),
        (None, {"prompt::source": "json"}, "prompt::boxes"),
        (None, {"prompt::source": "mask"}, "label, json"),
    ],
)
def test_missing_and_contradicting_boxes_are_said(pictures, tmp_path, boxes, settings, message):
    given = {} if boxes is None else {"prompt::boxes": box_file(tmp_path, boxes)}
    with pytest.raises(SamsegError, match=message):
        evaluate(pictures, tmp_path, **given, **settings)


def test_kept_embeddings_serve_other_boxes(pictures, tmp_path):
    cache = {"embeddings::cache_dir": str(tmp_path / "bank"), "prompt::source": "json"}
    found = []
    for number, boxes in enumerate((BOXES, {**BOXES, "scan_0005": [[12.0, 3.0, 44.0, 35.0]]})):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(
            rows(evaluate(pictures, folder, **cache, **{"prompt::boxes": box_file(folder, boxes)}) / "cases.csv")
        )
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("decoder", {"embeddings::cache_dir": "bank", "embeddings::variants": 1}),
        ("full", {"ema": 0.5, "learning_rates::layer_decay": 0.8, "checkpointing": True}),
        ("norm", {"learning_rates::weight_decay_matrices_only": True}),
        ("bias", {}),
        ("lora", {"strategy::rank": 2, "strategy::dora": True, "ema": 0.5, "checkpointing": True}),
    ],
)
def test_mobile_sams_encoder_goes_the_whole_way(strategy, settings, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out")}
    shared = {**places, **TINY, "sam_variant": "tiny_t"}
    network = {key: value for key, value in settings.items() if key.startswith("strategy")}
    run_workflow(config(strategy, "train", tmp_path), {**shared, **settings, "epochs": 1, "val_interval": 1})
    run_workflow(config(strategy, "evaluate", tmp_path), {**shared, **network})
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["sam_variant"] == "tiny_t" and card["values"] > 0
    assert len(rows(tmp_path / "out" / "evaluation" / "cases.csv")) == 3
    if strategy == "decoder":
        assert any((tmp_path / "bank").rglob("*"))


def test_evaluation_saves_images_with_the_values_of_the_labels(trained):
    folder = trained / "evaluation" / "predictions"
    for row in rows(trained / "evaluation" / "cases.csv"):
        with (
            Image.open(folder / f"{row['case']}_seg.png") as seg,
            Image.open(folder / f"{row['case']}_overlay.png") as top,
        ):
            assert seg.mode == "L" and top.mode == "RGB" and seg.size == top.size == SIZE[::-1]
            values = np.asarray(seg)
        assert set(np.unique(values)) <= {0, 255}
        assert (values == 255).sum() == float(row["prediction_px"])


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory) -> Path:
    return bundles.pack_bundle(trained, tmp_path_factory.mktemp("packed") / "bundle.zip", sam_checkpoint="random")


def predict(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["samseg", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_packed_bundle_predicts_as_it_was_evaluated(trained, packed, pictures, tmp_path, monkeypatch):
    """The same boxes give the same images, values included, without a datalist and without weights at hand."""
    names = ["scan_0004", "scan_0005", "scan_0006"]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / f"{name}.png").write_bytes((pictures / "images" / f"{name}.png").read_bytes())
    boxes = box_file(tmp_path, BOXES)
    again = {"prompt::source": "json", "prompt::boxes": boxes, "save_predictions": True}
    places = {"dataset_dir": str(pictures), "output_dir": str(trained), "results_dir": str(tmp_path / "again")}
    run_workflow([trained / "bundle" / "configs" / "evaluate.json"], {**places, **again, "sam_checkpoint": "random"})
    out = tmp_path / "out"
    assert predict(monkeypatch, packed, "--input", tmp_path / "images", "--boxes", boxes, "--output", out) == 0
    for name in names:
        first, second = (folder / f"{name}_seg.png" for folder in (out, tmp_path / "again" / "predictions"))
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
        assert (out / f"{name}_overlay.png").is_file()


def test_the_worst_image_of_a_validation_stands_upright_without_sides(tmp_path):
    """A disc at the upper right, missed: rows stay rows, nothing is mirrored, and no R and L are claimed."""
    reference = np.zeros((60, 80, 1), dtype=np.float32)
    reference[10:20, 55:70] = 1
    grid = {"affine": np.diag([1.0, 1.0, 1.0, 1.0])}
    item = {"case": "a", "image": MetaTensor(50 * reference[None], **grid)}
    item |= {"reference": MetaTensor(reference[None], **grid), "pred": MetaTensor(0 * reference[None], **grid)}
    engine = Engine(lambda engine, batch: batch)
    WorstCaseImage(tmp_path, classes=["tumour"]).attach(engine)
    engine.run([[item]], max_epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    stored = events.Images("validation/worst_case")[0].encoded_image_string
    picture = np.asarray(Image.open(io.BytesIO(stored)))[:288]
    rows_, columns = np.nonzero((picture == REFERENCE).all(axis=2))
    scale = 384 / 80
    assert rows_.min() / scale == pytest.approx(10, abs=0.2) and (rows_.max() + 1) / scale == pytest.approx(20, abs=0.2)
    assert columns.min() / scale == pytest.approx(55, abs=0.2)
    assert (picture[120:170, :30] == picture[0, 0]).all()


def test_overlay_shows_the_outline_and_the_boxes():
    labels = np.zeros((30, 40), dtype=int)
    labels[5:15, 10:20] = 1
    picture = np.asarray(overlay_picture(np.full((30, 40, 1), 90.0), labels, torch.tensor([[2.4, 3.0, 30.6, 20.0]])))
    assert picture.shape == (30, 40, 3)
    assert tuple(picture[5, 12]) == (230, 159, 0) and tuple(picture[9, 14]) == (90, 90, 90)
    assert tuple(picture[3, 8]) == tuple(picture[12, 30]) == (86, 180, 233)
    assert tuple(picture[25, 35]) == (90, 90, 90)


def test_values_of_several_classes_and_of_sixteen_bits(tmp_path):
    image = MetaTensor(torch.zeros(1, 4, 3, 1), meta={"filename_or_obj": "absent.png"})
    numbers = torch.tensor([0, 1, 2, 1]).reshape(1, 4, 1, 1).expand(1, 4, 3, 1)
    for values, mode in (({"0": "background", "7": "a", "9": "b", "8": "b"}, "L"), ({"3": "a", "1000": "b"}, "I;16")):
        save = SaveImagePngd("pred", ["a", "b"], tmp_path, labels=values, overlay=False)
        save({"case": "x", "pred": MetaTensor(numbers), "image": image})
        with Image.open(tmp_path / "x_seg.png") as stored:
            assert stored.mode == mode
            found = np.asarray(stored)
        wanted = [min(int(v) for v, name in values.items() if name == kind) for kind in ("a", "b")]
        assert found[:, 0].tolist() == [0, wanted[0], wanted[1], wanted[0]]


def test_masks_whose_background_is_not_zero_are_written_with_its_value(tmp_path):
    image = MetaTensor(torch.zeros(1, 4, 3, 1), meta={"filename_or_obj": "absent.png"})
    numbers = torch.tensor([0, 1, 0, 1]).reshape(1, 4, 1, 1).expand(1, 4, 3, 1)
    save = SaveImagePngd("pred", ["a"], tmp_path, labels={"0": "a", "255": "background"}, overlay=False)
    save({"case": "x", "pred": MetaTensor(numbers), "image": image})
    with Image.open(tmp_path / "x_seg.png") as stored:
        assert np.asarray(stored)[:, 0].tolist() == [255, 0, 255, 0]
    with pytest.raises(ConfigError, match="values of their own"):
        SaveImagePngd("pred", ["a"], tmp_path, labels={"0": "a"})


def test_predictions_that_are_none_and_names_that_lead_elsewhere_are_refused(tmp_path):
    save = SaveImagePngd("pred", ["a"], tmp_path / "out", overlay=False)
    for pred, name in ((torch.full((1, 4, 4, 1), 0.5), "x"), (torch.full((1, 4, 4, 1), 2.0), "x"),
                       (torch.ones(1, 4, 4, 2), "x"), (torch.ones(1, 4, 4, 1), "../x")):  # fmt: skip
        with pytest.raises(DataError, match="x"):
            save({"case": name, "pred": pred})
    with pytest.raises(ConfigError, match="no value for b"):
        SaveImagePngd("pred", ["a", "b"], tmp_path, labels={"1": "a"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("image", "expected"), [([0.0, 50, 200], [0, 50, 200]), ([0.0, 2000, 4000], [0, 127.5, 255])])
def test_images_of_eight_bits_keep_their_greys_and_others_are_stretched(image, expected):
    stretched = ScaleGreysd("image")({"image": torch.tensor(image)})["image"]
    torch.testing.assert_close(stretched, torch.tensor(expected, dtype=torch.float32), atol=11, rtol=0)
    unit = ScaleGreysd("image", top=1)({"image": torch.tensor(image)})["image"]
    torch.testing.assert_close(unit * 255, stretched)


@pytest.mark.parametrize("strategy", ["decoder", "full", "unet", "unet_box", "unet_crop", "ellipse"])
def test_every_strategy_of_the_comparison_learns_images_from_boxes(strategy, pictures, tmp_path):
    """One epoch with a validation, whose loss is written down, and an evaluation beside the box's ellipse."""
    plain = strategy.startswith("unet") or strategy == "ellipse"
    settings = {"image_size": 64, **({} if plain else TINY)}
    places = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out")}
    run_workflow(config(strategy, "train", tmp_path), {**places, **settings, "epochs": 1, "val_interval": 1})
    history = {row["name"]: float(row["value"]) for row in rows(tmp_path / "out" / "history.csv")}
    assert 0 < history["val_loss"] < 20
    run_workflow(config(strategy, "evaluate", tmp_path), {**places, **settings})
    results = tmp_path / "out" / "evaluation"
    assert len(rows(results / "cases.csv")) == 3 and "hd95_px" in rows(results / "cases.csv")[0]
    assert (results / "ellipse_cases.csv").is_file() == (strategy != "unet")


def test_colour_images_are_three_scans_of_one_file(tmp_path):
    data = make_pictures(tmp_path / "colour", colour=True)
    settings = {"scans": ["red", "green", "blue"], "scan_mode": "channels", "input_scale": "sam"}
    results = evaluate(data, tmp_path, **settings, save_predictions=True)
    assert len(rows(results / "cases.csv")) == 3
    with Image.open(data / "images" / "scan_0005.png") as image:
        stored = np.asarray(image)
    with Image.open(results / "predictions" / "scan_0005_overlay.png") as top:
        assert (np.asarray(top) == stored).all(axis=2).mean() > 0.6  # all but lines


@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 1)])
def test_flat_nifti_gives_a_png_of_the_picture_that_stands_upright(shape, packed, pictures, tmp_path, monkeypatch):
    """x is the first axis of the file and runs along the picture's columns."""
    with Image.open(pictures / "images" / "scan_0004.png") as image:
        array = np.asarray(image)
    (tmp_path / "in").mkdir()
    stored = array.T.reshape(shape[1], shape[0], *shape[2:])
    nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "in" / "scan_0004.nii.gz")
    boxes = box_file(tmp_path, {"scan_0004": BOXES["scan_0004"]})
    for source, out in ((tmp_path / "in", "a"), (pictures / "images" / "scan_0004.png", "b")):
        assert predict(monkeypatch, packed, "--input", source, "--boxes", boxes, "--output", tmp_path / out) == 0
    first, second = (np.asarray(Image.open(tmp_path / out / "scan_0004_seg.png")) for out in "ab")
    assert first.shape == SIZE and np.array_equal(first, second)


def test_results_lie_where_they_were_asked_for_whatever_the_folder_is_called(packed, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "study #2 $x 'y' @z %w \\ é"
    folder.mkdir()
    (folder / "new.png").write_bytes((pictures / "unlabelled" / "new.png").read_bytes())
    (folder / "boxes #1.json").write_text('{"new": [[1, 2, 30, 40]]}')
    words = ["--input", folder, "--boxes", folder / "boxes #1.json", "--output", folder / "out"]
    assert predict(monkeypatch, packed, *words) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["new_overlay.png", "new_seg.png", TABLE]


def test_the_table_of_images_has_areas(packed, pictures, tmp_path, monkeypatch):
    """In pixels, and in mm^2 where the file says how large they are."""
    with Image.open(pictures / "images" / "scan_0004.png") as image:
        array = np.asarray(image)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(array.T, np.diag([0.5, 0.4, 1, 1])), tmp_path / "in" / "flat.nii.gz")
    (tmp_path / "in" / "scan_0004.png").write_bytes((pictures / "images" / "scan_0004.png").read_bytes())
    boxes = box_file(tmp_path, dict.fromkeys(("flat", "scan_0004"), BOXES["scan_0004"]))
    words = ["--input", tmp_path / "in", "--boxes", boxes, "--output", tmp_path / "out"]
    assert predict(monkeypatch, packed, *words) == 0
    with (tmp_path / "out" / TABLE).open(newline="") as file:
        flat, plain = csv.DictReader(file)
    made = {name: Image.open(tmp_path / "out" / f"{name}_seg.png") for name in ("flat", "scan_0004")}
    pixels = {name: int(np.count_nonzero(image)) for name, image in made.items()}
    assert [flat["tumour_px"], plain["tumour_px"]] == [str(pixels["flat"]), str(pixels["scan_0004"])]
    assert float(flat["tumour_mm2"]) == pytest.approx(0.2 * pixels["flat"]) and plain["tumour_mm2"] == ""
    assert flat["spacing_mm"] == "0.4 x 0.5" and plain["spacing_mm"] == "" and plain["prompt"] == "boxes"


@pytest.mark.parametrize("box", [[60, 2, 70, 9], [3, 2, 3.0000001, 9]])
def test_images_without_boxes_are_predicted_as_a_whole_and_bad_boxes_cost_one_image(
    box, packed, pictures, tmp_path, monkeypatch, capsys
):
    words = ["--input", pictures / "unlabelled", "--output", tmp_path / "whole"]
    assert predict(monkeypatch, packed, *words) == 1 and "--whole-slice" in capsys.readouterr().err
    assert predict(monkeypatch, packed, *words, "--whole-slice") == 0
    assert (tmp_path / "whole" / "new_overlay.png").is_file()
    boxes = box_file(tmp_path, {**BOXES, "scan_0005": [box]})
    found = [pictures / "images" / f"{name}.png" for name in BOXES]
    (tmp_path / "in").mkdir()
    for path in found:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    words = ["--input", tmp_path / "in", "--boxes", boxes, "--output", tmp_path / "out"]
    assert predict(monkeypatch, packed, *words) == 1
    assert "scan_0005" in capsys.readouterr().err
    made = sorted(path.name for path in (tmp_path / "out").glob("*_seg.png"))
    assert made == ["scan_0004_seg.png", "scan_0006_seg.png"]
