"""Weight-decomposed low-rank adaptation of linear layers (Liu et al. 2024, DoRA, arXiv:2402.09353).

Equation 5: ``W' = m (W + s B A) / ||W + s B A||``. The low-rank update turns the direction of each row of the weight,
and a learned magnitude, one value per row, is its length. A row is an output here, so that norms are taken over the
inputs, as in the authors' code; their paper speaks of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from samseg_monai.adapters.lora import LoRALinear


class DoRALinear(LoRALinear):
    """A ``LoRALinear`` with a learned magnitude for each row of its adapted parts.

    Beside the tensors of LoRA it learns ``magnitude.<part> (out_features / num_parts,)``, float32, which start as the
    norms of the base's rows: a fresh layer changes nothing. Base weights that are loaded later need
    ``reset_magnitude()``. To the gradient the norm in the denominator is a constant, which saves memory and time
    (section 4.3 of the paper).

    Args: as of ``LoRALinear``.
    """

    def __init__(self, base: nn.Linear, **arguments: Any) -> None:
        super().__init__(base, **arguments)
        width = self.out_features // self.num_parts
        rows = {str(p): nn.Parameter(torch.empty(width, device=self.weight.device)) for p in self.parts}
        self.magnitude = nn.ParameterDict(rows)
        self.reset_magnitude()

    def reset_lora(self) -> None:
        """Draw ``A`` anew, set ``B`` to zero and the magnitudes to the base's, so that the layer equals it again."""
        super().reset_lora()
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set each magnitude to the norm of its row of ``W + s B A``."""
        for part in self.parts:
            self.magnitude[str(part)].copy_(self._norm(part))

    def _norm(self, part: int) -> Tensor:
        """Norms (out_features / num_parts,) of the rows of ``W + s B A``, without a gradient."""
        # bf16 of a surrounding autocast would make a fresh layer differ from its base
        kind = "cpu" if self.weight.is_meta else self.weight.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return torch.linalg.vector_norm(super()._merged(part), dim=1)

    def _stretch(self, part: int) -> Tensor:
        """What each row's output is multiplied by; a row of zeros has no direction and stays one."""
        norm = self._norm(part)
        return self.magnitude[str(part)].float() / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def _adapted(self, part: int, output: Tensor, update: Tensor) -> Tensor:
        product = output + update
        unbiased = product
        if self.bias is not None:
            unbiased = product - self._split(self.bias, 0)[part].to(product.dtype)
        # exact where the stretch is 1, in any precision
        return product + (self._stretch(part) - 1).to(product.dtype) * unbiased

    def _merged(self, part: int) -> Tensor:
        return self._stretch(part)[:, None] * super()._merged(part)
