"""Files of trained networks: adapters that explain themselves, full models, and how to load whichever there is.

An adapter is a folder with ``adapter.safetensors`` (the tensors a strategy owns, buffers included) and ``card.json``
(what they belong to). A model is one file with a bare, full state dict, as MONAI bundles keep in ``models/model.pt``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from samseg_monai import __version__
from samseg_monai.choices import Spacing
from samseg_monai.data.datalists import case_hash
from samseg_monai.errors import FEW_TENSORS, CheckpointError, WeightsError, raise_all
from samseg_monai.files import StrPath, hash_file, read_json, write_json, write_tensors, write_whole
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.networks.common import tensor_differences
from samseg_monai.networks.compute import hold_updates
from samseg_monai.networks.foreign import load_foreign
from samseg_monai.networks.peft import is_peft, load_peft
from samseg_monai.networks.scans import TOGETHER
from samseg_monai.sam.weights import KNOWN, RANDOM, find_weights, name_of, sha256_of
from samseg_monai.sam.weights.load import copy_tensors
from samseg_monai.sam.weights.read import is_plain, read_content
from samseg_monai.settings import problems_of
from samseg_monai.training.owned import owned_state

FORMAT_VERSION = 1
TENSORS, CARD = "adapter.safetensors", "card.json"
UNFIT = "does not fit this network"
BASE = "base_weights.json"  # in the folder of a run, which stays on its machine: the path of SAM's weights
STAGED_CARD = ".card.json.tmp"  # a card whose tensors are about to be moved

Network = SamSegmenter | PlainSegmenter

BOX_FACTS = ("boxes", "crop_margin", "crop_size")  # of a network without SAM that takes boxes
OF_NETWORK = ("base_sha256", "num_classes", "image_size", "scans", "scan_mode", "input_scale", "prompt")
# What must be equal for an adapter to mean anything in another network.
MUST_AGREE = ("strategy", "sam_variant", *OF_NETWORK, *BOX_FACTS)


def card_facts(network: Any) -> dict[str, Any]:
    """What must agree, as JSON values, and what describes it.

    ``base_file`` is the name (no folder) of the base weights' file, ``scan_names`` and ``cases`` as of ``Segmenter``.
    None stands for what a network that is no segmenter of ours does not have.
    """
    strategy = getattr(network, "strategy", None)
    return {
        "strategy": None if strategy is None else strategy.card(),
        "sam_variant": getattr(getattr(network, "spec", None), "name", None),
        **{key: getattr(network, key, None) for key in OF_NETWORK},
        **(network.box_facts() if isinstance(network, PlainSegmenter) else {}),
        **{key: value for key in ("scan_names", "cases") if (value := getattr(network, key, None)) is not None},
        "base_file": getattr(network, "base_file", None),
    }


def card_differences(card: Mapping[str, Any], network: Network) -> list[str]:
    """One line for each fact that is not equal; arguments of the strategy that only training reads are left out."""
    ignored = () if network.strategy is None else network.strategy.training_only
    facts = card_facts(network)
    theirs, ours = _flat(card, ignored), _flat(facts, ignored)
    if _each_alone(card) and _each_alone(facts):  # how scans are put together, and which, is no matter of the weights
        theirs["scan_mode"] = ours["scan_mode"]
        theirs["scans"] = ours["scans"] if _among(card, network) else theirs["scans"]
    return [
        f"{key}: adapter {theirs.get(key)!r}, network {ours.get(key)!r}"
        + (_other_base(card, facts) if key == "base_sha256" else "")
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    ] + scan_differences(card, network)


def scan_differences(card: Mapping[str, Any], network: Any) -> list[str]:
    """A line where the network's scans are others, by name, than those of the card; older cards name none."""
    theirs, ours = card.get("scan_names"), getattr(network, "scan_names", None)
    if theirs is None or ours is None or theirs == ours:
        return []
    if _each_alone(card) and getattr(network, "scan_mode", None) in TOGETHER and _among(card, network):
        return []
    return [f"scans: adapter of {', '.join(theirs)}, network of {', '.join(ours)}"]


def _each_alone(facts: Mapping[str, Any]) -> bool:
    """Whether each scan goes through the network by itself."""
    return isinstance(mode := facts.get("scan_mode"), str) and mode in TOGETHER


def _among(card: Mapping[str, Any], network: Any) -> bool:
    """Whether a network's scans are some of those that an adapter was trained on."""
    ours, theirs, count = getattr(network, "scan_names", None), card.get("scan_names"), card.get("scans")
    if not ours or not theirs or not _texts(theirs) or type(count) is not int or count != len(theirs):
        return False
    return set(ours) <= set(theirs)


def _flat(facts: Mapping[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
    """The facts that must agree, with one entry per argument of the strategy."""
    flat = {key: facts.get(key) for key in MUST_AGREE if key != "strategy"}
    strategy = facts.get("strategy")
    strategy = strategy if isinstance(strategy, Mapping) else {"_target_": strategy}
    arguments = strategy.get("arguments", {})
    arguments = arguments if isinstance(arguments, Mapping) else {"arguments": arguments}
    flat["strategy"] = strategy.get("_target_")
    return flat | {f"strategy {name}": value for name, value in arguments.items() if name not in ignored}


def _other_base(card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Which file the adapter was trained on, and what to do; older cards do not name it."""
    wanted, held = card.get("base_sha256"), facts.get("base_sha256")
    if wanted == RANDOM:
        return "; the adapter was trained on a random start: set sam_checkpoint to 'random'"
    wanted = wanted if isinstance(wanted, str) else None
    file, other = card.get("base_file") or name_of(wanted), facts.get("base_file") or name_of(held)
    trained = f"{file}, the file" if file else "the file"
    instead = f" and not to those of {other}" if other and other != file else ""
    return (
        f"; the adapter holds changes to the weights of {trained} with the first sha256{instead}: set sam_checkpoint "
        "to the path of that file, or train anew on this one"
    )


def save_adapter(
    network: Network,
    folder: StrPath,
    *,
    metrics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write what the strategy owns, and a card that says what it belongs to; returns the folder.

    Each file is written under a temporary name and then moved. The new card is whole before the tensors are moved, and
    ``read_card`` finds it by their hash: whenever the process is killed, there is an adapter with its own card.

    Args:
        network: with base weights loaded and a strategy installed.
        folder: made if absent; other files in it are left alone.
        metrics: JSON values, for example ``{"dice_mean": 0.81}``.
        extra: further JSON values, kept under ``extra``.
    Raises:
        CheckpointError: base weights were never loaded, or the network was merged and has no adapter any more.
    """
    folder, strategy = Path(folder), network.strategy
    if strategy is None:
        raise CheckpointError("adapter: this network was merged and has none; save it with save_model")
    if network.base_sha256 is None:
        raise CheckpointError(
            "adapter: the network's base weights were never loaded, so the adapter would fit nothing; "
            "call load_base() first (load_base('random') for a random start on purpose)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = owned_state(network, network.owned)
    staged = folder / STAGED_CARD

    def write(tensors: Path) -> None:
        save_file(state, tensors, metadata={"format": "pt"})
        card = {
            "format_version": FORMAT_VERSION,
            **card_facts(network),
            "rectangular": isinstance(network, SamSegmenter) and network.sam.rectangular,
            "tensors": len(state),
            "values": sum(tensor.numel() for tensor in state.values()),
            **strategy.facts(network),
            "spacing": getattr(network, "spacing", None),
            "adapter_sha256": hash_file(tensors),
            "package_version": __version__,
            "git_commit": git_commit(),
            "metrics": dict(metrics or {}),
            "extra": dict(extra or {}),
        }
        staged.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    try:
        write_whole(folder / TENSORS, write)
    except Exception:
        staged.unlink(missing_ok=True)
        raise
    os.replace(staged, folder / CARD)
    return folder


def read_card(folder: StrPath) -> dict[str, Any]:
    """The card of an adapter folder.

    Raises:
        CheckpointError: absent, unreadable, of a format that this version does not know, or with values of other types
            than ``save_adapter`` writes, all at once.
    """
    path = _card_path(Path(folder))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; an adapter folder holds {TENSORS} and {CARD}")
    card = read_json(path, CheckpointError, "card")
    if card.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: card format {card.get('format_version')!r}, this version of samseg-monai reads {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    strategy, text = card.get("strategy"), (str, type(None))
    known = {
        "strategy": isinstance(strategy, dict)
        and isinstance(strategy.get("_target_"), str)
        and isinstance(strategy.get("arguments", {}), dict),
        "values": type(card.get("values", 0)) is int,
        "scan_names": _texts(card.get("scan_names")),
        "cases": card.get("cases") is None
        or (isinstance(card["cases"], dict) and all(map(_texts, card["cases"].values()))),
        **{key: isinstance(card.get(key), text) for key in ("base_sha256", "base_file", "adapter_sha256")},
    }
    wrong = [f"{key}: got {card.get(key)!r:.80}" for key, good in known.items() if not good]
    raise_all(wrong, CheckpointError, f"{path}: not what samseg-monai writes; get the file again")
    return card


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def load_adapter(network: Network, folder: StrPath) -> dict[str, Any]:
    """Load an adapter into a network with the same base weights and strategy, and return its card.

    Raises:
        CheckpointError: nothing was changed; all differences between the card and the network, or ten of the tensors'.
    """
    folder = Path(folder)
    card = read_card(folder)
    raise_all(
        card_differences(card, network), CheckpointError, f"{folder}: the adapter does not belong to this network"
    )
    path = folder / TENSORS
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though {CARD} is there; get both files again")
    if hash_file(path) != card.get("adapter_sha256"):
        raise CheckpointError(f"{path}: not the file that {CARD} describes (sha256 differs); get both files again")
    state = _read_state(path)
    mine = network.state_dict()
    expected = {name: mine[name] for name in network.owned}
    raise_all(tensor_differences(state, expected), CheckpointError, f"{path}: {UNFIT}", most=FEW_TENSORS)
    raise_all(_not_finite(state), CheckpointError, f"{path}: {UNFIT}", most=FEW_TENSORS)
    copy_tensors(network, state)  # the names were compared one by one above
    network.fill()
    setattr(network, "spacing", card.get("spacing"))  # noqa: B010 a fact of what was trained, which any card keeps
    network.cases = card.get("cases")
    return card


def spacing_of(checkpoint: StrPath | None, packed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """In-plane spacing that an adapter was trained on, as ``Spacing`` of the settings; None where nobody knows.

    Args:
        checkpoint: as of ``load_trained``; of an adapter's folder the card tells.
        packed: what is true of any other checkpoint, the bundle's own model.
    Raises: CheckpointError: a card that cannot be read, or with another thing for a spacing.
    """
    if checkpoint is None or not (Path(checkpoint).is_dir() and _card_path(Path(checkpoint)).is_file()):
        return None if packed is None else dict(packed)
    spacing = read_card(checkpoint).get("spacing")
    if spacing is not None:
        heading = f"{_card_path(Path(checkpoint))}: no spacing in mm; get the card again"
        raise_all(problems_of(spacing, Spacing, "spacing"), CheckpointError, heading)
    return spacing


def save_model(network: nn.Module, path: StrPath) -> Path:
    """Write the bare, full state dict (plain CPU tensors): safetensors, or for another suffix what ``torch.load`` reads
    with ``weights_only=True``."""
    path = Path(path)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    safe = path.suffix == ".safetensors"
    write_whole(path, lambda to: save_file(state, to, metadata={"format": "pt"}) if safe else write_tensors(to, state))
    return path


def load_model(network: nn.Module, path: StrPath) -> None:
    """Load a full state dict strictly.

    A segmenter remembers the file's hash as its base: what is trained from here on starts from this file.

    Raises:
        CheckpointError: absent, unreadable, or listing missing, unexpected and differently shaped tensors, at most ten.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; train first, or give the model of a run or bundle")
    state = _read_state(path)
    raise_all(tensor_differences(state, network.state_dict()), CheckpointError, f"{path}: {UNFIT}", most=FEW_TENSORS)
    raise_all(_not_finite(state), CheckpointError, f"{path}: {UNFIT}", most=FEW_TENSORS)
    copy_tensors(network, state, lasting=_lasting(path))
    if isinstance(network, (SamSegmenter, PlainSegmenter)):
        network.fill()
        network.base_sha256, network.base_file = sha256_of(path), path.name


def _lasting(path: Path) -> bool:
    """Whether the tensors read from a file stay what they are: nobody may write to it, and none is part of another."""
    return path.suffix == ".safetensors" and not path.stat().st_mode & 0o222


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Tensors with which every prediction would be empty, without a word."""
    floating = {name: value for name, value in state.items() if value.is_floating_point()}
    # a sum takes a fifth of the time, and is finite of no tensor that has something else in it
    wrong = (name for name, value in floating.items() if not value.sum().isfinite() and not value.isfinite().all())
    return [f"{name}: holds values that are not finite" for name in wrong]


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = read_content(path)
    except WeightsError as error:
        raise CheckpointError(f"{path}: cannot be read as a model ({error})") from error
    if not isinstance(state, dict) or not all(map(is_plain, state.values())):
        raise CheckpointError(f"{path}: not a bare state dict of tensors; write it with save_model")
    return state


def load_trained(
    network: Network,
    *,
    checkpoint: StrPath | None = None,
    sam_checkpoint: StrPath | None = None,
    merged: bool = False,
) -> str:
    """Load whatever there is.

    Args:
        checkpoint: an adapter folder, ours or one of peft (base weights are loaded first), a full model file, a file of
            SAMed (base weights first) or SAM-LST, or None: SAM's base weights alone, for a strategy that trains nothing
            (zero-shot).
        sam_checkpoint: base weights as for ``SamSegmenter.load_base``; not needed for a full model. None: of a run, the
            file it was trained with (``remember_base``), if it is there and the same.
        merged: let low-rank updates cost nothing where the network does not learn (``hold_updates``).
    Returns:
        One line saying what was loaded.
    Raises:
        CheckpointError: ``checkpoint`` is given but absent, or does not fit; or it is None and the strategy trains.
        WeightsError: base weights are needed and absent, or the run had others than the official ones, which are not
            downloaded in their place.
    """
    if merged:
        hold_updates(network, int8=isinstance(network, SamSegmenter) and network.compute.int8)
    if checkpoint is None:
        if network.owned:
            # base weights with an untrained adapter score like zero-shot, and nobody would notice
            raise CheckpointError(
                f"nothing trained was found for {type(network.strategy).__name__}: no {TENSORS} in output_dir and no "
                "models/model.safetensors or model.pt in the bundle; train first, or set checkpoint"
            )
        network.load_base(sam_checkpoint)
        return f"SAM {network.spec.name} base weights only (zero-shot)"
    path = Path(checkpoint)
    if path.is_dir() and _card_path(path).is_file():
        card = read_card(path)
        if sam_checkpoint is None and isinstance(network, SamSegmenter):
            sam_checkpoint = _base_of(path, card, network.spec.name)
        network.load_base(sam_checkpoint, start=False)
        load_adapter(network, path)
        return f"adapter {path} ({card['strategy']['_target_']}, {card['values']:,} values) on SAM {network.spec.name}"
    if is_peft(path):
        return load_peft(network, path, sam_checkpoint)
    if path.is_file():
        if loaded := load_foreign(network, path, sam_checkpoint):
            return loaded
        card = _card_beside(path)
        raise_all(scan_differences(card, network), CheckpointError, f"{path}: does not belong to this network")
        load_model(network, path)
        network.cases = card.get("cases")
        return f"full model {path}"
    raise CheckpointError(
        f"checkpoint {path}: {'no ' + CARD + ' in this folder' if path.is_dir() else 'no such file or folder'}; give "
        f"(1) a folder with {TENSORS} and {CARD}, or of peft, (2) a model.pt written by training or a file of SAMed or "
        "SAM-LST, or (3) null for SAM as it is"
    )


def seen_cases(network: Any, cases: Iterable[str]) -> dict[str, list[str]]:
    """Those of ``cases`` that a network was trained on, or its epoch chosen by: "training" or "validation" -> names."""
    names = list(cases)
    known = {section: set(hashes or ()) for section, hashes in (getattr(network, "cases", None) or {}).items()}
    seen = {section: [name for name in names if case_hash(name) in hashes] for section, hashes in known.items()}
    return {section: found for section, found in seen.items() if found}


def _card_beside(model: Path) -> dict[str, Any]:
    """Card in the folder of a full model, as a packed bundle has it; empty without a readable one."""
    with suppress(CheckpointError):
        return read_card(model.parent)
    return {}


def remember_base(folder: StrPath, sam_checkpoint: StrPath) -> None:
    """Write into the folder of a run where the SAM weights lie that it is given, so that nobody has to say it again.

    Their hash is in the card of the adapter. Nothing that is packed or published has this path.
    """
    path = Path(sam_checkpoint).expanduser().absolute()
    write_json(Path(folder) / BASE, {"path": str(path)})


def _base_of(folder: Path, card: Mapping[str, Any], variant: str) -> str | None:
    """The weights that a run's adapter was trained on; None: those of the variant's name.

    Raises: WeightsError where they are lost, and others would be downloaded.
    """
    wanted = card.get("base_sha256")
    if not isinstance(wanted, str) or wanted == RANDOM:
        return None
    known = None
    if (folder / BASE).is_file():
        known = read_json(folder / BASE, CheckpointError, "record of SAM's weights").get("path")
        with suppress(WeightsError, OSError, ValueError):  # moved, or never a path
            path = find_weights(variant, str(known), download=False)
            if path.is_file() and sha256_of(path) == wanted:
                return str(path)
    if variant not in KNOWN or KNOWN[variant].sha256 in ("", wanted):
        return None
    file = known if isinstance(known, str) else card.get("base_file") or "a file of its own"
    raise WeightsError(
        f"this run was trained with {file} (sha256 {wanted}), which is not where it was, and is not the published "
        f"{KNOWN[variant].name}: give that file as sam_checkpoint (--sam-checkpoint FILE of samseg)"
    )


@functools.cache  # the code that runs was read when the process began
def git_commit(*, changes: bool = False) -> str | None:
    """Commit of the checkout this package runs from; None when it was installed or git is absent.

    Args:
        changes: add ``+changes`` where the checkout is not clean.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a package in site-packages must not report the commit of its surroundings
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", *["--dirty=+changes"][: int(changes)]]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _card_path(folder: Path) -> Path:
    """The card of the tensors in ``folder``: the one still to be moved, if a save was killed halfway."""
    staged = folder / STAGED_CARD
    with suppress(CheckpointError, OSError):  # none, or its tensors were not moved
        if read_json(staged, CheckpointError, "card").get("adapter_sha256") == hash_file(folder / TENSORS):
            return staged
    return folder / CARD
