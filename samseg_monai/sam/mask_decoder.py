"""SAM's prompt encoder and mask decoder for a batch of images with one prompt row each, and for any number of masks."""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import PromptEncoder as SamPromptEncoder

from samseg_monai.errors import ConfigError


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


class MaskDecoder(SamMaskDecoder):
    """SAM's mask decoder where row i of the prompts belongs to image i.

    segment_anything repeats every image once per prompt row: right for one image with many prompts, and wrong for a
    batch, where it would pair each image with each prompt. One image with many rows still works as there.
    """

    def forward(  # type: ignore[override]
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict masks.

        Args:
            image_embeddings: (B, C, gh, gw), or (1, C, gh, gw) for one image with B prompt rows.
            image_pe: (1, C, gh, gw).
            sparse_prompt_embeddings: (B, N, C).
            dense_prompt_embeddings: (B, C, gh, gw).
            multimask_output: False for the single mask, True for the masks behind it, None for all.

        Returns:
            Logits (B, M, 4 gh, 4 gw) and predicted mask qualities (B, M).

        Raises:
            ConfigError: the number of images is neither 1 nor that of the prompt rows.
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
        return logits, quality[:, chosen]
