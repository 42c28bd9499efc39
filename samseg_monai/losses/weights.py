"""How much each class counts in a loss, given by the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samseg_monai.errors import ConfigError, raise_all

BACKGROUND = "background"


def class_weights(weights: Mapping[str, float] | str | None, classes: Sequence[str]) -> Tensor | None:
    """Weights for MONAI's losses: only their ratios matter, and who is not named has weight 1.

    Args:
        weights: name -> positive number, as ``{"gallbladder": 3}``, or the same as a text for command lines,
            ``"gallbladder=3,pancreas=2"``; "background" may be among the names. None or empty: no weights.
        classes: names of the classes in the order of the network's channels, without the background.
    Returns: None without weights. For several classes float32 (K + 1,), background first, with mean 1: the balance
        between Dice and cross-entropy stays as it is. For a single class float32 (1,): its weight divided by the
        background's.
    Raises: ConfigError listing every unknown name, with the classes there are, and every weight that is no positive
        number.
    """
    table = _table(weights)
    if not table:
        return None
    names = [BACKGROUND, *classes]
    known = ", ".join(names)
    problems = [f"{name}: no such class; there are {known}" for name in table if name not in names]
    odd = {name: weight for name, weight in table.items() if not _valid(weight)}
    problems += [f"{name}: the weight must be a positive number, got {weight!r}" for name, weight in odd.items()]
    raise_all(problems, ConfigError, "class weights cannot be used")
    found = torch.tensor([float(table.get(name, 1.0)) for name in names])
    return found / found.mean() if len(classes) > 1 else found[1:] / found[0]


def _table(weights: Mapping[str, float] | str | None) -> dict[str, Any]:
    if not isinstance(weights, str):
        if weights is not None and not isinstance(weights, Mapping):
            raise ConfigError(f'class weights are {{"gallbladder": 3}} or "gallbladder=3,pancreas=2", got {weights!r}')
        return dict(weights or {})
    pairs = [part.partition("=") for part in weights.split(",")] if weights.strip() else []
    table = {name.strip(): _number(value.strip()) for name, _, value in pairs}
    if len(table) != len(pairs):
        raise ConfigError(f"class weights name a class twice: {weights!r}")
    return table


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _valid(weight: Any) -> bool:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    return number and math.isfinite(weight) and weight > 0
