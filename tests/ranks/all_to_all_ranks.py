"""What each rank of the all-to-all tests runs."""

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.all_to_all import AllToAll


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    exchange = AllToAll(send, receive, group)
    return exchange.wait(exchange.start(x))


def exchange(sizes: list[list[int]]) -> dict[str, list[list[float]]]:
    """Exchange rows [source, destination, index], `sizes[r][s]` of them from rank r to rank s; weight the results.

    Returns the received rows, and the gradients of the sum of the received rows times (1 + receiver).
    """
    rank = dist.get_rank()
    group = dist.new_group()
    sent = [[rank, to, i] for to, count in enumerate(sizes[rank]) for i in range(count)]
    x = torch.tensor(sent, dtype=torch.float64).view(-1, 3).T.contiguous().T.requires_grad_()  # not contiguous
    out = all_to_all(x, sizes[rank], [row[rank] for row in sizes], group)
    (out * (1 + rank) * torch.arange(1, 4)).sum().backward()
    assert x.grad is not None
    return {"received": out.tolist(), "grad": x.grad.tolist()}


def differentiate_twice() -> str:
    """Return the message of the error that a second differentiation raises."""
    x = torch.ones(2, 1, requires_grad=True)
    y = all_to_all(x, [1, 1], [1, 1], dist.new_group())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"
