"""Expert capacity: a limit on the assignments per expert and sequence, or per expert and document."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.documents import Documents


def within_capacity(
    experts: Tensor, valid: Tensor, num_experts: int, factor: float, documents: Documents | None = None
) -> Tensor:
    """experts [B, T, k], valid [B, T] → [B, T, k] bool: the accepted assignments; false for padding.

    In a sequence of n valid tokens an expert accepts the first ⌈factor · k · n / E⌉ assignments in the order of the
    tokens (Fedus et al. 2021, arXiv 2101.03961). Other implementations count per batch, so that the result for a token
    depends on the other sequences, on the micro-batch and on the rank. documents: each of them counts as a sequence.
    """
    batch, length, top_k = experts.shape
    tokens = valid.sum(1, keepdim=True)
    chosen = F.one_hot(experts.flatten(1), num_experts) * valid.repeat_interleave(top_k, 1)[..., None]
    place = chosen.cumsum(1)
    if documents is not None:
        tokens = documents.lengths
        starts = torch.arange(length, device=valid.device) - documents.positions
        first = (starts * top_k).repeat_interleave(top_k, 1)  # of each assignment, the first one in its document
        place = place - (place - chosen).gather(1, first[..., None].expand_as(place))
    place = place.gather(2, experts.flatten(1)[..., None]).view(batch, length, top_k)
    capacity = torch.ceil(factor * top_k * tokens / num_experts)
    return (place <= capacity[..., None]) & valid[..., None]
