"""``samseg bundle build|list|pack`` and ``samseg predict``."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.workflow import run_workflow
from samseg_monai.errors import BundleError

bundle_app = typer.Typer(help="Build bundles from recipes and pack runs to share them.", no_args_is_help=True)


@bundle_app.command("list")
def list_recipes() -> None:
    """List the tasks and strategies that bundles can be built from."""
    from samseg_monai.bundles import recipe_names

    for kind in ("tasks", "strategies"):
        typer.echo(f"{kind}: {', '.join(recipe_names(kind))}")


@bundle_app.command("build")
def build(
    task: Annotated[str, typer.Option(help="name of a task recipe, or path of a .json file")],
    strategy: Annotated[str, typer.Option(help="name of a strategy recipe, or path of a .json file")],
    out: Annotated[Path, typer.Option(help="folder that will hold the bundle's folder")] = Path("bundles"),
) -> None:
    """Expand a task and a strategy into a complete MONAI bundle."""
    from samseg_monai.bundles import build_bundle

    typer.echo(str(build_bundle(task, strategy, out)))


@bundle_app.command("pack")
def pack(
    run: Annotated[Path, typer.Argument(help="output_dir of a training and its evaluation")],
    output: Annotated[Path, typer.Option(help="ZIP to write")],
    sam_checkpoint: Annotated[str | None, typer.Option(help="base weights, if not found by name")] = None,
) -> None:
    """Pack a run as one ZIP that predicts and evaluates alone, offline."""
    from samseg_monai.bundles import pack_bundle

    path = pack_bundle(run, output, sam_checkpoint=sam_checkpoint)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def predict(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle")],
    input: Annotated[Path, typer.Option(help="case folder, folder of cases or of NIfTI/MHA/NRRD files, or one file")],
    output: Annotated[Path, typer.Option(help="folder for the segmentations")],
    boxes: Annotated[Path | None, typer.Option(help="JSON of boxes per case")] = None,
    prompts: Annotated[Path | None, typer.Option(help="coarse mask, or folder of <case>.nii.gz")] = None,
    sam_checkpoint: Annotated[str | None, typer.Option(help="base weights, if the bundle holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")] = None,
) -> None:
    """Segment cases without labels; the result has exactly the grid and the affine of its image.

    Prompts: --boxes, or --prompts, or (neither) the whole slice. Bad cases are named and left out; the exit code is
    then 1.
    """
    if boxes and prompts:
        raise BundleError("predict: got both --boxes and --prompts; give one source of prompts")
    overrides: dict[str, Any] = {
        "dataset_dir": str(input),
        "output_dir": str(output),
        "predictions_dir": str(output),
        "prompt::source": "json" if boxes else "mask" if prompts else "image",
    }
    for key, value in {"boxes": boxes, "prompts": prompts, "sam_checkpoint": sam_checkpoint}.items():
        if value:
            overrides[key] = str(value)
    if device:
        overrides["device"] = f"$torch.device({device!r})"
    if not bundle.exists():
        raise BundleError(f"predict: there is no bundle {bundle}; give the folder or the ZIP of one")
    if bundle.is_dir():
        _predict(bundle, overrides)
        return
    with tempfile.TemporaryDirectory() as temporary:
        _predict(unpack(bundle, Path(temporary)), overrides)


def _predict(root: Path, overrides: dict[str, Any]) -> None:
    from samseg_monai.bundles import verify_sums

    verify_sums(root)
    overrides.setdefault("checkpoint", _bundled_model(root))
    run_workflow([root / "configs" / "inference.json"], {k: v for k, v in overrides.items() if v is not None})
    typer.echo(f"segmentations: {overrides['predictions_dir']}")


def _bundled_model(root: Path) -> str | None:
    """Return the bundle's own weights; the folder of predictions is no place to look for an adapter."""
    model = root / "models" / "model.pt"
    return str(model) if model.is_file() else None


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the ZIP of a bundle into ``folder`` and return the bundle's folder.

    Raises:
        BundleError: not a ZIP, or not one that holds exactly one bundle; entries outside the folder are refused.
    """
    if not zipfile.is_zipfile(archive):
        raise BundleError(f"{archive}: not a ZIP; give the folder or the ZIP of a bundle")
    with zipfile.ZipFile(archive) as content:
        outside = [n for n in content.namelist() if Path(n).is_absolute() or ".." in Path(n).parts]
        if outside:
            raise BundleError(f"{archive}: entries point outside the bundle: {', '.join(outside)}; do not use it")
        content.extractall(folder)
    roots = [p.parent.parent for p in folder.glob("*/configs/inference.json")]
    if len(roots) != 1:
        raise BundleError(f"{archive}: holds {len(roots)} bundles with configs/inference.json, expected one")
    return roots[0]
