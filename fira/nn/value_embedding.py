"""Value embeddings of attention."""

import torch
from torch import Tensor, nn

from fira.nn.context import Context
from fira.nn.embedding import TokenTable


class ValueEmbedding(nn.Module):
    """λ · Emb[token], which an attention layer adds to its values; λ is a learnt scalar.

    Every layer has a table of its own, initially zero, so that no gradient is summed over pipeline stages. The tokens
    are read from the context, which every stage has. Weight decay and Muon do not apply to the table.
    Source: Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = TokenTable(vocab_size, width, std=0.0)
        self.scale = nn.Parameter(torch.empty(1))

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        value.fill_(1.0)

    def forward(self, context: Context) -> Tensor:
        """[B, T, width] for the tokens in the context [B, T]. Raises ValueError if it has none."""
        if context.tokens is None:
            raise ValueError("value embeddings need tokens; give input_ids, not vectors")
        return self.scale * self.table(context.tokens)
