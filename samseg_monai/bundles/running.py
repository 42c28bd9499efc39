"""What a bundle's config asks while it runs: where it lies, which weights to use, whether it can run as asked."""

from __future__ import annotations

import atexit
import copy
import ctypes
import difflib
import inspect
import logging
import os
import sys
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import Evaluator
from monai.utils import optional_import

from samseg_monai.bundles.build import SETTINGS
from samseg_monai.bundles.memory import saving
from samseg_monai.bundles.tensors import WithoutValues
from samseg_monai.bundles.values import custom_parts, effective_settings, prompt_problems
from samseg_monai.choices import Compute
from samseg_monai.errors import ConfigError, log_visibly, raise_all
from samseg_monai.faults import Told, end_like_ctrl_c, explain, output_problem
from samseg_monai.files import read_json
from samseg_monai.networks.compute import NO_TRAINING, compute_problems
from samseg_monai.sam.weights import RANDOM
from samseg_monai.settings import PLACES, BundleSettings, RunSettings, dump_settings, problems_of, read_settings

logger = logging.getLogger(__name__)
INTERNAL = {"_meta_"}
_OURS, _LOADED = "samseg_monai.networks.SamSegmenter", "$checkpoints.load_trained(@network_def,"
REFUSED = "config: this bundle cannot run as asked"


@dataclass(frozen=True)
class Running:
    """The bundle whose expression is being evaluated: folder of its configs, and the parser of the one that runs."""

    configs: Path
    parser: ConfigParser

    @property
    def config(self) -> dict[str, Any]:
        """The config with its overrides, not evaluated."""
        return dict(self.parser.get())

    @property
    def kind(self) -> str:
        """train, evaluate or inference."""
        return "evaluate" if "results_dir" in self.config else "train" if "train" in self.config else "inference"

    def settings(self) -> BundleSettings | None:
        """The settings the bundle was built from; None for a bundle without them."""
        path = self.configs / SETTINGS
        return read_settings(read_json(path, ConfigError, "settings"), str(path)) if path.is_file() else None


def running(trace: types.TracebackType | None = None) -> Running | None:
    """Find the running bundle. MONAI tells an expression nothing of it, but its workflow is on the call stack.

    ``trace`` finds the one in which an error was raised, which has ended by then.
    """
    for found in _owners(trace):
        if isinstance(found, ConfigWorkflow):
            return Running(Path(found.config_root_path).resolve(), found.parser)
    return None


def bundle_root() -> str:
    """Return the folder of the bundle that is running, from any working directory.

    Outside a workflow (``verify_net_in_out`` and the like parse the config alone) it is the working directory, as in
    MONAI's own bundles.
    """
    found = running()
    if found is None:
        return "."
    return str(found.configs.parent if found.configs.name == "configs" else found.configs)


def find_checkpoint(output_dir: str, root: str) -> str | None:
    """Choose what to evaluate: the adapter just trained in ``output_dir``, else the bundle's own model in ``models``.

    Returns:
        A path, or None where neither exists (zero-shot: the base weights alone).
    """
    if (Path(output_dir) / "adapter.safetensors").is_file():
        return str(output_dir)
    models = (Path(root) / "models" / name for name in ("model.safetensors", "model.pt"))
    return next((str(model) for model in models if model.is_file()), None)


def extra_inputs(**wanted: Any) -> dict[str, str]:
    """Return what MONAI's ``PrepareBatchExtraInput`` hands to the network beside the image: the truthy ``wanted``."""
    return {name: name for name, value in wanted.items() if value}


def in_order(named: dict[str, Any], *more: Any) -> list[Any]:
    """Handlers by name, then further ones; a handler that is switched off is left out."""
    rest = [handler for group in more for handler in (group.values() if isinstance(group, dict) else group)]
    return [handler for handler in (*named.values(), *rest) if handler is not None]


def rank_device() -> torch.device:
    """Return the device of this process of a ``torchrun`` launch: its own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_processes() -> None:
    """Join the process group that ``torchrun`` describes (NCCL with GPUs, gloo without); once is enough."""
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "multi_gpu config: this process was not started by torchrun; use "
            "torchrun --standalone --nproc_per_node=N -m monai.bundle run ..."
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_end_at_once)  # now: what is registered later, such as a writer's last flush, runs before it


def leave_processes() -> None:
    """Leave the process group; call it last in ``finalize``.

    Behind a ``DistributedDataParallel`` gloo's threads outlive that (torch 2.14), and a process that ends normally then
    sometimes aborts ("terminate called without an active exception", pytorch issue 190489), though everything was
    saved. So a process of ``torchrun`` on CPUs ends without C++'s destructors, when Python has done its own work.
    """
    backend = dist.get_backend()
    dist.destroy_process_group()
    if backend == "gloo" and "TORCHELASTIC_RUN_ID" in os.environ:
        _ENDING.append(True)


_ENDING: list[bool] = []  # filled where a process has finished its work


def _end_at_once() -> None:
    if _ENDING:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# by glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, in bytes
MALLOC = {-1: 1 << 30, -2: 1 << 26, -3: 1 << 28}


def guard() -> None:
    """Refuse what cannot run as asked; call it first in ``run``.

    MONAI accepts a misspelt override silently (``--epohcs 7`` trains with the default), and a wrong type ends in a
    traceback somewhere. Also lets our own errors and faults of the machine end the program with their text alone,
    without a traceback, and SIGTERM as Ctrl-C does.

    Raises:
        ConfigError: unknown keys, values of a wrong type or out of range, places and devices that cannot be used,
            folders that nothing can be written to; all are listed.
    """
    sys.excepthook = _plain_errors
    end_like_ctrl_c()
    reuse_memory()
    log_visibly()
    for engine in ("SupervisedTrainer", "SupervisedEvaluator"):
        logging.getLogger(f"ignite.engine.engine.{engine}").addFilter(_no_echo)
    mute_readers()
    # "Engine run resuming from iteration 0" of a fresh run: its terms are not ours, and CurveLog tells the same
    logging.getLogger("ignite.engine.engine").setLevel(logging.WARNING)
    found = running()
    if found is None:
        return
    if found.kind == "evaluate" and "_target_" not in found.config.get("evaluator", {}):
        folder = os.path.relpath(found.configs)
        files = f"['{folder}/inference.json','{folder}/evaluate.json']"
        raise ConfigError(
            f'evaluate.json only changes inference.json; give both, in this order: --config_file "{files}"'
        )
    problems = unknown_keys(found.config, _known(found.configs))
    unknown = {line.split(" (did")[0].partition(": ")[0] for line in problems}
    problems += [line for line in _wrong_values(found) if line.partition(": no such key")[0] not in unknown]
    raise_all(problems + _wrong_places(found) + _wrong_compute(found), ConfigError, REFUSED)
    steps = [str(step) for step in found.config.get("run", ())]
    before = " ".join(steps[: steps.index("$@loaded")]) if "$@loaded" in steps else "@network"
    # an evaluation draws its boxes from the seed that is left when the network has drawn its values
    if found.kind == "inference" and "@network" not in before and "@evaluator" not in before:
        build_bare(found.parser)


def build_bare(parser: ConfigParser) -> None:
    """Build the network of a config without values; ``load_trained`` has to follow before it is used.

    Drawing those of SAM's ViT-B takes as long as three of the slices that it segments at 256 pixels, and the file's
    replace them. What a file leaves out is drawn then (``Segmenter.fill``), with the numbers that it would have had.
    Nothing is done where the network, or how it is loaded, is a user's own.
    """
    config = copy.deepcopy(parser.get())
    definition, loaded = config.get("network_def"), str(config.get("loaded"))
    ours = isinstance(definition, dict) and definition.get("_target_") == _OURS and loaded.startswith(_LOADED)
    if not ours or custom_parts(config):
        return
    state = torch.get_rng_state()
    with WithoutValues():
        network = parser.get_parsed_content("network_def")

    def drawn() -> Any:
        torch.set_rng_state(state)
        return ConfigParser(config).get_parsed_content("network_def")

    network.drawn = drawn


def reuse_memory() -> None:
    """Let glibc keep what is freed for the next step, instead of giving it to Linux and asking for it again.

    Each page that comes back is filled with zeros first: with all memory kept, a step of the ladder at 512 px had 1,500
    faults of pages instead of 50,000 and took a sixth less time, in 4 % more memory. Blocks of 256 MiB, and what lies
    free beyond 1 GiB, are given back as before. Nothing is changed without glibc, nor where the user has chosen for
    himself by ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TOP_PAD_`` or ``GLIBC_TUNABLES``.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in chosen):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC.items():
            mallopt(parameter, value)


def mute_readers() -> None:
    """MONAI's ``LoadImaged`` tries every reader there is, and one that nobody asked for tells each time that its GPU
    codec is absent."""
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")


def configured(configs: Sequence[Path], overrides: Mapping[str, Any]) -> Running:
    """A workflow as it would run: config files, later ones override, with ``overrides``; nothing is evaluated.

    Raises:
        ConfigError: overrides within a group or component that the configs do not have (``promt::source``); all are
            listed. MONAI answers them with a KeyError, before it evaluates anything: ``guard`` never comes to see them.
    """
    parser, known, lost = _overridden(configs, overrides)
    raise_all(lost and lost + unknown_keys(parser.get(), known), ConfigError, REFUSED)
    return Running(configs[0].parent, parser)


def problems_of_overrides(configs: Sequence[Path], overrides: Mapping[str, Any]) -> list[str]:
    """What ``guard`` would say of these overrides, but for places and devices, which may be another machine's."""
    parser, known, lost = _overridden(configs, overrides)
    lost += unknown_keys(parser.get(), known)
    return lost or _wrong_values(Running(configs[0].parent, parser))


def _overridden(
    configs: Sequence[Path], overrides: Mapping[str, Any]
) -> tuple[ConfigParser, dict[str, dict[str, Any]], list[str]]:
    """The configs with the overrides put in, all keys of the bundle, and a line for each that has no place there."""
    parser = ConfigParser(ConfigParser.load_config_files([str(config) for config in configs]))
    known, lost = _known(configs[0].parent), []
    for key, value in overrides.items():
        try:
            parser[key] = value
        except (LookupError, TypeError, ValueError):
            lost.append(_no_such_key(key.replace("#", "::"), known))
    return parser, known, lost


def _known(configs: Path) -> dict[str, dict[str, Any]]:
    """Every id in the configs of a bundle, and the object it is a key of."""
    paths = [path for path in sorted(configs.glob("*.json")) if path.name not in ("metadata.json", SETTINGS)]
    return {key: owner for path in paths for key, owner in _ids(read_json(path, ConfigError, "config")).items()}


def _no_such_key(name: str, known: Mapping[str, Any]) -> str:
    group = name.split("::")[0]
    if group in RunSettings.model_fields and group not in known:
        return f"{name}: no such key (other bundles have {group!r}, this one has no use for it)"
    if name in known:
        return f"{name}: of another config of this bundle; this one has no such key"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name}" + (f" (did you mean {close[0]}?)" if close else "") + ": no such key"


# where the settings of a part lie in the configs
_IN_CONFIG = {"run": "", "task": "", "strategy::method": "strategy::", "strategy::network": "network_def::"}


def _wrong_values(found: Running) -> list[str]:
    """Settings that were overridden by something else than their type and range allow."""
    built = found.settings()
    if built is None:
        return []
    value = effective_settings(found.config, built)
    problems = []
    for line in _all_problems(value, dump_settings(built)):
        part = next((part for part in _IN_CONFIG if line.startswith(f"{part}::")), None)
        line = line if part is None else _IN_CONFIG[part] + line.removeprefix(f"{part}::")
        problems.append(line.replace("strategy::label", "strategy::name"))
    classes = found.config.get("classes")
    if isinstance(classes, list) and (len(classes) > 1) != (len(built.task.classes) > 1):
        problems.append(
            f"classes: got {len(classes)}, but this bundle was built for {len(built.task.classes)}; one class and "
            "several need different bundles: change the task's recipe and build it"
        )
    own = {name.split("::")[0] for name in custom_parts(found.config)}
    return [line for line in problems if line.split("::")[0].split(":")[0] not in own]


def _all_problems(value: dict[str, Any], built: dict[str, Any]) -> list[str]:
    """What is wrong with each setting, and what does not go together among those that are right by themselves."""
    problems = problems_of(value, BundleSettings)
    wrong = {tuple(line.partition(": ")[0].split("::")[:2]) for line in problems}
    if not all(len(key) == 2 and isinstance(value.get(key[0]), dict) and key[1] in built[key[0]] for key in wrong):
        return problems
    for part, key in wrong:
        if part == "task":  # its words follow its classes
            value["task"] = built["task"]
        else:
            value[part][key] = built[part][key]
    return list(dict.fromkeys(problems + problems_of(value, BundleSettings)))


def _wrong_places(found: Running) -> list[str]:
    """Paths and devices that MONAI, the shell or torch would take for something else."""
    problems = []
    for name in PLACES:
        value = found.parser.get(name)
        if isinstance(value, str) and value.startswith("~"):
            problems.append(f"{name}: got {value!r}; '~' is only known to shells: write the folder in full")
        elif isinstance(value, str) and "::" in value and not value.startswith(("$", "@")):
            shown = value.replace("::", "#")
            problems.append(f"{name}: got {shown!r}; MONAI has a meaning of its own for '#' and '::': use another name")
        elif isinstance(value, list) and name == "dataset_dir":
            continue
        elif value is not None and not isinstance(value, str):
            problems.append(f"{name}: got {value!r}, a {type(value).__name__}; a path is text: write ./{value}")
    problems += prompt_problems(found.config, evaluating=found.kind == "evaluate")
    return problems + ([*_absent(found), *_wrong_outputs(found)] if not problems else []) + _wrong_device(found)


def _absent(found: Running) -> list[str]:
    """Data, weights and prompts that are not there; told before anything is loaded."""
    config, problems = found.config, []

    def given(name: str) -> str | None:
        value = found.parser.get(name)
        return value if isinstance(value, str) and value != RANDOM and not value.startswith(("$", "@")) else None

    def absolute(place: str) -> str:
        return "" if Path(place).is_absolute() else f" ({Path(place).absolute()})"

    folder = given("dataset_dir")
    if found.kind != "inference" and folder is not None and not os.path.isdir(folder):
        problems.append(f"dataset_dir: got {folder!r}, which is not a folder{absolute(folder)}; give that of the data")
    elif found.kind != "inference" and (given("datalist") or (folder and config.get("datalist"))):
        listed = found.parser.get_parsed_content("datalist")
        if isinstance(listed, str) and not os.path.isfile(listed):
            where = absolute(listed)
            problems.append(
                f"datalist: got {listed!r}; no such file{where}; 'samseg prepare' or 'samseg phantom' makes one"
            )
    names = ["checkpoint", "boxes", "prompts", "prompt::boxes"] + ["sam_checkpoint"] * (found.kind == "train")
    for name in names:
        if (place := given(name)) is not None and not os.path.exists(os.path.expanduser(place)):
            problems.append(f"{name}: got {place!r}; no such file{absolute(place)}")
    return problems


def _wrong_outputs(found: Running) -> list[str]:
    """Folders that cannot be written to, as is found out now and not when the network has done its work."""
    names = {"train": ["output_dir"], "evaluate": ["results_dir"], "inference": ["predictions_dir"]}[found.kind]
    names += ["predictions_dir"] if found.config.get("save_predictions") else []
    places = {name: found.parser.get_parsed_content(name) for name in names if found.config.get(name)}
    problems = {name: output_problem(place) for name, place in places.items() if isinstance(place, str)}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _wrong_device(found: Running) -> list[str]:
    given = found.config.get("device")
    if isinstance(given, str) and given.startswith(("$", "@")) and not given.startswith("$torch.device('"):
        return []  # the bundle's own choice
    try:
        device: Any = found.parser.get_parsed_content("device")
        kind = torch.device(device).type if isinstance(device, (str, torch.device)) else None
    except RuntimeError as error:
        return [f"device: got {given!r}; {str(error.__cause__ or error).splitlines()[0]}"]
    if kind is None:
        return [f"device: got {given!r}; name one such as cpu, cuda or cuda:1"]
    if kind == "cuda" and not torch.cuda.is_available():
        return [f"device: got {given!r}, but there is no GPU that torch can use here; leave it out, or use cpu"]
    return []


def _wrong_compute(found: Running) -> list[str]:
    """Ways to compute that this machine, the device or a training does not have."""
    given = found.config.get("compute")
    if not isinstance(given, dict) or problems_of(given, Compute) or _wrong_device(found):
        return []  # there are none, or they are told
    compute, device = Compute(**given), found.parser.get_parsed_content("device")
    problems = [NO_TRAINING] if found.kind == "train" and compute.int8 else []
    return problems + compute_problems(
        compute, autocast=found.parser.get_parsed_content("autocast"), device=torch.device(device).type
    )


def _ids(config: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Map every id in ``config`` to the object it is a key of."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(config, dict):
        for key, value in config.items():
            name = f"{prefix}{str(key).lstrip('+').replace('#', '::')}"
            found[name] = config
            found.update(_ids(value, f"{name}::"))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            found.update(_ids(value, f"{prefix}{i}::"))
    return found


def _accepts(owner: dict[str, Any], key: str) -> bool:
    """Tell whether the component described by ``owner`` has an argument ``key``; unknown components pass."""
    target = owner.get("_target_")
    if not isinstance(target, str) or "." not in target:
        return isinstance(target, str)
    module, _, name = target.rpartition(".")
    component, found = optional_import(module, name=name)
    if not found:
        return True
    parameters = inspect.signature(component).parameters
    return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def unknown_keys(config: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Describe each id of ``config`` that is not in ``known`` and is no argument of the component it was given to."""
    problems = []
    for name, owner in _ids(config).items():
        key = name.rpartition("::")[2]
        if (
            name in known
            or name.split("::")[0] in INTERNAL
            or key.startswith("_")
            or ("_target_" in owner and _accepts(owner, key))
        ):
            continue
        parent = name.rpartition("::")[0]
        if parent and (parent not in known or known[parent].get(parent.rpartition("::")[2], "") is None):
            continue  # its parent is reported, is a component given whole, or a mapping in place of null
        problems.append(_no_such_key(name, known))
    return problems


def _plain_errors(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """End the program with the text of an error that a person can act on; leave others as they are."""
    told = explain_run(error)
    if told is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"{told.text}\n")
        if told.code != 1:  # with which Python ends after this hook
            raise SystemExit(told.code)


def _no_echo(record: logging.LogRecord) -> bool:
    """Keep ignite from telling an error, once for each of its loops, that is told at the end of the program."""
    return "run is terminating due to exception" not in str(record.msg)


def explain_run(error: BaseException) -> Told | None:
    """``faults.explain`` of an error that ended a workflow of MONAI, with the keys of its bundle that would help."""
    found = running(error.__traceback__)
    if found is None:
        return explain(error)
    resumable = found.kind == "train" and "resume" in found.config
    validating = found.kind == "train" and any(isinstance(item, Evaluator) for item in _owners(error.__traceback__))
    return explain(error, resumable=resumable, memory=partial(saving, found, validating=validating))


def _owners(trace: types.TracebackType | None) -> list[Any]:
    """Objects whose methods were running when an error was raised, the innermost first."""
    frames = traceback.walk_stack(inspect.currentframe()) if trace is None else reversed([*traceback.walk_tb(trace)])
    return [frame.f_locals.get("self") for frame, _ in frames]
