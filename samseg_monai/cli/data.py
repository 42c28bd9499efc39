"""Commands about data: ``prepare brats-men | synapse | folders | images``, ``bbox`` and ``phantom brats | btcv``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

prepare_app = typer.Typer(help="Check a data set and write its datalist.", no_args_is_help=True)
phantom_app = typer.Typer(help="Write synthetic cases for demos and tests.", no_args_is_help=True)


@prepare_app.callback()
@phantom_app.callback()
def _group() -> None:
    # Without a callback Typer would fold a group of one command into that command.
    return


@prepare_app.command("brats-men")
def prepare_brats_men_command(
    src: Annotated[Path, typer.Option(help="Folder that holds the case folders.")],
    output: Annotated[Path, typer.Option(help="Datalist (JSON) to write.")],
    label_coding: Annotated[
        str, typer.Option(help="2023: labels 0 1 2 3. 2021: labels 0 1 2 4, as in BraTS 2017 to 2022.")
    ] = "2023",
    fractions: Annotated[str, typer.Option(help="Of patients, for training, validation, testing.")] = "0.7,0.1,0.2",
    split_file: Annotated[
        Path | None, typer.Option(help="JSON with case or patient ids under training, validation, testing.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad cases out and list them.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 4,
) -> None:
    """Check cases in the layout of BraTS 2023 and write a datalist, split by patient."""
    from samseg_monai.data.brats import prepare_brats_men

    parts = _numbers(fractions, float, count=3, option="--fractions")
    summary = prepare_brats_men(
        src,
        output,
        label_coding=label_coding,
        fractions=parts,
        split_file=split_file,
        seed=seed,
        skip_bad=skip_bad,
        num_threads=threads,
    )
    typer.echo("\n".join(summary.lines()))


@prepare_app.command("synapse")
def prepare_synapse_command(
    src: Annotated[Path, typer.Option(help="BTCV's RawData, or the folder in it that holds img and label.")],
    output: Annotated[Path, typer.Option(help="Datalist (JSON) to write.")],
    label_coding: Annotated[
        str, typer.Option(help="btcv13: as published. samed, merit, transunet: eight organs. totalsegmentator.")
    ] = "btcv13",
    validation: Annotated[int, typer.Option(min=0, help="Patients taken out of the 18; 0: as published.")] = 0,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without missing cases.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice of validation patients.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad cases out and list them.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 2,
) -> None:
    """Check BTCV's abdominal CTs and write a datalist with the published 18 training and 12 test cases."""
    from samseg_monai.data.synapse import prepare_synapse

    summary = prepare_synapse(
        src,
        output,
        label_coding=label_coding,
        validation=validation,
        allow_missing=allow_missing,
        seed=seed,
        skip_bad=skip_bad,
        num_threads=threads,
    )
    typer.echo("\n".join(summary.lines()))


@prepare_app.command("folders")
def prepare_folders_command(
    src: Annotated[Path, typer.Option(help="Folder with imagesTr and labelsTr, or images and labels.")],
    output: Annotated[Path, typer.Option(help="Datalist (JSON) to write.")],
    labels: Annotated[str | None, typer.Option(help="Such as 1=anterior,2=posterior; default: dataset.json.")] = None,
    label_coding: Annotated[str | None, typer.Option(help="A known coding instead, such as totalsegmentator.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; default: dataset.json, or the folder.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Volumes for training, validation, testing in the order of their names.")
    ] = None,
    fractions: Annotated[str | None, typer.Option(help="Of the volumes instead; default 0.7,0.1,0.2.")] = None,
    by_name: Annotated[bool, typer.Option("--by-name", help="Cut fractions from the order of names.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order that fractions are cut from.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad cases out and list them.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 2,
) -> None:
    """Check a Decathlon folder, or plain folders of images and labels, and write a datalist, split by volume."""
    from samseg_monai.data.folders import parse_labels, prepare_folders

    if split is not None and fractions is not None:
        raise typer.BadParameter("give counts or fractions, not both", param_hint="--split")
    summary = prepare_folders(
        src,
        output,
        labels=None if labels is None else parse_labels(labels),
        label_coding=label_coding,
        name=name,
        counts=None if split is None else _numbers(split, int, count=3, option="--split"),
        fractions=_numbers(fractions or "0.7,0.1,0.2", float, count=3, option="--fractions"),
        by_name=by_name,
        seed=seed,
        skip_bad=skip_bad,
        num_threads=threads,
    )
    typer.echo("\n".join(summary.lines()))


@prepare_app.command("images")
def prepare_images_command(
    images: Annotated[Path, typer.Option(help="Folder of PNG, JPEG, TIFF, BMP, DICOM or one-slice NIfTI files.")],
    masks: Annotated[Path, typer.Option(help="Folder of masks with the same names, or ending in _mask or _seg.")],
    output: Annotated[Path, typer.Option(help="Datalist (JSON) to write.")],
    labels: Annotated[str, typer.Option(help="What the values in the masks mean, such as 255=tumour.")],
    group: Annotated[
        str | None, typer.Option(help="Regular expression for the patient, or block of images, in a name.")
    ] = None,
    spacing: Annotated[float | None, typer.Option(help="Pixel size in mm; default: the files' own, or pixels.")] = None,
    match: Annotated[str | None, typer.Option(help="Take only names like this, such as 'meningioma_*'.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the data set; default: that of the folder.")] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="JSON with names of images or groups under training, validation, testing.")
    ] = None,
    fractions: Annotated[str, typer.Option(help="Of groups, for training, validation, testing.")] = "0.7,0.1,0.2",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad cases out and list them.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 2,
) -> None:
    """Check 2-D images and their masks and write a datalist, split by group."""
    from samseg_monai.data.folders import parse_labels
    from samseg_monai.data.image_folders import prepare_images

    summary = prepare_images(
        images,
        masks,
        output,
        labels=parse_labels(labels),
        group=group,
        spacing=spacing,
        match=match,
        name=name,
        split_file=split_file,
        fractions=_numbers(fractions, float, count=3, option="--fractions"),
        seed=seed,
        skip_bad=skip_bad,
        num_threads=threads,
    )
    typer.echo("\n".join(summary.lines()))


def bbox(
    datalist: Annotated[Path, typer.Argument(help="Datalist (JSON).")],
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Folder that its paths are relative to; default: the datalist's own.")
    ] = None,
    crop: Annotated[str, typer.Option(help="Centre crop whose losses are counted.")] = "138,202",
    output: Annotated[Path | None, typer.Option(help="Write the report as JSON, too.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Cases read at the same time.")] = 4,
) -> None:
    """Measure the smallest in-plane centre crop that holds every training brain."""
    from samseg_monai.data.crops import smallest_crop

    sides = _numbers(crop, int, count=2, option="--crop")
    report = smallest_crop(datalist, dataset_dir or datalist.parent, crop=sides, num_threads=threads, progress=True)
    typer.echo("\n".join(report.lines()))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


@phantom_app.command("brats")
def phantom_brats_command(
    output: Annotated[Path, typer.Option(help="Folder to write the case folders into.")],
    cases: Annotated[int, typer.Option(min=0, help="Labelled cases.")] = 44,
    unlabelled: Annotated[int, typer.Option(min=0, help="More cases without a mask, in OUTPUT/unlabelled.")] = 0,
    shape: Annotated[str, typer.Option(help="Voxels; 240,240,155 is the real size.")] = "64,72,24",
    seed: Annotated[int, typer.Option(help="Everything is drawn from it.")] = 0,
) -> None:
    """Write phantoms in the layout of BraTS 2023."""
    from samseg_monai.data.phantoms import write_brats_cases

    size = _numbers(shape, int, count=3, option="--shape")
    ids = write_brats_cases(output, cases, shape=size, seed=seed, unlabelled=unlabelled, progress=True)
    typer.echo(f"wrote {len(ids)} labelled and {unlabelled} unlabelled phantoms to {output}")


@phantom_app.command("btcv")
def phantom_btcv_command(
    output: Annotated[Path, typer.Option(help="Folder to write img and label into.")],
    cases: Annotated[int, typer.Option(min=0, max=30, help="Labelled cases, about 3 to train for 2 to test.")] = 30,
    unlabelled: Annotated[int, typer.Option(min=0, help="More cases without a label.")] = 0,
    shape: Annotated[str, typer.Option(help="Voxels; 512,512,130 is about the real size.")] = "96,80,40",
    seed: Annotated[int, typer.Option(help="Everything is drawn from it.")] = 0,
) -> None:
    """Write abdominal CT phantoms in the layout of BTCV."""
    from samseg_monai.data.abdomen_phantoms import write_btcv_cases

    size = _numbers(shape, int, count=3, option="--shape")
    ids = write_btcv_cases(output, cases, shape=size, seed=seed, unlabelled=unlabelled, progress=True)
    typer.echo(f"wrote {len(ids)} labelled and {unlabelled} unlabelled phantoms to {output}")


def _numbers(text: str, kind: type, *, count: int, option: str) -> list:
    try:
        values = [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        values = []
    if len(values) != count or min(values) < 0:
        raise typer.BadParameter(f"expected {count} numbers separated by commas, got {text!r}", param_hint=option)
    return values
