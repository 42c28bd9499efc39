"""SAM in any size from segment_anything's classes, for a batch of images; state-dict keys stay SAM's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, Sam, TwoWayTransformer
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import PromptEncoder as SamPromptEncoder
from torch import nn

from samseg_monai.errors import ConfigError
from samseg_monai.products import adopt
from samseg_monai.sam.backbone import Backbone, SamSpec
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.vit import ViTSpec


class PromptEncoder(SamPromptEncoder):
    """SAM's prompt encoder; ``grid`` (tokens down, tokens across) may be smaller than the square it was built for.

    Coordinates stay relative to the full square, so a position has the same code in a square and a rectangular image.
    Runs in float32 whatever the surroundings: bf16 cannot hold the phases 2 pi c of SAM's position code.
    """

    def get_dense_pe(self, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the position code (1, C, gh, gw) of every token of ``grid`` (default: the full square)."""
        rows, cols = grid or self.image_embedding_size
        with self._full_precision():
            return super().get_dense_pe()[..., :rows, :cols]

    def forward(  # type: ignore[override]
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed points ((B, N, 2), (B, N)), boxes (B, 4) and masks (B, 1, 4 gh, 4 gw) as sparse and dense prompts."""
        with self._full_precision():
            sparse, dense = super().forward(points, boxes, masks)
        if masks is None and grid is not None:
            dense = dense[..., : grid[0], : grid[1]]
        return sparse, dense

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.no_mask_embed.weight.device.type, enabled=False)


class Looked(NamedTuple):
    """What the mask decoder makes of B images: M masks, and what lies on the way to them."""

    logits: torch.Tensor
    """(B, M, 4 gh, 4 gw)."""
    quality: torch.Tensor
    """Predicted, (B, M)."""
    tokens: torch.Tensor
    """Mask tokens behind the transformer, (B, M, C)."""
    grid: torch.Tensor
    """Image tokens behind the transformer, (B, C, gh, gw)."""
    upscaled: torch.Tensor
    """Those upscaled, (B, C/8, 4 gh, 4 gw)."""


class MaskDecoder(SamMaskDecoder):
    """SAM's mask decoder where row i of the prompts belongs to image i.

    segment_anything repeats every image once per prompt row: right for one image with many prompts, and wrong for a
    batch, where it would pair each image with each prompt. One image with many rows still works as there.
    """

    def forward(self, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, M, 4 gh, 4 gw) and predicted mask qualities (B, M); arguments are those of ``look``."""
        found = self.look(*given, **named)
        return found.logits, found.quality

    def look(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool | None,
    ) -> Looked:
        """Decode, and keep what lies on the way.

        Args:
            image_embeddings: (B, C, gh, gw), or (1, C, gh, gw) for one image with B prompt rows; else ConfigError.
            image_pe: (1, C, gh, gw).
            sparse_prompt_embeddings, dense_prompt_embeddings: (B, N, C) and (B, C, gh, gw).
            multimask_output: False for the single mask, True for the masks behind it, None for all.
        """
        rows = sparse_prompt_embeddings.shape[0]
        if image_embeddings.shape[0] not in (1, rows):
            raise ConfigError(
                f"mask decoder: got {image_embeddings.shape[0]} images and {rows} prompt rows; give one row per image"
            )
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(rows, -1, -1)
        tokens = torch.cat([own, sparse_prompt_embeddings], dim=1)
        source = image_embeddings.expand(rows, -1, -1, -1) + dense_prompt_embeddings
        height, width = source.shape[-2:]
        seen, source = self.transformer(source, image_pe.expand(rows, -1, -1, -1), tokens)

        grid = source.transpose(1, 2).reshape(rows, -1, height, width)  # (B, gh*gw, C) -> (B, C, gh, gw)
        upscaled = self.output_upscaling(grid)
        chosen = list(range(self.num_mask_tokens))
        if multimask_output is not None:
            chosen = chosen[1:] if multimask_output else chosen[:1]
        # only the asked masks are computed: the hyper-networks of the others need no gradient
        weights = torch.stack([self.output_hypernetworks_mlps[i](seen[:, 1 + i]) for i in chosen], dim=1)
        logits = torch.einsum("bmc,bchw->bmhw", weights, upscaled)
        quality = self.iou_prediction_head(seen[:, 0])
        return Looked(logits, quality[:, chosen], seen[:, 1 + chosen[0] : 2 + chosen[-1]], grid, upscaled)


class SamModel(Sam):
    """SAM with a differentiable, batched way through: ``embed`` the images, ``decode`` one prompt row per image.

    Attributes:
        spec: sizes of the variant.
        image_size: side of the square input, in pixels.
        rectangular: pad input to full patches only, instead of to the square.
    """

    image_encoder: Backbone  # type: ignore[assignment]

    def __init__(self, spec: SamSpec, *, image_size: int, num_masks: int, rectangular: bool, checkpointing: bool):
        grid = image_size // spec.patch_size
        super().__init__(
            image_encoder=spec.encoder(image_size=image_size, checkpointing=checkpointing),
            prompt_encoder=PromptEncoder(
                embed_dim=spec.prompt_dim,
                image_embedding_size=(grid, grid),
                input_image_size=(image_size, image_size),
                mask_in_chans=spec.mask_in_chans,
            ),
            mask_decoder=MaskDecoder(
                transformer_dim=spec.prompt_dim,
                transformer=TwoWayTransformer(
                    depth=2,
                    embedding_dim=spec.prompt_dim,
                    mlp_dim=spec.decoder_mlp_dim,
                    num_heads=spec.decoder_heads,
                ),
                num_multimask_outputs=num_masks,
                iou_head_hidden_dim=spec.iou_hidden_dim,
            ),
        )
        self.spec = spec
        self.image_size = image_size
        self.rectangular = rectangular
        adopt(self)

    def pad(self, image: torch.Tensor) -> torch.Tensor:
        """Pad (..., h, w) with zeros at the bottom and right: to the square, or to full patches if rectangular."""
        height, width = image.shape[-2:]
        if max(height, width) > self.image_size:
            raise ConfigError(
                f"SAM {self.spec.name}: got an image of {height} x {width} pixels, at most {self.image_size} fit; "
                "resize it or raise image_size"
            )
        if self.rectangular:
            patch = self.spec.patch_size
            return F.pad(image, (0, -width % patch, 0, -height % patch))
        return F.pad(image, (0, self.image_size - width, 0, self.image_size - height))

    def postprocess_masks(
        self, masks: torch.Tensor, input_size: tuple[int, ...], original_size: tuple[int, ...]
    ) -> torch.Tensor:
        """Scale low-resolution logits up by 4, cut off the padding and resize to ``original_size`` (H, W).

        Equal to SAM's own for a square input; SAM's would stretch the logits of a rectangular one to the square.
        """
        size = [4 * side for side in masks.shape[-2:]]
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)

    def embed(
        self, image: torch.Tensor, taps: Sequence[int] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Encode (B, 3, h, w), already normalised and padded, as (B, prompt_dim, h / 16, w / 16); see Backbone."""
        return self.image_encoder(image, taps)

    def decode(
        self,
        embedding: torch.Tensor,
        *,
        boxes: torch.Tensor | None = None,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
        masks: torch.Tensor | None = None,
        multimask: bool | None = False,
        second: nn.Module | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Predict low-resolution masks, one prompt row per image.

        Args:
            embedding: (B, prompt_dim, gh, gw).
            boxes: (B, 4) as x0 y0 x1 y1, in pixels of the padded input.
            points: coordinates (B, N, 2) as x y and labels (B, N): 1 inside, 0 outside, -1 none.
            masks: (B, 1, 4 gh, 4 gw) logits of an earlier prediction.
            multimask: False for SAM's single mask, True for the masks behind it, None for all.
            second: a decoder that goes on from there, such as ``adapters.HierarchicalDecoder``.

        Returns:
            Logits (B, M, 4 gh, 4 gw) and predicted qualities (B, M); with a second decoder also its logits.
        """
        grid = (embedding.shape[-2], embedding.shape[-1])
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=masks, grid=grid)
        if sparse.shape[0] == 1:  # no prompt: SAM's prompt encoder cannot know the batch size
            sparse = sparse.expand(embedding.shape[0], -1, -1)
        position = self.prompt_encoder.get_dense_pe(grid)
        if second is None:
            return self.mask_decoder(embedding, position, sparse, dense, multimask)
        found = self.mask_decoder.look(embedding, position, sparse, dense, multimask)
        first = (found.logits, found.tokens, found.grid, found.upscaled)
        return found.logits, found.quality, second(embedding, dense, position, first)


def build_sam(
    variant: str | SamSpec,
    *,
    image_size: int | None = None,
    num_masks: int = 3,
    rectangular: bool = False,
    checkpointing: bool = False,
) -> SamModel:
    """Build SAM with random weights, in evaluation mode.

    Args:
        variant: name of a spec (vit_b, vit_l, vit_h, vit_t, medsam, pico, tiny, tiny_t) or a spec.
        image_size: side of the square input, in pixels; default: the variant's own.
        num_masks: masks behind the single one; 3 in SAM, the number of classes for a semantic decoder.
        rectangular: pad input to full patches only; faster for oblong images. False is what SAM does.
        checkpointing: trade time for memory in the encoder's backward pass.

    Raises:
        ConfigError: unknown variant, or an image_size or num_masks that cannot be built.
    """
    spec = get_spec(variant)
    if num_masks < 1:
        raise ConfigError(f"num_masks: got {num_masks}; SAM's decoder needs at least 1")
    size = spec.image_size if image_size is None else image_size
    if size <= 0 or size % spec.patch_size:
        raise ConfigError(f"image_size: got {size}; SAM needs a positive multiple of its patch size {spec.patch_size}")
    return SamModel(
        spec, image_size=size, num_masks=num_masks, rectangular=rectangular, checkpointing=checkpointing
    ).eval()


def official_encoder(spec: SamSpec, size: int) -> nn.Module:
    """Image encoder in the sizes of ``spec``, random, for images of ``size`` pixels a side.

    segment_anything's own where it has one; it knows no TinyViT, so that one is this package's.
    """
    if not isinstance(spec, ViTSpec):
        return spec.encoder(image_size=size)
    return ImageEncoderViT(
        img_size=size,
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        out_chans=spec.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=spec.window_size,
        global_attn_indexes=spec.global_attn_indexes,
    )
