"""The notebook runs from its first cell to its last."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.fira.small_model import make_tokenizer
from tests.launch import ROOT

NOTEBOOK = ROOT / "notebooks" / "kaggle_training.ipynb"


def test_notebook_is_stored_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def attach_shards(folder: Path) -> None:
    """Shards named like those of FineWeb-Edu, with their tokenizer, as an attached dataset has them."""
    (folder / "shards").mkdir(parents=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(100, size=20_000)
        np.save(folder / "shards" / f"edufineweb_{split}_000000.npy", tokens.astype(np.uint16))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("shards", [False, True])
def test_notebook_trains_shows_the_loss_generates_and_checks_itself(
    shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "OMP_WAIT_POLICY", "passive"
    )  # on a busy machine, waiting threads take the cores of working ones
    if shards:
        attach_shards(tmp_path / "input")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nSTEPS, RANKS_STEPS, INPUT, OUT = 3, 2, {str(tmp_path / 'input')!r}, {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    for run, steps in (("fira-torchgpipe", ["1", "2", "3"]), ("fira-ranks", ["1", "2"])):
        lines = (tmp_path / run / "training_log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["iter", "0", *steps]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count("validation loss") == 2
    assert f"data: {tmp_path / 'input/shards' if shards else 'source code of Python'}" in text
    assert "The " in text
    table = outputs[-1]["data"]["text/plain"].splitlines()
    assert len(table) == 8
    assert all(row.endswith(" OK") for row in table[1:]), table
