"""The story of box-prompted meningioma: zero-shot against LoRA, on brain phantoms with pico SAM or MobileSAM."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samseg_monai.demo.story import Story, write_results
from samseg_monai.files import write_json
from samseg_monai.report.names import PICO_TEXT

TASK = "meningioma"
FOLDER = "demo"
CASES = 44
# SAM's weights know t1c's bright tumours; a fourth of the passes of four scans (scan_mode "mean_logits")
MOBILE: dict[str, Any] = {"sam_variant": "vit_t", "image_size": 512, "scans": ["t1c"]}
MOBILE_LORA: dict[str, Any] = {"strategy::rank": 4, "strategy::decoder": False}
MOBILE_TRAINING: dict[str, Any] = {"lr": 0.005}
FRACTIONS = (0.6, 0.1, 0.3)  # of the phantoms, to train, choose the epoch and test
TITLE = "samseg-monai demo: box-prompted tumour segmentation"
NOTE = (
    "Every number here comes from generated phantoms and from {sam}. It shows that the pipeline works and learns. It "
    "says nothing about {unsaid} or about patients."
)


@dataclass(frozen=True)
class DemoModel:
    """Which SAM the story is told with: words for the page, and what differs from the bundles' demo.json."""

    text: str = PICO_TEXT
    unsaid: str = "SAM"  # what the numbers say nothing about, beside patients
    title: str = ""  # behind the page's title
    settings: dict[str, Any] = field(default_factory=dict)  # of every config; without weights those of the package
    trained: dict[str, Any] = field(default_factory=dict)  # of what is trained, in training and evaluation
    training: dict[str, Any] = field(default_factory=dict)  # of the training alone


PICO = DemoModel()


def mobile_sam(checkpoint: str | None = None) -> DemoModel:
    """MobileSAM (``vit_t``) for the story; ``checkpoint`` is its file, None looks where SAM's weights lie.

    A forward pass takes fifty times as long as pico's: one scan in place of four, and no decoder to train, keep the
    whole story within minutes on two cores.

    Raises: WeightsError if the weights are not on this machine: a demo downloads nothing.
    """
    from samseg_monai.report.runs import sam_text
    from samseg_monai.sam.weights import RANDOM, find_weights, sha256_of

    path = str(find_weights("vit_t", checkpoint, download=False, key="--sam-checkpoint"))
    name = sam_text("vit_t", RANDOM if path == RANDOM else sha256_of(path))
    text = f"{name} at {MOBILE['image_size']} pixels, which sees the scan {MOBILE['scans'][0]} alone"
    settings = {**MOBILE, "sam_checkpoint": path}
    return DemoModel(text, "SAM's larger networks", f", {name}", settings, MOBILE_LORA, MOBILE_TRAINING)


def tell(output: Path, *, cases: int, epochs: int | None, seed: int, sam: DemoModel = PICO) -> tuple[list[str], str]:
    """Run the whole story (see ``samseg demo``); returns the shell lines that do the same, and the table as text."""
    from samseg_monai.bundles import build_bundle

    story = Story()
    configs = {name: build_bundle(TASK, name, output / "bundles") / "configs" for name in ("zero_shot", "lora")}
    data = _phantoms(story, output, cases, seed)
    runs = {name: output / "runs" / name for name in configs}
    shared: dict[str, Any] = {"dataset_dir": str(data), "seed": seed, **sam.settings}
    zero_shot = {**shared, "output_dir": str(runs["zero_shot"])}
    story.evaluate_demo("zero-shot: evaluate", configs["zero_shot"], zero_shot)
    shared |= sam.trained
    training = {**sam.training, **({} if epochs is None else {"epochs": epochs})}
    shared["output_dir"] = str(runs["lora"])
    story.run("LoRA: train", [configs["lora"] / name for name in ("train.json", "demo.json")], {**shared, **training})
    story.evaluate_demo("LoRA: evaluate", configs["lora"], shared)
    boxes, archive = output / "boxes.json", output / f"{TASK}_segmentation_lora.zip"
    write_json(boxes, _drawn_boxes(data / "unlabelled", seed), indent=1)
    story.pack_and_predict(
        runs["lora"], archive, data / "unlabelled", boxes=boxes, weights=sam.settings.get("sam_checkpoint")
    )
    return story.commands, _write_report(story, output, runs, data, sam)


def _phantoms(story: Story, output: Path, cases: int, seed: int) -> Path:
    from samseg_monai.data.datalists.brats import prepare_brats_men
    from samseg_monai.demo.brain_phantoms import write_brats_cases

    data = story.phantoms("brats", write_brats_cases, output, cases, seed)
    parts = ",".join(map(str, FRACTIONS))
    story.step(
        "datalist, split by patient",
        f"samseg prepare brats-men --src {data} --output {data / 'datalist.json'} --fractions {parts} --seed {seed}",
    )
    prepare_brats_men(data, data / "datalist.json", fractions=FRACTIONS, seed=seed)
    return data


def _drawn_boxes(folder: Path, seed: int) -> dict[str, Any]:
    """Stand in for a person: one loose box over the range of slices where the (unwritten) label of a phantom lies."""
    from samseg_monai.demo.brain_phantoms import make_case

    found = {}
    for case in sorted(p.name for p in folder.iterdir() if p.is_dir()):
        where = np.argwhere(make_case([seed, int(case.split("-")[2])])["seg"] > 0)
        low, high = where.min(0), where.max(0)
        margin = np.maximum(1, (high - low) // 10)
        box = [int(v) for v in (*(low - margin)[:2].clip(0), *(high + margin)[:2])]
        found[case] = [{"slices": [int(low[2]), int(high[2])], "box": box}]
    return found


def _write_report(story: Story, output: Path, runs: dict[str, Path], data: Path, sam: DemoModel) -> str:
    from samseg_monai.report.montage import cases_of_data
    from samseg_monai.report.runs import RunResult

    folders = {name: run / "evaluation" for name, run in runs.items()}
    results = [
        RunResult.load(folders["zero_shot"], name="box_ellipse", cases="ellipse_cases.csv"),
        RunResult.load(folders["zero_shot"], name="zero_shot"),
        RunResult.load(folders["lora"], name="lora"),
    ]
    montage, notes = cases_of_data(results, [data / "datalist.json"], data)
    return write_results(
        output,
        results,
        title=TITLE + sam.title,
        commands=story.commands,
        montage=montage,
        notes={"What this is": NOTE.format(sam=sam.text, unsaid=sam.unsaid), **notes},
    )
