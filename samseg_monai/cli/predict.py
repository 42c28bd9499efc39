"""``samseg predict``: segment cases without labels by a bundle from anywhere."""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samseg_monai.cli.cascade import PromptsClass, PromptsMin, predicted_prompts
from samseg_monai.cli.outputs import briefly
from samseg_monai.cli.places import BaseWeights, Device, check_places, device_of, scans_given
from samseg_monai.errors import BundleError, ConfigError, PromptError
from samseg_monai.workflow import run_workflow

if TYPE_CHECKING:
    from samseg_monai.bundles.door import Opened

Trust = Annotated[
    bool, typer.Option("--trust", help="run the JSON of the bundle itself, which can do whatever its maker likes")
]
Modality = Annotated[
    bool, typer.Option("--allow-modality", help="go on where an image seems to be of another modality")
]
WholeSlice = Annotated[bool, typer.Option("--whole-slice", help="Take the whole slice as the prompt, on purpose.")]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit numbers in SAM's image encoder: faster on CPUs with VNNI")]
Input = Annotated[
    Path, typer.Option(help="case folder, folder of cases, of volumes or of 2-D images, a file, DICOM, or a ZIP of it")
]
NoResample = Annotated[
    bool, typer.Option("--no-resample", help="Keep the in-plane spacing, though another was trained on.")
]
PromptsFrom = Annotated[
    Path | None, typer.Option(help="bundle without prompts whose masks of the same cases are the prompts")
]
Propagate = Annotated[
    int, typer.Option(min=0, help="volumes: carry what is found to so many slices each way, as the next one's box")
]
Scans = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TEXT", help="DICOM: the scan NAME has TEXT in its SeriesDescription; repeatable"),
]
NameBy = Annotated[
    str | None, typer.Option(help="DICOM: call cases like their folder, or like their series: folder, series")
]


def predict(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle")],
    input: Input,
    output: Annotated[Path, typer.Option("--output", "--out", help="folder for the segmentations")],
    boxes: Annotated[Path | None, typer.Option(help="JSON of boxes, or clicks, per case")] = None,
    prompts: Annotated[Path | None, typer.Option(help="coarse mask, or folder of <case>.nii.gz")] = None,
    prompts_from: PromptsFrom = None,
    prompts_class: PromptsClass = None,
    prompts_min_mm3: PromptsMin = None,
    propagate: Propagate = 0,
    whole_slice: WholeSlice = False,
    no_resample: NoResample = False,
    scan: Scans = None,
    name_by: NameBy = None,
    sam_checkpoint: BaseWeights = None,
    device: Device = None,
    int8: Int8 = False,
    allow_modality: Modality = False,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write no <case>_overlay.png.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what MONAI and the other libraries log.")] = False,
    trust: Trust = False,
) -> None:
    """Segment cases without labels; the result has exactly the grid and the affine of its image.

    A bundle for 2-D images writes a PNG of the image's size for each. Beside each result lies <case>_overlay.png, a
    picture with outlines and boxes, and predictions.csv has a row per case: mL, slices, prompt, seconds, warnings.
    Of the bundle its settings and its weights are read; its own JSON is not run, unless --trust says so.

    DICOM may lie in folders of any depth: series are told apart by their tags, and mapped to the bundle's scans by
    their descriptions, where these leave no doubt, or by --scan. Series that are no scan are passed over by name.

    Prompts of a bundle that takes boxes: --boxes, --prompts, --prompts-from, --whole-slice. Cases of another in-plane
    spacing than it was trained on are resampled to it, and the masks come back on the images' own grids. Bad cases are
    left out by name, with exit code 1; so are images of another modality, unless --allow-modality.
    """
    asked = {"--boxes": boxes, "--prompts": prompts, "--prompts-from": prompts_from}
    check_places("predict", {"BUNDLE": bundle, "--input": input, **asked})
    sources = [key for key, value in {**asked, "--whole-slice": whole_slice}.items() if value]
    _only_with(prompts_from, {"--prompts-class": prompts_class, "--prompts-min-mm3": prompts_min_mm3})
    from samseg_monai.bundles.door import open_bundle

    given = {key: os.path.abspath(value) for key, value in {"boxes": boxes, "prompts": prompts}.items() if value}
    how = {"sam_checkpoint": sam_checkpoint, "allow_modality": allow_modality or None, "device": device_of(device)}
    how["dataset_dir"] = os.path.abspath(input)
    overrides: dict[str, Any] = {key: value for key, value in how.items() if value is not None}
    with nullcontext() if verbose else briefly(), open_bundle(bundle, trust=trust) as opened, ExitStack() as stack:
        opened.check()
        overrides |= {"prompt::propagate": propagate} if propagate else {}
        typer.echo(f"{opened.name}: {input} -> {output}")
        prompted = _prompt_overrides(opened, given, sources)
        overrides |= _off(opened, resample=no_resample, pictures=no_pictures)
        overrides |= _series_overrides(opened, scan or [], name_by) | (opened.int8() if int8 else {})
        if prompts_from is not None:
            first = predicted_prompts(prompts_from, opened, overrides, prompts_class, prompts_min_mm3, logs=verbose)
            prompted = stack.enter_context(first)
        if opened.checkpoint is not None:  # the folder of predictions is no place to look for an adapter
            overrides["checkpoint"] = str(opened.checkpoint)
        overrides |= prompted | {key: os.path.abspath(output) for key in ("output_dir", "predictions_dir")}
        run_workflow([opened.config("inference")], overrides, echo=False, logs=verbose)
    typer.echo(f"segmentations: {overrides['predictions_dir']}")


def _only_with(prompts_from: Path | None, given: dict[str, Any]) -> None:
    """Raise ConfigError for options that say something of another bundle's masks where there are none."""
    lost = [name for name, value in given.items() if value]
    if lost and prompts_from is None:
        raise ConfigError(f"predict: {' and '.join(lost)}: of no use without --prompts-from")


def _off(opened: Opened, **unwanted: bool) -> dict[str, bool]:
    """Switches of a bundle that are to be off, of those that it has."""
    return {key: False for key, wanted in unwanted.items() if wanted and key in opened.parser().get()}


def _series_overrides(opened: Opened, scans: list[str], name_by: str | None) -> dict[str, Any]:
    """How a bundle is to sort DICOM series; nothing where nobody says it.

    Raises:
        ConfigError: no NAME=TEXT, or a name twice.
        BundleError: it cannot sort series.
    """
    texts = scans_given(scans, text=True)
    if not scans and name_by is None:
        return {}
    if "series" not in opened.parser().get():
        raise BundleError("predict: this bundle sorts no DICOM series; leave --scan and --name-by out")
    return {"series": {"texts": texts, "name_by": name_by}}


def _prompt_overrides(opened: Opened, prompts: dict[str, str], sources: list[str]) -> dict[str, Any]:
    """What tells a bundle where its prompts come from; nothing for one that takes none.

    Args:
        prompts: files of prompts by key.
        sources: options that name the one source of prompts.

    Raises:
        BundleError: it takes none and got some, or got them from several sources.
        PromptError: it takes some and got none.
    """
    if len(sources) > 1:
        raise BundleError(f"predict: got both {' and '.join(sources)}; give one source of prompts")
    if opened.prompted and not sources:
        from samseg_monai.data.files.cases import NO_PROMPTS

        raise PromptError(f"predict: {NO_PROMPTS}")
    if opened.prompted and sources != ["--prompts-from"]:
        source = {"boxes": "json", "prompts": "mask"}.get(next(iter(prompts), ""), "image")
        return {**prompts, "prompt::source": source}
    if sources and not opened.prompted:
        raise BundleError(
            f"predict: this bundle takes no prompts, but got {sources[0]}; leave it out, whole slices are segmented"
        )
    return {}
