"""The notebook runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.launch import ROOT

NOTEBOOK = ROOT / "notebooks" / "kaggle_training.ipynb"


def test_notebook_is_stored_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_notebook_trains_shows_the_loss_and_writes(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nSTEPS = 3\nRUN = {str(tmp_path / 'run')!r}"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    lines = (tmp_path / "run" / "training_log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["iter", "1", "2", "3"]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "validation loss" in text
    assert "\ndef " in "\n" + text
    assert "tokens/s" in text
    assert "import " in outputs[-1].text
