"""``samseg bundle build|list|pack`` and ``samseg predict``."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.lint import refuse_findings
from samseg_monai.cli.workflow import run_workflow
from samseg_monai.errors import BundleError, WeightsError

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

    try:
        path = pack_bundle(run, output, sam_checkpoint=sam_checkpoint)
    except WeightsError as error:
        raise WeightsError(
            f"pack: {error}\nHere sam_checkpoint is --sam-checkpoint FILE: the file that the training was given"
        ) from error
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def predict(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle")],
    input: Annotated[
        Path,
        typer.Option(
            help="case folder, folder of cases or of NIfTI/MHA/NRRD files or 2-D images, one file, or a DICOM series"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for the segmentations")],
    boxes: Annotated[Path | None, typer.Option(help="JSON of boxes per case")] = None,
    prompts: Annotated[Path | None, typer.Option(help="coarse mask, or folder of <case>.nii.gz")] = None,
    sam_checkpoint: Annotated[str | None, typer.Option(help="base weights, if the bundle holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="run a bundle that 'samseg lint' has findings in")] = False,
) -> None:
    """Segment cases without labels; the result has exactly the grid and the affine of its image.

    A bundle for 2-D images writes a PNG of the image's size for each, and a picture of it with outline and boxes.

    A bundle is a program: one that could do more than predict (see 'samseg lint') is refused without --trust.

    Prompts of a bundle that takes boxes: --boxes, or --prompts, or (neither) the whole slice. Bad cases are named and
    left out; the exit code is then 1.
    """
    if boxes and prompts:
        raise BundleError("predict: got both --boxes and --prompts; give one source of prompts")
    # absolute: MONAI would evaluate the name of a folder that begins with "$"
    given = {key: os.path.abspath(value) for key, value in {"boxes": boxes, "prompts": prompts}.items() if value}
    places = {"dataset_dir": input, "output_dir": output, "predictions_dir": output}
    overrides: dict[str, Any] = {key: os.path.abspath(place) for key, place in places.items()}
    if sam_checkpoint:
        overrides["sam_checkpoint"] = sam_checkpoint
    if device:
        overrides["device"] = f"$torch.device({device!r})"
    if not os.path.exists(bundle):
        raise BundleError(f"predict: there is no bundle {bundle}; give the folder or the ZIP of one")
    with opened(bundle, "predict", trust=trust) as root:
        _predict(root, overrides, given)


@contextmanager
def opened(bundle: Path, command: str, *, trust: bool) -> Iterator[Path]:
    """Folder of a bundle, which is unpacked for as long as it is in use when it is a ZIP.

    Raises:
        BundleError: it is no bundle, or the linter has findings in it and ``trust`` is False.
    """
    if not trust:
        refuse_findings(bundle, command)
    if bundle.is_dir():
        yield bundle.absolute()
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = unpack(bundle, Path(temporary))
        if not trust:
            refuse_findings(root, command)  # the ZIP may have been exchanged since it was looked through
        yield root


def _predict(root: Path, overrides: dict[str, Any], prompts: dict[str, str]) -> None:
    from samseg_monai.bundles import verify_sums

    verify_sums(root)
    overrides |= _prompt_overrides(root, prompts)
    overrides.setdefault("checkpoint", _bundled_model(root))
    run_workflow([root / "configs" / "inference.json"], {k: v for k, v in overrides.items() if v is not None})
    typer.echo(f"segmentations: {overrides['predictions_dir']}")


def _prompt_overrides(root: Path, prompts: dict[str, str]) -> dict[str, str]:
    """What tells a bundle where its prompts come from; nothing for one that takes none.

    Raises:
        BundleError: it takes none and got some; or there is no readable inference.json.
    """
    from samseg_monai.files import read_json

    path = root / "configs" / "inference.json"
    if not path.is_file():
        raise BundleError(f"{root}: no configs/inference.json; give the folder or the ZIP of a bundle")
    config = read_json(path, BundleError, "config")
    prompt = config.get("prompt", {}) if isinstance(config, dict) else None
    if not isinstance(prompt, dict):
        raise BundleError(f"{path}: expected a JSON object whose 'prompt' is one, too; ask for the bundle again")
    if prompt.get("source") != "none":
        source = {"boxes": "json", "prompts": "mask"}.get(next(iter(prompts), ""), "image")
        if source == "image":
            typer.echo(
                "no --boxes and no --prompts: the whole slice is the prompt; what was trained with a box around each "
                "object may then find anything",
                err=True,
            )
        return {**prompts, "prompt::source": source}
    if prompts:
        raise BundleError(
            f"predict: this bundle takes no prompts, but got --{next(iter(prompts))}; leave it out, whole slices are "
            "segmented"
        )
    return {}


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
