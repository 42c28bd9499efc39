"""One bundle's result as the prompt of another, in a prediction or evaluation: no person and no label at test time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samseg_monai.cli.outputs import briefly, folder_to_write
from samseg_monai.cli.places import BaseWeights, Device, check_places, device_of
from samseg_monai.errors import BundleError, ConfigError, DataError
from samseg_monai.settings import NOTHING
from samseg_monai.workflow import run_workflow

if TYPE_CHECKING:
    from samseg_monai.bundles.door import Opened
    from samseg_monai.settings import TaskSettings

PromptsClass = Annotated[
    list[str] | None, typer.Option(help="with --prompts-from: its class that is the structure; repeatable")
]
PromptsMin = Annotated[
    float | None, typer.Option(help="with --prompts-from: smaller components of its masks are no prompts")
]


def cascade(
    bundle: Annotated[Path, typer.Argument(help="folder or ZIP of a bundle that takes boxes, or folder of a run")],
    prompts_from: Annotated[Path, typer.Option(help="bundle without prompts whose masks are the prompts")],
    dataset_dir: Annotated[Path, typer.Option(help="folder of the data, with labels")],
    output: Annotated[
        Path, typer.Option("--output", "--out", callback=folder_to_write, help="folder for evaluation and first/")
    ],
    prompts_class: PromptsClass = None,
    prompts_min_mm3: PromptsMin = None,
    datalist: Annotated[Path | None, typer.Option(help="default: datalist.json in the folder of the data")] = None,
    section: Annotated[str, typer.Option(help="of the datalist: testing, validation or training")] = "testing",
    sam_checkpoint: BaseWeights = None,
    device: Device = None,
    allow_seen: Annotated[bool, typer.Option("--allow-seen", help="Go on with cases of the trainings.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what MONAI and the other libraries log.")] = False,
) -> None:
    """Evaluate a cascade: a bundle without prompts finds what one that takes boxes segments, scored against labels.

    The first is evaluated into OUTPUT/first, its predictions kept; its masks, of 2-D images boxes around them
    (OUTPUT/boxes.json), are the prompts of the second, which is evaluated into OUTPUT. Where the first found nothing,
    the prediction is empty. The labels have to have the classes of both bundles.
    """
    places = {"BUNDLE": bundle, "--prompts-from": prompts_from, "--dataset-dir": dataset_dir, "--datalist": datalist}
    check_places("cascade", places)
    from samseg_monai.bundles.door import open_bundle
    from samseg_monai.report.runs import RunResult
    from samseg_monai.report.tables import table_text

    data = datalist or dataset_dir / "datalist.json"
    how = {"sam_checkpoint": sam_checkpoint, "device": device_of(device), "section": section, "allow_seen": allow_seen}
    given: dict[str, Any] = {key: value for key, value in how.items() if value is not None}
    given |= {"dataset_dir": str(dataset_dir.absolute()), "datalist": str(data.absolute()), "save_predictions": True}

    def evaluate(opened: Opened, folder: Path, more: dict[str, Any]) -> str:
        # the folder of results is no place to look for an adapter
        weights = NOTHING if opened.checkpoint is None else str(opened.checkpoint)
        own = {"output_dir": str(folder), "checkpoint": weights, **more}
        run_workflow([opened.config("evaluate")], {**given, **own}, echo=False, logs=verbose)
        return table_text([RunResult.load(folder / "evaluation", label=opened.name)])

    with nullcontext() if verbose else briefly(), open_bundle(prompts_from) as first, open_bundle(bundle) as then:
        first.check()
        then.check()
        task, names = _structure(first, then, prompts_class or ())
        typer.echo(f"{first.name}: masks that are the prompts of {then.name}")
        least = {} if prompts_min_mm3 is None else {"min_component_mm3": prompts_min_mm3}
        results = output.absolute()
        before = evaluate(first, results / "first", least)
        masks = results / "first" / "evaluation" / "predictions"
        prompts = _handed_on(first, then, masks, _values(task, names, data), results / "boxes.json")
        after = evaluate(then, results, prompts)
    typer.echo(f"{before}\n\n{after}")
    typer.echo(f"evaluations: {output / 'evaluation'}, of the first alone {output / 'first' / 'evaluation'}")


@contextmanager
def predicted_prompts(
    bundle: Path,
    then: Opened,
    overrides: dict[str, Any],
    classes: Sequence[str] | None,
    min_mm3: float | None,
    *,
    logs: bool,
) -> Iterator[dict[str, Any]]:
    """Predict by a bundle that takes no prompts, and give the overrides by which another one takes its masks.

    Volumes are handed on as masks, so that boxes are made of them in the slices that ``then`` sees; 2-D images as
    boxes in pixels. Cases that cannot be predicted are told here and are bad cases of ``then``.

    Args:
        bundle: folder or ZIP of the first.
        then: the second.
        overrides: what both get: the input, devices, rules of DICOM series.
        classes: of the first, that are the structure; None: its only one, or those that ``then`` has, too.
        min_mm3: smaller components of the first's masks are no prompts.
        logs: as of ``run_workflow``.
    Raises:
        BundleError: the first takes prompts, the second takes none, or one is for volumes and the other for images.
        ConfigError: classes that the first does not have, or none where it has several.
        DataError: the first predicted no case.
    """
    from samseg_monai.bundles.door import open_bundle

    with open_bundle(bundle) as first, tempfile.TemporaryDirectory(prefix="samseg-") as place:
        first.check()
        values = _values(*_structure(first, then, classes or ()))
        own = {key: value for key, value in overrides.items() if key.partition("::")[0] in first.parser().get()}
        own.pop("prompt::propagate", None)  # the second's alone
        own |= {"output_dir": place, "predictions_dir": place, "pictures": False}
        own |= {"label_values": NOTHING} if then.settings and then.settings.task.kind == "images" else {}
        own |= {} if min_mm3 is None else {"min_component_mm3": min_mm3}
        own |= {} if first.checkpoint is None else {"checkpoint": str(first.checkpoint)}
        typer.echo(f"{first.name}: masks that are the prompts of {then.name}")
        try:
            run_workflow([first.config("inference")], own, echo=False, logs=logs)
        except DataError:
            if not any(Path(place).glob("*_seg.*")):
                raise  # else the log has told of each case that failed, and the others go on
        given = _handed_on(first, then, Path(place), values, Path(place) / "boxes.json")
        yield {"boxes" if key == "prompt::boxes" else key: value for key, value in given.items()}


def _handed_on(first: Opened, then: Opened, masks: Path, values: Sequence[int], table: Path) -> dict[str, Any]:
    """The overrides by which the second's evaluation takes the first's masks, of 2-D images as boxes in a ``table``."""
    given: dict[str, Any] = {"prompts_from": first.name}
    if first.settings is not None and first.settings.task.kind == "volumes":
        return {**given, "prompts": str(masks), "prompt::source": "mask", "prompt::mask_values": values}
    from samseg_monai.data.files.boxes import write_boxes
    from samseg_monai.data.files.drawn_boxes import PER_COMPONENT, PER_SLICE, boxes_from_masks

    per = PER_COMPONENT if then.parser().get("prompt::per_component") else PER_SLICE
    drawn = boxes_from_masks([masks], labels=values, per=per, empty=True)
    for case, reason in drawn.bad.items():
        typer.echo(f"error: {case}: masks of {first.name}: {reason}", err=True)
    write_boxes(table, drawn.boxes)
    return {**given, "prompt::boxes": str(table), "prompt::source": "json"}


def _values(task: TaskSettings, names: Sequence[str], datalist: Path | None = None) -> list[int]:
    """Values of classes in the first's masks: of 2-D images that were evaluated those of the data's own labels."""
    if datalist is None or task.kind == "volumes":
        return [task.classes.index(name) + 1 for name in names]
    from samseg_monai.data.datalists import labels_of

    labels = labels_of(datalist)
    return [min(int(value) for value, label in labels.items() if label == name) for name in names]


def _structure(first: Opened, then: Opened, classes: Sequence[str]) -> tuple[TaskSettings, list[str]]:
    """The first's task, and those of its classes that are the prompt."""
    if first.prompted or not then.prompted:
        wrong = f"{first.name} takes prompts itself" if first.prompted else f"{then.name} takes no prompts"
        raise BundleError(f"--prompts-from: {wrong}; a bundle without prompts gives them to one with boxes")
    if first.settings is None or then.settings is None or "prompts_from" not in then.parser().get():
        raise BundleError(f"--prompts-from: the own JSON of {then.name} knows no such prompts; leave --trust out")
    if then.settings.run.prompt.kind != "box":
        raise BundleError(f"--prompts-from: {then.name} is prompted by clicks, which a mask does not tell")
    one, other = first.settings.task, then.settings.task
    if one.kind != other.kind:
        raise BundleError(f"--prompts-from: {first.name} is for {one.kind}, {then.name} for {other.kind}")
    names = list(classes) or [name for name in one.classes if len(one.classes) == 1 or name in other.classes]
    unknown = sorted(set(names) - set(one.classes))
    if unknown or not names:
        got = f"{', '.join(unknown)}: no class" if unknown else "which class is to be looked for"
        raise ConfigError(f"--prompts-class: {got} of {first.name}; choose among {', '.join(one.classes)}")
    return one, names
