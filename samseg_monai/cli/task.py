"""``samseg task new|schema``: settings of a task of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from samseg_monai.cli.outputs import folder_to_write
from samseg_monai.cli.places import check_places
from samseg_monai.errors import BundleError, ConfigError

task_app = typer.Typer(help="Write settings of a task of your own.", no_args_is_help=True)


@task_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="of the task: letters, digits, _ . and -")],
    datalist: Annotated[Path, typer.Option(help="datalist (JSON) that samseg prepare has written")],
    dataset_dir: Annotated[
        Path | None, typer.Option(help="folder that its paths are relative to; default: the datalist's own")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="MR, CT, US, XC ... if the datalist does not say it")] = None,
    output: Annotated[
        Path, typer.Option("--output", "--out", callback=folder_to_write, help="folder that will hold NAME.json")
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="replace NAME.json")] = False,
) -> None:
    """Measure the data of a datalist and write a task for them, with a reason for each choice.

    Reads the grids of all cases and the voxels of up to 20 training cases. The reasons are printed, and stand in the
    file as keys that begin with //. Change what you know better; samseg bundle build checks it.
    """
    from samseg_monai.bundles.draft import check_name, draft_task, write_task

    check_name(name)
    places = {"--datalist": datalist, "--dataset-dir": dataset_dir}
    check_places("task new", places, "; samseg prepare writes a datalist")
    if modality is not None and not modality.isalnum():
        raise ConfigError(f"--modality: got {modality!r}; give MR, CT, US, XC ... as DICOM abbreviates it")
    path = output / f"{name}.json"
    if path.exists() and not force:
        raise BundleError(f"{path}: exists; give another name, or --force to replace it")
    from samseg_monai.data.datalists.measure import measure  # libraries that take seconds, once they are wanted

    measured = measure(datalist, dataset_dir or datalist.parent, progress=True)
    choices = draft_task(measured, modality and modality.upper())
    write_task(name, choices, output)
    width = max(len(choice.key) for choice in choices)
    for choice in choices:
        typer.echo(
            f"{choice.key:<{width}}  {json.dumps(choice.value, ensure_ascii=False)}\n{'':<{width}}  {choice.why}"
        )
    strategy = "lora" if len(measured.classes) == 1 else "ladder"
    typer.echo(f"wrote {path}; next: samseg bundle build --task {path} --strategy {strategy} --output my_bundles")


@task_app.command("schema")
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "--out", help="JSON file to write; default: print it")
    ] = None,
    of_bundle: Annotated[bool, typer.Option("--of-bundle", help="of a bundle's configs/settings.json instead")] = False,
) -> None:
    """Write the JSON Schema of tasks: editors then complete keys, explain them and mark mistakes."""
    from samseg_monai.bundles.draft import recipe_schema
    from samseg_monai.files import write_json
    from samseg_monai.settings import json_schema

    value = json_schema() if of_bundle else recipe_schema()
    if output is None:
        typer.echo(json.dumps(value, indent=2))
    else:
        write_json(output, value)
        typer.echo(f"wrote {output}")
