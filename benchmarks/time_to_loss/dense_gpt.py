"""A dense GPT in plain PyTorch, trained in one process with AdamW: the contender without Fira.

    x      = Emb[token] + Pos[position]
    x     += Attn(LN1 x);  x += W2 gelu(W1 LN2 x)         each block
    logits = Emb LN x

The sizes, the initialisation and the settings are those of nanoGPT's run on characters for a CPU: 4 layers, width 128,
4 heads, 64 characters, batches of 12, no dropout, AdamW with β = 0.9 and 0.99, weight decay 0.1 for matrices, warm-up,
and cosine decay to a tenth of the learning rate.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EVAL_EVERY = 50  # steps


@dataclass(frozen=True)
class Setting:
    """Model and training. hidden: width of the MLP. seq_len: tokens of a sequence. batch: sequences of a step."""

    vocab: int
    seq_len: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 4
    hidden: int = 512
    batch: int = 12
    steps: int = 2000
    warmup: int = 100
    lr: float = 1e-3


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.qkv, self.proj = nn.Linear(s.width, 3 * s.width), nn.Linear(s.width, s.width)
        self.up, self.down = nn.Linear(s.width, s.hidden), nn.Linear(s.hidden, s.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The model. Weights are drawn from N(0, 0.02²), those of the residual projections from N(0, 0.02² / 2L)."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(s.vocab, s.width), nn.Embedding(s.seq_len, s.width)
        self.blocks = nn.Sequential(*(Block(s) for _ in range(s.layers)))
        self.norm = nn.LayerNorm(s.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * s.layers) if name.endswith(("proj.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets [B, T] → mean cross-entropy in nats."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(s: Setting, training: Tensor, validation: Tensor, seed: int) -> Iterator[tuple[int, float, float]]:
    """Train on random windows; yield (step, seconds of training, loss of all validation windows).

    training, validation: token ids [N].
    """
    torch.manual_seed(seed)
    model = GPT(s)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    offsets, seconds = torch.arange(s.seq_len + 1), 0.0
    for step in range(1, s.steps + 1):
        started = time.perf_counter()
        progress = max(0.0, (step - s.warmup) / (s.steps - s.warmup))
        decayed = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(step / s.warmup, decayed)
        starts = torch.randint(len(training) - s.seq_len, (s.batch, 1))
        windows = training[starts + offsets]
        loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - started
        if step % EVAL_EVERY == 0 or step == s.steps:
            yield step, seconds, evaluate(model, validation, s.seq_len)


@torch.no_grad()
def evaluate(model: GPT, validation: Tensor, seq_len: int) -> float:
    """The mean loss of all windows of the validation tokens, which do not overlap."""
    count = (len(validation) - 1) // seq_len
    tokens, targets = (validation[i : i + count * seq_len].view(count, seq_len) for i in (0, 1))
    losses = [float(model(a, b)) * len(a) for a, b in zip(tokens.split(64), targets.split(64), strict=True)]
    return sum(losses) / count
