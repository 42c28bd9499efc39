"""The card beside exported files: what they are, shapes, what goes before and behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from safetensors.torch import save
from torch import nn

from samseg_monai import __version__
from samseg_monai.checkpoints import git_commit
from samseg_monai.export.parts import Part, Shape
from samseg_monai.export.source import Source
from samseg_monai.networks import SamSegmenter
from samseg_monai.training.owned import owned_state

SCALES = {
    "zscore": "z-scores of the volume, as `transforms` make them",
    "unit": "0 to 1, as `transforms` make them",
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


def facts(source: Source) -> dict[str, Any]:
    """What is known of the network, as JSON values; the same in the card, in ONNX metadata and within .pt2 files."""
    network = source.network
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
        "weights_sha256": weights_hash(network),
        "transforms": source.transforms,
        "package_version": __version__,
        "git_commit": git_commit(),
    }
    return {name: value for name, value in known.items() if value is not None}


def weights_hash(network: nn.Module) -> str:
    """sha256 of the safetensors file of all tensors, adapters unmerged; the same for equal names and values."""
    return hashlib.sha256(save(owned_state(network, network.state_dict()))).hexdigest()


def as_texts(known: dict[str, Any]) -> dict[str, str]:
    """The same as strings, others than text as JSON: what ONNX metadata can hold."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}


def describe(part: Part) -> dict[str, Any]:
    """Inputs and outputs of a part: shape, type and meaning of each."""

    def tensors(shapes: dict[str, Shape]) -> dict[str, Any]:
        return {name: {"shape": list(s), "dtype": "float32", "is": MEANING[name]} for name, s in shapes.items()}

    return {"inputs": tensors(part.inputs), "outputs": tensors(part.outputs)}


def preprocessing(source: Source) -> list[str]:
    """What has to be done to a volume before the files see it, in order."""
    network = source.network
    steps = [
        "`transforms` are MONAI's, in order: on the volume, but Resized and SplineResized on each slice",
        f"intensities: {SCALES[network.input_scale]}",
    ]
    if network.scan_mode == "mean_logits" and network.scans > 1:
        steps.append("each scan goes through SAM as a grey image with the same box; the logits are averaged")
    return steps


def postprocessing(source: Source) -> list[str]:
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


def use_of_pth(source: Source) -> list[str]:
    """How segment_anything gives this network's logits with an official-layout file."""
    network: Any = source.network
    size, native = network.image_size, network.spec.image_size
    steps = [f"sam = sam_model_registry['{network.spec.name}'](checkpoint=FILE)"] if native == 1024 else []
    if network.spec.name == "vit_t":
        steps[0] += "; with MobileSAM's mobile_sam, since segment_anything has no vit_t"
    if network.input_scale != "sam":
        steps.append("SamPredictor normalises: give set_torch_image() the slice * sam.pixel_std + sam.pixel_mean")
    if network.scan_mode == "mean_logits":
        steps.append("every scan is a grey image: three equal channels; average the logits of several scans")
    steps.append("predict_torch(..., multimask_output=False): only the first mask was trained")
    if size != native:
        steps.append(
            f"trained at {size} pixels, while segment_anything works at {native}: its logits are others. To get the "
            f"network's own, load the file as sam_checkpoint at image_size {size}"
        )
    if network.sam.rectangular:
        steps.append("trained with padding to full patches; segment_anything pads to the square, which changes logits")
    return steps


def parts_table(parts: Sequence[Part], suffix: str) -> dict[str, Any]:
    """Description of every part by its file name."""
    return {f"{part.name}.{suffix}": describe(part) for part in parts}
