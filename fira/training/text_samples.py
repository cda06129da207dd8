"""Texts that the model in training generates after the prompts of --sample-prompts.

All ranks generate with the whole model, see `whole_model`. Its weights are copies, and its random numbers come from
generators of their own, so that samples do not change the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fira.checkpoint.ranks import collective_errors, gather, share_groups, this_rank
from fira.data.chat_template import ChatTemplate
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.data.tokenizer_config import TokenizerConfig, read_config
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.files import errors_naming
from fira.metrics.samples_log import Sample
from fira.parallel.whole_model import whole_model
from fira.training.config import TrainConfig
from fira.training.run_evaluation import check_whole_model
from fira.training.trainer import Trainer
from pipeline.mpi import World
from pipeline.mpi.activity import doing

LENGTH = 64  # tokens of a sample
TEMPERATURE = 0.8
GROUP = 8  # prompts that are continued together


@dataclass(frozen=True)
class TextSamples:
    """Generates the samples of a run.

    tokens: of each prompt. every: number of steps between samples; None: after the last step only.
    """

    trainer: Trainer
    tokenizer: Tokenizer
    prompts: list[str]
    tokens: list[list[int]]
    eos: int | None
    every: int | None

    def is_due(self, step: int, last: int) -> bool:
        """Whether texts are generated after a step. last: the last step of the run."""
        return step == last or (self.every is not None and step % self.every == 0)

    def generate(self) -> list[Sample]:
        """Return a sample for each prompt (collective), the same on all ranks and in every layout."""
        model = whole_model(self.trainer.model, self.trainer.mesh)

        def texts(group: Sequence[int]) -> list[str]:
            sampling = Sampling(temperature=TEMPERATURE, seed=group[0])  # the seed of a prompt is its number
            new: list[list[int]] = [[] for _ in group]
            for tokens in continuation(model, [self.tokens[index] for index in group], LENGTH, sampling, self.eos):
                for row, token in tokens.items():
                    new[row].append(token)
            return self.tokenizer.decode_batch(new, skip_special_tokens=True)

        numbers = list(range(len(self.prompts)))
        groups = [numbers[start : start + GROUP] for start in range(0, len(numbers), GROUP)]
        with doing("text samples", long=True):  # no messages until all ranks have finished
            generated = share_groups(groups, texts)
        return [Sample(prompt, text) for prompt, text in zip(self.prompts, generated, strict=True)]


def prepare_samples(
    config: TrainConfig, trainer: Trainer, tokenizer: dict[str, bytes], chats: bool, world: World
) -> TextSamples | None:
    """Read the prompts of a run on rank 0, and send them to all ranks (collective); None without prompts.

    tokenizer: the content of its files by name. chats: whether a prompt is the message of a user. Raises UserError for
    a file without prompts, without a tokenizer, and if the whole model does not fit into the memory of each process.
    """
    if config.sample_prompts is None:
        return None
    if TOKENIZER not in tokenizer:
        raise UserError("--sample-prompts: the data has no tokenizer; give a --tokenizer")
    prompts: list[str] = []
    with collective_errors():
        check_whole_model(trainer, world, "--sample-prompts", "omit it, and use generate.py after training")
        if this_rank() == 0:
            prompts = _read_prompts(Path(config.sample_prompts))
    prompts = gather(prompts)[0]
    parsed = parse_tokenizer(tokenizer[TOKENIZER], Path(TOKENIZER))
    special = read_config(parsed, Path(), tokenizer.get)
    longest = int(trainer.model.config.seq_len)
    tokens = [ids[-longest:] for ids in _encode(prompts, parsed, special, chats)]
    eos = None if special.eos_token is None else parsed.token_to_id(special.eos_token)
    return TextSamples(trainer, parsed, prompts, tokens, eos, config.sample_every)


def _encode(prompts: Sequence[str], tokenizer: Tokenizer, config: TokenizerConfig, chats: bool) -> list[list[int]]:
    if not chats:
        return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    template = ChatTemplate(tokenizer, config)
    return [template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]


def _read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise UserError(f"--sample-prompts {path}: no such file; give a text file with a prompt per line")
    try:
        with errors_naming(path):
            prompts = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(
            f"--sample-prompts {path}: not text in UTF-8; give a text file with a prompt per line"
        ) from None
    if not prompts:
        raise UserError(f"--sample-prompts {path}: the file is empty; write a prompt per line")
    return prompts
