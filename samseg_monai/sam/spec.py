"""The SAM variants by name, with their sizes (segment_anything's build_sam.py; for vit_t MobileSAM's)."""

from __future__ import annotations

from samseg_monai.errors import ConfigError
from samseg_monai.sam.backbone import SamSpec
from samseg_monai.sam.tiny_vit import TinyViTSpec
from samseg_monai.sam.vit import ViTSpec

SPECS: dict[str, SamSpec] = {
    spec.name: spec
    for spec in (
        ViTSpec("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        # MedSAM (Ma et al. 2024): a ViT-B that was trained on medical images
        ViTSpec("medsam", 768, 12, 12, (2, 5, 8, 11)),
        ViTSpec("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ViTSpec("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
        # MobileSAM (Zhang et al. 2023, arXiv:2306.14289): SAM's own decoder behind a small encoder
        TinyViTSpec("vit_t", (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)),
        # pre-trained by this project: small enough for a demo on two CPU cores
        ViTSpec(
            "pico", 128, 6, 4, (1, 3, 5), window_size=8, image_size=256, prompt_dim=128,
            decoder_mlp_dim=512, decoder_heads=4, iou_hidden_dim=128,
        ),
        # never trained: the smallest network with every part of SAM in it, for tests
        ViTSpec(
            "tiny", 32, 2, 2, (1,), window_size=3, image_size=64, prompt_dim=32,
            decoder_mlp_dim=64, decoder_heads=2, iou_hidden_dim=32,
        ),
        # the same of vit_t
        TinyViTSpec(
            "tiny_t", (8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 2), (3, 3, 4, 3), image_size=64, prompt_dim=32,
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
        known = [name for name in SPECS if not name.startswith("tiny")]  # those are for tests
        raise ConfigError(f"sam_variant: no SAM variant is called {variant!r}; choose one of {', '.join(known)}")
    return SPECS[variant]
