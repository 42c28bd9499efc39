"""Sizes of the SAM variants (Kirillov et al. 2023, arXiv:2304.02643, and segment_anything's build_sam.py)."""

from __future__ import annotations

from dataclasses import dataclass

from samseg_monai.errors import ConfigError


@dataclass(frozen=True)
class SamSpec:
    """All numbers that tell one SAM from another.

    Args:
        name: variant name, as used for ``sam_variant``.
        embed_dim: width of the ViT encoder.
        depth: number of transformer blocks.
        num_heads: attention heads per block.
        global_attn_indexes: blocks with global attention; the others attend within windows.
        window_size: side of an attention window, in tokens.
        image_size: side of the (padded, square) input the position tables were made for, in pixels.
        patch_size: side of one token, in pixels.
        prompt_dim: channels of the image embedding, prompts and mask decoder.
        decoder_mlp_dim: hidden width of the mask decoder's transformer.
        decoder_heads: attention heads of the mask decoder's transformer.
        mask_in_chans: hidden channels that encode a mask prompt.
        iou_hidden_dim: hidden width of the head that predicts mask quality.
    """

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int = 14
    image_size: int = 1024
    patch_size: int = 16
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    mask_in_chans: int = 16
    iou_hidden_dim: int = 256


SPECS: dict[str, SamSpec] = {
    spec.name: spec
    for spec in (
        SamSpec("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        SamSpec("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        SamSpec("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
        # pre-trained by this project: small enough for a demo on two CPU cores
        SamSpec(
            "pico", 128, 6, 4, (1, 3, 5), window_size=8, image_size=256, prompt_dim=128,
            decoder_mlp_dim=512, decoder_heads=4, iou_hidden_dim=128,
        ),
        # never trained: the smallest network with every part of SAM in it, for tests
        SamSpec(
            "tiny", 32, 2, 2, (1,), window_size=3, image_size=64, prompt_dim=32,
            decoder_mlp_dim=64, decoder_heads=2, iou_hidden_dim=32,
        ),
    )
}  # fmt: skip


def get_spec(variant: str | SamSpec) -> SamSpec:
    """Return the spec called ``variant`` (a spec is returned as it is).

    Raises:
        ConfigError: no such variant; the message lists those there are.
    """
    if isinstance(variant, SamSpec):
        return variant
    if variant not in SPECS:
        raise ConfigError(f"sam_variant: no SAM variant is called {variant!r}; choose one of {', '.join(SPECS)}")
    return SPECS[variant]
