"""SamSegmenter: images and boxes in, logits out; SAM with a strategy installed (Kirillov et al. 2023, 2304.02643)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samseg_monai.adapters import ADAPTERS, merge_all
from samseg_monai.choices import Compute
from samseg_monai.errors import AdapterError, ConfigError, raise_all
from samseg_monai.files import unwrap
from samseg_monai.networks.common import (
    UNSCRIPTED,
    Clicks,
    best_mask,
    check_embedding,
    check_new_masks,
    check_options,
    join_boxes,
    named_scans,
    plain_inputs,
    prompt_groups,
    tensors_hash,
    versions_of,
    where_boxes_are,
)
from samseg_monai.networks.compute import NO_TRAINING, apply_compute, compute_problems
from samseg_monai.networks.scans import TOGETHER, combined
from samseg_monai.sam.backbone import SamSpec
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.weights import MASK_HEAD, RANDOM, LoadReport, find_weights, load_sam_weights, plain_names
from samseg_monai.settings import problems_of
from samseg_monai.strategies import Segmenter, Strategy, ZeroShot
from samseg_monai.training.owned import hold_statistics, keep_only

LOW_RES = 4  # SAM's decoder makes one logit per 4 x 4 pixels

Side = Callable[[Tensor, Tensor | None, list[Tensor]], Tensor]


class SamSegmenter(Segmenter):
    """SAM as a segmentation network with the interface that MONAI's trainers and evaluators expect.

    Built in evaluation mode with random weights and without reading a file; ``load_base`` loads SAM's weights.

    Args:
        sam_variant: vit_b, vit_l, vit_h, vit_t (MobileSAM), medsam, pico, tiny or tiny_t (tests); or a ``SamSpec``.
        strategy: how SAM learns; None means zero-shot (nothing learns).
        image_size: side in pixels of the square that SAM sees, a multiple of 16; None means the variant's own.
        num_classes: 1 gives one map, SAM's single mask. K > 1 gives K + 1 maps, channel 0 is the background.
        scans: number of channels of the input, S, or their names, which an adapter's card keeps.
        scan_mode: each scan goes through SAM as a grey image with the same box, and its logits, one per 4 x 4 pixels,
            are put together as ``scans.combined`` says: "mean_logits", "mean_probabilities", "majority", "union".
            "channels": three scans are the three colour channels. "neighbours": a slice of one scan and its
            neighbours are (``transforms.NeighbourSlicesd``): S is 3, or there is one name.
        input_scale: "sam": the input is 0-255 and SAM's own mean and standard deviation are applied. "zscore",
            "unit": the input is used as it is; the name says how it was prepared. "slice": each slice is brought to 0
            to 1, its minimum and its maximum, as MedSAM wants it.
        prompt: "box": boxes may be given. "none": there are none, and giving one is an error.
        rectangular: pad to full patches only, not to the square; faster for oblong images.
        checkpointing: recompute activations of encoder and ResNet ladder in the backward pass to save memory.
        autocast: "bf16" runs the image encoder and the side network in mixed precision, on any device, "bf16_all" the
            mask decoder, too (its position codes stay float32); None leaves precision alone.
        low_res_training: in training mode return the decoder's own logits, one per 4 x 4 pixels, as SAMed and SAM-LST
            compare them with the label; only without prompts.
        masks: "single": SAM's single mask. "best": of the three masks behind it the one whose quality SAM rates
            highest, per box; for one class and for evaluation, since no strategy here trains those masks.
        compute: values of ``choices.Compute``: int8, tf32, compile, attention.

    Attributes: those of ``Segmenter``, and
        second: None, or a decoder behind SAM's (``adapters.HierarchicalDecoder``), whose logits are averaged with its.
        side: None, or a callable ``side(image, embedding, taps) -> embedding`` that may change the embedding;
            ``side.taps`` (a sequence of block numbers) says which block outputs it wants to see.

    Raises:
        ConfigError: listing all arguments that are unknown or contradict each other.
        AdapterError: the strategy does not fit.
    """

    side: Side | None
    second: nn.Module | None

    def __init__(
        self,
        sam_variant: str | SamSpec = "vit_b",
        strategy: Strategy | None = None,
        *,
        image_size: int | None = None,
        num_classes: int = 1,
        scans: int | Sequence[str] = 1,
        scan_mode: Literal[
            "mean_logits", "mean_probabilities", "majority", "union", "channels", "neighbours"
        ] = "mean_logits",
        input_scale: Literal["zscore", "unit", "slice", "sam"] = "zscore",
        prompt: Literal["box", "none"] = "box",
        rectangular: bool = False,
        checkpointing: bool = False,
        autocast: Literal["bf16", "bf16_all"] | None = None,
        low_res_training: bool = False,
        masks: Literal["single", "best"] = "single",
        compute: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        scans, self.scan_names = named_scans(scans, scan_mode)
        chosen: dict[str, str | None] = {"scan_mode": scan_mode, "input_scale": input_scale, "prompt": prompt}
        chosen |= {"autocast": autocast, "masks": masks}
        check_options(chosen, num_classes=num_classes, scans=scans, low_res_training=low_res_training)
        raise_all(problems_of(dict(compute or {}), Compute, "compute"), ConfigError, "the segmenter cannot be built")
        self.compute = Compute(**(compute or {}))
        raise_all(compute_problems(self.compute, autocast=autocast), ConfigError, "the segmenter cannot be built")
        # 3 masks behind the single one for a single class: SAM's own layout, which its checkpoints fit
        self.sam = build_sam(
            sam_variant,
            image_size=image_size,
            num_masks=3 if num_classes == 1 else num_classes,
            rectangular=rectangular,
            checkpointing=checkpointing,
        )
        self.spec, self.image_size = self.sam.spec, self.sam.image_size
        self.num_classes, self.scans, self.scan_mode = num_classes, scans, scan_mode
        self.input_scale, self.prompt, self.autocast = input_scale, prompt, autocast
        self.low_res_training, self.masks = low_res_training, masks
        self._encoder_hash: tuple[Any, str] | None = None
        self.side = self.second = None
        self.adopt(ZeroShot() if strategy is None else strategy)
        apply_compute(self, self.compute)
        self.eval()

    def train(self, mode: bool = True) -> SamSegmenter:
        """As usual, but frozen layers with running statistics stay in evaluation mode; ConfigError with int8."""
        if mode and self.compute.int8:
            raise ConfigError(NO_TRAINING)
        super().train(mode)
        hold_statistics(self, self.owned)
        return self

    @property
    def encoder_frozen(self) -> bool:
        """Whether an image's embedding never changes, so that it may be stored."""
        return not any(name.startswith("sam.image_encoder.") for name in self.owned)

    def embedding_identity(self) -> dict[str, Any]:
        """Everything that an embedding made by ``encode`` depends on, beside the image, as JSON values."""
        encoder = self.sam.image_encoder
        versions = versions_of(encoder)
        if self._encoder_hash is None or self._encoder_hash[0] != versions:
            self._encoder_hash = (versions, tensors_hash(encoder))
        facts = {key: getattr(self, key) for key in ("image_size", "scan_mode", "input_scale")}
        facts |= {"rectangular": self.sam.rectangular, "autocast": self.autocast is not None}
        if self.precision in ("int8", "tf32"):
            facts["precision"] = self.precision
        return {"encoder_sha256": self._encoder_hash[1], **facts}

    @property
    def depth(self) -> int:
        """Slices of a slab, which see each other; 1: each is alone."""
        return 1 if self.strategy is None else self.strategy.depth

    @property
    def precision(self) -> str:
        """What the image encoder computes in: float32, tf32, bf16 or int8."""
        if self.compute.int8 or self.autocast is not None:
            return "int8" if self.compute.int8 else "bf16"
        return "tf32" if self.compute.tf32 and self.sam.pixel_mean.is_cuda else "float32"

    def __prepare_scriptable__(self) -> nn.Module:
        """Say to ``torch.jit.script`` what is possible instead."""
        how = "trace it (ckpt_export ... --use_trace True --input_shape [1,S,H,W])"
        raise ConfigError(f"TorchScript cannot script SAM; {how if self.prompt == 'none' else UNSCRIPTED}")

    def load_base(
        self, checkpoint: str | os.PathLike[str] | None = None, *, download: bool = True, start: bool = True
    ) -> LoadReport:
        """Load SAM's weights.

        Args:
            checkpoint: file; None looks in the usual places; "random" starts from random weights on purpose.
            download: whether the file may be fetched when it is nowhere to be found.
            start: also load what the strategy's own parts start from (a side network's weights); not before an adapter.
        Raises:
            WeightsError: absent, damaged or not fitting.
            ConfigError: the number of classes needs a new mask head, or the start is random, and the strategy would
                leave the masks of several classes untrained.
        """
        path = find_weights(self.spec.name, None if checkpoint is None else os.fspath(checkpoint), download=download)
        # Another number of masks than SAM's starts the mask head anew; then it has to learn, and to be saved.
        strategy = Strategy() if self.strategy is None else self.strategy
        report = load_sam_weights(
            self.sam, path, ignore=self.owned, allow_new_masks=self.num_classes > 1, tile_masks=strategy.tile_masks
        )
        if not strategy.random_masks and self.num_classes > 1:
            random = [name for name in self.sam.state_dict() if MASK_HEAD.match(name)] if str(path) == RANDOM else []
            check_new_masks(self, report.skipped or random)
        if str(path) == RANDOM or not self.owned:  # what else is missing is the strategy's, and in its file
            self.fill()
        if start:
            strategy.start(self, download=download)
        self.base_sha256 = report.sha256 or RANDOM
        self.base_file = os.path.basename(report.path) if report.sha256 else None
        return report

    def merge(self) -> int:
        """Fold low-rank updates, scales and shifts into plain layers; what is left is SAM, frozen, without a strategy.

        Returns:
            The number of layers merged. ``self.sam.state_dict()`` then loads strictly into any plain SAM.
        Raises:
            AdapterError: there is a side network or a bottleneck, which no layer of SAM can take in.
        """
        if self.side is not None or self.second is not None:
            what = "a side network" if self.second is None else "a second decoder"
            raise AdapterError(f"merge: got a network with {what}; SAM alone cannot replace it, use save_model")
        merged = merge_all(self)
        self.strategy, self.owned, self.unused, self.fixed, self.base_sha256 = None, [], [], [], None
        keep_only(self, self.owned)
        return merged

    def forward(self, image: Tensor, boxes: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Segment a batch of slices.

        Args:
            image: (B, S, H, W) with H, W <= image_size, intensities as ``input_scale`` says. Where ``depth`` is D > 1,
                B is a multiple of D, and each D images in a row are neighbouring slices of a volume, a slab.
            boxes: (B, 4) or (B, N, 4) as x0 y0 x1 y1 in pixels of ``image``, x along W; a row with NaN is no box. With
                P clicks (B, N, 4 + 3 P), behind each box, which may be NaN: x, y and 1 (inside) or 0 (outside), or NaN.
            embedding: (B * S, C, gh, gw) or (B, S, C, gh, gw) of an earlier pass through the encoder (1 for S when the
                scans are channels), which is then not run.
        Returns:
            Logits (B, C, H, W), float32, C = ``channels_out``; (B, C, H/4, W/4) in training mode with
            ``low_res_training``. With a second decoder training mode returns both, those and its own (B, C, H, W).
            Several boxes of one image are joined by their largest logit (background: smallest). An image whose boxes
            are all NaN gets -20 (background: +20).
        Raises:
            ConfigError: naming the shape that was got and the one expected.
        """
        image, boxes = plain_inputs(self, image, boxes)
        if len(image) % self.depth:
            raise ConfigError(
                f"image: got {len(image)} slices, but this network attends to neighbours in slabs of {self.depth}; "
                "give volumes to a SliceVolumeInferer, which cuts slabs, or train with depth 1 for single images"
            )
        if self.masks == "best" and self.training and self.owned:
            raise ConfigError(
                "masks: got 'best' in training, but the masks that it chooses from would not learn; train with "
                "'single' and evaluate with either"
            )
        if self.second is not None and boxes is not None:
            raise ConfigError(
                "boxes: got some, but a second decoder takes none; leave them out, or use another decoder"
            )
        if embedding is not None:
            embedding = embedding.flatten(0, 1) if embedding.ndim == 5 else embedding
            check_embedding(self, image, embedding)
        if boxes is None:
            return self._segment(image, embedding)

        def of_boxes(images: list[int] | slice, boxes: Tensor, given: Tensor) -> list[Tensor]:
            counts = given.sum(1).tolist()
            # a slice without a box is a neighbour all the same
            whole = self._encode(image) if embedding is None and self.depth > 1 else embedding
            own = None if whole is None else whole.unflatten(0, (-1, self.views))[images].flatten(0, 1)
            return join_boxes(self._segment(image[images], own, boxes[given], counts), counts, self.num_classes)

        return where_boxes_are(self, image, boxes, of_boxes)

    def _segment(
        self, image: Tensor, embedding: Tensor | None, boxes: Tensor | None = None, counts: Sequence[int] = ()
    ) -> Any:
        """Logits of B images; with boxes (R, 4) of the R boxes, ``counts[i]`` of them on image i."""
        embedding = self.mix(image, embedding)  # (B * V, C, gh, gw)
        if set(counts) - {1}:
            rows = torch.tensor(counts, device=image.device)
            embedding = embedding.unflatten(0, (-1, self.views)).repeat_interleave(rows, 0, output_size=sum(counts))
            embedding = embedding.flatten(0, 1)
        maps, (height, width) = self.decode(embedding, boxes), image.shape[-2:]
        if not self.training or not (self.low_res_training or self.second):
            return self.enlarge(maps)[..., :height, :width]
        first = maps[0][..., : -(-height // LOW_RES), : -(-width // LOW_RES)]
        if not self.low_res_training:
            first = self.enlarge(maps[:1])[..., :height, :width]
        return first if self.second is None else [first, maps[1][..., :height, :width]]

    def encode(self, image: Tensor) -> Tensor:
        """Normalise, pad and encode (B, S, H, W) to the (B * S, C, gh, gw) that ``forward`` takes (channels: B)."""
        return self._encode(image.as_subclass(torch.Tensor).float())

    def mix(self, image: Tensor, embedding: Tensor | None = None) -> Tensor:
        """What the decoder sees of (B, S, H, W): SAM's embedding, run or given, behind the side network if any."""
        if self.side is None:
            return self._encode(image) if embedding is None else embedding.float()
        taps: list[Tensor] = []
        wanted = tuple(getattr(self.side, "taps", ()))
        prepared = self._prepare(image)
        if getattr(self.side, "needs_embedding", True) and (embedding is None or wanted):
            embedding, taps = self._run_encoder(prepared, wanted)  # block outputs are not part of a stored embedding
        with self._encoder_precision(image):
            return self.side(prepared, embedding, taps).float()

    def decode(self, embedding: Tensor, boxes: Tensor | None) -> list[Tensor]:
        """Embeddings (R * V, C, gh, gw), boxes (R, 4 ...) if any, to logits (R, K, 4 gh, 4 gw), float32, over V views.

        A second decoder adds its own, (R, K, 16 gh, 16 gw). They have the wanted precision, whatever that of the
        surroundings is.
        """
        if boxes is None or boxes.shape[-1] == 4:
            return self._decode(embedding, boxes)
        groups = list(prompt_groups(boxes.float()))
        own = embedding.unflatten(0, (-1, self.views))
        maps = [self._decode(own[index].flatten(0, 1), box, clicks) for index, box, clicks in groups]
        order = torch.tensor([number for index, *_ in groups for number in index], device=own.device).argsort()
        return [torch.cat(each)[order] for each in zip(*maps, strict=True)]

    def _decode(self, embedding: Tensor, boxes: Tensor | None, clicks: Clicks | None = None) -> list[Tensor]:
        """``decode`` of rows that all have a box, or none of them, and equally many clicks."""
        boxes = None if boxes is None else boxes.float().repeat_interleave(self.views, 0)
        prompts: dict[str, Any] = {"boxes": boxes, "multimask": self.masks == "best" if self.num_classes == 1 else None}
        if clicks is not None:
            prompts["points"] = tuple(each.repeat_interleave(self.views, 0) for each in clicks)
        with torch.autocast(embedding.device.type, dtype=torch.bfloat16, enabled=self.autocast == "bf16_all"):
            low, quality, *more = self.sam.decode(embedding, second=self.second, **prompts)
        low = best_mask(low, quality, self.views) if prompts["multimask"] else low
        return [combined(maps.float().unflatten(0, (-1, self.views)), self.scan_mode) for maps in (low, *more)]

    def enlarge(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits of the decoders to those of the padded slice, one per pixel, in float32: the mean of two decoders."""
        low, *more = maps
        size = [side * self.spec.patch_size // LOW_RES for side in low.shape[-2:]]
        with torch.autocast(low.device.type, enabled=False):
            found = F.interpolate(low, size, mode="bilinear", align_corners=False)
            return (found + more[0]) / 2 if more else found

    def _encode(self, image: Tensor) -> Tensor:
        return self._run_encoder(self._prepare(image), ())[0].float()

    def _run_encoder(self, prepared: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        with self._encoder_precision(prepared):
            encoded = self.sam.embed(prepared, taps)
        return encoded if isinstance(encoded, tuple) else (encoded, [])

    def _prepare(self, image: Tensor) -> Tensor:
        """(B, S, H, W) to (B * V, 3, h, w) as SAM's encoder takes it: normalised, then padded with zeros."""
        if self.scan_mode in TOGETHER:
            image = image.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        if self.input_scale == "sam":
            image = (image - self.sam.pixel_mean) / self.sam.pixel_std
        if self.input_scale == "slice":
            low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
            image = (image - low) / (high - low).clamp_min(1e-8)
        return self.sam.pad(image)

    @property
    def views(self) -> int:
        """Passes through SAM per image."""
        return self.scans if self.scan_mode in TOGETHER else 1

    def _encoder_precision(self, image: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(image.device.type, dtype=torch.bfloat16)


@contextmanager
def disable_adapter(network: nn.Module) -> Iterator[None]:
    """Within, the network computes what the frozen SAM below its adapter computes, bit for bit.

    Args:
        network: a ``SamSegmenter`` (also in ``DistributedDataParallel``) whose strategy only adds to SAM: low-rank
            updates, bottlenecks, scales and shifts, a side network. Zero-shot has nothing to disable.
    Raises:
        AdapterError: SAM as it was is not there: trained in place (which tensors is told), merged, or never there.
    """
    network = unwrap(network)
    if not isinstance(network, SamSegmenter):
        raise AdapterError(f"disable_adapter: {type(network).__name__} has no SAM in it that an adapter was put on")
    if network.strategy is None:
        raise AdapterError("disable_adapter: the adapter was merged into SAM's weights; build the network again")
    if changed := sorted(set(network.owned) & {f"sam.{name}" for name in plain_names(network.sam)}):
        raise AdapterError(
            f"disable_adapter: {network.strategy.name!r} trains {len(changed)} of SAM's own tensors in place "
            f"({changed[0]} ...), so that SAM as it was is not here any more; compare with a zero-shot network"
        )
    layers = [layer for layer in network.modules() if isinstance(layer, ADAPTERS)]
    before, side = [layer.enabled for layer in layers], network.side
    try:
        network.side = None
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        network.side = side
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
