"""Evaluation of a model in one process."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.data.mixture import CountedBatches
from fira.evaluation.greedy_answers import EncodedPrompt, GreedyDecoder, prompt_groups
from fira.models.language_model import LanguageModel
from fira.nn.objective import TokenScores
from fira.parallel.batch_split import BatchSplit


class LocalModel:
    """A model in eval mode, see `EvaluatedModel`. batch: sequences in a forward pass."""

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self._model, self.batch = model, batch
        self.seq_len: int = model.config.seq_len
        device = next(model.parameters()).device
        self._split = BatchSplit(batch, 1, 0, model.config.d_model, device, objective=TokenScores())

    @torch.inference_mode()
    def reports(self, data: CountedBatches, first: int, count: int) -> Tensor:
        (part,) = self._split.batch(data.batch, first, count, dropout_seed=None).microbatches
        report: Tensor = self._model(part.inputs, part.context)
        return report[:count].double().cpu()

    def answers(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        decoder = GreedyDecoder(own_tokenizer(self._model), own_config(self._model))
        found: dict[int, str] = {}
        for group in prompt_groups(prompts):
            found |= zip(group, decoder.answers(self._model, [prompts[index] for index in group]), strict=True)
        return [found[index] for index in range(len(prompts))]
