"""One bundle's result as the prompt of another: no person and no label at test time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from samseg_monai.errors import BundleError, ConfigError, DataError
from samseg_monai.files import write_json
from samseg_monai.settings import NOTHING
from samseg_monai.workflow import run_workflow

if TYPE_CHECKING:
    from samseg_monai.bundles.door import Opened


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
    from samseg_monai.data.files.drawn_boxes import PER_COMPONENT, PER_SLICE, boxes_from_masks

    with open_bundle(bundle) as first, tempfile.TemporaryDirectory(prefix="samseg-") as place:
        first.check()
        values = _values(first, then, classes or ())
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
        given: dict[str, Any] = {"prompts_from": first.name}
        if first.settings is not None and first.settings.task.kind == "volumes":
            yield {**given, "prompts": place, "prompt::source": "mask", "prompt::mask_values": values}
            return
        table = Path(place) / "boxes.json"
        per = PER_COMPONENT if then.parser().get("prompt::per_component") else PER_SLICE
        drawn = boxes_from_masks([Path(place)], labels=values, per=per, empty=True)
        for case, reason in drawn.bad.items():
            typer.echo(f"error: {case}: masks of {first.name}: {reason}", err=True)
        write_json(table, drawn.boxes)
        yield {**given, "boxes": str(table), "prompt::source": "json"}


def _values(first: Opened, then: Opened, classes: Sequence[str]) -> list[int]:
    """Values of the first's masks that are the prompt."""
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
    return [one.classes.index(name) + 1 for name in names]
