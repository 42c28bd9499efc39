"""Learning rates: a schedule over iterations, and rates of their own for parts of a network."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.files import unwrap

logger = logging.getLogger(__name__)
Scale = Sequence[tuple[str, float]]

DECAYS = ("poly", "cosine", "constant")
_ENCODER = "sam.image_encoder."
# tables and tokens say where and what something is: shrinking them towards zero has no meaning
_TOKENS = re.compile(
    r"(^|\.)(iou_token|mask_tokens|cls_token|pos_embed|rel_pos_[hw]|relative_position_bias_table|attention_biases|point_embeddings"
    r"|not_a_point_embed|no_mask_embed)(\.|$)"
)


def warmup_schedule(
    optimizer: Optimizer, *, total: int, warmup: int = 0, decay: str = "poly", power: float = 0.9
) -> LambdaLR:
    """A schedule to be stepped once per iteration, e.g. by MONAI's ``LrScheduleHandler(epoch_level=False)``.

    Iteration ``it``, from 0, has ``(it + 1) / warmup`` of the optimiser's rate while ``it < warmup``, and afterwards

    - ``poly``: ``(1 - (it - warmup) / total) ** power``, as SAMed (Zhang and Liu 2023, arXiv:2304.13785) and SAM-LST
      (Chai et al. 2023, arXiv:2306.12737) have it; their code is one iteration late;
    - ``cosine``: ``(1 + cos(pi * (it - warmup) / (total - warmup))) / 2``, 0 from ``total`` on;
    - ``constant``: 1.

    The numbers are those of torch's ``SequentialLR`` of ``LinearLR`` and ``PolynomialLR`` or ``CosineAnnealingLR``, but
    these keep ``total`` in their state: a finished training that goes on with more epochs would learn nothing.

    Args:
        total: iterations of the whole training, warm-up included (batches, also under gradient accumulation).
        warmup: iterations of linear warm-up, 0 to ``total - 1``.
        decay: ``"poly"``, ``"cosine"`` or ``"constant"``.
        power: exponent of ``poly``, above 0.

    Raises:
        ConfigError: naming every value that is out of range.
    """
    problems = []
    if total < 1:
        problems.append(f"total must be at least 1 iteration, got {total}")
    if warmup < 0 or warmup >= max(total, 1):
        problems.append(
            f"warmup must be 0 to total - 1 = {total - 1} iterations, got {warmup}: all epochs together have "
            f"{total} batches; override a bundle with --schedule::warmup 0, or raise --epochs"
        )
    if decay not in DECAYS:
        problems.append(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if not power > 0:
        problems.append(f"power must be above 0, got {power}")
    raise_all(problems, ConfigError, "warmup_schedule cannot be made")

    def factor(it: int) -> float:
        if it < warmup:
            return (it + 1) / warmup
        if decay == "poly":
            return max(0.0, 1 - (it - warmup) / total) ** power
        return (1 + math.cos(math.pi * min(1.0, (it - warmup) / (total - warmup)))) / 2 if decay == "cosine" else 1.0

    # a plain function: LambdaLR leaves functions out of its state, which therefore stays loadable with weights_only
    return LambdaLR(optimizer, lr_lambda=factor)


def parameter_groups(
    network: nn.Module,
    lr: float,
    *,
    layer_decay: float | None = None,
    scale: Scale = (),
    weight_decay_matrices_only: bool = False,
) -> list[Any]:
    """The parameters that learn, as an optimiser's ``params``; schedules keep the ratios of their rates.

    With the defaults it is the plain list of parameters. Else there is one group for each rate, and a log of them.

    Args:
        network: SamSegmenter or another network, or DDP of it.
        lr: learning rate of everything that no rule names.
        layer_decay: d, 0 < d <= 1: block i of SAM's image encoder, i from 0, gets ``lr * d ** (depth - i)``, what lies
            before the blocks ``lr * d ** (depth + 1)``. Its neck, the mask decoder and a side network get ``lr``. The
            rule of ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2022, arXiv:2106.08254).
        scale: pairs of a pattern and a factor above 0. A pattern is a parameter's name or its beginning up to a dot,
            ``*`` stands for anything: ``["side.alpha", 10]``, ``["*.lora_b", 16]``. Of several that match the last one
            counts; the factor multiplies what ``layer_decay`` gives.
        weight_decay_matrices_only: no weight decay for biases, normalisations, gates, magnitudes, tokens and tables.

    Raises:
        ConfigError: values out of range, a pattern that matches nothing (the message lists the names there are), or
            ``layer_decay`` where nothing of an image encoder learns.
    """
    plain = unwrap(network)
    learning = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    if layer_decay is None and not scale and not weight_decay_matrices_only:
        return list(learning.values())
    raise_all(_problems(learning, layer_decay, scale), ConfigError, "learning_rates cannot be used")
    encoder: Any = getattr(getattr(plain, "sam", None), "image_encoder", None)
    groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in learning.items():
        factor = next((value for pattern, value in reversed(scale) if _matches(pattern, name)), 1.0)
        if layer_decay is not None and name.startswith(_ENCODER):
            layers_behind = len(encoder.named_blocks()) + 1 - encoder.depth_of(name.removeprefix(_ENCODER))
            factor *= layer_decay**layers_behind
        spared = weight_decay_matrices_only and (parameter.ndim < 2 or _TOKENS.search(name) is not None)
        groups.setdefault((factor, spared), {})[name] = parameter
    # what has the rate of the config comes first: it is the one that curves call "lr"
    ordered = sorted(groups.items(), key=lambda item: item[0] != (1.0, False))
    rows = [_row(lr * factor, spared, members) for (factor, spared), members in ordered]
    logger.info("Learning rates of %d groups:\n%s", len(rows), "\n".join(rows))
    return [
        {"params": list(members.values()), "lr": lr * factor, **({"weight_decay": 0.0} if spared else {})}
        for (factor, spared), members in ordered
    ]


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _problems(learning: Mapping[str, nn.Parameter], layer_decay: float | None, scale: Scale) -> list[str]:
    problems = []
    if layer_decay is not None and not (_number(layer_decay) and 0 < layer_decay <= 1):
        problems.append(f"layer_decay must be above 0 and at most 1, got {layer_decay!r}; null means none")
    elif layer_decay is not None and not any(name.startswith(_ENCODER) for name in learning):
        problems.append(f"layer_decay is {layer_decay}, but nothing of an image encoder learns; set it to null")
    for pair in scale:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) and _number(pair[1])):
            problems.append(f'scale takes a list of pairs such as [["side.alpha", 10]], got {pair!r} in it')
        elif not pair[1] > 0:
            problems.append(f"scale: the factor of {pair[0]!r} must be above 0, got {pair[1]}")
        elif not any(_matches(pair[0], name) for name in learning):
            there = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in learning)
            problems.append(f"scale: {pair[0]!r} matches nothing that learns; there is {', '.join(there) or 'nothing'}")
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _row(rate: float, spared: bool, members: Mapping[str, nn.Parameter]) -> str:
    """One line of the log: rate, number of tensors and values, and what their names begin with."""
    levels = zip(*(name.split(".") for name in members), strict=False)
    common = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
    values = sum(parameter.numel() for parameter in members.values())
    where = common or f"{next(iter(members))} and others"
    without = ", no weight decay" if spared else ""
    counts = f"{len(members)} tensor{'s'[: len(members) > 1]}, {values:,} value{'s'[: values > 1]}"
    return f"  {rate:.3g}{without}: {where} ({counts})"
