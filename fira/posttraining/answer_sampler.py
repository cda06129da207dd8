"""Answers that are sampled from the model in training, with its current weights.

Prompts are decoded in groups, each with a seed of its own, so that the answers do not depend on the layout.
"""

from collections.abc import Sequence

from fira.checkpoint.ranks import share_groups
from fira.decoding.decoding import CausalModel, continuation
from fira.decoding.sampling import Sampling
from fira.parallel.batch_split import hashed
from fira.parallel.parallelize import DistributedModel
from fira.parallel.whole_model import whole_model
from fira.posttraining.prompted_answers import PromptedAnswer, room
from pipeline.mesh import Mesh
from pipeline.mpi.activity import doing

GROUP = 32  # prompts that are decoded together


class AnswerSampler:
    """Samples answers at temperature 1.

    eos: the token after which an answer ends. answer_tokens: see `room`. seed: of the run.
    """

    def __init__(self, model: DistributedModel, mesh: Mesh, eos: int | None, answer_tokens: int, seed: int) -> None:
        self._model, self._mesh, self._eos = model, mesh, eos
        self._answer_tokens, self._seed = answer_tokens, seed

    def sampled(self, sequences: Sequence[Sequence[PromptedAnswer]], first: int) -> list[list[PromptedAnswer]]:
        """Return the same prompts with sampled answers (collective). first: number of the first sequence."""
        documents = [document for sequence in sequences for document in sequence]
        if not documents:
            return [[] for _ in sequences]
        seq_len, model = int(self._model.config.seq_len), whole_model(self._model, self._mesh)
        order = sorted(range(len(documents)), key=lambda index: len(documents[index].prompt))
        groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]

        def answers(group: list[int]) -> list[list[int]]:
            prompts = [documents[index].prompt for index in group]
            limits = [room(documents[index], self._answer_tokens, seq_len) for index in group]
            return sample(model, prompts, limits, self._eos, hashed(f"{self._seed}/{first}/{group[0]}"))

        with doing("sampling of answers", long=True):  # no messages until all ranks have finished
            new = iter(share_groups(groups, answers))
        return [[document._replace(answer=next(new)) for document in sequence] for sequence in sequences]


def sample(
    model: CausalModel, prompts: Sequence[list[int]], limits: Sequence[int], eos: int | None, seed: int
) -> list[list[int]]:
    """Return an answer to each prompt: up to the token `eos`, or so many tokens as its limit."""
    result: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for new in continuation(model, prompts, max(limits), Sampling(seed=seed), eos):
        for row in running & new.keys():
            result[row].append(new[row])
            if new[row] == eos or len(result[row]) == limits[row]:
                running.remove(row)
        if not running:
            break
    return result
