"""``samseg boxes from-mask | from-slicer | slices``: boxes for a prediction out of what was drawn elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samseg_monai.cli.outputs import file_to_write
from samseg_monai.cli.places import check_places
from samseg_monai.errors import DataError, raise_all, visible_lines

if TYPE_CHECKING:
    from samseg_monai.data.files.drawn_boxes import Drawn

boxes_app = typer.Typer(help="Make the file of boxes that samseg predict takes.", no_args_is_help=True)
Output = Annotated[Path, typer.Option("--output", "--out", callback=file_to_write, help="JSON of boxes to write.")]
Add = Annotated[bool, typer.Option("--add", help="Keep what OUTPUT holds for other cases.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad files out and list them.")]


@boxes_app.command("from-mask")
def from_mask(
    masks: Annotated[list[Path], typer.Argument(help="Mask files, or folders of <case>.nii.gz or of PNG files.")],
    output: Output,
    label: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Value that is the object; may be given again. Default: all above 0."),
    ] = None,
    per: Annotated[
        str, typer.Option(help="slice: one box around all in a slice. component: one for each object in it.")
    ] = "slice",
    margin: Annotated[str, typer.Option(help="Added on each side in the slice, such as 3mm, 2voxels or 2px.")] = "0mm",
    image: Annotated[
        Path | None,
        typer.Option(help="Image of the mask, its DICOM folder, or folder of all images: masks are moved to its grid."),
    ] = None,
    flat: Annotated[bool, typer.Option("--2d", help="NIfTI files of one slice are masks of 2-D images.")] = False,
    empty: Annotated[
        bool,
        typer.Option("--allow-empty", help="Empty masks of 2-D images are cases without boxes: nothing was found."),
    ] = False,
    add: Add = False,
    skip_bad: SkipBad = False,
) -> None:
    """Boxes around the foreground of masks, in every slice that has some.

    Boxes count the voxels of the stored image. A mask on the image's own grid needs nothing else; give the image of a
    DICOM series, and of a mask that another tool has cut or stored in other directions.
    """
    check_places("boxes", {**{f"MASKS[{n}]": path for n, path in enumerate(masks)}, "--image": image})
    from samseg_monai.data.files.drawn_boxes import boxes_from_masks, parse_margin

    drawn = boxes_from_masks(
        masks, labels=label or (), per=per, margin=parse_margin(margin), images=image, flat=flat, empty=empty
    )  # fmt: skip
    if not any(drawn.boxes.values()):  # a slip, and not that nothing was found
        raise_all(drawn.others, DataError, "boxes: --label names values that no mask has, and nothing was written")
    _write(drawn, output, add=add, skip_bad=skip_bad)


@boxes_app.command("from-slicer")
def from_slicer(
    files: Annotated[list[Path], typer.Argument(help="Markups of 3D Slicer (.mrk.json) with ROI.")],
    image: Annotated[Path, typer.Option(help="Image that they were drawn on: a file, or a folder of a DICOM series.")],
    output: Output,
    case: Annotated[str | None, typer.Option(help="Name of the case in the prediction; default: the image's.")] = None,
    add: Add = False,
    skip_bad: SkipBad = False,
) -> None:
    """Boxes out of the ROI that were drawn in 3D Slicer on one image.

    A ROI holds the voxels whose centres lie in it. Transforms above it in Slicer's tree are not in its file: harden
    them before it is saved.
    """
    check_places("boxes", {**{f"FILES[{n}]": path for n, path in enumerate(files)}, "--image": image})
    from samseg_monai.data.files.drawn_boxes import boxes_from_slicer

    _write(boxes_from_slicer(files, image, case), output, add=add, skip_bad=skip_bad)


@boxes_app.command("slices")
def slices(
    series: Annotated[Path, typer.Argument(help="Folder of one DICOM series.")],
) -> None:
    """Tell which slice of a box file each DICOM file is: its number, its instance number, its place, its name."""
    check_places("boxes", {"SERIES": series})
    from samseg_monai.data.files.dicom import slices_of

    if not series.is_dir():
        raise DataError(f"boxes: {series} is no folder; give the folder of a DICOM series")
    typer.echo("slice,instance_number,position_mm,file")
    for number, piece in enumerate(slices_of(series)):
        typer.echo(visible_lines(f"{number},{piece.instance},{piece.place_mm:.2f},{piece.name}"))


def _write(drawn: Drawn, output: Path, *, add: bool, skip_bad: bool) -> None:
    """Write the boxes and tell what there is to know. Raises DataError where files are bad, unless they may be."""
    from samseg_monai.data.files.boxes import VOLUME_BOXES, read_table, write_boxes

    problems = [f"{name}: {reason}" for name, reason in sorted(drawn.bad.items())]
    for line in drawn.notes:
        typer.echo(visible_lines(line), err=True)
    if problems and (not skip_bad or not drawn.boxes):
        raise_all(
            problems, DataError, "boxes: some files give no boxes, and nothing was written; --skip-bad leaves them out"
        )
    for line in problems:
        typer.echo(visible_lines(f"left out: {line}"), err=True)
    before = read_table(output, VOLUME_BOXES) if add and output.exists() else {}
    write_boxes(output, {**before, **drawn.boxes})
    count = sum(map(len, drawn.boxes.values()))
    replaced = sorted(set(before) & set(drawn.boxes))
    more = f"; replaced: {', '.join(replaced)}" if replaced else ""
    typer.echo(visible_lines(f"{count} boxes of {len(drawn.boxes)} cases in {output}{more}"))
