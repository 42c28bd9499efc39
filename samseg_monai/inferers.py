"""Volumes through a network that sees slices: the way there is the training set's own, the way back its inverse.

MONAI's ``SliceInferer`` drops further inputs of the network, and prompts are such inputs; hence this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Compose, MapTransform, Resized
from monai.transforms.traits import RandomizableTrait
from monai.transforms.utils import allow_missing_keys_mode, convert_applied_interp_mode

from samseg_monai.data.files.boxes import rectangles
from samseg_monai.data.slices.cache import VolumeEmbeddings, describe
from samseg_monai.data.slices.pickers import asked_slices
from samseg_monai.data.slices.slabs import calls
from samseg_monai.errors import ConfigError, PromptError, raise_all
from samseg_monai.files import unwrap
from samseg_monai.networks import EMPTY_LOGIT
from samseg_monai.transforms import BoxFromPromptd, SplineResized, boxes_of, clip_boxes, move_boxes
from samseg_monai.transforms.requested import carried_prompt

logger = logging.getLogger(__name__)

IMAGE, PROMPT = "image", "prompt"
CHANNELWISE = {Resized, SplineResized}  # give a channel the same whatever the others are: slices go through together
SAME_GRID = {"Resize", "Lambda"}  # what may lie in the history of a slice that was only resized

Network = Callable[..., torch.Tensor]


@dataclass(eq=False, repr=False)
class SliceVolumeInferer(Inferer):
    """Run a slice network over volumes, with a box per slice if it is prompted.

    Every slice goes through ``slice_transforms`` alone, exactly as in the training set (so a transform may look at the
    whole slice, as an intensity scaling does), or with others where they only resize, which makes no difference; boxes
    are computed behind them. Logits are taken back to the grid of the volume by the inverse of the same transforms,
    bilinearly. Slices without a box are not run: their logits are -20 (and 20 for the background, which is channel 0 of
    several).

    A 2-D image, a volume of one slice, takes ``boxes`` instead of a prompt volume, with clicks as of
    ``transforms.points`` or without, and so does a volume with clicks: floats that follow the slice's affine and are
    never rounded. Programs that pass neither have the prompt in the metadata of the image
    (``transforms.CarriedPromptd``).

    A network whose ``depth`` is D > 1 sees slabs of D neighbouring slices: whole ones from the first slice on, of which
    the last is moved inward to end with the volume (what it predicts once more is left out), and in a volume of fewer
    slices one that repeats the last. A slab with a slice to predict is run with all of its slices, those without a box
    included. So a slice's result depends on its slab, and not on ``batch_size`` or on which others are asked for.

    With ``embedding_dir`` the encoder sees each slice of a volume once: its embedding is kept on disk, in bf16, and
    read in later passes, as long as weights, transforms and volume stay the same. The first pass uses the rounded
    numbers too, so that all passes agree.

    Args:
        slice_transforms: deterministic MONAI dictionary transforms, or one Compose, on "image" and "prompt"; other keys
            that they name ("label") are passed over. Without ``BoxFromPromptd``.
        batch_size: slices per call of the network, at least 1; batches do not span volumes. Slabs: as many as fit, at
            least one.
        prompted: call ``network(images, boxes)``; else ``network(images)``.
        per_component: a box per connected component of the prompt, (b, max_boxes, 4), instead of one, (b, 4).
        max_boxes: boxes per slice at most, with ``per_component``.
        embedding_dir: folder for the embeddings of a frozen encoder; None runs the encoder every time.
        direct: take logits back by one bilinear resize to the slice's own size, not step by step; for transforms that
            only resize, which then need not be invertible.
        labels: return class numbers, the channel of the largest logit in the grid of the volume, instead of logits.
        propagate: slices to which a mask is carried at most, each way: the box around what was found in a slice,
            loosened, is the next one's box (one per component with ``per_component`` or where a slice was given
            several), until nothing is found, or less than ``carried_stop``, or another prompt is nearer; 0: none.
        carried_loosen: each side of a carried box is moved outwards by this fraction of its length, whole pixels.
        carried_stop, carried_most: it ends with a slice of less than this fraction of what was found in the first, and
            before one of more than this multiple, which is left empty: the mask has leaked.
    A validation that looks at some slices only gives ``slices``, bool (B, D): the others are as those without a box.

    Shape: inputs (B, S, H, W, D), prompt (B, N, H, W, D) with a channel for each box of a slice, or boxes
        (B, D, N, 4 + 3 P), of each slice, in pixel edges of the input, where D is 1 also (B, N, 4 + 3 P) (rows of NaN
        are none), to logits (B, C, H, W, D), float32. The network sees (b, S, h, w), with boxes (b, 4), (b, N, 4) or
        (b, N, 4 + 3 P), and returns (b, C, h, w). With ``labels`` the result is
        (B, 1, H, W, D), float32, whole numbers 0 to C - 1, and 0 in slices without a box. Where the input is a
        MetaTensor, so is the result, with the same metadata and history: ``Invertd`` takes both back to the file's
        grid.
    Raises: ConfigError if ``slice_transforms`` hold a random transform or ``BoxFromPromptd``, cannot be undone, or the
        prompt is missing; if ``labels`` are asked of one channel; if embeddings are to be kept that change, because
        the encoder learns or because they depend on the prompt. PromptError if prompt or boxes do not fit the input.
        CacheError if the embeddings on disk are damaged, foreign, or find no room.
    """

    slice_transforms: Any
    _: KW_ONLY
    batch_size: int = 8
    prompted: bool = True
    per_component: bool = False
    max_boxes: int = 8
    embedding_dir: str | Path | None = None
    direct: bool = False
    labels: bool = False
    propagate: int = 0
    carried_loosen: float = 0.0
    carried_stop: float = 0.1
    carried_most: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.slice_transforms, Compose):
            self.slice_transforms = Compose(self.slice_transforms)
        if min(self.propagate, self.carried_loosen) < 0 or not 0 <= self.carried_stop <= 1 <= self.carried_most:
            raise ConfigError(
                "propagate and carried_loosen must not be negative, carried_stop be 0 to 1, carried_most at least 1; "
                f"got {self.propagate}, {self.carried_loosen}, {self.carried_stop} and {self.carried_most}"
            )
        if self.batch_size < 1 or self.max_boxes < 1:
            wrong = f"{self.batch_size} and {self.max_boxes}"
            raise ConfigError(f"batch_size and max_boxes must be at least 1, got {wrong}")
        members = self.slice_transforms.flatten().transforms  # a Compose that chooses at random stays whole
        problems = [f"{type(t).__name__} is random" for t in members if isinstance(t, RandomizableTrait)]
        problems += ["BoxFromPromptd is only for the training set" for t in members if isinstance(t, BoxFromPromptd)]
        raise_all(problems, ConfigError, "the inferer takes the deterministic slice transforms, without boxes")
        self._has_map_transforms = any(isinstance(t, MapTransform) for t in members)
        self._channelwise = all(type(t) in CHANNELWISE for t in members)
        self._settings = describe(self.slice_transforms)

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Network,
        *args: Any,
        prompt: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        slices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict a batch of volumes; see the class for shapes and errors."""
        if args or kwargs:
            raise ConfigError(
                "SliceVolumeInferer takes only 'prompt', 'boxes' and 'slices', got "
                f"{len(args)} inputs and {sorted(kwargs)}"
            )
        if inputs.ndim != 5:
            raise ConfigError(f"SliceVolumeInferer needs volumes (B, S, H, W, D), got shape {tuple(inputs.shape)}")
        images = inputs.as_subclass(torch.Tensor)
        prompts: Any = [None] * len(images)
        if self.prompted:
            prompt, boxes = carried_prompt(inputs) if prompt is None and boxes is None else (prompt, boxes)
            prompts = self._checked(prompt, images) if boxes is None else _checked_boxes(boxes, prompt, images)
        if slices is not None and tuple(slices.shape) != (len(images), images.shape[-1]):
            raise ConfigError(f"slices must have shape {(len(images), images.shape[-1])}, got {tuple(slices.shape)}")
        if slices is not None and self.propagate:
            raise ConfigError("slices cannot be chosen where prompts are carried from slice to slice; leave one out")
        only: Any = [None] * len(images) if slices is None else slices.cpu()
        volumes = []
        for number, each in enumerate(zip(images, prompts, only, strict=True)):
            volume, stops = self._volume(*each, network)
            volumes.append(volume)
            if stops:
                logger.warning("%s; look for drift", _in_words(stops, inputs, number))
        logits = torch.stack(volumes)
        return MetaTensor(logits).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else logits

    def _checked(self, prompt: torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
        if prompt is None:
            raise ConfigError(
                "a prompted inferer needs the prompt volume: give the evaluator "
                'PrepareBatchExtraInput(extra_keys={"prompt": "prompt"}), or the inferer prompted=False'
            )
        expected = (len(images), *images.shape[2:])
        if prompt.ndim != 5 or (len(prompt), *prompt.shape[2:]) != expected:
            fitting = ", ".join(map(str, (len(images), "N", *images.shape[2:])))
            raise PromptError(f"prompt must have shape ({fitting}) to fit the image, got {tuple(prompt.shape)}")
        return prompt.as_subclass(torch.Tensor)

    def _volume(
        self, image: torch.Tensor, prompt: torch.Tensor | None, only: torch.Tensor | None, network: Network
    ) -> tuple[torch.Tensor, list[Stop]]:
        """(S, H, W, D) and a prompt (N, H, W, D), or boxes (D, N, 4 + 3 P), to (C, H, W, D).

        Of ``only``, bool (D,), the slices that are False are not run; None runs all. Where prompts were carried
        to other slices, it is told where they stopped.
        """
        size, depth = image.shape[1:3], image.shape[3]
        asked = torch.ones(depth, dtype=torch.bool) if prompt is None else _asked(prompt)
        wanted = [z for z in asked.nonzero()[:, 0].tolist() if only is None or only[z]]
        store = self._embeddings(image, prompt, network, wanted)
        slab = _slab(network)
        if slab > 1 and (depth == 1 or self.propagate):
            what = f"got {'a single slice' if depth == 1 else 'propagate'}"
            raise ConfigError(f"{what}, but this network is for volumes: it looks at slabs of {slab} slices")
        volume, stops = self._fill(None, image, prompt, wanted, network, store), []
        if volume is None:
            # no slice has a box: the network is asked once, for the number of its channels only
            slices = self._prepare(image[..., [0] * slab], None)[0].as_subclass(torch.Tensor)
            boxes = slices.new_full((slab, self.max_boxes, 4) if self.per_component else (slab, 4), torch.nan)
            logits = self._finished(_run(network, slices, boxes))
            volume = self._empty(logits.shape[1], (*size, depth), image.device)
        elif self.propagate and prompt is not None:
            several = self.per_component or prompt.shape[0 if prompt.ndim == 4 else 1] > 1
            stops = self._carry(volume, image, wanted, network, store, several=several)
        return volume, stops

    def _fill(
        self,
        volume: torch.Tensor | None,
        image: torch.Tensor,
        prompt: torch.Tensor | None,
        wanted: list[int],
        network: Network,
        store: VolumeEmbeddings | None,
        places: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """Put the logits of the slices ``wanted`` of ``image`` (S, H, W, d) into ``volume``, made for the first.

        With ``places`` slice k of ``image`` and ``prompt`` is slice ``places[k]`` of the volume.
        """
        at, slab = range(image.shape[-1]) if places is None else places, _slab(network)
        for seen, new in calls(wanted, image.shape[-1], slab, self.batch_size):
            numbers, prepared, boxes = self._batch(image, prompt, seen, at, whole=slab > 1)
            if not numbers:
                continue
            slices = prepared.as_subclass(torch.Tensor)
            numbers = [at[k] for k in numbers]
            embedding = None if store is None else store.get(numbers, slices)
            logits = _run(network, slices, boxes, embedding)
            if slab > 1:
                numbers, logits = [numbers[k] for k in new], logits[new]
            logits = self._finished(self._undo(logits, prepared, image.shape[1:3]))
            if volume is None:
                volume = self._empty(logits.shape[1], (*image.shape[1:3], image.shape[3]), logits.device)
            volume[..., numbers] = logits.permute(1, 2, 3, 0)  # (b, C, H, W) -> (C, H, W, b)
        return volume

    def _carry(
        self,
        volume: torch.Tensor,
        image: torch.Tensor,
        given: list[int],
        network: Network,
        store: VolumeEmbeddings | None,
        *,
        several: bool,
    ) -> list[Stop]:
        """Carry what was found in the slices ``given`` to their neighbours in ``volume``; the stops, by slice."""
        depth, active, stops = image.shape[-1], [], []
        for k, z in enumerate(given):
            area = int(self._found(volume, z).sum())
            limits = (self.carried_stop * area, self.carried_most * area)
            below, above = given[k - 1] if k else None, given[k + 1] if k + 1 < len(given) else None
            down = 0 if below is None else (below + z) // 2 + 1
            up = depth - 1 if above is None else (z + above) // 2
            ends = ((-1, max(down, z - self.propagate)), (1, min(up, z + self.propagate)))
            active += [(z, z, step, last, limits) for step, last in ends]
        while active:
            going, planes = [], []
            for first, z, step, last, (least, most) in active:
                mask = self._found(volume, z)
                area = int(mask.sum())
                if not area or area < least:
                    stops.append(Stop(first, z, "little was found" if area else "nothing was found"))
                elif area > most:  # it has leaked into what lies beside
                    volume[..., z] = self._empty(len(volume), (*mask.shape, 1), volume.device)[..., 0]
                    stops.append(
                        Stop(first, z - step, f"a leak, {area / most * self.carried_most:.1f} times the first")
                    )
                elif z == last:
                    far = f"{abs(z - first)} slices, the most" if abs(z - first) == self.propagate else NEARER
                    stops.append(Stop(first, z, ENDS if z in (0, depth - 1) else far))
                else:
                    planes.append(self._next_prompt(mask, several))
                    going.append((first, z + step, step, last, (least, most)))
            if going:
                places = [front[1] for front in going]
                prompts = torch.stack(planes, dim=-1).to(image.device)
                every = list(range(len(places)))
                self._fill(volume, image[..., places], prompts, every, network, store, places)
            active = going
        return sorted(stop for stop in stops if stop.why not in (NEARER, ENDS) or stop.last != stop.first)

    def _found(self, volume: torch.Tensor, z: int) -> torch.Tensor:
        """Where slice z (C, H, W) has an object: bool (H, W), on the CPU."""
        plane = volume[..., z]
        return (plane[0] > 0 if len(plane) == 1 else plane[1:].amax(0) > plane[0]).cpu()

    def _next_prompt(self, mask: torch.Tensor, several: bool) -> torch.Tensor:
        """Prompt (N, H, W) of the slice beside one with this mask: a channel for each box, as volumes have it."""
        planes = torch.zeros((self.max_boxes if several else 1, *mask.shape), dtype=torch.uint8)
        for plane, (x0, y0, x1, y1) in zip(planes, rectangles(mask.numpy(), per_component=several), strict=False):
            x, y = (round(self.carried_loosen * side) for side in (x1 - x0, y1 - y0))
            plane[max(0, y0 - y) : y1 + y, max(0, x0 - x) : x1 + x] = 1
        return planes

    def _embeddings(
        self, image: torch.Tensor, prompt: torch.Tensor | None, network: Network, wanted: list[int]
    ) -> VolumeEmbeddings | None:
        if self.embedding_dir is None:
            return None
        if prompt is not None and prompt.ndim == 4 and wanted:
            # the prompt is no part of what an embedding is known by, so it must not change the image
            plane, mask = image[..., wanted[:1]], prompt[..., wanted[:1]]
            one, other = (self._prepare(plane, m)[0] for m in (mask, torch.ones_like(mask)))
            if one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
                raise ConfigError(
                    "slice_transforms change the image according to the prompt, so embeddings cannot be kept; leave "
                    "embedding_dir out, or crop in the volume transforms"
                )
        return VolumeEmbeddings(self.embedding_dir, network, self._settings, image)

    def _batch(
        self, image: torch.Tensor, prompt: torch.Tensor | None, wanted: list[int], at: Sequence[int], *, whole: bool
    ) -> tuple[list[int], MetaTensor, torch.Tensor | None]:
        """Numbers of the slices that the network has to see, what it sees of them, (b, S, h, w), and their boxes.

        ``whole``: it has to see all that are ``wanted``, with or without a box. ``at``: their numbers in the volume.
        """
        masks = prompt if prompt is not None and prompt.ndim == 4 else None
        groups = [wanted] if self._channelwise else [[z] for z in wanted]
        parts = [self._prepare(image[..., g], None if masks is None else masks[..., g]) for g in groups]
        prepared: Any = parts[0][0]  # all have its history
        if len(parts) > 1:
            together = torch.cat([part.as_subclass(torch.Tensor) for part, _ in parts])
            prepared = MetaTensor(together, meta=prepared.meta, applied_operations=prepared.applied_operations)
        if prompt is None:
            return wanted, prepared, None
        if masks is None:
            boxes = _followed(prompt[wanted], image, prepared)
        else:
            # on the CPU, where they are looked for: all at once, since a GPU waits for each question
            planes = torch.cat([part for _, part in parts if part is not None]).cpu()
            how: dict[str, Any] = {"per_component": self.per_component, "max_boxes": self.max_boxes}
            boxes = torch.stack([boxes_of(plane, **how) for plane in planes])
        kept = _asked(boxes.reshape(len(wanted), -1, boxes.shape[-1])).nonzero()[:, 0].tolist()
        if len(kept) < len(wanted):
            without = set(wanted) - {wanted[k] for k in kept}
            own = {k: prompt[[k]] if masks is None else masks[..., [k]] for k in without}
            lost = sorted({at[k] for k in without if not whole or _asked(own[k])[0]})
            if lost:
                logger.warning(
                    "prompts of slices %s vanish in slice_transforms; predicted empty. Resize prompts with mode 'area'",
                    lost,
                )
            if not whole:
                wanted, prepared, boxes = [wanted[k] for k in kept], prepared[kept], boxes[kept]
        return wanted, prepared, boxes.to(image.device, non_blocking=True)

    def _prepare(self, image: torch.Tensor, prompt: torch.Tensor | None) -> tuple[MetaTensor, torch.Tensor | None]:
        """Slices (S, H, W, b) as the network sees them, (b, S, h, w), and their prompts (N, H, W, b), (b, N, h, w)."""
        volumes = {IMAGE: image} if prompt is None else {IMAGE: image, PROMPT: prompt}
        d: Any = {key: MetaTensor(v.movedim(-1, 0).flatten(0, 1).contiguous()) for key, v in volumes.items()}
        d = self._apply(self.slice_transforms, d)
        prepared: Any = d[IMAGE] if isinstance(d[IMAGE], MetaTensor) else MetaTensor(d[IMAGE])
        count = image.shape[-1]
        slices = MetaTensor(
            prepared.as_subclass(torch.Tensor).unflatten(0, (count, -1)),
            meta=prepared.meta,
            applied_operations=prepared.applied_operations,
        )
        return slices, d[PROMPT].as_subclass(torch.Tensor).unflatten(0, (count, -1)) if prompt is not None else None

    def _undo(self, logits: torch.Tensor, prepared: MetaTensor, size: Sequence[int]) -> torch.Tensor:
        """(b, C, h, w) to (b, C, H, W): all slices went through the same geometry, so one call undoes it for all."""
        batch, channels = logits.shape[:2]
        if logits.shape[2:] != prepared.shape[2:]:
            raise ConfigError(
                f"the network must return logits of its input's size {tuple(prepared.shape[2:])}, "
                f"got {tuple(logits.shape[2:])}"
            )
        if self.direct:
            steps = sorted({str(step["class"]) for step in prepared.applied_operations} - SAME_GRID)
            if steps:
                raise ConfigError(
                    f"direct is for slice_transforms that only resize, got {', '.join(steps)}; leave it out"
                )
            return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
        history = convert_applied_interp_mode(prepared.applied_operations, mode="bilinear", align_corners=False)
        stack = MetaTensor(logits.flatten(0, 1), meta=dict(prepared.meta), applied_operations=list(history))
        undone = self._apply(self.slice_transforms.inverse, {IMAGE: stack})[IMAGE].as_subclass(torch.Tensor)
        if tuple(undone.shape[1:]) != tuple(size):
            raise ConfigError(
                f"slice_transforms cannot be undone: slices of {tuple(size)} come back as {tuple(undone.shape[1:])}; "
                "use invertible transforms"
            )
        return undone.unflatten(0, (batch, channels))

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as they are, or (b, 1, H, W) class numbers."""
        if not self.labels:
            return logits
        if logits.shape[1] == 1:
            raise ConfigError("labels need a logit per class, but the network returns a single one; use labels=False")
        return logits.max(dim=1, keepdim=True).indices.float()  # argmax across channels takes four times as long

    def _empty(self, channels: int, size: Sequence[int], device: torch.device) -> torch.Tensor:
        if self.labels:
            return torch.zeros((1, *size), device=device)
        volume = torch.full((channels, *size), EMPTY_LOGIT, device=device)
        if channels > 1:
            volume[0] = -EMPTY_LOGIT
        return volume

    def _apply(self, function: Callable[[Any], Any], d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._has_map_transforms:
            return d
        with allow_missing_keys_mode(self.slice_transforms):
            return function(d)


def _slab(network: Network) -> int:
    return int(getattr(unwrap(network), "depth", 1))  # type: ignore[arg-type]


NEARER, ENDS = "another prompt is nearer", "the volume ends"


class Stop(NamedTuple):
    """Where a prompt that was given in slice ``first`` was carried to, and why no further."""

    first: int
    last: int
    why: str


def _in_words(stops: list[Stop], inputs: torch.Tensor, number: int) -> str:
    """Stops in the slices of the file where it is known, as box files count them; else in those of the volume."""

    def named(z: int) -> str:
        if not isinstance(inputs, MetaTensor) or "original_affine" not in inputs.meta:
            return f"slice {z} of the volume"
        before = inputs.meta["original_affine"]
        affines = [np.asarray(torch.as_tensor(a).cpu(), dtype=float) for a in (before, inputs.affine)]
        stored, ours = (affine[number] if affine.ndim == 3 else affine for affine in affines)
        matrix = np.linalg.solve(stored, ours)
        axis = int(np.abs(matrix[:3, 2]).argmax())
        index = round(float((matrix @ [(inputs.shape[2] - 1) / 2, (inputs.shape[3] - 1) / 2, z, 1])[axis]))
        return f"slice {index}" if axis == 2 else f"slice {index} along axis {axis}"

    parts = [
        f"the prompt of {named(first)} was carried to "
        + " and ".join(f"{named(stop.last)} ({stop.why})" for stop in stops if stop.first == first)
        for first in dict.fromkeys(stop.first for stop in stops)
    ]
    return "; ".join(parts)


def _checked_boxes(boxes: torch.Tensor, prompt: torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
    """Boxes (B, D, N, 4 ...) that fit ``images`` (B, S, H, W, D); PromptError says why others do not."""
    if prompt is not None:
        raise PromptError("got boxes and a prompt volume; give one of them")
    expected = (len(images), images.shape[-1])
    rows = boxes[:, None] if boxes.ndim == 3 else boxes
    if rows.ndim != 4 or tuple(rows.shape[:2]) != expected or rows.shape[-1] < 4 or rows.shape[-1] % 3 != 1:
        fitting = ", ".join(map(str, expected[: 1 if expected[1] == 1 else 2]))
        raise PromptError(
            f"boxes must have shape ({fitting}, N, 4), with P clicks ({fitting}, N, 4 + 3 P), to fit the image, got "
            f"{tuple(boxes.shape)}"
        )
    return rows.as_subclass(torch.Tensor)


def _asked(prompt: torch.Tensor) -> torch.Tensor:
    """``asked_slices`` of a prompt (N, H, W, D), or of boxes (D, N, 4 + 3 P)."""
    asked = asked_slices(prompt) if prompt.ndim == 4 else asked_slices(None, prompt)
    assert asked is not None
    return asked


def _followed(boxes: torch.Tensor, image: torch.Tensor, prepared: MetaTensor) -> torch.Tensor:
    """Boxes (b, N, 4 ...) of slices of an image (S, H, W, D) on what the transforms made of them, (b, S, h, w)."""
    if prepared.shape[2:] != image.shape[1:3] and not prepared.applied_operations:
        raise ConfigError(
            "boxes cannot follow slice_transforms that keep no record of what they do (SplineResized); leave "
            "store_size null for 2-D images and clicks"
        )
    moved = move_boxes(boxes.flatten(0, 1), torch.eye(4), prepared.affine)  # a slice starts without its own affine
    return clip_boxes(moved, (prepared.shape[2], prepared.shape[3])).unflatten(0, tuple(boxes.shape[:2]))


def _run(
    network: Network, slices: torch.Tensor, boxes: torch.Tensor | None, embedding: torch.Tensor | None = None
) -> torch.Tensor:
    inputs = [slices] if boxes is None else [slices, boxes]
    logits = network(*inputs) if embedding is None else network(*inputs, embedding=embedding)
    return logits.as_subclass(torch.Tensor).float()
