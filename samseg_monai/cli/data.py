"""Commands about data: ``prepare brats-men | synapse | folders | images``, ``bbox`` and ``phantom brats | btcv``.

A command is the function that it calls: their parameters have the same names, and the function says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from samseg_monai.cli.outputs import file_to_write
from samseg_monai.cli.places import check_places
from samseg_monai.errors import visible_lines

MOST_SEED = 2**32 - 1  # of NumPy's generators
prepare_app = typer.Typer(help="Check a data set and write its datalist.", no_args_is_help=True)
phantom_app = typer.Typer(help="Write synthetic cases for demos and tests.", no_args_is_help=True)


def numbers(kind: type, count: int) -> Callable[[str], Any]:
    """Parser of an option such as ``0.7,0.1,0.2`` or ``64x72x24``: ``count`` numbers that are not negative."""

    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.replace("x", ",").split(","))
        except ValueError:
            values = ()
        if len(values) != count or not all(0 <= value < math.inf for value in values):  # false for NaN
            raise typer.BadParameter(f"expected {count} numbers >= 0 separated by commas, got {text!r}")
        return values

    return parse


def _labels(text: str) -> dict[str, str]:
    from samseg_monai.data.datalists.label_maps import parse_labels

    return parse_labels(text)


Output = Annotated[Path, typer.Option("--output", "--out", callback=file_to_write, help="Datalist (JSON) to write.")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the split.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad cases out and list them.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Cases read at the same time.")]
Unlabelled = Annotated[int, typer.Option(min=0, help="More cases without a mask, in OUTPUT/unlabelled.")]
# Any: what Typer hands over is what the parser made of the text
Fractions = Annotated[
    Any,
    typer.Option(
        parser=numbers(float, 3),
        metavar="A,B,C",
        help="Of patients, groups or volumes: train, validate, test; default 0.7,0.1,0.2.",
    ),
]
SplitFile = Annotated[
    Path | None, typer.Option(help="JSON with names of cases or patients under training, validation, testing.")
]
Folds = Annotated[
    int | None,
    typer.Option(min=3, help="Cross-validation instead: that many datalists; in each one part tests, one validates."),
]
Table = Annotated[Path | None, typer.Option(help="CSV with the columns case and patient.")]
Shape = Annotated[Any, typer.Option(parser=numbers(int, 3), metavar="X,Y,Z", help="Voxels along the three axes.")]


@prepare_app.command("brats-men")
def _brats_men(
    src: Annotated[Path, typer.Option(help="Folder that holds the case folders.")],
    output: Output,
    scans: Annotated[
        list[str] | None, typer.Option("--scan", help="t1n, t1c, t2w or t2f; several times; default: all there are.")
    ] = None,
    label_coding: Annotated[
        str | None,
        typer.Option(
            help="2023: labels 0 1 2 3. 2021: 0 1 2 4, as in BraTS 2017 to 2022. gtv: 0 1, as in BraTS-MEN-RT. "
            "Default: gtv where the labels are called so, else 2023."
        ),
    ] = None,
    fractions: Fractions = None,
    folds: Folds = None,
    split_file: SplitFile = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    num_threads: Threads = 4,
) -> None:
    """Check case folders of BraTS (2017 to 2024, MEN-RT too) and write a datalist, split by patient."""
    given = locals()
    check_places("prepare", {"--src": src, "--split-file": split_file})
    from samseg_monai.data.datalists.brats import prepare_brats_men

    _tell(prepare_brats_men(**given))


@prepare_app.command("synapse")
def _synapse(
    src: Annotated[
        Path,
        typer.Option(
            help="BTCV's RawData or its folder with img and label; or TransUNet's with train_npz, test_vol_h5."
        ),
    ],
    output: Output,
    label_coding: Annotated[
        str, typer.Option(help="btcv13: as published. samed, merit, transunet: eight organs. totalsegmentator.")
    ] = "btcv13",
    validation: Annotated[int, typer.Option(min=0, help="Patients taken out of the 18; 0: as published.")] = 0,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without missing cases.")] = False,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    num_threads: Threads = 2,
) -> None:
    """Check BTCV's abdominal CTs and write a datalist with the published 18 training and 12 test cases."""
    given = locals()
    check_places("prepare", {"--src": src})
    from samseg_monai.data.datalists.synapse import prepare_synapse

    _tell(prepare_synapse(**given))


@prepare_app.command("folders")
def _folders(
    src: Annotated[
        Path,
        typer.Option(
            help="Folder with imagesTr and labelsTr (Decathlon, nnU-Net), images and labels, or one folder for each "
            "case; DICOM series are folders in place of files."
        ),
    ],
    output: Output,
    labels: Annotated[
        Any, typer.Option(parser=_labels, metavar="TEXT", help="Such as 1=anterior,2=posterior; default: dataset.json.")
    ] = None,
    label_coding: Annotated[str | None, typer.Option(help="A known coding instead, such as totalsegmentator.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns case and patient; with label and image (or scans) it lists the cases."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; default: dataset.json, or the folder.")] = None,
    counts: Annotated[
        Any,
        typer.Option(
            "--split", parser=numbers(int, 3), metavar="A,B,C", help="Volumes to train, validate, test, by their names."
        ),
    ] = None,
    fractions: Fractions = None,
    folds: Folds = None,
    split_file: SplitFile = None,
    by_name: Annotated[bool, typer.Option("--by-name", help="Cut fractions from the order of names.")] = False,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    num_threads: Threads = 2,
) -> None:
    """Check volumes and their labels, see which layout they have, and write a datalist, split by volume or patient."""
    given = locals()
    check_places("prepare", {"--src": src, "--split-file": split_file})
    from samseg_monai.data.datalists.folders import prepare_folders

    _tell(prepare_folders(**given))


@prepare_app.command("images")
def _images(
    images: Annotated[Path, typer.Option(help="Folder of PNG, JPEG, TIFF, BMP, DICOM or one-slice NIfTI files.")],
    masks: Annotated[Path, typer.Option(help="Folder of masks with the same names, or ending in _mask or _seg.")],
    output: Output,
    labels: Annotated[
        Any, typer.Option(parser=_labels, metavar="TEXT", help="What the values in the masks mean: 255=tumour.")
    ],
    group: Annotated[
        str | None, typer.Option(help="Regular expression for the patient, or block of images, in a name.")
    ] = None,
    spacing: Annotated[float | None, typer.Option(help="Pixel size in mm; default: the files' own, or pixels.")] = None,
    match: Annotated[str | None, typer.Option(help="Take only names like this, such as 'meningioma_*'.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; default: that of the folder.")] = None,
    table: Table = None,
    split_file: SplitFile = None,
    fractions: Fractions = None,
    folds: Folds = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    num_threads: Threads = 2,
) -> None:
    """Check 2-D images and their masks and write a datalist, split by group."""
    given = locals()
    check_places("prepare", {"--images": images, "--masks": masks, "--split-file": split_file})
    from samseg_monai.data.datalists.images import prepare_images

    _tell(prepare_images(**given))


def bbox(
    datalist: Annotated[Path, typer.Argument(help="Datalist (JSON).")],
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Folder that its paths are relative to; default: the datalist's own.")
    ] = None,
    crop: Annotated[
        Any, typer.Option(parser=numbers(int, 2), metavar="X,Y", help="Centre crop whose losses are counted.")
    ] = "138,202",
    output: Annotated[
        Path | None, typer.Option("--output", "--out", callback=file_to_write, help="Write the report as JSON, too.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 4,
) -> None:
    """Measure the smallest in-plane centre crop that holds every training brain."""
    from samseg_monai.data.datalists.crops import smallest_crop
    from samseg_monai.files import write_json

    report = smallest_crop(datalist, dataset_dir or datalist.parent, crop=crop, num_threads=threads, progress=True)
    _tell(report)
    if output is not None:
        write_json(output, asdict(report))


@phantom_app.command("brats")
def _phantom_brats(
    output: Annotated[Path, typer.Option("--output", "--out", help="Folder to write the case folders into.")],
    cases: Annotated[int, typer.Option(min=0, help="Labelled cases.")] = 44,
    unlabelled: Unlabelled = 0,
    shape: Shape = "64,72,24",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Everything is drawn from it.")] = 0,
) -> None:
    """Write phantoms in the layout of BraTS 2023, whose real size is 240,240,155."""
    given = locals()
    from samseg_monai.demo.brain_phantoms import write_brats_cases

    ids = write_brats_cases(**given, progress=True)
    typer.echo(f"wrote {len(ids)} labelled and {unlabelled} unlabelled phantoms to {output}")


@phantom_app.command("btcv")
def _phantom_btcv(
    output: Annotated[Path, typer.Option("--output", "--out", help="Folder to write img and label into.")],
    cases: Annotated[int, typer.Option(min=0, max=30, help="Labelled cases, about 3 to train for 2 to test.")] = 30,
    unlabelled: Unlabelled = 0,
    shape: Shape = "96,80,40",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Everything is drawn from it.")] = 0,
) -> None:
    """Write abdominal CT phantoms in the layout of BTCV, whose real size is about 512,512,130."""
    given = locals()
    from samseg_monai.demo.abdomen_phantoms import write_btcv_cases

    ids = write_btcv_cases(**given, progress=True)
    typer.echo(f"wrote {len(ids)} labelled and {unlabelled} unlabelled phantoms to {output}")


def _tell(summary: Any) -> None:
    typer.echo(visible_lines("\n".join(summary.lines())))
