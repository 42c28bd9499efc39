"""Low-rank updates as Hugging Face's peft stores them for transformers' ``SamModel``: names, settings, reading.

peft adapts a layer as a whole, SAM's layer of query, key and value, too. Updates of rank r to n of its parts are there
one update of rank n r: ``A`` of all parts one below the other, ``B`` of each part in its own rows and columns. On the
way back a part takes the columns of ``B`` that reach its rows; it needs as high a rank as there are of these.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samseg_monai.adapters.lora import DoRALinear, LoRALinear
from samseg_monai.errors import FEW_TENSORS, CheckpointError, raise_all
from samseg_monai.files import read_json
from samseg_monai.networks.segmenter import SamSegmenter
from samseg_monai.sam.weights import read_state
from samseg_monai.sam.weights.load import copy_tensors
from samseg_monai.strategies import FacT, LoRA

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
# what a file computes depends on these; with other values than the first it is no plain low-rank update
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    # the others change the base weights when training begins
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.\\]+")  # of a layer's name or its end, dots escaped or not


@dataclass(frozen=True)
class Update:
    """``scaling * b @ a`` is added to the weight of a linear layer: a (rank, in_features), b (out_features, rank)."""

    a: Tensor
    b: Tensor
    scaling: float


def is_peft(path: Path) -> bool:
    """Whether this is a folder that peft wrote."""
    return path.is_dir() and (path / PEFT_CONFIG).is_file()


def read_peft(folder: Path) -> dict[str, Update]:
    """Updates of a folder that peft wrote, by the names of SAM's layers as segment_anything has them.

    Raises:
        CheckpointError: it holds anything but plain low-rank updates; all that it holds besides.
        WeightsError: the tensors are absent or damaged.
    """
    config = read_json(folder / PEFT_CONFIG, CheckpointError, "settings of peft")
    problems = [
        f"{key}: got {config[key]!r}; only {' or '.join(map(repr, plain))} is a plain low-rank update"
        for key, plain in _PLAIN.items()
        if key in config and not any(type(config[key]) is type(value) and config[key] == value for value in plain)
    ]
    state, updates = read_state(folder / PEFT_TENSORS), {}
    matched = {name: _NAME.fullmatch(name) for name in state}
    problems += [f"{name}: no low-rank update of a linear layer" for name, match in matched.items() if match is None]
    for layer in dict.fromkeys(match[1] for match in matched.values() if match):
        a, b = (state.get(f"{layer}.lora_{which}.weight", torch.empty(0)) for which in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
            problems.append(f"{layer}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} make no update")
            continue
        strength = scaling_of(config, layer, len(a))
        if strength is None:
            problems.append(f"{layer}: lora_alpha and alpha_pattern tell no strength of it")
        else:
            updates[layer] = Update(a, b, strength)
    raise_all(problems, CheckpointError, f"{folder}: this adapter of peft cannot be read", most=FEW_TENSORS)
    return updates


def scaling_of(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """Factor of the update of ``layer`` (segment_anything's name), or None where the settings cannot be read."""
    name, patterns = peft_name(layer), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping) or not all(_PATTERN.fullmatch(str(key)) for key in patterns):
        return None
    alpha = config.get("lora_alpha", 8)  # peft's default
    for key, value in patterns.items():  # the first that fits
        end = key.removeprefix("^").replace("\\", "")
        if name == end or (not key.startswith("^") and name.endswith(f".{end}")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_name(layer: str) -> str:
    """Name in ``SamModel`` of a linear layer of SAM's image encoder blocks or of the mask decoder's attention."""
    return layer.replace("image_encoder.blocks.", "vision_encoder.layers.")


def load_peft(network: nn.Module, folder: Path, sam_checkpoint: str | os.PathLike[str] | None) -> str:
    """Load base weights and an adapter that peft wrote; returns one line that says so.

    Args:
        network: of one class, with LoRA(rank, targets, blocks) that reaches all layers of the file and has at least the
            rank that each of their parts needs; scalings may differ. What the file does not adapt stays SAM's.
        sam_checkpoint: as for ``SamSegmenter.load_base``.
    Raises:
        CheckpointError: the file does not fit; everything that does not is named, and nothing was changed.
        WeightsError: tensors or base weights are absent or do not fit.
    """
    updates, heading = read_peft(folder), f"{folder}: this adapter of peft does not fit this network"
    if not isinstance(network, SamSegmenter):
        raise CheckpointError(f"{heading}: {type(network).__name__} has no SAM in it")
    problems = _argument_problems(network, updates)
    values: dict[str, Tensor] = {}
    if not problems:
        layers = {name: layer for name, layer in network.sam.named_modules() if isinstance(layer, LoRALinear)}
        problems += [f"{name}: in the file, not adapted in the network" for name in updates.keys() - layers.keys()]
        for name, layer in layers.items():
            none = Update(torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0), 1.0)
            found = updates.get(name, none)
            if (found.a.shape[1], found.b.shape[0]) != (layer.in_features, layer.out_features):
                wanted = f"from {layer.in_features} to {layer.out_features} features in the network"
                problems.append(f"{name}: from {found.a.shape[1]} to {found.b.shape[0]} in the file, {wanted}")
                continue
            split, missing = split_update(layer, found)
            values |= {f"sam.{name}.{key}": tensor for key, tensor in split.items()}
            problems += [f"{name}: {problem}" for problem in missing]
    raise_all(problems, CheckpointError, heading, most=FEW_TENSORS)
    network.load_base(sam_checkpoint, start=False)
    copy_tensors(network, values)
    network.fill()
    return f"adapter of peft {folder} ({len(updates)} layers) on SAM {network.spec.name} ({network.base_file})"


def split_update(layer: LoRALinear, update: Update) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of ``layer`` that add ``update`` to its weight, exactly, and what it cannot take in.

    A part gets the columns of B that are not zero in its rows, then those that lie where ``LoRALinear.fused`` puts its
    own, so that what was fused comes back as it was.
    """
    rank, held = layer.rank, update.a.shape[0]
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    factor = update.scaling / layer.scaling
    for part, rows in enumerate(update.b.chunk(layer.num_parts)):
        used = rows.ne(0).any(0).tolist()
        if part not in layer.parts or sum(used) > rank:
            if any(used):
                has = f"rank {rank}" if part in layer.parts else "no update there"
                problems.append(f"part {part} of {layer.num_parts}: rank {sum(used)} in the file, {has} in the network")
            continue
        place = layer.parts.index(part)
        order = sorted(range(held), key=lambda c: (not used[c], not place * rank <= c < (place + 1) * rank, c))
        chosen = sorted(order[:rank])
        a, b = torch.empty(rank, layer.in_features), torch.zeros(len(rows), rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # what is left can still learn
        a[: len(chosen)] = update.a[chosen]
        b[:, : len(chosen)] = rows[:, chosen] * factor
        tensors |= {f"lora_a.{part}": a, f"lora_b.{part}": b}
    return tensors, problems


def _argument_problems(network: SamSegmenter, updates: Mapping[str, Update]) -> list[str]:
    """What is to be changed in the network's arguments, so that it can compute what the file does."""
    problems, strategy = [], network.strategy
    if network.num_classes > 1:
        problems.append(f"num_classes: the file holds no masks of {network.num_classes} classes; it needs 1")
    rank, targets = _needs(network, updates)
    decoder = any(name.startswith("mask_decoder.") for name in updates)
    if not isinstance(strategy, LoRA) or isinstance(strategy, FacT):
        more = ", decoder='lora'" if decoder else ""
        needs = f"LoRA(rank={rank}, targets={targets or ['q', 'v']}{more})"
        return [*problems, f"strategy: the file needs {needs}, got {type(strategy).__name__}"]
    if rank > strategy.rank:
        problems.append(f"rank: the file needs rank={rank}, got {strategy.rank}")
    if missing := [target for target in targets if target not in strategy.targets]:
        problems.append(f"targets: the file adapts {missing}, too; got {list(strategy.targets)}")
    if decoder and strategy.decoder != "lora":
        problems.append(f"decoder: the file needs 'lora', got {strategy.decoder!r}")
    if any(isinstance(layer, DoRALinear) for layer in network.modules()):
        problems.append("dora: the file needs dora=False, got True")
    return problems


def _needs(network: SamSegmenter, updates: Mapping[str, Update]) -> tuple[int, list[str]]:
    """The rank that the file's updates need, and their targets."""
    encoder, ranks = network.sam.image_encoder, [1]
    targets: dict[str, None] = {}
    for path, block in encoder.named_blocks():
        for target, place in encoder.targets(block).items():
            update = updates.get(f"image_encoder.{path}.{place.layer}")
            if update is None or update.b.shape[0] % place.parts:
                continue
            used = int(update.b.chunk(place.parts)[place.part].ne(0).any(0).sum())
            ranks.append(used)
            targets |= {target: None} if used else {}
    ranks += [u.a.shape[0] for name, u in updates.items() if name.startswith("mask_decoder.")]
    return max(ranks), list(targets)
