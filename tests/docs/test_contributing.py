"""CONTRIBUTING's worked examples, a strategy and a task, are applied to a copy of the repository, and run there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("samseg_monai", "bundles", "tests", "setup.cfg", "pyproject.toml")
SIX = [
    "samseg_monai/strategies/embedding_shift.py",
    "samseg_monai/strategies/__init__.py",
    "samseg_monai/choices.py",
    "samseg_monai/bundles/words.py",
    "samseg_monai/recipes/strategies/embedding_shift.json",
    "tests/strategies/test_strategy_laws.py",
]
# whatever goes through all strategies, tasks or settings
LISTS = [
    "package/test_house.py::test_imports_point_downwards",
    "package/test_house.py::test_files_and_functions_stay_small_and_explained",
    "package/test_face.py::test_every_strategy_is_created_by_name_as_its_recipe_says",
    "package/test_face.py::test_the_other_recipes_have_no_sam",
    "bundles/test_settings.py::test_nothing_that_is_run_or_names_a_place_gets_into_any_field[embedding_shift]",
    "bundles/test_settings.py::test_every_text_of_the_schema_has_a_pattern_or_a_list_of_values",
    "bundles/test_settings.py::test_every_number_of_the_schema_has_a_range",
    "bundles/test_settings.py::test_settings_survive_a_round_through_json",
    "bundles/test_bundles.py::test_every_task_builds_with_every_strategy",
    "bundles/test_check.py::test_every_bundle_that_can_be_built_is_as_built",
]
# runs command lines one after the other, and imports everything once
RUNNER = """
import json, runpy, sys

for words in json.loads(sys.argv.pop()):
    module, sys.argv = ("samseg_monai", words) if words[0] == "samseg" else (words[2], words[2:])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{words} ended with {stop.code}")
"""


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def changes(title: str) -> list[tuple[str, str, str]]:
    """File, kind and text of each block whose introduction ends with the name of a file."""
    return re.findall(r"`([\w./]+)`:\n\n```(\w+)\n(.*?)^```$", section(title), flags=re.S | re.M)


def command_lines(title: str) -> list[list[str]]:
    [block] = re.findall(r"^```bash\n(.*?)^```$", section(title), flags=re.S | re.M)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def apply(root: Path, file: str, kind: str, text: str) -> None:
    """Write a new file, or put a change in where its old lines stand, which has to be one place."""
    path = root / file
    if kind != "diff":
        assert not path.exists()
        path.write_text(text, encoding="utf-8")
        return
    for hunk in text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-\n"), hunk
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        before = path.read_text(encoding="utf-8")
        assert before.count(old) == 1, f"{file} has not one place like\n{old}"
        path.write_text(before.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with both examples in it."""
    root = tmp_path_factory.mktemp("contributed")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    for title in ("Worked example: a strategy", "Worked example: a task"):
        for change in changes(title):
            apply(root, *change)
    return root


def run(root: Path, commands: list[list[str]]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_the_examples_touch_what_the_text_says():
    assert [file for file, _, _ in changes("Worked example: a strategy")] == SIX
    assert "in six files" in section("I want to add ...") and "Nothing else" in section("Worked example: a strategy")
    assert [file for file, _, _ in changes("Worked example: a task")] == ["samseg_monai/recipes/tasks/liver.json"]


def test_the_examples_keep_the_rules_of_the_house(copy):
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", *(file for file in SIX if file.endswith(".py"))]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_examples_run_and_every_list_of_the_tests_follows_them(copy):
    """The text's own commands, then the tests that go through all strategies, tasks and settings."""
    commands = [*command_lines("Worked example: a strategy"), *command_lines("Worked example: a task")]
    assert [words[:3] for words in commands][:2] == [["python", "-m", "pytest"], ["samseg", "bundle", "build"]]
    commands.append(["python", "-m", "pytest", *(f"tests/{name}" for name in LISTS)])
    told = run(copy, [[*words, "-p", "no:cacheprovider"] if "pytest" in words else words for words in commands])
    assert len(re.findall(r"^\d+ passed", told, flags=re.M)) == 2 and "failed" not in told, told
    bundle = copy / "my_bundles" / "liver_segmentation_embedding_shift"
    assert "scaled by 1" in (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    card = json.loads((copy / "runs" / "liver" / "run_card.json").read_text(encoding="utf-8"))
    assert card["status"] == "completed" and card["strategy"]["name"] == "embedding_shift"
    scores = json.loads((copy / "runs" / "liver" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    assert scores["cases"] == 2 and 0 <= scores["metrics"]["dice_mean"] <= 1
