"""Load base weights into SAM: position tables fitted to the image size, everything that does not fit named.

Position tables are interpolated as SAMed (Zhang & Liu 2023, arXiv:2304.13785) and SAM-LST (Chai et al. 2023) publish
it, but the image encoder says which tables these are, not digits in their names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai.errors import FEW_TENSORS, WeightsError, in_turn, raise_all
from samseg_monai.sam.backbone import Backbone
from samseg_monai.sam.build import SamModel, build_sam
from samseg_monai.sam.weights.find import RANDOM, sha256_of
from samseg_monai.sam.weights.read import is_h_sam, is_sam_lst, is_samed, looks_like, read_state

logger = logging.getLogger(__name__)

ENCODER = "image_encoder."
# Tensors whose shape or number follows the number of masks; SAMed starts all of them anew when it differs.
MASK_HEAD = re.compile(r"mask_decoder\.(mask_tokens|output_hypernetworks_mlps|iou_prediction_head)\.")
TOKENS = "mask_decoder.mask_tokens.weight"
HYPER_NETWORK = re.compile(r"(mask_decoder\.output_hypernetworks_mlps\.)(\d+)(\..+)")
ADAPTER = "lora_"
LISTS = ("resized", "skipped", "ignored", "passed_over")  # of a report
FEW = 4  # problems shown of a file for another variant: none of the hundreds tells more than the heading


@dataclass(frozen=True)
class LoadReport:
    """What loading did, by name.

    Args:
        path: file read, or ``"random"``.
        sha256: of the file; None for a random start.
        loaded: number of the network's tensors that now hold the file's values.
        changed: how many of those had other values before; 0 means that the network already held this file.
        resized: position tables that were interpolated to the network's image size.
        skipped: tensors of the mask head left as built because the number of masks differs.
        ignored: adapter tensors, which no base file has.
        passed_over: the file's tensors that the image encoder knows by name and nobody uses (``unused_in_files``).
    """

    path: str
    sha256: str | None
    loaded: int = 0
    changed: int = 0
    resized: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the log."""
        if self.sha256 is None:
            return "random start: no base weights were loaded"
        counts = [f"{len(getattr(self, word))} {word.replace('_', ' ')}" for word in LISTS if getattr(self, word)]
        extra = f" ({', '.join(counts)})" if counts else ""
        return f"{self.path}: {self.loaded} tensors loaded, {self.changed} changed{extra}, sha256 {self.sha256[:12]}"


@dataclass
class _Plan:
    """Decisions taken before the first tensor is touched, so that a refused file leaves the network as it was.

    ``names`` are those of each list of the report, and of the tensors that do not fit, by what is wrong with them.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(
        default_factory=lambda: {word: [] for word in (*LISTS, "shape", "missing", "unexpected")}
    )


def load_sam_weights(
    sam: nn.Module,
    path: str | Path,
    *,
    ignore: Collection[str] = (),
    allow_new_masks: bool = False,
    tile_masks: bool = False,
) -> LoadReport:
    """Copy the weights of a file into a SAM, whatever its image size, or refuse and leave the SAM untouched.

    Position tables that follow the image size are interpolated when the file was made for another. Linear layers may
    have been replaced by adapters that keep ``weight`` and ``bias``.

    Args:
        sam: SAM with SAM's own names; device and dtype of its tensors are kept.
        path: weights file, or ``"random"``: nothing is read and the network stays as built.
        ignore: names that a base file cannot have (adapter tensors); names with ``lora_`` always count as such. A
            leading ``sam.`` is dropped. Names that plain SAM has too (a trained decoder) are required all the same.
        allow_new_masks: True leaves the mask head (tokens, hyper-networks, IoU head) as built when the file was made
            for another number of masks, and names it in ``skipped``.
        tile_masks: with a new mask head, mask ``i`` takes token and hyper-network of the file's mask ``i % n`` (the IoU
            head stays as built). Equal starts part as soon as each learns its own class.

    Raises: WeightsError if the file is unreadable (see :func:`read_state`), is a trained network of SAMed or SAM-LST,
        fits nowhere, or has missing, unexpected or differently shaped tensors: ten are listed with both shapes, and how
        many there are of each kind; of a file that was made for another variant four.
    """
    if str(path) == RANDOM:
        logger.warning("SAM starts from random weights, as asked")
        return LoadReport(RANDOM, None)
    state = read_state(path)
    _refuse_trained(path, state)
    owned = {name.removeprefix("sam.") for name in ignore}
    plan = _plan(sam, state, owned=owned - plain_names(sam), new_masks=allow_new_masks, tile=tile_masks)
    _refuse(plan, sam, state, path)
    changed = copy_tensors(sam, plan.values)
    lists = {word: tuple(plan.names[word]) for word in LISTS}
    report = LoadReport(str(path), sha256_of(path), loaded=len(plan.values), changed=changed, **lists)
    if skipped := lists["skipped"]:
        modules = dict.fromkeys(".".join(name.split(".")[:2]) for name in skipped)
        logger.warning("%s: skipped: %d tensors of %s", path, len(skipped), ", ".join(modules))
    logger.info(report.summary())
    return report


def resize_table(table: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Position table in another size, bilinear: absolute (1, h, w, C) to (1, h', w', C), relative (n, C) to (n', C)."""
    if table.ndim == 4:
        image = table.permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
        return F.interpolate(image, list(shape[1:3]), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    size = (shape[0], table.shape[1])
    return F.interpolate(table[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _plan(sam: nn.Module, state: Mapping[str, torch.Tensor], *, owned: set[str], new_masks: bool, tile: bool) -> _Plan:
    targets = sam.state_dict()
    encoder = getattr(sam, "image_encoder", None)
    known = encoder if isinstance(encoder, Backbone) else None  # segment_anything's own SAM says nothing of itself
    tables = set() if known is None else {ENCODER + name for name in known.sized_tables()}
    unused = set() if known is None else {ENCODER + name for name in known.unused_in_files}
    new_head = new_masks and TOKENS in state and TOKENS in targets and state[TOKENS].shape != targets[TOKENS].shape
    plan = _Plan()
    for name, target in targets.items():
        if new_head and MASK_HEAD.match(name):
            value = _tiled(state, name, len(targets[TOKENS])) if tile else None
            if value is None or value.shape != target.shape:
                plan.names["skipped"].append(name)
            else:
                plan.values[name] = value
        elif name not in state:
            plan.names["ignored" if name in owned or ADAPTER in name else "missing"].append(name)
        elif state[name].shape == target.shape:
            plan.values[name] = state[name]
        elif name in tables and state[name].shape[-1] == target.shape[-1] and state[name].ndim == target.ndim:
            plan.values[name] = resize_table(state[name], target.shape)
            plan.names["resized"].append(name)
        else:
            plan.names["shape"].append(name)
    for name in state:
        if name in unused:
            plan.names["passed_over"].append(name)
        elif name not in targets:
            plan.names["skipped" if new_head and MASK_HEAD.match(name) else "unexpected"].append(name)
    return plan


def _tiled(state: Mapping[str, torch.Tensor], name: str, wanted: int) -> torch.Tensor | None:
    """Value of a mask token table or hyper-network for ``wanted`` masks from a file with fewer or more; None of others.

    Mask i takes what the file has for mask ``i % n``.
    """
    have = len(state[TOKENS])
    if name == TOKENS:
        return state[TOKENS][torch.arange(wanted) % have]
    match = HYPER_NETWORK.match(name)
    return None if match is None else state.get(f"{match[1]}{int(match[2]) % have}{match[3]}")


def plain_names(sam: nn.Module) -> set[str]:
    """Names that this SAM had before any adapter: a strategy may own some, but a base file must have them."""
    if not isinstance(sam, SamModel):
        return set()
    with torch.device("meta"):  # names only, no memory
        plain = build_sam(sam.spec, image_size=sam.image_size, num_masks=sam.mask_decoder.num_multimask_outputs)
    return set(plain.state_dict())


def _refuse_trained(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError if the file is what another project's training wrote, not a SAM to start from."""
    if is_samed(state):
        raise WeightsError(
            f"{path} is {'an H-SAM' if is_h_sam(state) else 'a SAMed'} file: {len(state)} tensors of LoRA adapters "
            "(w_a_000 ...) and decoder without SAM's image encoder. Give the SAM file it was trained on as "
            "sam_checkpoint, and this one as checkpoint"
        )
    if is_sam_lst(state):
        raise WeightsError(
            f"{path} is a SAM-LST file: a trained SAM with the ResNet beside it (CNN_encoder). Give it as checkpoint "
            "of a network with the strategy Ladder(mix='gate', decoder='upscaling')"
        )


def _refuse(plan: _Plan, sam: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    targets, words = sam.state_dict(), ("shape", "missing", "unexpected")
    kinds = ([f"{word}: {name}: {_shapes(name, state, targets)}" for name in plan.names[word]] for word in words)
    problems = in_turn(*kinds)
    other = looks_like(state, targets)
    hint = ""  # the likely reason, so that nobody has to read two hundred shapes to find it
    if other:
        hint = f"; it looks like a file for {other}"
    elif plan.names["shape"] and all(MASK_HEAD.match(name) for name in plan.names["shape"]):
        hint = "; it was made for another number of masks: pass allow_new_masks=True to start the mask head anew"
    counts = ", ".join(f"{len(plan.names[word])} {word}" for word in words if plan.names[word])
    heading = f"{path} does not fit this SAM ({counts} of {len(targets)} tensors){hint}"
    raise_all(problems, WeightsError, heading, most=FEW if other else FEW_TENSORS)


def _shapes(name: str, state: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> str:
    file, network = (str(tuple(held[name].shape)) if name in held else "has none" for held in (state, targets))
    return f"file {file}, network {network}"


@torch.no_grad()
def copy_tensors(network: nn.Module, values: Mapping[str, torch.Tensor], *, lasting: bool = False) -> int:
    """Copy ``values`` into the tensors of these names; returns how many had other values before.

    Tensors that the network was built without (on the device "meta") become copies of ``values``.

    Args:
        lasting: nothing else will ever write to ``values``: where the network has no tensor of its own, they are used
            as they are, on the disk perhaps, without a copy.
    """
    targets = network.state_dict()  # shares storage with the network
    changed, new = 0, {}
    for name, value in values.items():
        target = targets[name]
        if target.is_meta:
            value = value.to(target.dtype)
            as_it_is = lasting and value.is_contiguous()
            new[name] = value if as_it_is else value.clone(memory_format=torch.contiguous_format)
            changed += 1
            continue
        value = value.to(target)
        changed += not torch.equal(target, value)
        target.copy_(value)
    if new:
        network.load_state_dict(new, strict=False, assign=True)
    return changed
