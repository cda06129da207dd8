"""Answers that are sampled in each step: for `--objective grpo`, and for a distillation with `--on-policy`."""

from dataclasses import replace
from pathlib import Path

from fira.checkpoint.ranks import collective_errors
from fira.data.derived_batches import DerivedBatches, DerivedSequences
from fira.data.tokenizer import TOKENIZER, parse_tokenizer
from fira.data.tokenizer_config import read_config
from fira.errors import UserError
from fira.posttraining.answer_sampler import AnswerSampler
from fira.posttraining.chat_corpus import ChatCorpus
from fira.posttraining.on_policy import OnPolicyAnswers
from fira.posttraining.rewarded_answers import ExactReward, RewardedAnswers
from fira.training.run_evaluation import check_whole_model
from fira.training.setup import Run
from pipeline.mpi import World


def with_samples(run: Run, world: World) -> Run:
    """Return the run with data whose answers are sampled, if its objective needs them (collective).

    Validation of a distillation is on the answers of the data. Raises UserError for texts, which have no prompts; for
    a batch that is not divisible by the group; and if the whole model does not fit into the memory of each process.
    """
    config = run.config
    if config.objective != "grpo" and not config.on_policy:
        return run
    flag = "--objective grpo" if config.objective == "grpo" else f"--on-policy {config.on_policy}"
    if not isinstance(run.corpus, ChatCorpus):
        raise UserError(f"{flag}: the data are texts without prompts; give chats as --data")
    with collective_errors():
        check_whole_model(run.trainer, world, flag, "give a smaller model")
    tokenizer = parse_tokenizer(run.tokenizer[TOKENIZER], Path(TOKENIZER))
    end = read_config(tokenizer, Path(), run.tokenizer.get).eos_token
    eos = None if end is None else tokenizer.token_to_id(end)
    sampler = AnswerSampler(run.trainer.model, run.trainer.mesh, eos, config.answer_tokens, config.seed)
    if config.objective == "distill":
        answers = OnPolicyAnswers(sampler, config.on_policy, config.seed)
        return replace(run, loader=DerivedBatches(run.loader, answers))
    size, group = config.recipe().batch_size, config.group_size
    if size % group:
        raise UserError(
            f"--group-size {group}: does not divide the batch of {size} sequences; give another --batch-size"
        )
    reward = ExactReward(tokenizer, config.answer_after)
    return replace(
        run,
        loader=DerivedBatches(run.loader, RewardedAnswers(sampler, reward, group), group),
        validation=DerivedSequences(run.validation, RewardedAnswers(sampler, reward, 1)),
    )
