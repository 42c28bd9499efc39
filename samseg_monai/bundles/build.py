"""Make a bundle of its settings: every file of it is rendered from the engine's templates.

A recipe is settings with a name: of a task (what is learnt, from which data) or of a strategy (how). Both may set
values of the run (``run``; the strategy's count) and of the demo. A recipe that ``"extends"`` another of its kind takes
over what it does not set itself. Keys that begin with ``//`` are comments.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import jinja2

from samseg_monai import __version__
from samseg_monai.choices import Ladder, Method
from samseg_monai.errors import BundleError, ConfigError, raise_all
from samseg_monai.files import read_json
from samseg_monai.settings import BundleSettings, demonstrated, dump_settings, merged, read_settings

RECIPES = Path(str(files("samseg_monai") / "recipes"))
SETTINGS = "settings.json"
LARGE_FILES = "large_files.yml"  # what may be downloaded: not in a bundle that holds all weights
CONFIGS = ("train", "inference", "evaluate")
OVERLAYS = ("multi_gpu_train", "multi_gpu_evaluate", "demo")
PARTS = {"train": ("base", "labels", "train"), "inference": ("base", "inference"), "evaluate": ("labels", "evaluate")}
TEXTS = {
    "README.md": "docs/README.md",
    "data_license.txt": "docs/data_license.txt",
    "LICENSE": "LICENSE",
    LARGE_FILES: LARGE_FILES,
    "logging.conf": "configs/logging.conf",
}
KIRILLOV = "Kirillov A. et al. Segment Anything. ICCV 2023. arXiv:2304.02643"
WIDTH = 120


def recipe_names(kind: str) -> list[str]:
    """List the recipes of ``kind`` ("tasks" or "strategies")."""
    return sorted(path.stem for path in (RECIPES / kind).glob("*.json"))


def read_recipe(kind: str, name: str, *, level: int = 0) -> dict[str, Any]:
    """Read a recipe of ``kind`` by its name or path, with what it extends, and so on up to ten times (``level``).

    Raises:
        BundleError: there is none, it is no JSON object, groups in it are none, or it extends itself.
    """
    if "\0" in name or level > 10:
        raise BundleError(f"{kind}: {name!r} {'is no name' if level <= 10 else 'extends itself, or too many others'}")
    path = Path(name) if name.endswith(".json") else RECIPES / kind / f"{name}.json"
    if not os.path.isfile(path):  # which raises for no name, however long
        raise BundleError(f"{kind}: {_not_there(kind, name)}")
    recipe = without_comments(read_json(path, BundleError, f"{kind} recipe", "correct it"))
    groups = {"run": recipe.get("run"), "demo": recipe.get("demo")}
    groups["demo::run"] = recipe["demo"].get("run") if isinstance(recipe.get("demo"), dict) else None
    wrong = [f"{key}: got {value!r}; expected an object" for key, value in groups.items() if not _is_group(value)]
    raise_all(wrong, BundleError, f"{kind} recipe {path}: correct it")
    recipe = {key: value for key, value in recipe.items() if key not in groups or value is not None}
    parent = recipe.pop("extends", None)
    recipe = recipe if parent is None else merged(read_recipe(kind, str(parent), level=level + 1), recipe)
    return {**recipe, "name": path.stem}


def _not_there(kind: str, name: str) -> str:
    """What is wrong with the name or path of a recipe, and which was meant."""
    known = recipe_names(kind)
    if name.endswith(".json"):
        folder = Path(name).parent
        near = difflib.get_close_matches(Path(name).name, [path.name for path in folder.glob("*.json")], n=1)
        meant = (
            f"did you mean {folder / near[0]}?"
            if near
            else "give the path of a recipe, or a name of samseg bundle list"
        )
        return f"{name}: no such file; {meant}"
    if os.path.isfile(f"{name}.json"):
        return f"no recipe {name!r}, but there is a file {name}.json: give {name}.json, with its suffix"
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"no recipe {name!r}; {meant}There are {', '.join(known)}, or give the path of a .json file"


def _is_group(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def without_comments(value: Any) -> Any:
    """A recipe without the keys that begin with ``//``."""
    if isinstance(value, dict):
        return {key: without_comments(item) for key, item in value.items() if not key.startswith("//")}
    return [without_comments(item) for item in value] if isinstance(value, list) else value


def compose(task: str, strategy: str) -> BundleSettings:
    """The settings of a task with a strategy, both given by name or path.

    Raises:
        BundleError: unknown recipes; everything that is wrong or missing in them, at once.
    """
    return compose_recipes(
        read_recipe("tasks", task), read_recipe("strategies", strategy), f"task {task} with strategy {strategy}"
    )


def compose_recipes(task: dict[str, Any], strategy: dict[str, Any], title: str) -> BundleSettings:
    """The settings of two recipes as ``read_recipe`` gives them; ``title`` is how an error calls them.

    Raises:
        BundleError: everything that is wrong or missing in them, at once.
    """
    what, how = dict(task), dict(strategy)
    run = merged(what.pop("run", {}), how.pop("run", {}))
    demo = merged(what.pop("demo", {}), how.pop("demo", {}))
    if demo:  # pages say so: a demo runs in minutes on two cores
        demo = merged({"run": {"sam_variant": "pico"}}, demo)
    if how.get("network") is not None:  # tasks choose a SAM, which means nothing to such a network
        run["sam_variant"] = None
        demo["run"] = {key: value for key, value in (demo.get("run") or {}).items() if key != "sam_variant"}
    value = {
        "engine": __version__,
        "name": f"{what['name']}_segmentation_{how['name']}",
        "task": what,
        "strategy": how,
        "run": run,
        "demo": demo or None,
    }
    try:
        return read_settings(value, title)
    except ConfigError as error:
        raise BundleError(str(error)) from error


def build_bundle(task: str, strategy: str, output: str | Path) -> Path:
    """Write the bundle ``<task>_segmentation_<strategy>`` below ``output``.

    Args:
        task, strategy: names of recipes, or paths of recipe files of your own.
        output: folder that will hold the bundle's folder; files of the same names are replaced.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: unknown recipes; everything that is wrong or missing in them, at once.
    """
    settings = compose(task, strategy)
    return write_bundle(settings, Path(output) / settings.name)


def write_bundle(settings: BundleSettings, folder: Path, *, wheel: bool = False) -> Path:
    """Write the bundle of ``settings`` into ``folder``; the same settings give the same bytes.

    Everything is rendered before the first file is written, and files of the same names are replaced. ``wheel`` says
    that a wheel of the package lies in it, which its README then tells to install.
    """
    content = render(settings, wheel=wheel)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        for name, text in content.items():
            path = Path(temporary) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for name in content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(temporary) / name, folder / name)
    return folder


def render(settings: BundleSettings, *, wheel: bool = False) -> dict[str, str]:
    """Text of every file of the bundle by its name, relative to the bundle's folder."""
    values = {**_values(settings), "install": install_words(settings.name, settings.engine, wheel=wheel)}
    names = [*(CONFIGS if settings.trains else CONFIGS[1:]), *(o for o in OVERLAYS if _has(settings, o)), "metadata"]
    configs = {f"configs/{name}.json": config_text(_config(name, values)) for name in names}
    configs[f"configs/{SETTINGS}"] = config_text(dump_settings(settings))
    return {**configs, **{target: _rendered(name, values) for name, target in TEXTS.items()}}


def wheel_name(version: str) -> str:
    """Path in a bundle of the wheel of samseg-monai that it may hold."""
    return f"wheel/samseg_monai-{version}-py3-none-any.whl"


def install_words(name: str, version: str, *, wheel: bool) -> str:
    """What the README of the bundle ``name`` says of installing the package."""
    if not wheel:
        return f"samseg-monai {version} has to be installed (`pip install .` in its source folder)."
    told = f"Install samseg-monai {version} from the wheel that lies in this bundle; what it needs comes from PyPI:"
    return f"{told}\n\n```\npip install {name}/{wheel_name(version)}\n```"


def _has(settings: BundleSettings, overlay: str) -> bool:
    return settings.demo is not None if overlay == "demo" else settings.trains


def _config(name: str, values: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for part in PARTS.get(name, (name,)):
        text = _rendered(f"{part}.json", {**values, "config": name})
        for key, value in json.loads(_COMMA.sub(lambda found: found[1] or found[2], text)).items():
            known = key.startswith("+") and key[1:] in config  # a list that goes on from part to part
            config[key[1:] if known else key] = [*config[key[1:]], *value] if known else value
    return config


_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[}\]])')  # a string, or a comma before a closing bracket


@cache
def _environment(trim: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RECIPES / "engine"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=trim,
        lstrip_blocks=trim,
        autoescape=False,  # JSON, Markdown and plain text, not HTML
    )
    environment.filters["j"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment


def _rendered(template: str, values: dict[str, Any]) -> str:
    return _environment(template.endswith(".json")).get_template(f"{template}.jinja").render(values)


def config_text(value: Any) -> str:
    """JSON in at most 120 columns: what holds plain values stays on one line where it fits, else lines are filled."""
    rows = [f"{' ' * 4}{json.dumps(key)}: {_laid_out(item, 4, len(key) + 4)}" for key, item in value.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _laid_out(value: Any, indent: int, before: int) -> str:
    """``value`` as JSON; ``before`` columns of the line behind ``indent`` are taken."""
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    plain = all(_plain(item) for item in (value.values() if isinstance(value, dict) else value))
    line = json.dumps(value, ensure_ascii=False)
    if plain and indent + before + len(line) < WIDTH:
        return line
    pairs = value.items() if isinstance(value, dict) else (("", item) for item in value)
    keys = [
        (f"{json.dumps(key, ensure_ascii=False)}: " if isinstance(value, dict) else "", item) for key, item in pairs
    ]
    rows = [f"{key}{_laid_out(item, indent + 4, len(key))}" for key, item in keys]
    if plain and isinstance(value, dict):
        rows = _filled(rows, WIDTH - indent - 4)
    pad, (opening, closing) = " " * (indent + 4), "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{pad}" + f",\n{pad}".join(rows) + f"\n{' ' * indent}{closing}"


def _filled(rows: list[str], width: int) -> list[str]:
    """Arguments of a component, as many on a line as fit; its class has a line of its own."""
    lines: list[str] = []
    for number, row in enumerate(rows):
        fits = lines and not (number == 1 and lines[0].startswith('"_target_"')) and "\n" not in lines[-1] + row
        if fits and len(lines[-1]) + len(row) + 3 <= width:
            lines[-1] += f", {row}"
        else:
            lines.append(row)
    return lines


def _plain(value: Any) -> bool:
    """A value without a component or list of its own: it may stand on the line of what holds it."""
    items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not any(isinstance(item, (dict, list)) and item for item in items)


def component(package: str, value: dict[str, Any] | None, **more: Any) -> dict[str, Any] | None:
    """A choice of the settings, ``{"name": "EveryNth", "n": 2}``, as a component of a config."""
    if value is None:
        return None
    return {"_target_": f"{package}.{value['name']}", **more, **{k: v for k, v in value.items() if k != "name"}}


# name of a method -> its class, which samseg_monai.strategies has under the same name as choices
METHODS = {get_args(kind.model_fields["name"].annotation)[0]: kind.__name__ for kind in get_args(get_args(Method)[0])}
SIDES = {"resnet": "ResNetSide"}
AROUND = {"boxes", "crop_margin", "crop_size"}  # arguments of PlainSegmenter; a network's others are those of its class
PICKERS = "samseg_monai.data.slices"


def _strategy(method: dict[str, Any]) -> dict[str, Any]:
    """A method of the settings as the component ``strategy``."""
    given = {("name" if key == "label" else key): value for key, value in method.items() if key != "name"}
    if method["name"] == "ladder":
        side = method["side"]
        given["side"] = component("samseg_monai.adapters", side and {**side, "name": SIDES[side["name"]]})
        given["side_weights"] = None
    return {"_target_": f"samseg_monai.strategies.{METHODS[method['name']]}", **given}


def _network(settings: BundleSettings) -> dict[str, Any] | None:
    """The network without SAM as a component, its channels following scans, boxes and classes."""
    if settings.strategy.network is None:
        return None
    given = settings.strategy.network.model_dump(mode="json", exclude=AROUND)
    name = given["name"]
    if name == "BoxEllipse":
        return component("samseg_monai.networks", given)
    boxes = getattr(settings.strategy.network, "boxes", "none")
    shape: dict[str, Any] = {
        "in_channels": "$len(@scans) + 1" if boxes == "channel" else "$len(@scans)",
        "out_channels": "$len(@classes) + 1" if len(settings.task.classes) > 1 else 1,
    }
    if name == "UNETR":
        side = "@patch" if given["spatial_dims"] == 3 else "@image_size"
        shape["img_size"] = "@network_def::crop_size" if boxes == "crop" else side
    if name == "VNet":  # its dropout is three-dimensional by default
        shape["dropout_dim"] = given["spatial_dims"]
    return component("monai.networks.nets", given, **shape)


def _values(settings: BundleSettings) -> dict[str, Any]:
    """What the templates may ask for."""
    from samseg_monai.bundles.words import words
    from samseg_monai.sam.weights import KNOWN

    dumped = dump_settings(settings)
    task, run, net = settings.task, settings.run, settings.strategy.network
    several, ladder = len(task.classes) > 1, isinstance(settings.strategy.method, Ladder)
    return {
        **dumped,
        "sam": settings.has_sam,
        "images": task.kind == "images",
        "several": several,
        "volumetric": settings.sees_volumes,
        "boxes": settings.has_sam or settings.takes_boxes,  # low_res_training may be switched off again
        "embeddings": settings.has_sam and settings.frozen_encoder,
        "stored": run.store_size is not None
        or ladder
        or (several and task.kind == "volumes" and not settings.sees_volumes),
        "ladder": ladder,
        "slabs": hasattr(settings.strategy.method, "depth") and task.kind == "volumes",
        "trains": settings.trains,
        # where nothing validates, all cases of the training learn
        "prepare": [line if run.val_interval else re.sub(r" --validation \d+", "", line) for line in task.prepare],
        "recipe": settings.strategy,
        "strategy": _strategy(dumped["strategy"]["method"]),
        "net": _network(settings),
        "net_boxes": {"boxes": "given"} if net is None or net.name == "BoxEllipse" else dumped["strategy"]["network"],
        "picker": component(PICKERS, dumped["run"]["slices"]["picker"]),
        "val_picker": _val_picker(dumped["run"]),
        "demo_keys": _demo_keys(settings),
        "weights": KNOWN.get(run.sam_variant or "vit_b", KNOWN["vit_b"]),
        "published": run.sam_variant in KNOWN,
        "references": list(
            dict.fromkeys([*([KIRILLOV] if settings.has_sam else []), *task.references, *settings.strategy.references])
        ),
        **words(settings),
    }


def _val_picker(run: dict[str, Any]) -> dict[str, Any] | None:
    picker = run["validation"]["picker"]
    return picker and component(PICKERS, picker)


def _demo_keys(settings: BundleSettings) -> dict[str, Any]:
    """Ids and values of the demo's overlay.

    It is laid over inference.json, too: a group that only train.json has must be whole, or MONAI does not find it.
    """
    demo = settings.demo.model_dump(mode="json", exclude_unset=True) if settings.demo else {}
    whole = dump_settings(demonstrated(settings))["run"]
    whole["slices"] |= {"picker": component(PICKERS, whole["slices"]["picker"]), "cache_dir": None}
    whole["validation"] = {"picker": _val_picker(whole)}
    keys: dict[str, Any] = {}

    def collect(value: dict[str, Any], where: str) -> None:
        for key, item in value.items():
            name = f"{where}{key}"
            if not where and isinstance(item, dict) and key not in ("prompt", "embeddings"):
                keys[name] = whole[key]
            elif isinstance(item, dict):
                collect(item, f"{name}::")
            else:
                keys[name] = item

    network = demo.get("network", {})
    around = {key: value for key, value in network.items() if key in AROUND}
    net = {key: value for key, value in network.items() if key not in AROUND}
    for values, where in (
        (demo.get("run", {}), ""), (demo.get("method", {}), "strategy::"), (around, "network_def::"),
        (net, "network_def::net::"),
    ):  # fmt: skip
        collect(values, where)
    without = [] if settings.has_sam and settings.frozen_encoder else ["embeddings"]
    without += ["image_size"] if settings.sees_volumes else ["patch"]
    return {key: value for key, value in keys.items() if key.partition("::")[0] not in without}
