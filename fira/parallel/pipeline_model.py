"""A model split over the local devices of one process by torchgpipe, without MPI."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.nn.context import Context
from fira.parallel.parallelize import layer_flops
from pipeline.partition import partition
from pipeline.torchgpipe_stage import LocalPipeline


class PipelineModel(nn.Module):
    """A model that is called like the original, `module(tokens)` → logits. Its parameters keep the model's names."""

    def __init__(self, model: LanguageModel, pipeline: LocalPipeline) -> None:
        super().__init__()
        self.config = model.config
        self.layers = model.layers
        self._pipeline = [pipeline]  # in a list, so that its parameters are not registered twice
        self.tied = model.tied

    @property
    def devices(self) -> list[torch.device]:
        """Tokens are moved to the first device, logits are on the last."""
        return self._pipeline[0].gpipe.devices

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """[B, T] int64 → logits [B, T, vocab]. Without a context, dropout is applied in train mode only."""
        tokens = tokens.to(self.devices[0])
        if self.tied:  # torchgpipe rejects a parameter in two partitions, so the head gets a view of it in each forward
            weight = self.layers[0].get_parameter("token.weight")
            self.layers[-1].get_submodule("project").weight = weight.view_as(weight).to(self.devices[-1])
        context = context or Context.for_tokens(tokens, self.training)
        context.tokens = tokens
        return self._pipeline[0](tokens, context)


def create_pipeline_model(
    model: LanguageModel | Any,
    devices: Sequence[torch.device | str],
    chunks: int | None = None,
    recompute: bool = False,
    autocast: torch.dtype | None = None,
) -> PipelineModel:
    """Split a model, or a new one of a config, over devices such as `["cuda:0", "cuda:1"]`, balanced by FLOPs.

    chunks: the number of micro-batches of a batch (default: four per device). recompute: save only the tensors between
    devices and recompute the others in the backward. autocast: dtype of matrix products; None: disabled. Autocast
    around a call has no effect, because torchgpipe runs layers in threads of its own. Parameters are moved, not copied.
    Raises ValueError if there are more devices than layers.
    """
    if not isinstance(model, LanguageModel):
        model = build(model)
    if model.tied:
        del model.layers[-1].get_submodule("project").weight
    balance = [len(span) for span in partition(layer_flops(model), len(devices))]
    local = LocalPipeline(list(model.layers), balance, devices, chunks, autocast, recompute)
    return PipelineModel(model, local)
