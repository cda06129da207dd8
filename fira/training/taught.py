"""The teacher of `--objective distill`: its tokens are stored in the run folder, or computed in each step.

    teacher/train-0-teacher_ids.npy   [windows, T, k]       of the training sequences of source 0
    teacher/train-0-teacher_logs.npy  [windows, T, k + 1]   fp32
    teacher/val-0-…                                         of its validation sequences

Only the sequences that the run reads are computed; a resumed run computes those that are missing.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from fira.checkpoint.pretrained import Saved, stored_config
from fira.checkpoint.ranks import this_rank
from fira.data.derived_batches import DerivedBatches, DerivedSequences
from fira.data.loader import Windows
from fira.data.mixture import Joined, Mixture
from fira.data.rows import Rows
from fira.data.tokenizer import TOKENIZER
from fira.devices import AUTOCAST_DTYPES, parameter_dtype
from fira.errors import UserError
from fira.models.registry import build
from fira.parallel.forward_pass import ForwardPass
from fira.parallel.kernel_loading import KernelLoading
from fira.parallel.parallelize import parallelize
from fira.posttraining.distillation import TeacherTokens
from fira.posttraining.teacher import Teacher, columns
from fira.posttraining.window_store import StoredWindows, WindowStore
from fira.training import state
from fira.training.run_data import open_windows, windows_of
from fira.training.setup import Run
from pipeline.mpi.activity import doing

FOLDER = "teacher"
logger = logging.getLogger(__name__)


def with_teacher(run: Run, out: Path, first: int, quiet: bool) -> Run:
    """Return the run with data that contain the teacher's tokens (collective).

    Unchanged without a teacher. out: the run folder. first: number of the next training sequence.
    The teacher's hash becomes a setting of the run, so that a resumed run does not continue with another teacher.
    """
    if run.teacher is None:
        return run
    loading = _Loading(run, run.teacher)
    run = replace(run, settings=run.settings | {"teacher": loading.saved.weights_hash()})
    if run.config.teacher_online:
        taught = loading.teacher.taught
        return replace(
            run, loader=DerivedBatches(run.loader, taught), validation=DerivedSequences(run.validation, taught)
        )
    windows = _stored_windows(run, out, loading, first, quiet)
    loader, validation = open_windows(windows, run.corpus, run.config)
    return replace(run, loader=loader, validation=validation)


class _Loading:
    """The teacher of a run, loaded at its first use. Raises UserError if it does not match the student."""

    def __init__(self, run: Run, saved: Saved) -> None:
        config, student = run.config, run.trainer.model.config
        self.run, self.saved = run, saved
        self.config = stored_config(self.saved)
        _check_tokenizer(self.saved, run.tokenizer)
        named = f"--teacher {config.teacher}"
        if (own := self.config.vocab_size) != student.vocab_size:
            raise UserError(f"{named}: a vocabulary of {own} tokens, the student has {student.vocab_size}")
        if (own := self.config.seq_len) < student.seq_len:
            raise UserError(f"{named}: a context of {own} tokens, the student has {student.seq_len}")
        if config.teacher_top_k > student.vocab_size:
            raise UserError(f"--teacher-top-k {config.teacher_top_k}: the vocabulary has {student.vocab_size} tokens")
        self.tokens = TeacherTokens(config.teacher_top_k, config.distill_temperature)

    def stored(self, rows: Rows) -> Mapping[str, np.ndarray]:
        """See `Teacher.stored` (collective)."""
        return self.teacher.stored(rows)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher on the layout of the run (collective)."""
        trainer, precision = self.run.trainer, self.run.config.precision
        with torch.device("meta"):
            model = build(self.config)
        mesh, dtype, autocast = trainer.mesh, parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
        stages, experts = mesh.layout.pp, getattr(self.config, "num_experts", 1)
        if len(model.layers) < stages or experts % mesh.layout.ep:
            raise UserError(
                f"--teacher {self.run.config.teacher}: {len(model.layers)} layers and {experts} experts cannot be "
                f"divided over {mesh.layout}; give a smaller --pp or --ep"
            )
        student = trainer.model
        parallel = parallelize(model, mesh, 0, [student.device], dtype=dtype, autocast=autocast, shard=student.shard)
        state.load_weights(self.saved, parallel)
        split = replace(trainer.split, width=self.config.d_model, objective=self.tokens)
        return Teacher(ForwardPass(parallel, split, KernelLoading(parallel, mesh)), self.tokens, self.config.vocab_size)


def _check_tokenizer(saved: Saved, tokenizer: dict[str, bytes]) -> None:
    """Raise UserError unless the teacher has the vocabulary of the student's tokenizer."""
    if TOKENIZER not in tokenizer or not saved.has_file(TOKENIZER):
        return
    own, student = (
        Tokenizer.from_buffer(content).get_vocab() for content in (saved.file(TOKENIZER), tokenizer[TOKENIZER])
    )
    if own != student:
        different = len(own.items() ^ student.items())
        raise UserError(
            f"--teacher {saved.folder}: another tokenizer, {different} entries differ; "
            f"give a teacher that was trained with the student's {TOKENIZER}"
        )


def _stored_windows(run: Run, out: Path, loading: _Loading, first: int, quiet: bool) -> list[tuple[Windows, Windows]]:
    """The windows of each source with the teacher's tokens, which are computed where they are missing (collective)."""
    student, batch = run.trainer.model.config, run.config.recipe().batch_size
    arrays = columns(run.config.teacher_top_k, student.seq_len, student.vocab_size)
    key = {
        "teacher": loading.saved.weights_hash(),
        "data": run.corpus.folder.name,
        "temperature": run.config.distill_temperature,
        "precision": run.config.precision,
    }
    if run.config.document_mask:
        key["document_mask"] = True
    result = []
    sources = windows_of(run.corpus, student.seq_len, run.config)
    for number, (source, needed) in enumerate(zip(sources, _needed(run, first), strict=True)):
        pair: list[Windows] = []
        for split, windows, numbers in zip(("train", "val"), source, needed, strict=True):
            store = WindowStore(out / FOLDER, f"{split}-{number}", len(windows), arrays, key)
            with doing("teacher"):
                store.fill(windows, numbers, batch, loading.stored, f"teacher, {split}", not quiet)
            if this_rank() == 0:
                logger.info("teacher's tokens of %s: %d MB in %s", split, store.bytes() // 2**20, out / FOLDER)
            pair.append(StoredWindows(windows, store, loading.stored))
        result.append((pair[0], pair[1]))
    return result


def _needed(run: Run, first: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """For each source, the windows that the run reads from sequence `first` on: for training, and for validation."""
    recipe, loader, validation = run.config.recipe(), run.loader, run.validation
    assert isinstance(loader, Mixture)
    assert isinstance(validation, Joined)
    train: list[list[int]] = [[] for _ in run.corpus.sources]
    for number in range(first, recipe.steps * recipe.batch_size):
        source, index = loader.place(number)
        train[source].append(loader.loaders[source].window(index))
    return list(zip(train, [source.numbers for source in validation.sources], strict=True))
