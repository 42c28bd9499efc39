"""The notebook runs from its first cell to its last; ``python -m tests.docs.test_tutorial`` writes its outputs anew."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def executed(folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this machine
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]  # its warnings
        if cell.cell_type == "code":
            printed = "".join(output.text for output in outputs if output.output_type == "stream")
            others = [output for output in outputs if output.output_type != "stream"]
            stream = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
            cell.outputs = [*stream, *others]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    return [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_its_stored_outputs_are_small(tmp_path):
    stored, now = nbformat.read(NOTEBOOK, as_version=4), executed(tmp_path)
    assert NOTEBOOK.stat().st_size < 150_000
    assert [cell.get("execution_count") for cell in stored.cells] == [cell.get("execution_count") for cell in now.cells]
    assert printed(stored)[:2] == printed(now)[:2]  # names and counts; later numbers may round otherwise elsewhere
    assert any("Dice" in text for text in printed(now))
    pictures = [
        output for cell in now.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1 and (tmp_path / "tutorial_adapter" / "card.json").is_file()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        nbformat.write(executed(Path(place)), NOTEBOOK)
