"""Low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685), weight-decomposed, or of common factors.

A frozen ``y = W x + b`` becomes ``y = W x + b + s B A x`` with ``A (r, d_in)`` and ``B (d_out, r)`` learned.
``s = alpha / r``, or ``alpha / sqrt(r)`` when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.products import Linear, SharedLinear, linear


class LoRALinear(SharedLinear):
    """A frozen linear layer with low-rank updates to some of its equal output parts.

    SAM fuses query, key and value into one ``Linear(d, 3 d)``: with ``num_parts=3``, parts 0, 1, 2 are q, k, v. In
    MobileSAM their rows alternate head by head, [q, k, v] of the first head, then of the second: ``groups`` is then the
    number of heads, and a part consists of its rows of all groups, in order.
    The tensors of ``base`` are shared, not copied, and keep the keys ``weight`` and ``bias``, so that a plain
    checkpoint loads before or after. The learned tensors are ``lora_a.<part> (rank, in_features)``, Kaiming uniform
    with a = sqrt(5), and ``lora_b.<part> (out_features / num_parts, rank)``, zeros: a fresh layer changes nothing.

    Args:
        base: layer to take over.
        rank: rank of each update, 1 to min(in_features, out_features / num_parts).
        alpha: strength of the update (no unit), greater than 0; None means ``rank``, that is a scaling of 1 when
            not rank-stabilised.
        parts: output parts to adapt, each in 0 .. num_parts - 1, no repetition.
        num_parts: number of equal parts that the output consists of.
        groups: how often the sequence of parts repeats among the rows.
        dropout: probability, 0 <= p < 1, of dropping an input value of ``A`` during training.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
    Attributes:
        enabled: False makes it compute what its base computes, bit for bit.
        shared: modules outside of the layer that its updates are made of, too.
    Shape: ``(..., in_features)`` to ``(..., out_features)``.
    Raises:
        AdapterError: listing everything that is wrong with the arguments.
    """

    shared: tuple[nn.Module, ...] = ()

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float | None = None,
        parts: Sequence[int] = (0,),
        num_parts: int = 1,
        groups: int = 1,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
    ) -> None:
        problems = _problems(base, rank, alpha, parts, num_parts, groups, dropout)
        raise_all(problems, AdapterError, "LoRALinear cannot be built")
        super().__init__(base)
        self.rank, self.num_parts, self.parts, self.groups = rank, num_parts, tuple(sorted(parts)), groups
        self.scaling = float(rank if alpha is None else alpha) / (math.sqrt(rank) if rank_stabilised else rank)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.enabled = True
        width = base.out_features // num_parts
        self.lora_a = nn.ParameterDict({str(p): _like(base.weight, rank, base.in_features) for p in self.parts})
        self.lora_b = nn.ParameterDict({str(p): _like(base.weight, width, rank) for p in self.parts})
        LoRALinear.reset_lora(self)  # a subclass resets what it adds once it is there
        self.train(base.training)

    def reset_lora(self) -> None:
        """Draw ``A`` anew and set ``B`` to zero, so that the layer equals its base again."""
        for a in self.lora_a.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        for b in self.lora_b.values():
            nn.init.zeros_(b)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if not self.enabled:
            return super().forward(input)
        # what the update adds to all rows at once, with zeros where nothing is adapted: no row is cut out and put back
        down, up = self.fused()
        low = linear(self.dropout(input), down)  # (..., rank for each part), one mask for all of them
        update = linear(low, self.scaling * up)
        return self._adapted(super().forward(input), update)

    def fused(self) -> tuple[Tensor, Tensor]:
        """``A`` (n rank, in_features) and ``B`` (out_features, n rank) of one update that equals those of the n parts.

        ``B`` has that of each part in its rows and in the columns of its own ``A``, and zeros elsewhere.
        """
        pairs = {part: self._pair(part) for part in self.parts}
        none = self.weight.new_zeros(self.out_features // self.num_parts, 0)
        of_parts = [pairs[part][1] if part in pairs else none for part in range(self.num_parts)]
        return torch.cat([a for a, _ in pairs.values()]), self._in_order(torch.block_diag(*of_parts))

    def _pair(self, part: int) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features / num_parts, rank) of one part."""
        return self.lora_a[str(part)], self.lora_b[str(part)]

    def _in_order(self, rows: Tensor) -> Tensor:
        """``rows`` (out_features, ...), part after part, in the order of the layer's outputs."""
        if self.groups == 1:
            return rows
        return rows.unflatten(0, (self.num_parts, self.groups, -1)).transpose(0, 1).flatten(0, 2)

    def _grouped(self, rows: Tensor) -> Tensor:
        """A view (groups, num_parts, width, ...) of ``rows`` (out_features, ...)."""
        return rows.unflatten(0, (self.groups, self.num_parts, -1))

    def _adapted(self, output: Tensor, update: Tensor) -> Tensor:
        """Output from that of the base, which may be overwritten, and the low-rank update, both (..., out_features)."""
        return output.add_(update)

    def _merged(self, part: int) -> Tensor:
        """Weight (out_features / num_parts, in_features) of one part that computes the same, in float32."""
        # whatever the stored type is: a merge happens once and should lose nothing
        down, up = self._pair(part)
        update = up.float() @ down.float()
        return self._grouped(self.weight)[:, part].flatten(0, 1).float() + self.scaling * update

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain ``nn.Linear`` that computes the same in evaluation mode; this layer stays as it is."""
        plain = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.detach().clone()
        grouped = self._grouped(weight)  # a view: what is written lands in ``weight``
        for part in self.parts:
            grouped[:, part] = self._merged(part).unflatten(0, (self.groups, -1)).to(weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)

    def lora_names(self) -> list[str]:
        """Names of the learned tensors, relative to this layer."""
        return [name for name, _ in self.named_parameters() if name not in ("weight", "bias")]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, parts={self.parts} of {self.num_parts}, groups={self.groups}"


class DoRALinear(LoRALinear):
    """A ``LoRALinear`` with a learned magnitude for each row of its adapted parts (Liu et al. 2024, arXiv:2402.09353).

    Equation 5: ``W' = m (W + s B A) / ||W + s B A||``. The low-rank update turns the direction of each row of the
    weight; the magnitude is its length. A row is an output here, so that norms are taken over the inputs, as in the
    authors' code; their paper speaks of columns.

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

    def _adapted(self, output: Tensor, update: Tensor) -> Tensor:
        product = output + update
        unbiased = product if self.bias is None else product - self.bias.to(product.dtype)
        plain = self.weight.new_ones(self.out_features // self.num_parts, dtype=torch.float32)
        of_parts = [self._stretch(part) if part in self.parts else plain for part in range(self.num_parts)]
        # exact where the stretch is 1, in any precision
        return product + (self._in_order(torch.cat(of_parts)) - 1).to(product.dtype) * unbiased

    def _merged(self, part: int) -> Tensor:
        return self._stretch(part)[:, None] * super()._merged(part)


class Factors(nn.Module):
    """Factors that the updates of many layers have in common (FacT, Jie and Deng 2023, arXiv:2212.03145).

    ``u.<width> (rank, width)`` for each width of an input, Kaiming uniform with a = sqrt(5), and ``v.<width> (width,
    rank)`` for each width of an output, zeros: fresh updates change nothing.

    Args:
        inputs, outputs: the widths.
        like: a tensor whose device and type those of the parameters are.
    """

    def __init__(self, rank: int, inputs: Collection[int], outputs: Collection[int], *, like: Tensor) -> None:
        super().__init__()
        self.u = nn.ParameterDict({str(width): _like(like, rank, width) for width in inputs})
        self.v = nn.ParameterDict({str(width): _like(like, width, rank) for width in outputs})
        for u in self.u.values():
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        for v in self.v.values():
            nn.init.zeros_(v)


class FacTLinear(LoRALinear):
    """A ``LoRALinear`` whose factors are those of all layers but for a small core of its own: FacT-TT, equation 5.

    The update of a part is ``s V C U`` with ``core.<part>`` C (rank, rank), Kaiming uniform with a = sqrt(5), learned
    here, and U and V of the one module in ``shared``, ``Factors`` with the widths of the layer's input and of a part,
    which has to be put there: it lies outside of the layer, and learns, too.

    Args: as of ``LoRALinear``.
    """

    def __init__(self, base: nn.Linear, **arguments: Any) -> None:
        super().__init__(base, **arguments)
        del self.lora_a, self.lora_b
        self.core = nn.ParameterDict({str(p): _like(base.weight, self.rank, self.rank) for p in self.parts})
        self.reset_lora()

    def reset_lora(self) -> None:
        """Draw the cores anew; the layer equals its base as long as the factors are fresh."""
        for core in self.core.values():
            nn.init.kaiming_uniform_(core, a=math.sqrt(5))

    def _pair(self, part: int) -> tuple[Tensor, Tensor]:
        factors: Any = self.shared[0]
        u, v = factors.u[str(self.in_features)], factors.v[str(self.out_features // self.num_parts)]
        return self.core[str(part)] @ u, v


def _like(weight: Tensor, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, device=weight.device, dtype=weight.dtype))


def _problems(
    base: nn.Linear, rank: int, alpha: float | None, parts: Sequence[int], num_parts: int, groups: int, dropout: float
) -> list[str]:
    if not isinstance(base, nn.Linear):
        return [f"base must be an nn.Linear, got {type(base).__name__}; name a linear layer"]
    if isinstance(base, LoRALinear):
        return ["base is a LoRALinear already; merge it first or build the network anew"]
    if num_parts < 1 or groups < 1 or base.out_features % (num_parts * groups):
        times = f" in {groups} groups" if groups != 1 else ""
        return [f"out_features {base.out_features} do not split into {num_parts} equal parts{times}; choose a divisor"]
    problems = []
    width = base.out_features // num_parts
    largest = min(base.in_features, width)
    if not 1 <= rank <= largest:
        shape = f"{base.in_features}-to-{width}"
        problems.append(f"rank must be 1 to {largest} for a {shape} update, got {rank}; choose a smaller rank")
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(range(num_parts)):
        problems.append(f"parts must be different numbers of 0 .. {num_parts - 1}, got {tuple(parts)}")
    if not 0 <= dropout < 1:
        problems.append(f"dropout must be a probability, 0 <= p < 1, got {dropout}")
    if alpha is not None and not alpha > 0:
        problems.append(f"alpha must be greater than 0, got {alpha}; None means rank")
    return problems
