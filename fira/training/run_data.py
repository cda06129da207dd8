"""The data of a run: the corpus of its objective, its batches, and the files of its tokenizer."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fira.checkpoint.ranks import gather
from fira.data.corpus import Corpus, prepare
from fira.data.loader import Loader, ValidationSequences, Windows
from fira.data.mixture import Joined, Mixture, parse_mixture
from fira.data.sources import input_files
from fira.data.text_windows import TextWindows
from fira.data.tokenizer import TOKENIZER, eos_id, load_tokenizer
from fira.data.tokenizer_config import TOKENIZER_CONFIG, read_config_beside
from fira.errors import UserError
from fira.nn.objective import CrossEntropy, Objective
from fira.posttraining.chat_corpus import ChatCorpus, prepare_chats
from fira.posttraining.chat_records import contains_chats
from fira.posttraining.distillation import Distillation
from fira.posttraining.dpo import PreferenceLoss
from fira.posttraining.grpo import PolicyGradient
from fira.training.config import TrainConfig
from pipeline.mpi import World
from pipeline.mpi.activity import doing
from pipeline.mpi.cores import own_cores, running_on

CHATS = ("sft", "dpo", "grpo")  # objectives whose data are chats
RECORDS = {"dpo": "prompt, chosen and rejected"}  # of a row, by objective; by default one chat


def objective_of(config: TrainConfig) -> Objective:
    """What the run minimises."""
    if config.objective == "distill":
        return Distillation(config.distill_beta, config.distill_temperature)
    if config.objective == "grpo":
        return PolicyGradient()
    return PreferenceLoss(config.dpo_loss, config.dpo_beta) if config.objective == "dpo" else CrossEntropy()


def load_corpus(
    config: TrainConfig, tokenizer: str | None, model: Any, world: World, quiet: bool
) -> Corpus | ChatCorpus:
    """The data, prepared or verified by one rank of each node on the cores of all its ranks, then read by the others
    (collective).

    model: the config of the model.
    """

    def corpus(progress: bool, verified: Path | None = None) -> Corpus | ChatCorpus:
        if config.objective in CHATS or (config.objective == "distill" and _are_chats(config.data)):
            return chats(config, tokenizer, model, progress, verified)
        return prepare(config.data, config.text_column, tokenizer, model.vocab_size, None, progress, verified)

    nodes = gather((platform.node(), own_cores()))
    cores = set[int]().union(*(cores for node, cores in nodes if node == platform.node()))
    prepared = None
    if world.local_rank == 0:
        with doing("data preparation", long=True), running_on(cores):  # may take longer than the timeout of the others
            prepared = corpus(progress=world.rank == 0 and not quiet)
    folders = {node: folder for node, folder in gather((platform.node(), prepared and prepared.folder)) if folder}
    return prepared or corpus(progress=False, verified=folders[platform.node()])


def _are_chats(data: str | None) -> bool:
    return contains_chats([path for source, _ in parse_mixture(data) for path in input_files(source)])


def chats(config: TrainConfig, tokenizer: str | None, model: Any, progress: bool, verified: Path | None) -> ChatCorpus:
    """The packed chats, or the pairs of `--objective dpo`. Raises UserError without data or tokenizer."""
    flag = f"--objective {config.objective}"
    if config.data is None:
        raise UserError(
            f"{flag}: no chats; give a file with {RECORDS.get(config.objective, 'one chat')} per row as --data"
        )
    if tokenizer is None:
        raise UserError(f"{flag}: no tokenizer; give the model to start from as --init, or a --tokenizer")
    pairs, room = config.objective == "dpo", config.answer_tokens if config.samples_answers else 0
    return prepare_chats(config.data, tokenizer, model.vocab_size, model.seq_len, None, progress, verified, pairs, room)


def tokenizer_files(corpus: Corpus | ChatCorpus, given: str | None) -> dict[str, bytes]:
    """The files of the tokenizer with which a checkpoint is saved. given: its path, next to its chat template."""
    if corpus.tokenizer is None:
        return {}
    config = read_config_beside(load_tokenizer(corpus.tokenizer), Path(given or corpus.tokenizer))
    return {TOKENIZER: corpus.tokenizer.read_bytes(), TOKENIZER_CONFIG: config.to_json()}


def open_data(corpus: Corpus | ChatCorpus, seq_len: int, config: TrainConfig) -> tuple[Mixture, Joined]:
    """The training batches and the validation sequences of a corpus, each source in proportion to its weight."""
    return open_windows(windows_of(corpus, seq_len, config), corpus, config)


def open_windows(
    windows: Sequence[tuple[Windows, Windows]], corpus: Corpus | ChatCorpus, config: TrainConfig
) -> tuple[Mixture, Joined]:
    """The same for given windows of each source, for training and for validation."""
    weights = [source.weight for source in corpus.sources]
    counts = [max(1, round(config.eval_sequences * weight)) for weight in weights]
    validation = [ValidationSequences(val, count) for (_, val), count in zip(windows, counts, strict=True)]
    return Mixture([Loader(train, config.seed) for train, _ in windows], weights), Joined(validation)


def windows_of(corpus: Corpus | ChatCorpus, seq_len: int, config: TrainConfig) -> list[tuple[Windows, Windows]]:
    """The sequences of each source for training and for validation; with --document-mask, documents are kept apart."""
    if isinstance(corpus, ChatCorpus):
        return [(source.train, source.val) for source in corpus.sources]
    separator = separator_of(corpus) if config.document_mask else None
    return [
        (TextWindows(source.train, seq_len, True, separator), TextWindows(source.val, seq_len, False, separator))
        for source in corpus.sources
    ]


def separator_of(corpus: Corpus) -> int:
    """The token between documents. Raises UserError if the corpus are shards of tokens without a tokenizer."""
    if corpus.tokenizer is None:
        raise UserError("--document-mask: shards do not say which token ends a document; give their --tokenizer")
    return eos_id(load_tokenizer(corpus.tokenizer))
