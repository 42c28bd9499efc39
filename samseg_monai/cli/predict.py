"""``samseg predict``: segment cases without labels by a bundle from anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.workflow import run_workflow

if TYPE_CHECKING:
    from samseg_monai.bundles.door import Opened

Trust = Annotated[
    bool, typer.Option("--trust", help="run the JSON of the bundle itself, which can do whatever its maker likes")
]
BaseWeights = Annotated[str | None, typer.Option(help="base weights, if not found by name")]


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
    trust: Trust = False,
) -> None:
    """Segment cases without labels; the result has exactly the grid and the affine of its image.

    A bundle for 2-D images writes a PNG of the image's size for each, and a picture of it with outline and boxes.

    Of the bundle its settings and its weights are read; its own JSON is not run, unless --trust says so.

    Prompts of a bundle that takes boxes: --boxes, or --prompts, or (neither) the whole slice. Bad cases are named and
    left out; the exit code is then 1.
    """
    from samseg_monai.bundles.door import open_bundle

    if boxes and prompts:
        raise BundleError("predict: got both --boxes and --prompts; give one source of prompts")
    given = {key: os.path.abspath(value) for key, value in {"boxes": boxes, "prompts": prompts}.items() if value}
    places = {"dataset_dir": input, "output_dir": output, "predictions_dir": output}
    overrides: dict[str, Any] = {key: os.path.abspath(place) for key, place in places.items()}
    overrides |= {} if sam_checkpoint is None else {"sam_checkpoint": sam_checkpoint}
    if device is not None:
        import torch

        try:
            overrides["device"] = f"$torch.device({str(torch.device(device))!r})"
        except RuntimeError as error:
            raise ConfigError(f"--device: got {device!r}; give cpu, cuda or cuda:1") from error
    with open_bundle(bundle, trust=trust) as opened:
        opened.check()
        overrides |= _prompt_overrides(opened, given)
        if opened.checkpoint is not None:  # the folder of predictions is no place to look for an adapter
            overrides["checkpoint"] = str(opened.checkpoint)
        run_workflow([opened.config("inference")], overrides, echo=False)
    typer.echo(f"segmentations: {overrides['predictions_dir']}")


def _prompt_overrides(opened: Opened, prompts: dict[str, str]) -> dict[str, str]:
    """What tells a bundle where its prompts come from; nothing for one that takes none.

    Raises:
        BundleError: it takes none and got some.
    """
    if opened.prompted:
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
