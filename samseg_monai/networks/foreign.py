"""Load what SAMed, SAM-LST and H-SAM wrote after training into a segmenter with the strategy that computes the same.

The correspondence is exact: SAMed's LoRA on q and v (Zhang & Liu 2023, arXiv:2304.13785) has scaling 1, as ``LoRA``
with ``alpha`` equal to ``rank``; SAM-LST (Chai et al. 2023, arXiv:2306.12737) is ``Ladder`` with the gate; H-SAM (Cheng
et al. 2024, arXiv:2403.18271) is such a ``LoRA`` with the decoder "h_sam".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from samseg_monai.adapters.ladder import GatedSide, ResNetSide
from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.errors import FEW_TENSORS, CheckpointError, WeightsError, raise_all
from samseg_monai.networks.common import tensor_differences
from samseg_monai.networks.plain import PlainSegmenter
from samseg_monai.networks.segmenter import SamSegmenter
from samseg_monai.sam.weights import is_sam_lst, is_samed, read_state, sha256_of
from samseg_monai.sam.weights.load import copy_tensors
from samseg_monai.sam.weights.read import from_h_sam, from_sam_lst, is_h_sam, is_samed_s, samed_tensors
from samseg_monai.strategies import FacT, LoRA

logger = logging.getLogger(__name__)

_TOKENS = "mask_decoder.mask_tokens.weight"
_POS_EMBED = "sam.image_encoder.pos_embed"
_PARTS = ("q", "v")
SAMED_HEADS = ("prompt_encoder.", "mask_decoder.")
_USUAL = {"input_scale": "unit", "prompt": "none"}


def load_foreign(
    network: SamSegmenter | PlainSegmenter, path: Path, sam_checkpoint: str | os.PathLike[str] | None
) -> str | None:
    """Load a file of SAMed, H-SAM or SAM-LST and say so in one line; None, and nothing is done, for any other file.

    ``base_sha256`` then is this file's: what is trained from here on starts from it.

    Args:
        network: for SAMed with the strategy LoRA(rank, targets q and v, decoder "samed" or True), for H-SAM with the
            decoder "h_sam", for SAM-LST with Ladder(mix "gate"), and with the file's number of classes. All projects
            show their networks images in [0, 1] without prompts; another ``input_scale`` or ``prompt`` is logged as a
            warning.
        path: existing file.
        sam_checkpoint: for SAMed and H-SAM, the SAM file it was trained on, as for ``SamSegmenter.load_base``.
    Raises:
        CheckpointError: the file does not fit; everything that does not is named, and nothing was changed.
        WeightsError: the base weights of a SAMed or H-SAM file are absent or do not fit.
    """
    try:
        state = read_state(path)
    except WeightsError:  # whoever reads it next says what is wrong with it
        return None
    project = "H-SAM" if is_h_sam(state) else "SAMed" if is_samed(state) else "SAM-LST" if is_sam_lst(state) else None
    if project is None:
        return None
    if not isinstance(network, SamSegmenter):
        raise CheckpointError(f"{path} is a file of {project}, but {type(network).__name__} has no SAM in it")
    heading = f"{path}: this file of {project} does not fit this network"
    if project != "SAM-LST":
        values = samed_values(network, state, heading)
        network.load_base(sam_checkpoint, start=False)
        on, passed_over = f" on SAM {network.spec.name} ({network.base_file})", len(state) - len(values)
    else:
        values, passed_over = _sam_lst_values(network, state, heading)
        on = ""
    copy_tensors(network, values)
    network.fill()
    network.base_sha256, network.base_file = sha256_of(path), path.name
    used = [f"{key} {getattr(network, key)!r}" for key, usual in _USUAL.items() if getattr(network, key) != usual]
    if used:
        logger.warning("%s: %s trains on images in [0, 1] without prompts; here: %s", path, project, ", ".join(used))
    idle = f", {passed_over} of no use passed over" if passed_over else ""
    return f"{project} file {path} ({len(values)} tensors{idle}){on}"


def samed_values(network: SamSegmenter, state: Mapping[str, Tensor], heading: str) -> dict[str, Tensor]:
    """Tensors of a file of SAMed or H-SAM under the network's names: LoRA of q and v, prompt encoder and decoders.

    Args:
        heading: begins the CheckpointError that lists everything of the file that does not fit the network.
    """
    rank = next(
        (len(state[name]) for matrix, _, _, name in samed_tensors(state) if matrix == "a" and state[name].ndim), 0
    )
    second: dict[str, Tensor] | None = None
    decoders: tuple[object, ...] = ("samed", True)
    problems = []
    if is_h_sam(state):
        try:
            state, second, side = from_h_sam(state)
        except WeightsError as error:
            raise CheckpointError(f"{heading}: {error}") from error
        decoders = ("h_sam",)
        if side not in (None, network.image_size):
            problems.append(f"image_size: the file needs {side}, got {network.image_size}")
    problems += _samed_arguments(network, rank, decoders) + _classes(network, state.get(_TOKENS))
    if is_samed_s(state):
        problems.append("it adapts the mask decoder with LoRA, too (SAMed_s); only SAMed's encoder adapters are known")
    raise_all(problems, CheckpointError, heading, most=FEW_TENSORS)
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LoRALinear)]
    named = {f"sam.{name}": value for name, value in state.items() if name.startswith(SAMED_HEADS)}
    own = {name for name in network.state_dict() if name.startswith(tuple(f"sam.{head}" for head in SAMED_HEADS))}
    for matrix, block, part, name in samed_tensors(state):
        if block < len(layers):
            prefix, layer = layers[block]
            named[f"{prefix}.lora_{matrix}.{sorted(layer.lora_a)[part]}"] = state[name]
        else:
            problems.append(
                f"{name}: it adapts {_PARTS[part]} of block {block}, the network adapts {len(layers)} blocks"
            )
    own |= {f"{prefix}.{name}" for prefix, layer in layers for name in layer.lora_names()}
    if second is not None and network.second is not None:
        own |= {f"second.{name}" for name in network.second.state_dict()}
        named |= {f"second.{name}": value for name, value in second.items()}
    rest = [
        name for name in state if not name.startswith(SAMED_HEADS) and name not in {t[3] for t in samed_tensors(state)}
    ]
    problems += [f"{name}: in the file, not in the network" for name in rest]
    return _fitting(network, named, own, problems, heading)


def _samed_arguments(network: SamSegmenter, rank: int, decoders: tuple[object, ...]) -> list[str]:
    """What is to be changed in the strategy, so that it computes what SAMed or H-SAM does."""
    strategy = network.strategy
    if not isinstance(strategy, LoRA) or isinstance(strategy, FacT):
        return [
            f"strategy: the file needs LoRA(rank={rank}, targets=['q', 'v'], decoder={decoders[0]!r}), "
            f"got {type(strategy).__name__}"
        ]
    scaled = strategy.alpha in (None, strategy.rank) and not strategy.rank_stabilised
    needs = {
        f"rank: the file needs rank={rank}, got {strategy.rank}": strategy.rank == rank,
        f"alpha: the file needs a scaling of 1, alpha={rank} or null without rank_stabilised, "
        f"got alpha={strategy.alpha}, rank_stabilised={strategy.rank_stabilised}": scaled,
        f"targets: the file needs ['q', 'v'], got {list(strategy.targets)}": sorted(strategy.targets) == list(_PARTS),
        f"decoder: the file needs {' or '.join(map(repr, decoders))}, got {strategy.decoder!r}": strategy.decoder
        in decoders,
        "dora: the file needs dora=False, got True": not strategy.dora,
    }
    return [problem for problem, fits in needs.items() if not fits]


def _classes(network: SamSegmenter, tokens: Tensor | None) -> list[str]:
    """All projects make one map per class and one of the background, each from a mask token."""
    if tokens is None or not tokens.ndim or network.num_classes == len(tokens) - 1 > 1:
        return []
    if len(tokens) == 2:
        return ["num_classes: the file has maps of one class and the background; such a network has one map here"]
    return [f"num_classes: the file needs {len(tokens) - 1} (and the background), got {network.num_classes}"]


def _sam_lst_values(network: SamSegmenter, state: Mapping[str, Tensor], heading: str) -> tuple[dict[str, Tensor], int]:
    """The file's tensors under the network's names, and how many were passed over."""
    try:
        named, passed_over = from_sam_lst(state)
    except WeightsError as error:
        raise CheckpointError(f"{heading}: {error}") from error
    side = network.side
    problems = _classes(network, named.get(f"sam.{_TOKENS}"))
    if not isinstance(side, GatedSide) or not side.needs_embedding or not isinstance(side.net, ResNetSide):
        got = type(network.strategy).__name__
        problems.append(
            f"strategy: the file needs Ladder(mix='gate', decoder='upscaling') with a ResNetSide, got {got}"
        )
    table, own = named.get(_POS_EMBED), network.state_dict().get(_POS_EMBED)
    if table is not None and own is not None and table.ndim == own.ndim and table.shape[:-1] != own.shape[:-1]:
        size = table.shape[1] * network.spec.patch_size
        problems.append(f"image_size: the file needs {size}, got {network.image_size}")
    raise_all(problems, CheckpointError, heading, most=FEW_TENSORS)
    return _fitting(network, named, set(network.state_dict()), [], heading), len(passed_over)


def _fitting(
    network: SamSegmenter, named: dict[str, Tensor], wanted: set[str], problems: list[str], heading: str
) -> dict[str, Tensor]:
    """``named``, after comparing it with the ``wanted`` tensors of the network."""
    expected = {name: tensor for name, tensor in network.state_dict().items() if name in wanted}
    raise_all([*problems, *tensor_differences(named, expected)], CheckpointError, heading, most=FEW_TENSORS)
    return named
