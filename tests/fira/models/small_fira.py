"""A small fira model, one of its MoE layers and a training batch, for the tests of several modules."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fira import FIRA
from fira.models.fira import FiraConfig
from fira.nn.context import Context, TrainingContext
from fira.nn.moe.layer import MoE
from tests.fira.small_model import perturbed

CONFIG = FiraConfig(vocab_size=13, seq_len=9, d_model=8, n_head=2, num_layers=2, d_ff=12, dropout=0.0)
LENGTHS = [9, 5]


def make_model(config: FiraConfig = CONFIG, dtype: torch.dtype = torch.float64) -> FIRA:
    """A model whose parameters all differ from special initial values, such as a bias of zero."""
    torch.manual_seed(0)
    return perturbed(FIRA(config).to(dtype), 0.2)


def make_moe(top_k: int = 2, num_experts: int = 4, width: int = 6) -> MoE:
    """The MoE layer of a block, with parameters from N(0, 1)."""
    config = replace(CONFIG, d_model=width, n_head=1, d_ff=5, num_experts=num_experts, top_k=top_k)
    torch.manual_seed(1)
    moe = FIRA(config).layers[1].moe.double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    return moe


def batch(config: FiraConfig = CONFIG, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Context]:
    """Tokens, targets (−100 in the padding) and the context for training."""
    torch.manual_seed(2)
    tokens = torch.randint(config.vocab_size, (len(lengths), config.seq_len))
    targets = torch.randint(config.vocab_size, tokens.shape)
    valid = torch.tensor(lengths)
    targets[torch.arange(config.seq_len) >= valid[:, None]] = -100
    return tokens, targets, Context(lengths=valid, training=TrainingContext(aux_weights=valid / sum(lengths)))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
