"""The house rules that a reader relies on: imports point downwards, files and functions stay small."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "samseg_monai"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "__init__": 0, "errors": 0, "faults": 0.2, "files": 0.5, "zips": 0.5, "pictures": 0.5, "choices": 0.5,
    "products": 0.5, "refusals": 0.6, "network_choices": 0.6,
    "settings": 0.7,
    "sam": 1, "adapters": 1, "data": 1, "transforms": 1, "metrics": 1, "training": 1,
    "strategies": 2,
    "networks": 3, "inferers": 3, "checkpoints": 3,
    "face": 4, "handlers": 4, "report": 4, "bundles": 4, "export": 4,
    "workflow": 4.5, "comparison": 4.7, "cli": 5, "demo": 5, "__main__": 6,
}  # fmt: skip
# (importer, imported) on one floor: each is one step further down the same staircase
NEIGHBOURS = {
    ("checkpoints", "networks"), ("inferers", "networks"), ("export", "bundles"), ("transforms", "data"),
    ("demo", "cli"), ("cli", "demo"),  # a story runs commands, and is one
}  # fmt: skip


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "samseg_monai" else [f"samseg_monai.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("samseg_monai.")}
    return {"__init__" if name == "__version__" else name for name in found}


def test_every_module_has_a_floor():
    assert len(MODULES) > 40 and MODULES[0] == PACKAGE / "__init__.py"
    assert {part_of(path) for path in MODULES} <= set(FLOORS)


# the face hands on names of all floors, each only when it is asked for: tests/package/test_face.py
@pytest.mark.parametrize("path", MODULES[1:], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = part_of(path)
    upwards = {
        other
        for other in imported_parts(path)
        if other != own and FLOORS[other] >= FLOORS[own] and (own, other) not in NEIGHBOURS
    }
    assert not upwards, f"{own} (floor {FLOORS[own]}) imports {upwards}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small_and_explained(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 500
    assert ast.get_docstring(tree), "module docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
    for node in reachable(tree):
        if not node.name.startswith("_") and node.end_lineno - node.lineno > 5 and node.name != "forward":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def reachable(node: ast.AST) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes that another module can name: those of the module and of its public classes."""
    found = []
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found.append(child)
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            found += reachable(child)
    return found


def test_nothing_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = [ROOT / name for name in listed.split("\0") if name and Path(name).suffix != ".safetensors"]
    assert len(texts) > 80
    pattern = re.compile(r"(?<![\w.])/(?:root|work|tmp|farm)/\w")
    found = [str(p) for p in texts if p.is_file() and pattern.search(p.read_text(encoding="utf-8", errors="ignore"))]
    assert not found
