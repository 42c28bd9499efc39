"""Learning-rate schedules per iteration: warm-up, then polynomial, cosine or no decay.

The polynomial one is that of SAMed (Zhang and Liu 2023, arXiv:2304.13785) and SAM-LST (Chai et al. 2023,
arXiv:2306.12737): ``base * (1 - (it - warmup) / total) ** 0.9`` after a linear warm-up. Their code sets the rate after
the step, so that iteration ``it`` runs with the rate that ours has at ``it - 1``; nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from samseg_monai.errors import ConfigError, raise_all

DECAYS = ("poly", "cosine", "constant")


def warmup_schedule(
    optimizer: Optimizer,
    *,
    total: int,
    warmup: int = 0,
    decay: str = "poly",
    power: float = 0.9,
    floor: float = 0.0,
) -> LambdaLR:
    """A schedule to be stepped once per iteration, e.g. by MONAI's ``LrScheduleHandler(epoch_level=False)``.

    With ``it`` counted from 0, the factor on the optimiser's own rate is ``(it + 1) / warmup`` while ``it < warmup``
    (so the first step already learns; it reaches 1 at the last one) and ``floor + (1 - floor) * g`` afterwards, where
    ``g`` is

    - ``poly``: ``(1 - (it - warmup) / total) ** power``, not below 0; as published it is divided by ``total``, so the
      rate at the end of a warmed-up training is small but not zero;
    - ``cosine``: ``(1 + cos(pi * (it - warmup) / (total - warmup))) / 2``, zero from ``total`` on;
    - ``constant``: 1.

    Args:
        optimizer: its present rates are the base rates.
        total: iterations of the whole training, warm-up included (batches, also under gradient accumulation).
        warmup: iterations of linear warm-up, 0 to ``total - 1``.
        decay: ``"poly"``, ``"cosine"`` or ``"constant"``.
        power: exponent of ``poly``, above 0.
        floor: fraction of the base rate that the decay ends at, 0 to 1.

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
    if not 0 <= floor <= 1:
        problems.append(f"floor must be 0 to 1 (a fraction of the base rate), got {floor}")
    raise_all(problems, ConfigError, "warmup_schedule cannot be made")
    # a plain function: LambdaLR leaves functions out of its state, which therefore stays loadable with weights_only
    return LambdaLR(optimizer, lr_lambda=_factor(total, warmup, decay, power, floor))


def _factor(total: int, warmup: int, decay: str, power: float, floor: float) -> Callable[[int], float]:
    def factor(it: int) -> float:
        if it < warmup:
            return (it + 1) / warmup
        done = it - warmup
        if decay == "poly":
            shape = max(0.0, 1 - done / total) ** power
        elif decay == "cosine":
            shape = (1 + math.cos(math.pi * min(1.0, done / (total - warmup)))) / 2
        else:
            shape = 1.0
        return floor + (1 - floor) * shape

    return factor
