"""The story of box-prompted meningioma: zero-shot against LoRA, on brain phantoms with pico SAM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from samseg_monai.cli.story import Story, write_results

TASK = "meningioma"
FOLDER = "demo"
CASES = 44
FRACTIONS = (0.6, 0.1, 0.3)  # of the phantoms, to train, choose the epoch and test
NOTE = (
    "Every number here comes from generated phantoms and from pico, a network of two million parameters that this "
    "project trained on drawn shapes. It shows that the pipeline works and learns. It says nothing about SAM or about "
    "patients."
)


def tell(output: Path, *, cases: int, epochs: int | None, seed: int) -> tuple[list[str], str]:
    """Run the whole story; see ``samseg demo``.

    Args:
        output: folder for everything.
        cases: labelled phantoms, at least 8.
        epochs: of the LoRA training; None takes those of the bundle's demo.json.
        seed: of phantoms, split and training.
    Returns: the shell lines that do the same, and the table as text.
    """
    from samseg_monai.bundles import build_bundle

    story = Story()
    configs = {name: build_bundle(TASK, name, output / "bundles") / "configs" for name in ("zero_shot", "lora")}
    data = _phantoms(story, output, cases, seed)
    runs = {name: output / "runs" / name for name in configs}
    shared: dict[str, Any] = {"dataset_dir": str(data), "seed": seed}
    _evaluate(story, "zero-shot: evaluate", configs["zero_shot"], runs["zero_shot"], shared)
    training = {**shared, "output_dir": str(runs["lora"]), **({} if epochs is None else {"epochs": epochs})}
    story.run("LoRA: train", [configs["lora"] / name for name in ("train.json", "demo.json")], training)
    _evaluate(story, "LoRA: evaluate", configs["lora"], runs["lora"], shared)
    _pack_and_predict(story, output, runs["lora"], data, seed)
    return story.commands, _write_report(story, output, runs, data)


def _phantoms(story: Story, output: Path, cases: int, seed: int) -> Path:
    from samseg_monai.data.brats import prepare_brats_men
    from samseg_monai.data.phantoms import write_brats_cases

    data = output / "phantoms"
    story.step(
        f"phantoms: {cases} labelled, 1 unlabelled",
        f"samseg phantom brats --cases {cases} --unlabelled 1 --seed {seed} --output {data}",
    )
    write_brats_cases(data, cases, seed=seed, unlabelled=1, progress=True)
    parts = ",".join(map(str, FRACTIONS))
    story.step(
        "datalist, split by patient",
        f"samseg prepare brats-men --src {data} --output {data / 'datalist.json'} --fractions {parts} --seed {seed}",
    )
    prepare_brats_men(data, data / "datalist.json", fractions=FRACTIONS, seed=seed)
    return data


def _evaluate(story: Story, what: str, configs: Path, run: Path, shared: dict[str, Any]) -> None:
    files = [configs / name for name in ("evaluate.json", "demo.json")]
    story.run(what, files, {**shared, "output_dir": str(run), "save_predictions": True})


def _pack_and_predict(story: Story, output: Path, run: Path, data: Path, seed: int) -> None:
    """Pack the run, unpack the ZIP as its receiver would, and segment the unlabelled case with boxes from a person."""
    from samseg_monai.bundles import pack_bundle
    from samseg_monai.cli.bundle import predict

    archive = output / f"{TASK}_segmentation_lora.zip"
    story.step("pack", f"samseg bundle pack {run} --output {archive}")
    pack_bundle(run, archive)
    unlabelled = data / "unlabelled"
    boxes = output / "boxes.json"
    boxes.write_text(json.dumps(_drawn_boxes(unlabelled, seed), indent=1), encoding="utf-8")
    story.step(
        "predict the unlabelled case with the packed bundle",
        f"samseg predict {archive} --input {unlabelled} --boxes {boxes} --output {output / 'predictions'}",
    )
    predict(archive, input=unlabelled, output=output / "predictions", boxes=boxes)


def _drawn_boxes(folder: Path, seed: int) -> dict[str, Any]:
    """Stand in for a person: one loose box over the range of slices where the (unwritten) label of a phantom lies."""
    from samseg_monai.data.phantoms import make_case

    found = {}
    for case in sorted(p.name for p in folder.iterdir() if p.is_dir()):
        where = np.argwhere(make_case([seed, int(case.split("-")[2])])["seg"] > 0)
        low, high = where.min(0), where.max(0)
        margin = np.maximum(1, (high - low) // 10)
        box = [int(v) for v in (*(low - margin)[:2].clip(0), *(high + margin)[:2])]
        found[case] = [{"slices": [int(low[2]), int(high[2])], "box": box}]
    return found


def _write_report(story: Story, output: Path, runs: dict[str, Path], data: Path) -> str:
    from samseg_monai.cli.overlays import overlay_cases
    from samseg_monai.data.datalists import load_datalist
    from samseg_monai.report import RunResult

    folders = {name: run / "evaluation" for name, run in runs.items()}
    history = runs["lora"] / "history.csv"
    results = [
        RunResult.load(folders["zero_shot"], name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(folders["zero_shot"], name="zero_shot"),
        RunResult.load(folders["lora"], name="lora", history=history.resolve()),
    ]
    items = load_datalist(data / "datalist.json", data, "testing")
    return write_results(
        output,
        results,
        title="samseg-monai demo: box-prompted tumour segmentation",
        commands=story.commands,
        montage=overlay_cases(results[2], folders, items, scan=1),
        notes={"What this is": NOTE},
    )
