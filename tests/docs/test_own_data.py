"""README's five commands for one's own data, word for word, on real volumes and images. Plumbing, not accuracy."""

import json
import re
import shutil
from pathlib import Path

import pytest

from samseg_monai.metrics import read_rows
from tests.docs.test_docs import ROOT, commands, run_line

SECTION = "Your own data in five commands"
GUIDE = ROOT / "docs" / "your_own_data.md"
PARTS = {"hippocampus": ("images", "labels"), "brain_tumour_t1c": ("images", "labels")}


def five_commands(data: str) -> list[str]:
    """The commands of the section on ``data``, the name of its folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"## {SECTION}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.S | re.M)
    [block] = [block for block in blocks if f"data/{data}" in block]
    return block.splitlines()


@pytest.mark.parametrize("data", PARTS)
def test_there_are_five_and_the_guide_has_the_same(data):
    lines = five_commands(data)
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "samseg prepare", "samseg task", "samseg bundle", "python -m", "samseg report",
    ]  # fmt: skip
    shown = commands(GUIDE)
    assert [line for line in lines if line not in shown] == []


@pytest.mark.realdata
@pytest.mark.parametrize(("data", "every", "cases"), [("hippocampus", 20, 2), ("brain_tumour_t1c", 9, 4)])
def test_five_commands_run_on_real_data(data, every, cases, realdata, tmp_path, monkeypatch):
    """On a part of the files: 10 volumes, 21 images."""
    for part in PARTS[data]:
        (tmp_path / "data" / data / part).mkdir(parents=True)
        for path in sorted((realdata / data / part).iterdir())[::every]:
            shutil.copy(path, tmp_path / "data" / data / part)
    monkeypatch.chdir(tmp_path)
    for line in five_commands(data):
        run_line(line, monkeypatch)
    [run] = Path("runs").glob("my_*/")
    recipe = json.loads(Path(f"{run.name}.json").read_text())
    assert recipe["modality"] == "MR" and recipe.get("kind", "volumes") == ("volumes" if every == 20 else "images")
    rows = read_rows(run / "evaluation" / "cases.csv")
    assert len({row["case"] for row in rows}) >= cases and {row["class"] for row in rows} == set(recipe["classes"])
    assert "Dice" in Path(f"{run}.html").read_text(encoding="utf-8")
