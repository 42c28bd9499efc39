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
from samseg_monai.bundles.build import SETTINGS, config_text, render_config
from samseg_monai.bundles.record import RECORD, read_record_settings
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.files import read_json, write_text
from samseg_monai.sam.weights import sha256_of
from samseg_monai.settings import dump_settings, read_settings

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
        problems.append("evaluation/metrics.json is missing: run inference.json and evaluate.json with this output_dir")
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
        raise_all(_mismatches(root, card), BundleError, f"pack: {run} is not one run, but parts of several")
        steps = _as_evaluated(root / "configs", card)
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


def _as_evaluated(configs: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Let the packed bundle predict as it was evaluated, however its training was set; return the steps behind it.

    That is: small components removed, and for 2-D images boxes shrunk as much and the values of the labels.
    """
    had = card.get("settings", {})
    steps = {key: had[key] for key in POSTPROCESSING if key in had}
    config = read_json(configs / "inference.json", BundleError, "config")
    changes = dict(steps)
    if LABELS in config:
        shrink = had.get("prompt", {}).get("shrink", 0.0)
        changes |= {LABELS: card.get(LABELS), "prompt": {**config["prompt"], "shrink": shrink}}
    write_text(configs / "inference.json", config_text({**config, **changes}))
    if (settings := read_record_settings(configs)) is not None:
        value = dump_settings(settings)
        value["run"] |= steps
        if LABELS in config:
            value["task"][LABELS] = card.get(LABELS)
            value["run"]["prompt"]["shrink"] = changes["prompt"]["shrink"]
        value = dump_settings(read_settings(value, "pack"))
        write_text(configs / SETTINGS, config_text(value))
    return steps


def _mismatches(root: Path, card: dict[str, Any]) -> list[str]:
    """What the bundle's words say otherwise than its settings, its adapter or its evaluation."""
    settings = read_record_settings(root / "configs")
    if settings is None:
        return []
    task, source = settings.task, settings.run.prompt.source
    found = read_json(root / "configs" / "metadata.json", BundleError, "metadata").get("network_data_format", {})
    ours = render_config(settings, "metadata")["network_data_format"]
    problems = [
        f"metadata.json: {name} are {found.get(part, {}).get(key, {}).get('channel_def')}, the run has "
        f"{ours[part][key]['channel_def']}"
        for name, part, key in (("channels", "inputs", "image"), ("classes", "outputs", "pred"))
        if found.get(part, {}).get(key, {}).get("channel_def") != ours[part][key]["channel_def"]
    ]
    had = card.get("settings", {})
    problems += [
        f"{key}: evaluated with {had[key]}, trained with {value}"
        for key, value in {"classes": task.classes, "scans": task.scans}.items()
        if key in had and had[key] != value
    ]
    evaluated = card.get("prompt_source")
    if evaluated is not None and (evaluated == "none") != (source == "none"):
        problems.append(f"prompt::source: evaluated with {evaluated!r}, trained with {source!r}")
    return problems


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
