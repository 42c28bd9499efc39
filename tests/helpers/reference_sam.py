"""The oracle of the parity tests: segment_anything's own classes, in any size."""

from __future__ import annotations

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samseg_monai.sam.build import official_encoder
from samseg_monai.sam.vit import ViTSpec


def reference_sam(spec: ViTSpec, *, image_size: int | None = None, masks: int = 3) -> Sam:
    """SAM in the sizes of ``spec`` with ``masks`` masks behind the single one, random weights, in evaluation mode."""
    size = spec.image_size if image_size is None else image_size
    grid = size // spec.patch_size
    return Sam(
        image_encoder=official_encoder(spec, size),
        prompt_encoder=PromptEncoder(spec.prompt_dim, (grid, grid), (size, size), spec.mask_in_chans),
        mask_decoder=MaskDecoder(
            transformer_dim=spec.prompt_dim,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=spec.prompt_dim, mlp_dim=spec.decoder_mlp_dim, num_heads=spec.decoder_heads
            ),
            num_multimask_outputs=masks,
            iou_head_hidden_dim=spec.iou_hidden_dim,
        ),
    ).eval()
