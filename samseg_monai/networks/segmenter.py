"""SamSegmenter: images and boxes in, logits out; SAM with a strategy installed (Kirillov et al. 2023, 2304.02643)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from samseg_monai.adapters.lora import merge_all
from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import SamSpec
from samseg_monai.sam.weights import RANDOM, LoadReport, find_weights, load_sam_weights
from samseg_monai.strategies import Segmenter, Strategy, ZeroShot
from samseg_monai.trainable import hold_statistics, keep_only

EMPTY_LOGIT = -20.0  # of a class where there is nothing to predict: sigmoid(-20) = 2e-9, still finite in every type

Side = Callable[[Tensor, Tensor, list[Tensor]], Tensor]

_OPTIONS: dict[str, tuple[str | None, ...]] = {
    "scan_mode": ("mean_logits", "channels"),
    "input_scale": ("zscore", "unit", "sam"),
    "prompt": ("box", "none"),
    "autocast": (None, "bf16"),
}


class SamSegmenter(Segmenter):
    """SAM as a segmentation network with the interface that MONAI's trainers and evaluators expect.

    Built in evaluation mode with random weights and without reading a file; ``load_base`` loads SAM's weights.

    Args:
        sam_variant: vit_b, vit_l, vit_h, pico, or tiny (tests); or a ``SamSpec``.
        strategy: how SAM learns; None means zero-shot (nothing learns).
        image_size: side in pixels of the square that SAM sees, a multiple of 16; None means the variant's own.
        num_classes: 1 gives one map, SAM's single mask. K > 1 gives K + 1 maps, channel 0 is the background.
        scans: number of channels of the input, S.
        scan_mode: "mean_logits": each scan goes through SAM as a grey image with the same box, and the logits are
            averaged. "channels": three scans are the three colour channels.
        input_scale: "sam": the input is 0-255 and SAM's own mean and standard deviation are applied. "zscore",
            "unit": the input is used as it is; the name says how it was prepared.
        prompt: "box": boxes may be given. "none": there are none, and giving one is an error.
        rectangular: pad to full patches only, not to the square; faster for oblong images.
        checkpointing: recompute encoder activations in the backward pass to save memory.
        autocast: "bf16" runs the image encoder in mixed precision, on any device; None leaves precision alone.

    Attributes:
        owned: names of the tensors that learn; unused: names that the strategy froze because the task never uses them.
        base_sha256: hash of the base weights' file, "random" after an explicit random start, None before loading.
        side: None, or a callable ``side(image, embedding, taps) -> embedding`` that may change the embedding;
            ``side.taps`` (a sequence of block numbers) says which block outputs it wants to see.

    Raises:
        ConfigError: listing all arguments that are unknown or contradict each other.
        AdapterError: the strategy does not fit.
    """

    side: Side | None

    def __init__(
        self,
        sam_variant: str | SamSpec = "vit_b",
        strategy: Strategy | None = None,
        *,
        image_size: int | None = None,
        num_classes: int = 1,
        scans: int = 1,
        scan_mode: Literal["mean_logits", "channels"] = "mean_logits",
        input_scale: Literal["zscore", "unit", "sam"] = "zscore",
        prompt: Literal["box", "none"] = "box",
        rectangular: bool = False,
        checkpointing: bool = False,
        autocast: Literal["bf16"] | None = None,
    ) -> None:
        super().__init__()
        chosen = {"scan_mode": scan_mode, "input_scale": input_scale, "prompt": prompt, "autocast": autocast}
        problems = [
            f"{key}: got {value!r}; choose one of {', '.join(map(repr, _OPTIONS[key]))}"
            for key, value in chosen.items()
            if value not in _OPTIONS[key]
        ]
        problems += [
            f"{k}: got {v}; at least 1" for k, v in {"num_classes": num_classes, "scans": scans}.items() if v < 1
        ]
        if scan_mode == "channels" and scans != 3:
            problems.append(f"scans: got {scans}, but scan_mode 'channels' needs exactly 3; or use 'mean_logits'")
        raise_all(problems, ConfigError, "SamSegmenter cannot be built")
        # 3 masks behind the single one for a single class: SAM's own layout, which its checkpoints fit
        self.sam = build_sam(
            sam_variant,
            image_size=image_size,
            num_masks=3 if num_classes == 1 else num_classes,
            rectangular=rectangular,
            checkpointing=checkpointing,
        )
        self.num_classes, self.scans, self.scan_mode = num_classes, scans, scan_mode
        self.input_scale, self.prompt, self.autocast = input_scale, prompt, autocast
        self.base_sha256: str | None = None
        self.side = None
        self.strategy = None
        strategy = ZeroShot() if strategy is None else strategy
        self.owned = strategy.install(self)
        self.unused = strategy.unused(self)
        self.strategy = strategy
        keep_only(self, self.owned)
        self.eval()

    @property
    def spec(self) -> SamSpec:
        """Sizes of the SAM variant."""
        return self.sam.spec

    @property
    def image_size(self) -> int:
        """Side of the square that SAM sees, in pixels."""
        return self.sam.image_size

    @property
    def channels_out(self) -> int:
        """Number of logit maps: 1, or the number of classes and the background."""
        return 1 if self.num_classes == 1 else self.num_classes + 1

    def train(self, mode: bool = True) -> SamSegmenter:
        """As usual, but frozen layers with running statistics stay in evaluation mode."""
        super().train(mode)
        hold_statistics(self, self.owned)
        return self

    def load_base(self, checkpoint: str | os.PathLike[str] | None = None, *, download: bool = True) -> LoadReport:
        """Load SAM's weights.

        Args:
            checkpoint: file; None looks in the usual places; "random" starts from random weights on purpose.
            download: whether the file may be fetched when it is nowhere to be found.
        Raises:
            WeightsError: absent, damaged or not fitting.
            ConfigError: the number of classes needs a new mask head that the strategy would leave untrained.
        """
        path = find_weights(self.spec.name, None if checkpoint is None else os.fspath(checkpoint), download=download)
        # Another number of masks than SAM's starts the mask head anew; then it has to learn, and to be saved.
        report = load_sam_weights(self.sam, path, ignore=self.owned, allow_new_masks=self.num_classes > 1)
        lost = {f"sam.{name}" for name in report.skipped} & self.state_dict().keys() - {*self.owned, *self.unused}
        if lost:
            raise ConfigError(
                f"num_classes={self.num_classes} needs a new mask head, which the strategy does not train "
                f"({len(lost)} tensors, first {min(lost)}): predictions would be noise; use a strategy that trains the "
                "decoder (LoRA: decoder=true)"
            )
        self.base_sha256 = report.sha256 or RANDOM
        return report

    def merge(self) -> int:
        """Fold all LoRA updates into plain layers; what is left is SAM, frozen, without a strategy.

        Returns:
            The number of layers merged. ``self.sam.state_dict()`` then loads strictly into any plain SAM.
        """
        merged = merge_all(self)
        self.strategy, self.owned, self.unused, self.base_sha256 = None, [], [], None
        keep_only(self, self.owned)
        return merged

    def forward(self, image: Tensor, boxes: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Segment a batch of slices.

        Args:
            image: (B, S, H, W) with H, W <= image_size, intensities as ``input_scale`` says.
            boxes: (B, 4) or (B, N, 4) as x0 y0 x1 y1 in pixels of ``image``, x along W; a row with NaN is no box.
            embedding: (B * S, C, gh, gw) of an earlier pass through the encoder (B when the scans are channels), which
                is then not run.
        Returns:
            Logits (B, C, H, W), float32, C = ``channels_out``. Several boxes of one image are joined by their largest
            logit (background: smallest). An image whose boxes are all NaN gets -20 (background: +20).
        Raises:
            ConfigError: naming the shape that was got and the one expected.
        """
        # MetaTensor bookkeeping would be paid for in every layer
        image = image.as_subclass(torch.Tensor).float()
        boxes = None if boxes is None else boxes.as_subclass(torch.Tensor)
        self._check(image, boxes, embedding)
        if boxes is None:
            return self._segment(image, None, embedding)
        boxes = boxes[:, None] if boxes.ndim == 2 else boxes  # (B, N, 4)
        given = ~boxes.isnan().any(-1)  # (B, N)
        counts = given.sum(1).tolist()
        seen = [index for index, count in enumerate(counts) if count]
        if not seen and torch.is_grad_enabled() and self.owned:
            # A batch without any box must still reach every owned tensor, or backward() and DDP would fail.
            box = image.new_tensor([[0, 0, image.shape[-1], image.shape[-2]]])
            return self._empty(image) + 0 * self._segment(image[:1], box, self._of_images(embedding, [0])).sum()
        result = list(self._empty(image))
        if seen:
            owner = [row for row, index in enumerate(seen) for _ in range(counts[index])]
            logits = self._segment(image[seen], boxes[given], self._of_images(embedding, seen), owner=owner)
            for index, maps in zip(seen, logits.split([counts[index] for index in seen]), strict=True):
                result[index] = torch.cat([maps[:, : -self.num_classes].amin(0), maps[:, -self.num_classes :].amax(0)])
        return torch.stack(result)

    def encode(self, image: Tensor) -> Tensor:
        """Normalise, pad and encode (B, S, H, W) to the embedding (B * S, C, gh, gw) that ``forward`` takes.

        With scans as channels the embedding is (B, C, gh, gw).
        """
        return self._run_encoder(self._prepare(image.as_subclass(torch.Tensor).float()), ())[0].float()

    def _run_encoder(self, prepared: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        with self._encoder_precision(prepared):
            encoded = self.sam.embed(prepared, taps)
        return encoded if isinstance(encoded, tuple) else (encoded, [])

    def _segment(
        self, image: Tensor, boxes: Tensor | None, embedding: Tensor | None, *, owner: list[int] | None = None
    ) -> Tensor:
        """Logits (R, C, H, W) of R boxes (R, 4), box r on image ``owner[r]``; without boxes of the B images."""
        views = self._views
        embedding = self._embed(image, embedding)  # (B * V, C, gh, gw)
        owner = list(range(len(image))) if owner is None else owner
        if owner != list(range(len(image))):
            rows = torch.tensor(owner, device=image.device)
            embedding = embedding.unflatten(0, (-1, views))[rows].flatten(0, 1)
        if boxes is not None:
            boxes = boxes.float().repeat_interleave(views, 0)
        # Float32 whatever the surroundings: bf16 cannot hold the phases 2 pi c of SAM's position code.
        with torch.autocast(image.device.type, enabled=False):
            low, _ = self.sam.decode(embedding, boxes=boxes, multimask=False if self.num_classes == 1 else None)
            low = low.unflatten(0, (-1, views)).mean(1)  # resizing is linear: the mean may be taken first
            size = [side * self.spec.patch_size for side in embedding.shape[-2:]]
            full = F.interpolate(low, size, mode="bilinear", align_corners=False)
        return full[..., : image.shape[-2], : image.shape[-1]]

    def _embed(self, image: Tensor, embedding: Tensor | None) -> Tensor:
        if self.side is None:
            return self.encode(image) if embedding is None else embedding.float()
        taps: list[Tensor] = []
        wanted = tuple(getattr(self.side, "taps", ()))
        prepared = self._prepare(image)
        if embedding is None or wanted:  # block outputs are not part of a stored embedding
            embedding, taps = self._run_encoder(prepared, wanted)
        with self._encoder_precision(image):
            return self.side(prepared, embedding, taps).float()

    def _prepare(self, image: Tensor) -> Tensor:
        """(B, S, H, W) to (B * V, 3, h, w) as SAM's encoder takes it: normalised, then padded with zeros."""
        if self.scan_mode == "mean_logits":
            image = image.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        if self.input_scale == "sam":
            image = (image - self.sam.pixel_mean) / self.sam.pixel_std
        return self.sam.pad(image)

    @property
    def _views(self) -> int:
        """Passes through SAM per image."""
        return self.scans if self.scan_mode == "mean_logits" else 1

    def _of_images(self, embedding: Tensor | None, images: list[int]) -> Tensor | None:
        return None if embedding is None else embedding.unflatten(0, (-1, self._views))[images].flatten(0, 1)

    def _empty(self, image: Tensor) -> Tensor:
        logits = image.new_full((len(image), self.channels_out, *image.shape[-2:]), EMPTY_LOGIT, dtype=torch.float32)
        logits[:, : -self.num_classes] = -EMPTY_LOGIT
        return logits

    def _encoder_precision(self, image: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(image.device.type, dtype=torch.bfloat16)

    def _check(self, image: Tensor, boxes: Tensor | None, embedding: Tensor | None) -> None:
        if image.ndim != 4 or image.shape[1] != self.scans or max(image.shape[-2:]) > self.image_size:
            raise ConfigError(
                f"image: got shape {tuple(image.shape)}, expected (B, {self.scans}, H, W) with H and W at most "
                f"{self.image_size}; check scans and image_size"
            )
        if boxes is not None and self.prompt == "none":
            raise ConfigError("boxes: got some, but this network was built with prompt='none'; build it with 'box'")
        if boxes is not None and (boxes.ndim not in (2, 3) or len(boxes) != len(image) or boxes.shape[-1] != 4):
            raise ConfigError(
                f"boxes: got shape {tuple(boxes.shape)}, expected (B, 4) or (B, N, 4) with B={len(image)}"
            )
        patch = self.spec.patch_size
        sides = image.shape[-2:] if self.sam.rectangular else (self.image_size, self.image_size)
        wanted = (len(image) * self._views, self.spec.prompt_dim, *(-(-side // patch) for side in sides))
        if embedding is not None and tuple(embedding.shape) != wanted:
            raise ConfigError(
                f"embedding: got shape {tuple(embedding.shape)}, expected {wanted}: one per image and scan, "
                "made by encode() at this image_size"
            )
