"""A small MoE layer and its training context, for the tests of several modules."""

from typing import Any

import torch
from torch import Tensor, nn

from fira.nn.context import Context, TrainingContext
from fira.nn.moe.experts import Experts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router

LENGTHS = torch.tensor([9, 5])


def make_moe(capacity_factor: float = 0.0, **routing: Any) -> MoE:
    torch.manual_seed(0)
    router = Router(6, 4, 2, **routing)
    moe = MoE(router, Experts(4, 6, 5, 0.0, "experts"), 4, 1, [], capacity_factor=capacity_factor).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def training(lengths: Tensor = LENGTHS) -> Context:
    return Context(lengths=lengths, training=TrainingContext(aux_weights=(lengths / lengths.sum()).double()))
