"""Forged checkpoints and exports end in a one-line error, or load as exactly the model that their files describe.

They are loaded through `load_model`, `newest_valid` and `check_settings`, with limits on memory and time. A checkpoint
that is changed without new hashes is refused, or the change has no effect. `forged_folders.json` has the forgeries that
were found by hand or by this test.
"""

import json
import math
import os
import resource
import shutil
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fira import load_model
from fira.checkpoint.shards import Checkpoint, newest_valid
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import to_document
from fira.training.state import check_settings
from tests.integration.forgeries import Forgery, apply, documents, forgeries
from tests.launch import ROOT

MEMORY = 2**30  # bytes in addition to what the process has at the start of a test
SECONDS = 20  # for one folder; on an idle machine it takes 0.02 s
SHARDS = ["model-00001-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
SOURCES = {  # folder in an archive, files that are read from it
    "checkpoint": ("fira", ["manifest.json", "index.json", "config.json", "state.json", "tokenizer.json", *SHARDS]),
    "export": ("mooshak", ["config.json", "tokenizer.json", "model.safetensors"]),
    "stock": ("rish", ["config.json", "tokenizer.json", "model.safetensors"]),
    "sharded": ("mooshak", ["config.json", "model.safetensors.index.json", "model.safetensors"]),
}
CORPUS = json.loads((ROOT / "tests/fixtures/forged_folders.json").read_text())


def step_folder(place: Path, source: str) -> Path:
    return place / "checkpoints" / "step-000002" if source == "checkpoint" else place


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid folder of each source."""
    place = tmp_path_factory.mktemp("originals")
    for source, (family, _) in SOURCES.items():
        with tarfile.open(ROOT / f"tests/fixtures/before_redesign/{family}.tar.xz") as archive:
            archive.extractall(place / "archive" / source, filter="data")
        kind = "stock" if source == "sharded" else source
        target = step_folder(place / source, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        (place / "archive" / source / kind).rename(target)
    sharded = place / "sharded"
    names = load_file(sharded / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


@contextmanager
def limits() -> Iterator[None]:
    """Context manager that limits the memory and the time of the block."""

    def interrupt(*_: object) -> None:
        raise AssertionError(f"no result within {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(folder: Path, source: str) -> LanguageModel | None:
    """Load a folder through the public entry points; None if it is refused in one line."""
    try:
        with limits():
            model = load_model(folder)
            if source == "checkpoint":
                check_settings(Checkpoint.open(step_folder(folder, source)), {}, override=False)
                assert newest_valid(folder / "checkpoints") is not None
            return model
    except UserError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 700, message
        return None


def check(originals: Path, place: Path, source: str, forgery: Forgery, reseal: bool) -> bool:
    """Forge a copy of a folder, load it, and compare. Return whether it was loaded."""
    folder = place / "forged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals / source, folder)
    target = step_folder(folder, source)
    apply(target, forgery, reseal)
    before = listing(folder)
    model = load(folder, source)
    assert listing(folder) == before  # loading writes nothing
    if model is None:
        return False
    if source == "checkpoint" and not reseal:
        target = step_folder(originals / source, source)
    compare_with_files(model, target, source)
    return True


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def compare_with_files(model: LanguageModel, folder: Path, source: str) -> None:
    """The config and the weights are exactly those in the files: nothing is converted, defaulted or reordered."""
    document = json.loads((folder / "config.json").read_text())
    config = to_document(model.config)
    if source in ("checkpoint", "export"):
        stored = document["shape"] if source == "export" else document
        assert {key: (type(config[key]), config[key]) for key in stored} == {
            key: (type(value), value) for key, value in stored.items()
        }
    else:
        for theirs, ours in (("hidden_size", "d_model"), ("num_hidden_layers", "num_layers"), ("vocab_size",) * 2):
            assert (type(document[theirs]), document[theirs]) == (type(config[ours]), config[ours])
    assert all(value >= 0 and math.isfinite(value) for value in config.values() if isinstance(value, int | float))
    stored_bits = {hash_of(value) for path in folder.glob("model*.safetensors") for value in rows_of(load_file(path))}
    for name, weight in model.weights().items():
        assert weight.dtype.is_floating_point
        for row in weight.detach() if weight.dim() > 1 else [weight.detach()]:
            for part in (row,) if hash_of(row) in stored_bits else row.chunk(2):  # gate and up projection of an expert
                assert hash_of(part) in stored_bits, name


def rows_of(tensors: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for value in tensors.values():
        yield value
        if value.dim() > 1:
            yield from value


def hash_of(tensor: torch.Tensor) -> int:
    return hash((tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("source", SOURCES)
def test_original_folder_is_loaded(originals: Path, tmp_path: Path, source: str) -> None:
    assert check(originals, tmp_path, source, ["rename", "config.json", "config.json"], reseal=False)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: " ".join(map(str, case))[:80])
def test_known_forgeries_are_refused(originals: Path, tmp_path: Path, case: list[Any]) -> None:
    source, *forgery = case
    assert not check(originals, tmp_path, source, forgery, reseal=True)


def fuzz(originals: Path, place: Path, examples: int) -> None:
    files = {
        source: documents(step_folder(originals / source, source), names) for source, (_, names) in SOURCES.items()
    }
    drawn = st.sampled_from(sorted(SOURCES)).flatmap(
        lambda source: st.tuples(st.just(source), forgeries(files[source]), st.booleans())
    )

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(drawn)
    def run(case: tuple[str, Forgery, bool]) -> None:
        check(originals, place, *case)

    run()


def test_forged_folders(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(originals, tmp_path, examples=25)


@pytest.mark.slow
def test_many_forged_folders(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz(originals, tmp_path, examples=int(os.environ.get("FORGED_FOLDERS", "600")))
