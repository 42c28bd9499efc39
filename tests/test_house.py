"""The house rules that a reader relies on: imports point downwards, files and functions stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "samseg_monai"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "__init__": 0, "errors": 0,
    "sam": 1, "adapters": 1, "data": 1, "transforms": 1, "losses": 1, "schedules": 1, "metrics": 1, "trainable": 1,
    "strategies": 2,
    "networks": 3, "inferers": 3, "checkpoints": 3,
    "handlers": 4, "report": 4, "bundles": 4, "pretrain": 4,
    "cli": 5, "__main__": 6,
}  # fmt: skip
# (importer, imported) on one floor: each is one step further down the same staircase
NEIGHBOURS = {("strategies", "trainable"), ("checkpoints", "networks")}


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
    assert len(MODULES) > 40
    assert {part_of(path) for path in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
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
    assert text.count("\n") <= 300
    assert ast.get_docstring(tree), "module docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and node.end_lineno - node.lineno > 5 and node.name not in {"forward"}:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_nothing_names_a_machine():
    tracked = [p for p in ROOT.rglob("*") if p.is_file() and p.suffix in {".py", ".json", ".md", ".cfg", ".toml", ".yml", ".yaml", ""}]
    tracked = [p for p in tracked if not {".venv", ".git", "demo", "runs"} & set(p.relative_to(ROOT).parts[:-1])]
    assert len(tracked) > 80
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|mnt|Users)/\w")
    found = [f"{p.relative_to(ROOT)}" for p in tracked if pattern.search(p.read_text(encoding="utf-8", errors="ignore"))]
    assert not found
