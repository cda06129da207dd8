"""Router: the choice of k of E experts for each token, and the weights of their outputs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fira.nn.dropout import at_place, normal, salt
from fira.nn.norms import full_precision


class Routed(NamedTuple):
    """Routing of tokens […]."""

    experts: Tensor  # […, k] int64, the chosen experts
    weights: Tensor  # […, k], weights of their outputs
    logits: Tensor  # […, E]


def number_chosen(top_k: int | float, num_experts: int) -> int:
    """Number of experts per token. top_k: that number, or a fraction of all experts, rounded down: 0.8 of 4 is 3."""
    # 1e-9 compensates rounding: 15/22 of 22 is slightly less than 15 in floating point
    return top_k if isinstance(top_k, int) else max(1, int(top_k * num_experts + 1e-9))


class Router(nn.Module):
    """Token-choice top-k of the logits (W x + b) / temperature.

    renormalise: the weights are the softmax over the k chosen logits and sum to one. Otherwise they are the chosen
    entries of the softmax over all E logits.
    noise: standard deviation of Gaussian noise on the logits in training, determined by sequence, position and `name`.
    balance_rate: change of an expert's bias per step, upwards if its load was below the mean and downwards if above.
    The bias affects which experts are chosen but not their weights; it balances the load without an auxiliary loss
    (Wang et al. 2024, arXiv 2408.15664).
    top_k: number of experts per token, or a fraction of E.
    """

    compilable = ("forward",)
    balance: Tensor  # [E], the bias

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int | float,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        renormalise: bool = True,
        noise: float = 0.0,
        balance_rate: float = 0.0,
        name: str = "",
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts, bias=bias)
        self.temperature = temperature
        self.renormalise = renormalise
        self.noise = noise
        self.salt: int | Tensor = salt(name)
        self.balance_rate = balance_rate
        if balance_rate:
            self.register_buffer("balance", torch.zeros(num_experts))
        self.top_k = number_chosen(top_k, num_experts)
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must choose between 1 and {num_experts} experts")

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Routed:
        """x [N, d], keys [N] int32 token keys for noise; None: no noise."""
        # In full precision, because a rounding error could change the chosen experts.
        with full_precision(x.device):
            logits = self.gate(x.to(self.gate.weight.dtype))
            if self.temperature != 1:
                logits = logits / self.temperature
            if self.noise and keys is not None:
                logits = logits + self.noise * normal(at_place(keys, self.salt), logits.shape[1]).to(logits.dtype)
            if self.balance_rate:
                experts = (logits.softmax(1) + self.balance).topk(self.top_k, 1).indices
                kept = logits.gather(1, experts)
            else:
                kept, experts = logits.topk(self.top_k, 1)
            if self.renormalise:
                return Routed(experts, kept.softmax(1), logits)
            return Routed(experts, logits.softmax(1).gather(1, experts), logits)

    def rebalance(self, load: Tensor) -> None:
        """Update the bias of a router that is trained. load: [E] assignments of a step, summed over all ranks."""
        if self.balance_rate and self.gate.weight.requires_grad:
            self.balance += self.balance_rate * (load.mean() - load).sign().to(self.balance)
