"""Build SAM in any size from segment_anything's classes; state-dict keys stay SAM's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam, TwoWayTransformer

from samseg_monai.errors import ConfigError
from samseg_monai.sam.backbone import Backbone, SamSpec
from samseg_monai.sam.mask_decoder import MaskDecoder, PromptEncoder
from samseg_monai.sam.spec import get_spec


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict low-resolution masks, one prompt row per image.

        Args:
            embedding: (B, prompt_dim, gh, gw).
            boxes: (B, 4) as x0 y0 x1 y1, in pixels of the padded input.
            points: coordinates (B, N, 2) as x y and labels (B, N): 1 inside, 0 outside, -1 none.
            masks: (B, 1, 4 gh, 4 gw) logits of an earlier prediction.
            multimask: False for SAM's single mask, True for the masks behind it, None for all.

        Returns:
            Logits (B, M, 4 gh, 4 gw) and predicted qualities (B, M).
        """
        grid = (embedding.shape[-2], embedding.shape[-1])
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=masks, grid=grid)
        if sparse.shape[0] == 1:  # no prompt: SAM's prompt encoder cannot know the batch size
            sparse = sparse.expand(embedding.shape[0], -1, -1)
        return self.mask_decoder(embedding, self.prompt_encoder.get_dense_pe(grid), sparse, dense, multimask)


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
        variant: name of a spec (vit_b, vit_l, vit_h, vit_t, pico, tiny, tiny_t) or a spec.
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
    model = SamModel(
        spec,
        image_size=spec.image_size if image_size is None else image_size,
        num_masks=num_masks,
        rectangular=rectangular,
        checkpointing=checkpointing,
    )
    return model.eval()
