"""Pack a run into one ZIP that runs alone: configs, full weights, adapter, card, metrics, licences, checksums."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from samseg_monai import checkpoints
from samseg_monai.bundles.record import RECORD
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.sam.weights import sha256_of

SUMS = "SHA256SUMS"
WEIGHTS = (".pt", ".safetensors")  # floating-point numbers hardly shrink, and large files take half a minute to try
POSTPROCESSING = ("min_component_mm3",)  # keys of an evaluation that belong to its numbers and to every prediction
LABELS = "label_values"  # of 2-D images: what the values of the label files mean, which predictions have, too
RESULTS = ("metrics.json", "cases.csv", "ellipse_cases.csv", "transunet_cases.csv", "run_card.json")


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over every other file of ``folder``, in the format of ``sha256sum --check``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: str | Path) -> int:
    """Check the files of a bundle against its ``SHA256SUMS`` and return their number (0: the bundle has no sums).

    Raises:
        BundleError: files that are missing or were changed; all are listed.
    """
    root = Path(folder)
    sums = root / SUMS
    if not sums.is_file():
        return 0
    problems = []
    lines = sums.read_text(encoding="utf-8").splitlines()
    for line in lines:
        expected, _, name = line.partition("  ")
        path = root / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_of(path) != expected:
            problems.append(f"{name}: changed since it was packed")
    raise_all(problems, BundleError, f"{root.name}: not the bundle that was packed; ask for it again")
    return len(lines)


def _network(config: Path) -> Any:
    """Build the network that a config describes, with random weights."""
    parser = ConfigParser()
    parser.read_config(str(config))
    return parser.get_parsed_content("network_def")


def _check_run(run: Path) -> list[str]:
    problems = []
    if not (run / RECORD / "configs" / "inference.json").is_file():
        problems.append(f"{RECORD}/configs/inference.json is missing: train or evaluate with this output_dir first")
    if not (run / "evaluation" / "metrics.json").is_file():
        problems.append("evaluation/metrics.json is missing: run the bundle's evaluate.json with this output_dir")
    trained = (run / RECORD / "configs" / "train.json").is_file()
    if trained and not (run / "adapter.safetensors").is_file():
        problems.append("adapter.safetensors is missing: training has saved no best epoch yet")
    return problems


def pack_bundle(run: str | Path, output: str | Path, *, sam_checkpoint: str | None = None) -> Path:
    """Pack the run in folder ``run`` as ``output`` (a ZIP that holds one folder, the bundle).

    Args:
        run: ``output_dir`` of a training and its evaluation, or of a zero-shot evaluation.
        output: the ZIP to write; replaced if it exists.
        sam_checkpoint: base weights, where they are not found by name (see ``find_weights``).

    Returns:
        The ZIP's path.

    Raises:
        BundleError: the run is not complete; everything that is missing is listed.
        WeightsError, CheckpointError: base weights or adapter are absent or do not fit.
    """
    run, output = Path(run), Path(output)
    if not run.is_dir():
        raise BundleError(f"pack: there is no folder {run}; give the output_dir of a run")
    raise_all(_check_run(run), BundleError, f"pack: {run} is not a finished run")
    card = json.loads((run / "evaluation" / "run_card.json").read_text(encoding="utf-8"))
    name = card["bundle"]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / name
        shutil.copytree(run / RECORD, root)
        steps = {key: card["settings"][key] for key in POSTPROCESSING if key in card.get("settings", {})}
        _set_keys(root / "configs", steps)
        _set_images(root / "configs" / "inference.json", card)
        with torch.random.fork_rng():
            torch.manual_seed(int(card.get("seed") or 0))  # a random base is that of the evaluation
            _write_models(run, root, sam_checkpoint, steps)
        (root / "metrics").mkdir()
        for result in RESULTS:
            if (run / "evaluation" / result).is_file():
                shutil.copy(run / "evaluation" / result, root / "metrics" / result)
        write_sums(root)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(output.name + ".part")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                kind = zipfile.ZIP_STORED if path.suffix in WEIGHTS else zipfile.ZIP_DEFLATED
                archive.write(path, path.relative_to(temporary).as_posix(), kind)
        partial.replace(output)
    return output


def _set_keys(configs: Path, values: dict[str, Any]) -> None:
    """Let the packed bundle evaluate and predict as it was evaluated, however its training was set."""
    for name in ("evaluate.json", "inference.json"):
        config = json.loads((configs / name).read_text(encoding="utf-8"))
        text = json.dumps({**config, **values}, indent=4, ensure_ascii=False) + "\n"
        (configs / name).write_text(text, encoding="utf-8")


def _set_images(inference: Path, card: dict[str, Any]) -> None:
    """Let 2-D images be predicted as they were evaluated: the values of the labels, boxes shrunk as much."""
    config = json.loads(inference.read_text(encoding="utf-8"))
    if LABELS not in config:  # volumes
        return
    shrink = card.get("settings", {}).get("prompt", {}).get("shrink", 0.0)
    config |= {LABELS: card.get(LABELS), "prompt": {**config["prompt"], "shrink": shrink}}
    inference.write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_models(run: Path, root: Path, sam_checkpoint: str | None, steps: dict[str, Any]) -> None:
    """Write ``models/model.pt`` (all weights), and adapter and card of a trained run, with the test metrics."""
    network = _network(root / "configs" / "inference.json")
    trained = (run / "adapter.safetensors").is_file()
    checkpoints.load_trained(network, checkpoint=str(run) if trained else None, sam_checkpoint=sam_checkpoint)
    models = root / "models"
    models.mkdir()
    checkpoints.save_model(network, models / "model.pt")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    checkpoints.save_adapter(network, models, metrics=metrics, extra=steps)
