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
@pytest.mark.timeout(400)
def test_notebook_trains_shows_the_loss_generates_and_checks_itself(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nSTEPS, RANKS_STEPS, OUT = 3, 2, {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    for run, steps in (("fira", ["1", "2", "3"]), ("fira-ranks", ["1", "2"])):
        lines = (tmp_path / run / "training_log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["iter", *steps]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count("validation loss") == 2
    assert "The " in text
    table = outputs[-1]["data"]["text/plain"].splitlines()
    assert len(table) == 8
    assert all(row.endswith(" OK") for row in table[1:]), table
