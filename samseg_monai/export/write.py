"""Export a network: refuse what cannot be, write, read back, compare, and only then hand the files out."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from samseg_monai import __version__
from samseg_monai.adapters import merge_all
from samseg_monai.checkpoints import Network, git_commit
from samseg_monai.errors import BundleError, ConfigError, raise_all
from samseg_monai.export.foreign import (
    against_peft,
    against_samed,
    peft_again,
    samed_again,
    samed_state,
    use_elsewhere,
    write_peft,
)
from samseg_monai.export.official import official_sam, official_shapes, official_state
from samseg_monai.export.parity import (
    TOLERANCE,
    Difference,
    compare_parts,
    compare_predictor,
    difference,
    require,
    trials,
)
from samseg_monai.export.parts import Shape, parts_of, read_onnx, read_program, to_program, write_onnx, write_program
from samseg_monai.export.source import Source
from samseg_monai.faults import output_problem
from samseg_monai.files import read_json, write_json, write_tensors
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.peft import PEFT_CONFIG, PEFT_TENSORS
from samseg_monai.networks.scans import TOGETHER
from samseg_monai.sam.weights import load_sam_weights, sha256_of
from samseg_monai.training.owned import owned_state

FORMATS = ("pth", "torch", "onnx", "samed", "peft")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CARD = "export.json"  # beside the files: what they are, and what goes before and behind them
SUFFIX = {"torch": "pt2", "onnx": "onnx"}
SCALES = {
    "zscore": "z-scores of the volume, as `transforms` make them",
    "unit": "0 to 1, as `transforms` make them",
    "slice": "0 to 1, as `transforms` make them; minimum and maximum of each slice become 0 and 1 inside",
    "sam": "0 to 255, as `transforms` make them; SAM's own mean and standard deviation are applied inside",
}
MEANING = {
    "image": "slices, one channel per scan; at most `image_size` high and wide",
    "boxes": "x0 y0 x1 y1 in pixels of `image`, x along its width; a row with NaN is no box, its logits are -20",
    "embedding": "SAM's image embedding; does not depend on the box: keep it and decode as many boxes as there are",
    "mixed": "SAM's image embedding mixed with the side network's",
    "low_res": "logits, one per 4 x 4 pixels",
    "logits": "logits, one per pixel of the padded slice",
}


@dataclass(frozen=True)
class Exported:
    """Files that were written, the card among them, and how far each is from its network."""

    files: list[Path]
    differences: list[Difference]


def export_network(source: Source, fmt: str, output: str | Path, *, size: tuple[int, int] | None = None) -> Exported:
    """Write ``source`` in one format, checked.

    Everything is written to a temporary folder, read back and compared with the network in float32 on the CPU; only
    files that pass are moved to ``output``. ``source.network`` stays as it is.

    Args:
        fmt: "pth": ``sam_<variant>.pth``, plain SAM in the official layout. "torch": one .pt2 per part. "onnx": one
            .onnx per part. "samed": ``samed_<variant>.pth``, as SAMed saves its networks. "peft": the two files of an
            adapter that Hugging Face's peft loads into transformers' ``SamModel``. ``export.json`` beside them says
            what they are and how to use them.
        output: folder; files of the same names are replaced.
        size: height and width of the slices of a rectangular network (torch, onnx).

    Raises:
        BundleError: the format cannot hold this network (all reasons), or the files do not compute the same.
        ConfigError: unknown format, a size that does not fit, or an output that nothing can be written to.
    """
    if fmt not in FORMATS:
        raise ConfigError(f"format: got {fmt!r}; choose one of {', '.join(FORMATS)}")
    refuse(source.network, fmt)
    if source.kind != "box" and fmt in ("torch", "onnx"):
        raise BundleError(f"format {fmt} has no input for clicks (prompt::kind {source.kind}); possible: pth, peft")
    if fmt not in ("torch", "onnx") and size is not None:
        what = "the official layout" if fmt == "pth" else f"the layout of {fmt}"
        raise ConfigError(f"size: got {size}, but {what} has none; leave it out")
    output = Path(output)
    if problem := output_problem(output):
        raise ConfigError(f"output: {problem}")
    output.mkdir(parents=True, exist_ok=True)
    network = _exact(source.network)
    known = _facts(source)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as temporary:
        folder = Path(temporary)
        if isinstance(network, SamSegmenter) and fmt == "pth":
            if network.scan_mode in TOGETHER:  # predictors enlarge each scan's map: the mean alone may be taken behind
                network.scan_mode = "mean_logits"
            described, differences = _write_pth(source, network, folder)
        elif isinstance(network, SamSegmenter) and fmt in ("samed", "peft"):
            described, differences = _write_foreign(network, fmt, folder)
        else:
            described, differences = _write_parts(network, fmt, folder, known, size)
        require(differences)
        _write_card(source, fmt, folder, known, described, differences)
        files = []
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
            files.append(output / path.name)
    return Exported(files, differences)


def _exact(network: Network) -> Network:
    """A copy as files are compared with: on the CPU, in evaluation mode, in float32 throughout, without gradients."""
    exact = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    if isinstance(exact, SamSegmenter):
        exact.autocast = None
    return exact


def _write_pth(source: Source, network: SamSegmenter, folder: Path) -> tuple[dict[str, Any], list[Difference]]:
    spec, allowed = network.spec, TOLERANCE["pth"]
    path = folder / f"sam_{spec.name}.pth"
    write_tensors(path, official_state(network, source.base))
    sam = official_sam(spec, path)  # strictly: other names or shapes would raise here
    if network.image_size == spec.image_size:
        differences = [compare_predictor(network, sam, allowed)]
    else:
        again = SamSegmenter(
            spec,
            image_size=network.image_size,
            scans=network.scans,
            scan_mode=network.scan_mode,  # type: ignore[arg-type]
            input_scale=network.input_scale,  # type: ignore[arg-type]
            prompt=network.prompt,  # type: ignore[arg-type]
            rectangular=network.sam.rectangular,
        )
        load_sam_weights(again.sam, path)
        with torch.no_grad():
            pairs = [(again(**tensors), network(**tensors)) for tensors in trials(network, parts_of(network))]
        differences = [difference(f"read back at image_size {network.image_size}", pairs, allowed)]
    return {path.name: {"use": _use_of_pth(source)}}, differences


def _write_foreign(network: SamSegmenter, fmt: str, folder: Path) -> tuple[dict[str, Any], list[Difference]]:
    if fmt == "samed":
        path = folder / f"samed_{network.spec.name}.pth"
        write_tensors(path, samed_state(network))
        again, what = samed_again(network, path), "read back as SAMed's file"
    else:
        path = folder / PEFT_TENSORS
        write_peft(network, folder)
        config = read_json(folder / PEFT_CONFIG, BundleError, "settings of peft")
        again, what = peft_again(network, load_file(path), config), "read back as peft's updates of whole layers"
    with torch.no_grad():
        pairs = [(again(**tensors), network(**tensors)) for tensors in trials(network, parts_of(network))]
    return {path.name: {"use": use_elsewhere(network, fmt)}}, [difference(what, pairs, TOLERANCE[fmt])]


def _write_parts(
    network: Network, fmt: str, folder: Path, known: dict[str, Any], size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[Difference]]:
    plain = network
    if mergeable(network):
        plain = copy.deepcopy(network)
        merge_all(plain)
    parts = parts_of(plain, size)
    # others than text as JSON: what ONNX metadata can hold
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}
    calls = {}
    for part in parts:
        path = folder / f"{part.name}.{SUFFIX[fmt]}"
        program = to_program(part)
        if fmt == "torch":
            write_program(program, path, texts)
            calls[part.name] = read_program(path)
        else:
            write_onnx(program, part, path, texts)
            calls[part.name] = read_onnx(path)
    described = {
        f"{p.name}.{SUFFIX[fmt]}": {"inputs": _tensors(p.inputs), "outputs": _tensors(p.outputs)} for p in parts
    }
    return described, compare_parts(network, parts, calls, TOLERANCE[fmt])


def _write_card(
    source: Source,
    fmt: str,
    folder: Path,
    known: dict[str, Any],
    described: dict[str, Any],
    differences: Sequence[Difference],
) -> None:
    files = {
        path.name: {"sha256": sha256_of(path), **described.get(path.name, {})} for path in sorted(folder.iterdir())
    }
    content = {
        "format_version": 1,
        "format": fmt,
        **known,
        "torch": str(torch.__version__),
        "files": files,
        "preprocessing": _preprocessing(source),
        "postprocessing": _postprocessing(source),
        "parity": [asdict(difference) for difference in differences],
    }
    write_json(folder / CARD, content)


def _facts(source: Source) -> dict[str, Any]:
    """What is known of the network, as JSON values; the same in the card, in ONNX metadata and within .pt2 files."""
    network = source.network
    tensors = owned_state(network, network.state_dict())  # adapters unmerged
    known = {
        "bundle": source.name,
        "warning": source.warning,
        "intended_use": source.intended_use or "Research only. Not a medical device.",
        "sam_variant": network.spec.name,
        "strategy": None if network.strategy is None else network.strategy.card(),
        "image_size": network.image_size,
        "classes": list(source.classes),
        "num_classes": network.num_classes,
        "scans": list(source.scans),
        "scan_mode": network.scan_mode,
        "input_scale": network.input_scale,
        "prompt": network.prompt,
        "rectangular": isinstance(network, SamSegmenter) and network.sam.rectangular,
        "base_sha256": source.base_sha256,
        "weights_sha256": hashlib.sha256(save(tensors)).hexdigest(),
        "transforms": source.transforms,
        "package_version": __version__,
        "git_commit": git_commit(),
    }
    return {name: value for name, value in known.items() if value is not None}


def _tensors(shapes: dict[str, Shape]) -> dict[str, Any]:
    """Shape, type and meaning of the inputs or outputs of a part."""
    return {name: {"shape": list(s), "dtype": "float32", "is": MEANING[name]} for name, s in shapes.items()}


def _preprocessing(source: Source) -> list[str]:
    """What has to be done to a volume before the files see it, in order."""
    network = source.network
    steps = [
        "`transforms` are MONAI's, in order: on the volume, but Resized and SplineResized on each slice",
        f"intensities: {SCALES[network.input_scale]}",
    ]
    if network.scan_mode in TOGETHER and network.scans > 1:
        how = TOGETHER[network.scan_mode]
        steps.append(f"each scan goes through SAM as a grey image with the same box; {how}")
    if network.scan_mode == "neighbours":
        steps.append(
            "three channels: the slice before, the slice, the slice behind; at the volume's ends the last again"
        )
    return steps


def _postprocessing(source: Source) -> list[str]:
    """What has to be done with the logits, in order."""
    network = source.network
    if network.num_classes == 1:
        decide = "one map: logit > 0, which is a probability (sigmoid) above 0.5"
        several = "several boxes in one slice: the largest logit of theirs"
    else:
        decide = "one map per class behind the background's: softmax for probabilities, argmax for labels"
        several = "several boxes in one slice: the largest logit of theirs, of the background the smallest"
    steps = ["cut the padding off: logits[..., :height, :width] of the slice"]
    steps += [several] if network.prompt == "box" else []
    return [*steps, "resize the logits to the slice before Resized, bilinearly", decide, "undo the other transforms"]


def _use_of_pth(source: Source) -> list[str]:
    """How segment_anything gives this network's logits with an official-layout file."""
    network: Any = source.network
    size, native = network.image_size, network.spec.image_size
    steps = [f"sam = sam_model_registry['{network.spec.name}'](checkpoint=FILE)"] if native == 1024 else []
    if network.spec.name == "vit_t":
        steps[0] += "; with MobileSAM's mobile_sam, since segment_anything has no vit_t"
    if network.input_scale == "slice":
        steps.append("first bring each slice to 0 to 1, its minimum and maximum")
    if network.input_scale != "sam":
        steps.append("SamPredictor normalises: give set_torch_image() the slice * sam.pixel_std + sam.pixel_mean")
    if network.scan_mode in TOGETHER:
        steps.append(
            f"every scan is a grey image: three equal channels; of several scans {TOGETHER[network.scan_mode]}"
        )
    steps.append("predict_torch(..., multimask_output=False): only the first mask was trained")
    if size != native:
        steps.append(
            f"trained at {size} pixels, while segment_anything works at {native}: its logits are others. To get the "
            f"network's own, load the file as sam_checkpoint at image_size {size}"
        )
    if network.sam.rectangular:
        steps.append("trained with padding to full patches; segment_anything pads to the square, which changes logits")
    return steps


def obstacles(network: Network) -> dict[str, list[str]]:
    """Reasons why ``network`` cannot be exported, by format; an empty list means that it can.

    The formats are those of ``samseg export`` and, as ``ckpt_export``, MONAI's TorchScript command.
    """
    parts, tracing, absent = _against_parts(network), [], []
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        absent = [f"packages {', '.join(missing)} are not installed: pip install 'samseg-monai[onnx]'"]
    if network.prompt != "none":
        tracing = [
            "box prompts: MONAI's ckpt_export traces a network with one random image, so boxes are no input of the "
            "result, and which slices have a box is decided in Python, which tracing does not record"
        ]
    found = {"pth": _against_pth(network), "torch": parts, "onnx": parts + absent}
    found |= {"samed": _no_sam(network), "peft": _no_sam(network)}
    if isinstance(network, SamSegmenter):
        found |= {"samed": against_samed(network), "peft": against_peft(network)}
    return {**found, "ckpt_export": tracing + _against_slabs(network)}


def refuse(network: Network, fmt: str) -> None:
    """Raise BundleError with all reasons against ``fmt`` and the formats that are possible instead."""
    found = obstacles(network)
    possible = [name for name in FORMATS if not found[name]]
    instead = f"possible: {', '.join(possible)}" if possible else "no other format is possible either"
    raise_all(found[fmt], BundleError, f"format {fmt} cannot hold this network; {instead}")


def mergeable(module: nn.Module) -> list[str]:
    """Names of the adapter layers below ``module`` that can be folded into a plain layer."""
    return [name for name, layer in module.named_modules() if name and callable(getattr(layer, "merge", None))]


def _no_sam(network: Network) -> list[str]:
    kind = type(getattr(network, "net", network)).__name__
    return [f"{kind}: there is no SAM in it, whose layout the file would have"]


def _against_pth(network: Network) -> list[str]:
    if not isinstance(network, SamSegmenter):
        return _no_sam(network)
    reasons = _against_best(network)
    if network.second is not None:
        reasons.append("a second decoder behind SAM's: the layout has room for one")
    if network.side is not None:
        side = type(getattr(network.side, "net", network.side)).__name__
        reasons.append(f"side network {side}: no layer of SAM can take in what it adds to SAM's embedding")
    if network.num_classes > 1:
        masks = network.channels_out
        fit = "would fit, but be taken for" if masks == 4 else "have other shapes than"
        reasons.append(
            f"{network.num_classes} classes: the {masks} masks, one per class and the background, {fit} SAM's 4 "
            "(one object, and three guesses at its parts)"
        )
        return reasons  # its tensors cannot be compared one by one
    folded = tuple(f"{name}." for name in mergeable(network.sam))
    foreign = [
        name for name in network.sam.state_dict().keys() - official_shapes(network.spec) if not name.startswith(folded)
    ]
    if foreign:
        reasons.append(
            f"{type(network.strategy).__name__}: {len(foreign)} tensors that SAM does not have and that cannot be "
            f"merged into its layers (first: {min(foreign)})"
        )
    return reasons


def _against_parts(network: Network) -> list[str]:
    if not isinstance(network, SamSegmenter):
        boxes = f"boxes '{network.boxes}': only networks without boxes, or with SAM, have a part that takes them"
        deep = "three dimensions: these files are of networks that see slices; MONAI's ckpt_export makes TorchScript"
        return [boxes] if network.boxes != "none" else [deep] if len(network.sides) == 3 else []
    reasons, taps = _against_best(network) + _against_slabs(network), tuple(getattr(network.side, "taps", ()))
    if taps:
        side = type(network.side).__name__
        reasons.append(f"side network {side}: it reads blocks {taps}, which the encoder does not hand out")
    return reasons


def _against_slabs(network: Network) -> list[str]:
    depth = getattr(network, "depth", 1)
    alone = f"slabs of {depth} slices: the files take slices one by one, and no neighbours to attend to"
    return [] if depth == 1 else [alone]


def _against_best(network: SamSegmenter) -> list[str]:
    best = "masks 'best': the file would give the single mask, not the one of highest quality; set masks to 'single'"
    return [] if network.masks == "single" else [best]
