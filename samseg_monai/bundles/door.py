"""The one door for bundles: what a sender wrote is read as data, and what runs is built by this package.

MONAI evaluates what it finds in a config, so no config from elsewhere is handed to it. Of a bundle its settings, its
card and its weights are read, each through a check of its own; the configs are written anew from the settings into a
scratch folder, and run there. ``trust`` runs the sender's own JSON.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ComponentLocator, ConfigParser

from samseg_monai import __version__
from samseg_monai.bundles.archive import Archive, BundleFiles, open_files
from samseg_monai.bundles.build import SETTINGS as FILE
from samseg_monai.bundles.build import write_bundle
from samseg_monai.bundles.old import VERSION, old_settings
from samseg_monai.bundles.pickles import pickle_problems
from samseg_monai.bundles.record import NAME, PARTS, RECORD
from samseg_monai.bundles.tensors import WithoutValues, described_tensors
from samseg_monai.checkpoints import CARD, STAGED_CARD, TENSORS, Network
from samseg_monai.choices import Compute
from samseg_monai.errors import BundleError, CheckpointError, ConfigError, SamsegError, own_cause, raise_all, visible
from samseg_monai.files import foreign_problems, read_json
from samseg_monai.networks.common import tensor_differences
from samseg_monai.sam.weights import is_sam_lst, is_samed
from samseg_monai.settings import NOTHING, BundleSettings, read_settings

SETTINGS = f"configs/{FILE}"
WEIGHTS = ("models/model.safetensors", "models/model.pt")
MOST = 20  # edits that are told
MOST_VALUES = 800_000_000  # of a network whose weights do not tell its size: SAM's largest has 641 million
_LOCATOR = ComponentLocator()  # looks through all of MONAI, once for all configs
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A bundle that can be run.

    Args:
        root: its folder, whose configs this package has written (with ``trust``: the sender's).
        name: of the bundle.
        settings: what it was made from; None with ``trust``.
        checkpoint: its weights, or the folder of a run with an adapter; None where nothing was trained.
        card: what the bundle says of its weights, unchecked; empty where it says nothing.
        edited: configs that are not what the package writes from the settings, by key; they were not used.
    """

    root: Path
    name: str
    settings: BundleSettings | None
    checkpoint: Path | None
    card: dict[str, Any] = field(default_factory=dict)
    edited: tuple[str, ...] = ()

    def config(self, name: str) -> Path:
        """Path of a config file; there need not be one."""
        return self.root / "configs" / f"{name}.json"

    @property
    def prompted(self) -> bool:
        """Whether it takes boxes or masks. Raises BundleError where its inference.json cannot be read."""
        if self.settings is not None:
            return self.settings.run.prompt.source != "none"
        prompt = read_json(self.config("inference"), BundleError, "config").get("prompt", {})
        if not isinstance(prompt, dict):
            raise BundleError(
                f"{self.config('inference')}: expected an object under 'prompt'; ask for the bundle again"
            )
        return prompt.get("source") != "none"

    def parser(self, name: str = "inference") -> ConfigParser:
        """One of its configs, not yet evaluated."""
        parser = ConfigParser()
        parser.locator = _LOCATOR
        parser.read_config(str(self.config(name)))
        return parser

    def int8(self) -> dict[str, Any]:
        """What its configs have to be overridden by for 8-bit numbers. Raises BundleError where they know none."""
        if "compute" not in self.parser().get():
            why = "its network has no image encoder of SAM" if self.settings else "its own JSON knows none; no --trust"
            raise BundleError(f"{self.name}: cannot compute with int8: {why}")
        return {"compute::int8": True}

    def network(self) -> Network:
        """Its network with random weights."""
        with own_errors():
            network: Network = self.parser().get_parsed_content("network_def")
        return network

    def check(self) -> None:
        """Compare the network with the weights before either takes memory; to be called before they are used.

        A sender's own JSON (``trust``) is not checked.

        Raises:
            BundleError: MONAI refuses its arguments, or it is larger than any network; the weights are no tensors.
            CheckpointError: the weights are not those of this network; all differences.
        """
        if self.settings is None:
            return
        with torch.random.fork_rng(devices=()), WithoutValues():
            try:
                network = self.network()
            except SamsegError:
                raise
            except Exception as error:
                reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
                raise BundleError(f"{self.name}: no network can be built from its settings: {reason[-1]}") from error
        expected = network.state_dict()
        if self.checkpoint is not None and self.checkpoint.is_file():
            found = described_tensors(self.checkpoint)
            if not is_samed(found) and not is_sam_lst(found):  # these are compared when they are loaded
                heading = f"{self.name}: {self.checkpoint.name} does not fit this network"
                raise_all(tensor_differences(found, expected), CheckpointError, heading)
                return
        values = sum(tensor.numel() for tensor in expected.values())
        if values > MOST_VALUES:
            raise BundleError(f"{self.name}: a network of {values:,} values, expected at most {MOST_VALUES:,}")


@contextmanager
def open_bundle(path: str | Path, *, trust: bool = False) -> Iterator[Opened]:
    """Open a bundle for as long as it is in use.

    Args:
        path: folder or ZIP of a bundle, or ``output_dir`` of a run.
        trust: run the JSON of the bundle itself, which can do whatever its maker likes.

    Raises:
        BundleError: it is no bundle, is not what was packed, leads out of its folder, or holds weights that are more
            than tensors; all problems at once.
        ConfigError: its settings are not ones; all problems at once.
    """
    path = Path(path)
    run = path if (path / RECORD).is_dir() else None
    if run is not None:
        raise_all(foreign_problems(run, (RECORD, TENSORS, CARD, STAGED_CARD)), BundleError, f"{run}: do not use it")
    files = open_files(path / RECORD if run else path)
    try:
        if isinstance(files, Archive) or not trust:
            raise_all(files.problems, BundleError, f"{files.place} is not what it shows; do not use it")
        with tempfile.TemporaryDirectory(prefix="samseg-") as scratch:
            if isinstance(files, Archive) and not trust and (weights := _weights(files)):
                files.hold(weights, Path(scratch) / "held")
            raise_all(files.changed(), BundleError, f"{files.place}: not the bundle that was packed; ask for it again")
            opened = _trusted(files, Path(scratch)) if trust else _rebuilt(files, Path(scratch))
            if run is not None:
                opened = replace(opened, checkpoint=run if (run / TENSORS).is_file() else opened.checkpoint)
            yield opened
    finally:
        files.close()


def _weights(files: BundleFiles) -> str | None:
    """The file of its weights."""
    return next((name for name in WEIGHTS if name in files.sizes), None)


def _trusted(files: BundleFiles, scratch: Path) -> Opened:
    LOG.warning("--trust: the JSON of %s itself is run, which can do whatever its maker likes", files.place)
    root = files.unpack(scratch / "bundle") if isinstance(files, Archive) else files.place.absolute()
    weights = _weights(files)
    return Opened(root, name_of(files), None, None if weights is None else root / weights, _card(files))


def _rebuilt(files: BundleFiles, scratch: Path) -> Opened:
    settings = settings_of(files)
    root = write_bundle(settings, scratch / settings.name)
    edited: list[str] = []
    if SETTINGS not in files.sizes:
        LOG.warning("%s has no settings.json (samseg-monai %s wrote none): its configs tell them", files.place, VERSION)
    elif settings.engine != __version__:
        LOG.warning("%s is from samseg-monai %s; %s builds its configs anew", files.place, settings.engine, __version__)
    else:
        built = {path.relative_to(root).as_posix() for path in (root / "configs").iterdir()} - {SETTINGS}
        edited = [line for name in sorted(built & files.sizes.keys()) for line in differences(files, root, name)]
    if edited:
        LOG.warning(
            "%s: edits of its configs are not used (--trust uses them):\n%s", files.place, "\n".join(edited[:MOST])
        )
    name = _weights(files)
    weights = None if name is None else files.bring(name, root)
    if weights is not None and weights.suffix == ".pt":
        with weights.open("rb") as stream:
            problems = [f"{weights.name}: {problem}" for problem in pickle_problems(stream)]
        raise_all(problems, BundleError, f"{files.place}: its weights are more than tensors, and could run code")
    own = {"num_workers": 0, "compute": Compute()}  # for the receiver's machine to say
    run = settings.run.model_copy(update=own)
    if run != settings.run:
        write_bundle(settings.model_copy(update={"run": run}), root)
    return Opened(root, settings.name, settings, weights, _card(files), tuple(edited))


def settings_of(files: BundleFiles) -> BundleSettings:
    """Settings of a bundle, checked; of one that has none, those that its configs tell.

    Raises:
        BundleError: there are no configs, or they hold what settings cannot tell.
        ConfigError: the settings are not ones; all problems at once.
    """
    if SETTINGS in files.sizes:
        try:
            return read_settings(files.json(SETTINGS), f"{files.place}: {SETTINGS}")
        except ConfigError as error:
            engine = engine_of(files)
            if engine == __version__:
                raise
            raise ConfigError(
                f"{error}\nIt says that samseg-monai {engine} made it, this is {__version__}: use that"
            ) from error
    if PARTS in files.sizes:
        parts = visible(", ".join(map(str, files.json(PARTS).get("parts", ()))), 500)
        raise BundleError(
            f"{files.place}: has parts of its own ({parts}), which no settings describe; --trust runs what its maker "
            "wrote"
        )
    configs = {n: files.json(f"configs/{n}.json") for n in ("inference", "train", "evaluate", "metadata")
               if f"configs/{n}.json" in files.sizes}  # fmt: skip
    if "inference" not in configs:
        raise BundleError(f"{files.place}: no {SETTINGS} and no configs/inference.json; ask for the bundle again")
    card = files.json("metrics/run_card.json") if "metrics/run_card.json" in files.sizes else {}
    try:
        found = old_settings(name_of(files), configs, configs.pop("metadata", {}), card)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"{files.place}: not the configs of samseg-monai {VERSION}; ask for the bundle again"
        ) from error
    return read_settings(found, f"{files.place}: configs of samseg-monai {VERSION}")


def engine_of(files: BundleFiles) -> str:
    """Version of samseg-monai that a bundle says it was made by."""
    source = next((name for name in (SETTINGS, PARTS) if name in files.sizes), None)
    engine = VERSION if source is None else files.json(source).get("engine", __version__)
    return engine if isinstance(engine, str) and re.fullmatch(r"[0-9][\w.+-]{0,63}", engine) else __version__


def name_of(files: BundleFiles) -> str:
    """Name of a bundle without settings: the recorded one, else that of its folder."""
    name = files.read(NAME, 1000).decode("utf-8", "replace") if NAME in files.sizes else files.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name.strip()).lstrip("_.-")[:64] or "bundle"


def _card(files: BundleFiles) -> dict[str, Any]:
    return files.json(f"models/{CARD}") if f"models/{CARD}" in files.sizes else {}


def differences(files: BundleFiles, root: Path, name: str) -> list[str]:
    """How a file of a bundle differs from the one that this package has built at ``root``; empty for equal bytes."""
    built = (root / name).read_bytes()
    if files.sizes[name] == len(built) and files.read(name, len(built)) == built:
        return []
    if not name.endswith(".json"):
        return [f"{name}: not what the package writes"]
    try:
        theirs = files.json(name)
    except BundleError as error:
        return [visible(" ".join(str(error).split()), 500)]
    changes = list(_changes(json.loads(built), theirs, ""))
    return [visible(f"{name}: {change}") for change in changes] or [f"{name}: the same values, written in another way"]


def _changes(built: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(built, dict) and isinstance(theirs, dict):
        for key in {**built, **theirs}:
            at = f"{where}::{key}" if where else str(key)
            if key not in theirs:
                yield f"{at}: taken out"
            elif key not in built:
                yield f"{at}: added, {_short(theirs[key])}"
            else:
                yield from _changes(built[key], theirs[key], at)
    elif isinstance(built, list) and isinstance(theirs, list) and len(built) == len(theirs):
        for index, pair in enumerate(zip(built, theirs, strict=True)):
            yield from _changes(*pair, f"{where}::{index}")
    elif built != theirs or type(built) is not type(theirs):
        yield f"{where}: {_short(theirs)} in place of {_short(built)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the error of ours behind whatever MONAI has wrapped it in: what a user has to read is its text alone."""
    try:
        yield
    except Exception as error:
        cause = own_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None


def literal(value: Any, *, place: bool = True) -> Any:
    """A text that MONAI would change as an expression that gives it.

    MONAI writes every "#" of a config as "::", evaluates what begins with "$", follows "@" and "%".

    Args:
        value: anything; what is no text stays.
        place: it is a path and never an expression. Else what begins with "$" or "@" is one, and stays.
    """
    if not isinstance(value, str) or not set(value) & set("#$@%") or value == NOTHING:
        return value
    if not place and value.startswith(("$", "@")):
        return value
    return "$'" + "".join(c if c.isalnum() or c in "/. _-" else f"\\U{ord(c):08x}" for c in value) + "'"
