"""``_target_`` names, judged without importing what they name.

Names of MONAI, torch, torchvision and ignite must be in the lists of ``names``, whole: a longer path would reach what a
module happens to import (``monai.utils.module.import_module``, ``torch.serialization.pickle``). Components of this
package are found by reading its source.
"""

from __future__ import annotations

import ast
import functools
from itertools import accumulate
from pathlib import Path

from samseg_monai.lint.names import MONAI, OTHERS, OWN_CLASSES, OWN_FUNCTIONS, TRANSFORMS, words

PACKAGE = Path(__file__).resolve().parent.parent
PACKAGES = ("monai", "ignite", "torch", "torchvision", "samseg_monai")
_LISTED = {module: words(names) for module, names in {**MONAI, **OTHERS}.items()}
# what MONAI's ComponentLocator finds without a module
_SHORT = frozenset().union(*(words(names) for names in MONAI.values()))
# names that say why they are not listed; the first one that is part of the name counts
_HINTS = {
    "download": "it downloads",
    "hub": "it downloads and runs code",
    "load": "it may load code or pickles",
    "pickle": "it reads pickles",
    "jit": "it runs compiled code",
    "dataset": "it may read pickles or download",
    "perceptual": "it downloads and runs code",
    "run": "it runs something",
    "exec": "it runs something",
    "system": "it runs something",
    "popen": "it runs something",
    "import": "it imports whatever it is told to",
    "compile": "it runs a compiler",
    "bundle": "it runs bundles",
}


def problem_of_target(target: object) -> str | None:
    """Say why a ``_target_`` is not known to be harmless; None if it is."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        return "no plain dotted name: what it becomes is known only when it runs"
    module, _, name = target.rpartition(".")
    if not module:
        return None if name in _SHORT or _is_transform(name) else _reason(target, "MONAI's listed components")
    package = target.partition(".")[0]
    if package not in PACKAGES:
        return f"outside {', '.join(PACKAGES)}"
    if package == "samseg_monai":
        known = _own(module.partition(".")[2], name)
    else:
        known = name in _LISTED.get(module, ()) or (module == "monai.transforms" and _is_transform(name))
    return None if known else _reason(target, f"the components of {package} that are known to be harmless")


def _reason(target: str, group: str) -> str:
    hint = next((why for word, why in _HINTS.items() if word in target.lower()), None)
    return f"not among {group}" + (f": {hint}" if hint else "")


def _is_transform(name: str) -> bool:
    return any(name.removesuffix(suffix) in TRANSFORMS for suffix in ("Dict", "d", "D", ""))


def _own(part: str, name: str) -> bool:
    """Tell whether ``samseg_monai.<part>.<name>`` is a public component of this package."""
    levels = set(accumulate(part.split("."), "{}.{}".format))
    if not levels & OWN_CLASSES or name.startswith("_"):
        return False
    kinds = (ast.ClassDef, ast.FunctionDef) if levels & OWN_FUNCTIONS else (ast.ClassDef,)
    path = PACKAGE.joinpath(*part.split("."))
    own, others = _defined(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    if name in own:
        return isinstance(own[name], kinds)
    return name in others and isinstance(_defined(others[name])[0].get(name), kinds)


@functools.lru_cache(maxsize=64)
def _defined(module: Path) -> tuple[dict[str, ast.stmt], dict[str, Path]]:
    """What a module of this package defines, and which of its modules the rest comes from."""
    own: dict[str, ast.stmt] = {}
    others: dict[str, Path] = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body if module.is_file() else []:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            own[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("samseg_monai."):
            path = PACKAGE.joinpath(*str(node.module).split(".")[1:])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            others |= {alias.name: path for alias in node.names if alias.asname in (None, alias.name)}
    return own, others
