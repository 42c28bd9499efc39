"""Sentences about a bundle, made of its settings, so that README and metadata say what the configs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samseg_monai.choices import SECOND, SSF, Adapter, FacT, Ladder, LoRA, Selective, ZeroShot
from samseg_monai.settings import BundleSettings

PLACES = {
    "serial": "behind attention and MLP",
    "parallel": "beside the MLP",
    "both": "behind the attention and beside the MLP",
}
_PROMPTS = {"box": ("box", "Boxes"), "points": ("click", "Clicks"), "both": ("box and click", "Boxes with clicks")}
BEHIND = "the prompt encoder's no_mask_embed and a second decoder behind it"
NEIGHBOURS = ("slice before", "slice", "slice behind")
SCALES = {"zscore": "z-scores", "unit": "0 to 1", "slice": "0 to 1 within each slice", "sam": "0 to 255"}


def words(settings: BundleSettings) -> dict[str, Any]:
    """What the templates of README and metadata say of prompts, values, inputs and outputs."""
    task, run = settings.task, settings.run
    prompted, several = run.prompt.source != "none", len(task.classes) > 1
    shown = task.channels or task.scans
    seen = [f"{shown[0]}, {place}" for place in NEIGHBOURS] if run.scan_mode == "neighbours" else shown
    numbered = [f"{number} {name}" for number, name in enumerate(task.classes, start=1)]
    channels = ["background", *task.classes] if several else task.classes
    if task.kind == "images":
        form = "predictions are images with the values of the labels"
    else:
        form = f"predictions are volumes of 0 to {len(task.classes)}"
    if several:
        pred = f"{len(channels)} channels, softmax: {', '.join(channels)}; {form}"
    else:
        pred = f"one channel: logit of {task.classes[0]} (more than 0 is {task.classes[0]}); {form}"
    return {
        "prompted": prompted,
        "how": f"with {_PROMPTS[run.prompt.kind][0]} prompts" if prompted else "without prompts",
        "prompts": _PROMPTS[run.prompt.kind][1],
        "said": _method(settings),
        "facts": {
            "image": _image(settings, shown),
            "label": f"0 background; {', '.join(numbered)}" + _coding(settings),
            "pred": pred,
            "inputs": dict(zip(map(str, range(len(seen))), seen, strict=True)),
            "outputs": dict(zip(map(str, range(len(channels))), channels, strict=True)),
        },
    }


def next_words(settings: BundleSettings, folder: Path) -> str:
    """Lines with the commands that come next, as they are typed in the working directory.

    Args:
        settings: of the bundle.
        folder: where it lies, as seen from the working directory.
    """
    data, phantoms = Path("data") / settings.task.dataset, settings.task.phantoms
    kinds = ["train"] if settings.trains else ["inference", "evaluate"]
    lines = [f"next: {_command(folder, kinds, data, f'runs/{settings.name}')}"]
    if not (data / "datalist.json").is_file():
        lines.append(
            f"      ({data}/datalist.json is not here: --dataset_dir is the folder that samseg prepare wrote it to)"
        )
    if settings.demo is not None:
        lines.append("or, for a try in minutes:")
        lines += [f"      {line}" for line in phantoms]
        lines.append(
            f"      {_command(folder, [*kinds, 'demo'], Path('demo/phantoms') if phantoms else data, 'runs/demo')}"
        )
    return "\n".join(lines)


def _command(folder: Path, kinds: list[str], data: Path, output: str) -> str:
    files = [f"{folder.as_posix()}/configs/{kind}.json" for kind in kinds]
    given = "[" + ",".join(f"'{file}'" for file in files) + "]" if len(files) > 1 else files[0]
    given = f'"{given}"' if len(files) > 1 or " " in given else given
    return f"python -m monai.bundle run --config_file {given} --dataset_dir {data.as_posix()} --output_dir {output}"


def _image(settings: BundleSettings, shown: list[str]) -> str:
    task = settings.task
    kind = "2-D image" if task.kind == "images" else "volume"
    if len(shown) > 1:
        what = f"{len(shown)} {kind}s of one exam ({', '.join(shown)}), in that order as channels"
    else:
        what = f"one {kind} ({shown[0]})"
    if settings.run.scan_mode == "neighbours":
        what += ", of which SAM sees each slice between its neighbours as the three channels"
    window = task.intensity.window
    clipped = f" of {window[0]:g} to {window[1]:g}" if window and settings.run.input_scale != "zscore" else ""
    return (
        f"{what}; {task.modality}; intensities{clipped} are scaled to {SCALES[settings.run.input_scale]} by the bundle"
    )


def _coding(settings: BundleSettings) -> str:
    if settings.task.labels == "foreground":
        return " (every value above 0)"
    return "; label files keep their own coding, which the datalist names"


def _method(settings: BundleSettings) -> str:
    """What learns, with the values of this bundle."""
    method, run = settings.strategy.method, settings.run
    size = f"slices of {run.image_size} pixels"
    if settings.sees_volumes:
        size = f"patches of {' x '.join(map(str, run.patch))} voxels, in three dimensions"
    if settings.strategy.network is not None:
        boxes = getattr(settings.strategy.network, "boxes", "given")
        return f"Network: {settings.strategy.network.name} on {size}; boxes: {boxes}."
    sam = f"SAM: {run.sam_variant} on {size}."
    if isinstance(method, ZeroShot):
        return f"{sam} Nothing learns."
    if isinstance(method, LoRA):
        kind = "DoRA" if method.dora else "LoRA"
        what = f"{kind} of rank {method.rank} in {', '.join(method.targets)} of {_blocks(method)}"
        return f"{sam} {what}; the mask decoder {_decoder(method.decoder, kind)}."
    if isinstance(method, Adapter):
        what = f"Bottlenecks of width {method.width} {PLACES[method.place]} of {_blocks(method)}, "
        what += f"scaled by {method.scale:g}"
        if method.depth > 1:
            what += f"; each slice attends to its neighbours in slabs of {method.depth} slices, through further ones"
        return f"{sam} {what}; the mask decoder {_decoder(method.decoder)}."
    if isinstance(method, SSF):
        what = "A scale and a shift behind every layer of the encoder that has weight and bias"
        return f"{sam} {what}; the mask decoder {_decoder(method.decoder)}."
    if isinstance(method, FacT):
        where = f"{', '.join(method.targets)} of {_blocks(method)}"
        what = f"FacT of rank {method.rank}, scaled by {method.scale:g}, in {where}"
        return f"{sam} {what}; the mask decoder {_decoder(method.decoder)}."
    if isinstance(method, Ladder):
        width = f" of width {method.side.width}" if method.side else ""
        decoder = f"full, with {BEHIND}" if method.decoder == "hierarchical" else method.decoder
        return f"{sam} Ladder{width}: mix {method.mix}, decoder {decoder}, masks {method.masks}."
    assert isinstance(method, Selective)
    frozen = f"; frozen: {', '.join(method.frozen)}" if method.frozen else ""
    also = f"; the mask decoder {_decoder(method.decoder)}" if method.decoder else ""
    return f"{sam} What learns: {', '.join(method.patterns)}{frozen}{also}."


def _blocks(method: LoRA | Adapter | FacT) -> str:
    if method.last is not None:
        return f"the last {method.last:.0%} of the blocks with attention"
    return "all blocks" if method.blocks is None else f"blocks {', '.join(map(str, method.blocks))}"


def _decoder(choice: bool | str, kind: str = "") -> str:
    if choice == "lora":
        return f"has {kind} in q and v of its attention"
    if choice == "samed":
        return "learns, too, and so does the prompt encoder's no_mask_embed"
    if choice in SECOND:
        return f"learns, too, with {BEHIND}" + (", both as in H-SAM's code" if choice == "h_sam" else "")
    return "learns, too" if choice else "stays as it is"
