"""The story of eight abdominal organs without prompts: the ladder and its halves, on CT phantoms with pico SAM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samseg_monai.demo.story import Story, write_results
from samseg_monai.settings import NOTHING

TASK = "abdomen"
FOLDER = "demo_abdomen"
CASES = 15
VALIDATION = 2  # patients of the training part that choose the epoch
LADDER = "ladder"
# Both halves are trained as the ladder is, with its looks at the slices: what differs is the mix alone. The recipes
# cnn_only and sam_only are the published ablations: they mirror left to right, and their mask heads stay random.
HALVES: dict[str, dict[str, Any]] = {
    "sam_only": {"strategy::mix": "sam", "strategy::side": NOTHING},
    "cnn_only": {"strategy::mix": "side", "embeddings::cache_dir": NOTHING},  # no encoder, no embeddings
}
LABELS = {"sam_only": "SAM only, no CNN", "cnn_only": "CNN only, no SAM"}
NOTES = {
    "What this is": (
        "Every measured number here comes from generated phantoms and from pico, a network of two million parameters "
        "that this project trained on drawn shapes. It shows that the pipeline works and learns. It says nothing about "
        "SAM or about patients. Zero-shot has a random mask head: without prompts SAM knows no organs, and its row is "
        "noise."
    ),
    "What is compared": (
        "Ladder, CNN only and SAM only share slices, augmentation, decoder and schedule, and the epoch of each is "
        "chosen on the same validation cases; SAM's encoder is frozen in all of them. What the CNN reaches alone is "
        "not SAM's work."
    ),
}


def tell(output: Path, *, cases: int, epochs: int | None, seed: int) -> tuple[list[str], str]:
    """Run the whole story (see ``samseg demo``); returns the shell lines that do the same, and the table as text.

    Of the ``cases`` (8 to 30, else DataError) 2 test for 3 that train, of which 2 in all validate.
    """
    from samseg_monai.bundles import build_bundle

    story = Story()
    configs = {name: build_bundle(TASK, name, output / "bundles") / "configs" for name in ("zero_shot", LADDER)}
    data = _phantoms(story, output, cases, seed)
    runs = {name: output / "runs" / name for name in ("zero_shot", *HALVES, LADDER)}
    # one folder for all: whoever sees the same slice through the same encoder finds its embedding there
    shared: dict[str, Any] = {"dataset_dir": str(data), "seed": seed}
    shared |= {"embeddings::cache_dir": str(output / "embeddings")}
    run = {**shared, "output_dir": str(runs["zero_shot"]), "strategy::random_masks": True}  # a row of noise
    story.evaluate_demo("zero-shot: evaluate", configs["zero_shot"], run)
    train = [configs[LADDER] / name for name in ("train.json", "demo.json")]
    length = {"embeddings::variants": 8, **({} if epochs is None else _shortened(train[1], epochs))}
    for name in (*HALVES, LADDER):
        run = {**shared, "output_dir": str(runs[name]), **HALVES.get(name, {})}
        story.run(f"{name}: train", train, {**run, **length})
        story.evaluate_demo(f"{name}: evaluate", configs[LADDER], run)
    story.pack_and_predict(runs[LADDER], output / f"{TASK}_segmentation_{LADDER}.zip", data / "unlabelled")
    return story.commands, _write_report(story, output, runs, data)


def _shortened(demo: Path, epochs: int) -> dict[str, int]:
    """Another number of epochs, with the same share of them to warm up."""
    config = json.loads(demo.read_text(encoding="utf-8"))
    return {"epochs": epochs, "schedule::warmup": config["schedule"]["warmup"] * epochs // config["epochs"]}


def _phantoms(story: Story, output: Path, cases: int, seed: int) -> Path:
    from samseg_monai.data.datalists.synapse import prepare_synapse
    from samseg_monai.demo.abdomen_phantoms import write_btcv_cases

    data = story.phantoms("btcv", write_btcv_cases, output, cases, seed)
    datalist = data / "datalist.json"
    story.step(
        "datalist with the published split",
        f"samseg prepare synapse --src {data} --output {datalist} --validation {VALIDATION} --allow-missing "
        f"--seed {seed}",
    )
    prepare_synapse(data, datalist, validation=VALIDATION, allow_missing=True, seed=seed)
    return data


def _write_report(story: Story, output: Path, runs: dict[str, Path], data: Path) -> str:
    from samseg_monai.report.montage import cases_of_data
    from samseg_monai.report.runs import RunResult

    results = [RunResult.load(run / "evaluation", name=name, label=LABELS.get(name)) for name, run in runs.items()]
    shown = [run for run in results if run.name != "zero_shot"]  # noise has no outline worth seeing
    montage, notes = cases_of_data(shown, [data / "datalist.json"], data)
    return write_results(
        output,
        results,
        title="samseg-monai demo: eight abdominal organs without prompts",
        commands=story.commands,
        montage=montage,
        notes={**NOTES, **notes},
        organs=True,
    )
