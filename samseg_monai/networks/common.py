"""What networks with and without SAM share: what they refuse, and how maps of boxes become the map of an image."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samseg_monai.errors import ConfigError, in_turn, raise_all
from samseg_monai.networks.scans import TOGETHER
from samseg_monai.transforms.points import prompted

if TYPE_CHECKING:
    from samseg_monai.networks.plain import PlainSegmenter
    from samseg_monai.networks.segmenter import SamSegmenter

EMPTY_LOGIT = -20.0  # of a class where there is nothing to predict: sigmoid(-20) = 2e-9, still finite in every type

UNSCRIPTED = "boxes would be no input of the result; use samseg export --format torch or onnx, where they are"

OPTIONS: dict[str, tuple[str | None, ...]] = {
    "scan_mode": (*TOGETHER, "channels", "neighbours"),
    "input_scale": ("zscore", "unit", "slice", "sam"),
    "prompt": ("box", "none"),
    "autocast": (None, "bf16", "bf16_all"),
    "masks": ("single", "best"),
    "boxes": ("none", "channel", "crop", "given"),
}


def named_scans(scans: int | Sequence[str], mode: str = "") -> tuple[int, list[str] | None]:
    """Number of channels, and the names of the scans if they were given by name; "neighbours" makes three of each."""
    each = 3 if mode == "neighbours" else 1
    return (scans, None) if isinstance(scans, int) else (each * len(scans), list(scans))


def check_options(
    chosen: Mapping[str, str | None], *, num_classes: int, scans: int, low_res_training: bool = False
) -> None:
    """Raise ConfigError listing all constructor arguments that are unknown or contradict each other."""
    problems = [
        f"{key}: got {value!r}; choose one of {', '.join(map(repr, OPTIONS[key]))}"
        for key, value in chosen.items()
        if value not in OPTIONS[key]
    ]
    problems += [f"{k}: got {v}; at least 1" for k, v in {"num_classes": num_classes, "scans": scans}.items() if v < 1]
    if chosen.get("scan_mode") == "channels" and scans != 3:
        problems.append(f"scans: got {scans}, but scan_mode 'channels' needs exactly 3; or use 'mean_logits'")
    if chosen.get("scan_mode") == "neighbours" and scans != 3:
        problems.append(
            f"scans: got {scans} channels, but scan_mode 'neighbours' is for the three of one scan's slices"
        )
    if low_res_training and chosen.get("prompt") != "none":
        problems.append("low_res_training: got true with prompts; it is for networks with prompt='none'")
    if chosen.get("masks") == "best" and num_classes != 1:
        problems.append(f"masks: got 'best' with {num_classes} classes, whose masks are no guesses; use 'single'")
    raise_all(problems, ConfigError, "the segmenter cannot be built")


def plain_inputs(
    network: SamSegmenter | PlainSegmenter, image: Tensor, boxes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Image and boxes as plain tensors, whose metadata would be paid for in every layer; the image in float32.

    Raises:
        ConfigError: naming the shape that was got and the one expected, or there are boxes that the network refuses.
    """
    most = getattr(network, "sides", (network.image_size,) * 2)
    shape = tuple(image.shape)
    if len(shape) != 2 + len(most) or shape[1] != network.scans or any(map(operator.gt, shape[2:], most)):
        axes = "H, W" if len(most) == 2 else "H, W, D"
        limit = f"H and W at most {most[0]}" if len(most) == 2 else f"these at most {', '.join(map(str, most))}"
        raise ConfigError(
            f"image: got shape {shape}, expected (B, {network.scans}, {axes}) with {limit}; check scans and image_size"
        )
    image = image.as_subclass(Tensor).float()
    if boxes is None:
        if network.prompt != "none" and torch.jit.is_tracing():
            raise ConfigError(f"boxes: got none while TorchScript traces this network; {UNSCRIPTED}")
        return image, None
    if network.prompt == "none":
        how = "boxes='channel', 'crop' or 'given'" if hasattr(network, "boxes") else "'box'"
        raise ConfigError(f"boxes: got some, but this network was built with prompt='none'; build it with {how}")
    clicked = boxes.shape[-1] > 4 and boxes.shape[-1] % 3 == 1 and hasattr(network, "sam")
    if boxes.ndim not in (2, 3) or len(boxes) != len(image) or not (clicked or boxes.shape[-1] == 4):
        more = "; with P clicks 4 + 3 P columns" if hasattr(network, "sam") else ""
        wanted = f"(B, 4) or (B, N, 4) with B={len(image)}{more}"
        raise ConfigError(f"boxes: got shape {tuple(boxes.shape)}, expected {wanted}")
    return image, boxes.as_subclass(Tensor).float()


def check_embedding(network: SamSegmenter, image: Tensor, embedding: Tensor) -> None:
    """Raise ConfigError naming the shape that was got and the one expected."""
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
            "decoder (LoRA, Adapter or SSF: decoder=true), or zero-shot with strategy::random_masks true if a row of "
            "noise is wanted"
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


def empty_logits(like: Tensor, count: int, num_classes: int, size: Sequence[int]) -> Tensor:
    """Logits (count, C, H, W) of images without a box: -20, and 20 for the background of several classes.

    Args:
        like: gives the device.
        num_classes: 1 means C = 1, K > 1 means C = K + 1 with the background first.
        size: H and W.
    """
    channels = 1 if num_classes == 1 else num_classes + 1
    logits = torch.full((count, channels, *size), EMPTY_LOGIT, dtype=torch.float32, device=like.device)
    logits[:, :-num_classes] = -EMPTY_LOGIT
    return logits


def whole_slice(image: Tensor) -> Tensor:
    """A box (1, 1, 4) around all of a slice of (B, S, H, W)."""
    return image.new_tensor([[[0, 0, image.shape[-1], image.shape[-2]]]])


def where_boxes_are(
    network: SamSegmenter | PlainSegmenter,
    image: Tensor,
    boxes: Tensor,
    segment: Callable[[list[int] | slice, Tensor, Tensor], Sequence[Tensor]],
) -> Tensor:
    """Logits (B, C, H, W) of images (B, S, H, W), those without a box empty.

    Args:
        boxes: (B, 4) or (B, N, 4), or with clicks as of ``transforms.points``; a row with neither is no prompt.
        segment: numbers of n images (or the slice of all), their boxes (n, N, ...) and which are given (n, N), some for
            each, on the CPU, to n (C, H, W).
    """
    boxes = boxes[:, None] if boxes.ndim == 2 else boxes
    given = prompted(boxes).cpu()  # the one question here for which a GPU has to finish what it does
    seen: Any = given.any(1).nonzero()[:, 0].tolist()
    if seen and len(seen) == len(image):
        return torch.stack(list(segment(slice(None), boxes, given)))
    empty = empty_logits(image, len(image), network.num_classes, image.shape[-2:])
    if not seen:
        # A batch without any box must still reach every owned tensor, or backward() and DDP would fail.
        reach = torch.is_grad_enabled() and network.owned and len(image)
        return empty + 0 * segment([0], whole_slice(image), given.new_ones(1, 1))[0].sum() if reach else empty
    result = list(empty)
    for index, logits in zip(seen, segment(seen, boxes[seen], given[seen]), strict=True):
        result[index] = logits
    return torch.stack(result)


Clicks = tuple[Tensor, Tensor]


def prompt_groups(rows: Tensor) -> Iterator[tuple[list[int], Tensor | None, Clicks | None]]:
    """Prompts (R, 4 + 3 P) as SAM takes them: those with a box or without, and of equally many clicks, together.

    SAM does not mask what fills up a row of prompts, so that it would change the result.

    Yields: the rows' numbers, their boxes (r, 4) or None, and the clicks as places (r, p, 2), in pixels counted from
        the middle of the first one, and labels (r, p), or None.
    """
    clicks = rows[:, 4:].unflatten(1, (-1, 3))
    there = ~clicks.isnan().any(2)
    kinds = list(zip((~rows[:, :4].isnan().any(1)).tolist(), there.sum(1).tolist(), strict=True))
    for boxed, count in dict.fromkeys(kinds):
        index = [number for number, kind in enumerate(kinds) if kind == (boxed, count)]
        own = clicks[index][there[index]].unflatten(0, (len(index), count)) if count else None
        yield index, rows[index, :4] if boxed else None, None if own is None else (own[..., :2] - 0.5, own[..., 2])


def join_boxes(logits: Tensor, counts: Sequence[int], num_classes: int) -> list[Tensor]:
    """Logits (R, C, H, W) of R boxes, ``counts[i]`` of them on image i, to one (C, H, W) per image.

    A pixel gets the largest logit of a class and the smallest of the background.
    """
    return [
        torch.cat([maps[:, :-num_classes].amin(0), maps[:, -num_classes:].amax(0)])
        for maps in logits.split(list(counts))
    ]


def best_mask(logits: Tensor, quality: Tensor, views: int) -> Tensor:
    """Of the masks of every box the one with the highest predicted quality.

    Args:
        logits: (R * V, M, h, w), the V views of a box in a row.
        quality: (R * V, M), as SAM's decoder predicts it; its mean over the views decides.
        views: V.
    Returns:
        (R * V, 1, h, w): all views of a box give the same mask, so that their mean is one of an object.
    """
    best = quality.float().unflatten(0, (-1, views)).mean(1).argmax(1).repeat_interleave(views)  # (R * V,)
    return logits[torch.arange(len(logits), device=logits.device), best][:, None]


def tensor_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor of a file that is missing, of no use, of another shape than in the network, or of whole
    numbers in place of others."""
    return in_turn(
        [f"{name}: missing in the file" for name in expected if name not in found],
        [f"{name}: in the file, not in the network" for name in found if name not in expected],
        [
            f"{name}: shape {tuple(found[name].shape)} in the file, {tuple(tensor.shape)} in the network"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
        [
            f"{name}: {found[name].dtype} in the file, {tensor.dtype} in the network"
            for name, tensor in expected.items()
            if name in found and found[name].is_floating_point() != tensor.is_floating_point()
        ],
    )
