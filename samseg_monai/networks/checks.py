"""What a segmenter refuses, and how it knows that its encoder is still the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samseg_monai.errors import ConfigError, raise_all

if TYPE_CHECKING:
    from samseg_monai.networks.plain import PlainSegmenter
    from samseg_monai.networks.segmenter import SamSegmenter

OPTIONS: dict[str, tuple[str | None, ...]] = {
    "scan_mode": ("mean_logits", "channels"),
    "input_scale": ("zscore", "unit", "sam"),
    "prompt": ("box", "none"),
    "autocast": (None, "bf16", "bf16_all"),
    "masks": ("single", "best"),
    "boxes": ("none", "channel", "crop", "given"),
}


def check_options(
    chosen: Mapping[str, str | None],
    *,
    num_classes: int,
    scans: int,
    low_res_training: bool = False,
    masks: str = "single",
) -> None:
    """Raise ConfigError listing all constructor arguments that are unknown or contradict each other."""
    chosen = {**chosen, "masks": masks}
    problems = [
        f"{key}: got {value!r}; choose one of {', '.join(map(repr, OPTIONS[key]))}"
        for key, value in chosen.items()
        if value not in OPTIONS[key]
    ]
    problems += [f"{k}: got {v}; at least 1" for k, v in {"num_classes": num_classes, "scans": scans}.items() if v < 1]
    if chosen.get("scan_mode") == "channels" and scans != 3:
        problems.append(f"scans: got {scans}, but scan_mode 'channels' needs exactly 3; or use 'mean_logits'")
    if low_res_training and chosen.get("prompt") != "none":
        problems.append("low_res_training: got true with prompts; it is for networks with prompt='none'")
    if masks == "best" and num_classes != 1:
        problems.append(f"masks: got 'best' with {num_classes} classes, whose masks are no guesses; use 'single'")
    raise_all(problems, ConfigError, "the segmenter cannot be built")


def check_image(network: SamSegmenter | PlainSegmenter, image: Tensor) -> None:
    """Raise ConfigError naming the shape of image that was got and the one expected."""
    if image.ndim != 4 or image.shape[1] != network.scans or max(image.shape[-2:]) > network.image_size:
        raise ConfigError(
            f"image: got shape {tuple(image.shape)}, expected (B, {network.scans}, H, W) with H and W at most "
            f"{network.image_size}; check scans and image_size"
        )


def check_boxes(network: SamSegmenter | PlainSegmenter, image: Tensor, boxes: Tensor | None) -> None:
    """Raise ConfigError if there are boxes that this network does not take, or in a shape that it does not take."""
    if boxes is not None and network.prompt == "none":
        how = "boxes='channel', 'crop' or 'given'" if hasattr(network, "boxes") else "'box'"
        raise ConfigError(f"boxes: got some, but this network was built with prompt='none'; build it with {how}")
    if boxes is not None and (boxes.ndim not in (2, 3) or len(boxes) != len(image) or boxes.shape[-1] != 4):
        raise ConfigError(f"boxes: got shape {tuple(boxes.shape)}, expected (B, 4) or (B, N, 4) with B={len(image)}")


def check_inputs(network: SamSegmenter, image: Tensor, boxes: Tensor | None, embedding: Tensor | None) -> None:
    """Raise ConfigError naming the shape that was got and the one expected, or that these masks cannot be trained."""
    check_image(network, image)
    check_boxes(network, image, boxes)
    if network.masks == "best" and network.training and network.owned:
        raise ConfigError(
            "masks: got 'best' in training, but the masks that it chooses from would not learn; train with 'single' "
            "and evaluate with either"
        )
    if embedding is None:
        return
    patch, size = network.spec.patch_size, network.image_size
    sides = image.shape[-2:] if network.sam.rectangular else (size, size)
    wanted = (len(image) * network.views, network.spec.prompt_dim, *(-(-side // patch) for side in sides))
    if tuple(embedding.shape) != wanted:
        raise ConfigError(
            f"embedding: got shape {tuple(embedding.shape)}, expected {wanted}: one per image and scan, "
            "made by encode() at this image_size"
        )


def check_new_masks(network: SamSegmenter, skipped: Collection[str]) -> None:
    """Raise ConfigError if the base file left tensors of the mask head (``skipped``, SAM's names) untrained."""
    lost = {f"sam.{name}" for name in skipped} & network.state_dict().keys() - {*network.owned, *network.unused}
    if lost:
        raise ConfigError(
            f"num_classes={network.num_classes} needs a new mask head, which the strategy does not train "
            f"({len(lost)} tensors, first {min(lost)}): predictions would be noise; use a strategy that trains the "
            "decoder (LoRA: decoder=true)"
        )


def versions_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes whenever a tensor of ``module`` is replaced or written to; cheap, and of no meaning to others."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in module.state_dict(keep_vars=True).values())


def tensors_hash(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all tensors of ``module``."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
