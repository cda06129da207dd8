"""Log-probabilities of the reference of `--objective dpo`: of each answer by the initial weights, in the run folder.

    reference/reference.json    key of the prepared data; size and SHA-256 of each array
    reference/train-0.npy       float64 [documents], of the training pairs of source 0: 16 bytes per pair
    reference/val-0.npy         the same of its validation pairs

They are computed once, by a forward pass of the run over all pairs, so that a step needs one model. A resumed run reads
them, and needs the reference model only if they are missing or damaged.
"""

import hashlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fira.checkpoint.manifest import FileRecord, encode_json
from fira.checkpoint.pretrained import open_saved
from fira.checkpoint.ranks import collective_errors, gather, this_rank
from fira.checkpoint.shards import Checkpoint
from fira.data.loader import ValidationSequences
from fira.errors import UserError
from fira.files import errors_naming
from fira.files import replace as replace_file
from fira.json_reader import integer, mapping, read, record, text
from fira.nn.objective import TokenScores
from fira.parallel.forward_pass import ForwardPass
from fira.posttraining.chat_corpus import ChatCorpus
from fira.posttraining.packed_examples import PackedExamples
from fira.posttraining.preference_pairs import PreferencePairs
from fira.progress_bar import progress_bar
from fira.training import state
from fira.training.run_data import open_data
from fira.training.setup import Run
from pipeline.mpi.activity import doing

FOLDER, INDEX = "reference", "reference.json"
INDEX_SCHEMA = record(
    {
        "data": text(),
        "files": mapping(record({"size": integer(), "sha256": text("[0-9a-f]{64}", "a SHA-256")})),
    }
)
Arrays = dict[str, np.ndarray]  # by split and source, such as train-0

logger = logging.getLogger(__name__)


def with_reference(run: Run, out: Path, resumed: Checkpoint | None, quiet: bool) -> Run:
    """Return the run with its data complete; unchanged unless its objective is dpo (collective).

    run: with its initial weights; those of a resumed run are restored afterwards. out: the run folder.
    The SHA-256 of the log-probabilities becomes a setting of the run, so that a resumed run does not continue with
    those of another model.
    """
    corpus = run.corpus
    if run.config.objective != "dpo" or not isinstance(corpus, ChatCorpus):
        return run
    examples = {
        f"{split}-{number}": getattr(source, split)
        for number, source in enumerate(corpus.sources)
        for split in ("train", "val")
    }
    arrays = _read_or_load(run, out, resumed, examples) if resumed else None
    if arrays is None:
        arrays = _compute(run, examples, quiet)
    digest = _write(out / FOLDER, arrays, corpus.folder.name)
    pairs = {name: PreferencePairs(packed, arrays[name]) for name, packed in examples.items()}
    sources = [
        replace(source, train=pairs[f"train-{number}"], val=pairs[f"val-{number}"])
        for number, source in enumerate(corpus.sources)
    ]
    loader, validation = open_data(replace(corpus, sources=sources), run.trainer.model.config.seq_len, run.config)
    return replace(run, loader=loader, validation=validation, settings=run.settings | {"reference": digest})


def _read_or_load(run: Run, out: Path, resumed: Checkpoint, examples: dict[str, PackedExamples]) -> Arrays | None:
    """Return the arrays in the run folder, or in that of the checkpoint, read by rank 0 (collective).

    If they are missing or damaged, load the weights with which the run began, and return None. Without --init, and with
    new adapters, which change nothing, these are the weights of the model now. Raises UserError if the weights cannot
    be loaded.
    """
    arrays, problem = None, ""
    if this_rank() == 0:
        for folder in (out, resumed.folder.absolute().parents[1]):
            try:
                arrays = _read(folder / FOLDER, examples, run.corpus.folder.name)
                break
            except UserError as error:
                problem = str(error)
    arrays, problem = gather((arrays, problem))[0]
    if arrays is None and run.config.init and not run.adapters:
        try:
            state.load_weights(open_saved(run.config.init), run.trainer.model)
        except UserError as error:
            raise UserError(f"{problem}, and is not computed again: {error}") from None
    if arrays is None and this_rank() == 0:
        logger.warning("%s; the reference log-probabilities are computed again", problem)
    return arrays


def _read(folder: Path, examples: dict[str, PackedExamples], data: str) -> Arrays:
    """Return the arrays of a folder. Raises UserError unless it is undamaged and of these data."""
    index = read(folder / INDEX, INDEX_SCHEMA)
    if index["data"] != data or index["files"].keys() != {f"{name}.npy" for name in examples}:
        raise UserError(f"{folder / INDEX} is of other data")
    for name, entry in index["files"].items():
        FileRecord(**entry).check(folder / name)
    with errors_naming(folder):
        return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in examples}


def _compute(run: Run, examples: dict[str, PackedExamples], quiet: bool) -> Arrays:
    """Compute the log-probability of the answer in each document, on every rank (collective)."""
    started, batch = time.perf_counter(), run.config.recipe().batch_size
    sequences = sum(map(len, examples.values()))
    shown = this_rank() == 0 and not quiet
    label = "reference log-probabilities"
    with doing(label), progress_bar(sequences, label, shown, " sequences") as bar:
        arrays = {
            name: answer_logs(run.trainer.forward, packed, batch, bar.update) for name, packed in examples.items()
        }
    pairs = sum(map(len, arrays.values())) // 2
    if this_rank() == 0:
        seconds = time.perf_counter() - started
        logger.info("reference log-probabilities of %d pairs (%.1f KB) in %.1f s", pairs, 0.016 * pairs, seconds)
    return arrays


def answer_logs(
    forward: ForwardPass, packed: PackedExamples, batch: int, advance: Callable[[int], object]
) -> np.ndarray:
    """Return the log-probability of the answer in each document, float64 [documents], on every rank (collective).

    batch: sequences in a batch. advance: called with the number of sequences of each batch.
    """
    data, result = ValidationSequences(packed), np.empty(packed.documents)
    for first in range(0, len(data), batch):
        count = min(batch, len(data) - first)
        logs = forward.reports(data.batch, first, count, TokenScores())[..., 0].numpy()
        documents = data.batch(first, count).documents
        assert documents is not None
        for row, numbers in enumerate(documents):
            span, tokens = packed.documents_of(first + row), numbers >= 0
            result[span] = np.bincount(numbers[tokens], logs[row, tokens], span.stop - span.start)
        advance(count)
    return result


def _write(folder: Path, arrays: Arrays, data: str) -> str:
    """Write the arrays where the folder does not have them, and return the SHA-256 of their records (collective)."""
    contents = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    records = {name: asdict(FileRecord.of(content)) for name, content in contents.items()}
    index = encode_json({"data": data, "files": records})
    with collective_errors():
        if this_rank() == 0:
            with errors_naming(folder):
                folder.mkdir(exist_ok=True)
            for name, content in [*contents.items(), (INDEX, index)]:
                if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                    replace_file(folder / name, content)
    return hashlib.sha256(encode_json(records)).hexdigest()


def _npy(array: np.ndarray) -> bytes:
    """The content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
