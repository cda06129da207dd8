"""PyTorch's parallel libraries on the MPI backend, compared with the same training in one process."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from tests.launch import run_function

ROWS = 8  # per rank


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).double()


def batch(step: int, ranks: range) -> Tensor:
    """Return the concatenated rows of several ranks."""
    rows = [torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(100 * step + rank)) for rank in ranks]
    return torch.cat(rows).double()


def train(
    net: nn.Module, ranks: range, steps: int = 3, after: Callable[[nn.Module], object] = lambda net: None
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        net(batch(step, ranks)).square().mean().backward()
        after(net)
        optimizer.step()
        optimizer.zero_grad()


def assert_close(net: nn.Module, reference: nn.Module, rtol: float = 1e-12) -> None:
    for got, expected in zip(net.parameters(), reference.parameters(), strict=True):
        full = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(full, expected, rtol=rtol, atol=rtol)


def reference(**options: object) -> nn.Module:
    net = model()
    train(net, range(dist.get_world_size()), **options)  # type: ignore[arg-type]
    return net


def data_parallel() -> None:
    """DDP: several buckets, hooks with futures, gradient accumulation with ``no_sync``, uneven numbers of batches."""
    here = range(dist.get_rank(), dist.get_rank() + 1)
    net = DistributedDataParallel(model(), bucket_cap_mb=0.01)
    train(net, here)
    assert_close(net, reference())

    for hook, rtol in ((default_hooks.allreduce_hook, 1e-12), (default_hooks.fp16_compress_hook, 1e-2)):
        net = DistributedDataParallel(model(), bucket_cap_mb=0.01)
        net.register_comm_hook(None, hook)
        train(net, here)
        assert_close(net, reference(), rtol)
    net = DistributedDataParallel(model().float())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for step in range(4):
        net(batch(step, here).float()).square().mean().backward()  # calls collectives in a future's callback

    net = DistributedDataParallel(model())
    with net.no_sync():
        net(batch(0, here)).square().mean().backward()
    net(batch(1, here)).square().mean().backward()
    alone = model()
    for step in (0, 1):
        alone(batch(step, range(dist.get_world_size()))).square().mean().backward()
    torch.testing.assert_close(net.module[0].weight.grad, alone[0].weight.grad)

    net = DistributedDataParallel(model())
    with Join([net]):
        for step in range(dist.get_rank() + 1):
            net(batch(step, here)).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def sharded() -> None:
    """FSDP2 with gradient clipping."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    here = range(dist.get_rank(), dist.get_rank() + 1)
    norms: dict[str, list[float]] = {"sharded": [], "reference": []}

    def clip(name: str) -> Callable[[nn.Module], object]:
        def call(net: nn.Module) -> None:
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            norms[name].append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())

        return call

    net = model()
    for layer in (net[0], net[2], net[4], net):
        fully_shard(layer, mesh=mesh)
    train(net, here, after=clip("sharded"))
    assert_close(net, reference(after=clip("reference")))
    torch.testing.assert_close(norms["sharded"], norms["reference"], rtol=1e-12, atol=0)


def tensors() -> None:
    """DTensor's redistributions, and functional collectives with their gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("a", "b"))
    a, b = torch.arange(96.0).view(12, 8), torch.arange(64.0).view(8, 8) / 7
    left, right = (
        distribute_tensor(a, mesh, [Shard(0), Replicate()]),
        distribute_tensor(b, mesh, [Replicate(), Shard(1)]),
    )
    torch.testing.assert_close((left @ right).redistribute(mesh, [Replicate(), Replicate()]).to_local(), a @ b)
    torch.testing.assert_close(left.redistribute(mesh, [Shard(1), Shard(0)]).full_tensor(), a)

    x = torch.full((size,), float(rank), requires_grad=True)
    functional.all_reduce(x * 2, "sum", mesh["b"]).wait()
    y = functional.all_to_all_single_autograd(x * x, [1] * size, [1] * size, dist.group.WORLD)
    (y * torch.arange(1.0, size + 1)).sum().backward()  # rank s scales the part from rank r by r + 1
    torch.testing.assert_close(x.grad, 2.0 * rank * (rank + 1) * torch.ones(size))


def pipelined() -> None:
    """PyTorch's 1F1B schedule over all ranks, with one layer per rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(size)]
    reference_net = nn.Sequential(*copy.deepcopy(layers))
    stage = PipelineStage(layers[rank], rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=lambda out, target: (out - target).square().mean())
    x, target = torch.randn(8, 16), torch.randn(8, 16)
    losses: list[Tensor] = []
    schedule.step(*((x,) if rank == 0 else ()), **({"target": target, "losses": losses} if rank == size - 1 else {}))
    loss = (reference_net(x) - target).square().mean()
    loss.backward()
    torch.testing.assert_close(layers[rank][0].weight.grad, reference_net[rank][0].weight.grad)
    if rank == size - 1:
        torch.testing.assert_close(torch.stack(losses).mean(), loss.detach())


def save(folder: str) -> None:
    """Save FSDP2's shards with torch.distributed.checkpoint."""
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save({"model": net.state_dict()}, checkpoint_id=folder)


def load(folder: str) -> None:
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    state = {"model": net.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    net.load_state_dict(state["model"])
    assert_close(net, model())


def accelerated() -> None:
    """Hugging Face Accelerate, the basis of its Trainer: loader, accumulation, clipping and gathering."""
    from accelerate import Accelerator

    size = dist.get_world_size()
    rows = batch(0, range(4 * size))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert (accelerator.num_processes, accelerator.process_index) == (size, dist.get_rank())
    net = model()
    loader = DataLoader(TensorDataset(rows), batch_size=ROWS)  # one batch per rank
    wrapped, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
    assert isinstance(wrapped, DistributedDataParallel)
    losses: list[Tensor] = []
    for (part,) in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(part).square().mean()
            losses.append(accelerator.gather(loss.detach()).mean())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()

    reference_net, expected = model(), []
    optimizer = torch.optim.SGD(reference_net.parameters(), lr=0.1)
    for step in rows.split(2 * ROWS * size):
        expected += [reference_net(part).square().mean().detach() for part in step.split(ROWS * size)]
        reference_net(step).square().mean().backward()
        nn.utils.clip_grad_norm_(reference_net.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert_close(net, reference_net)


def everything() -> None:
    for part in (data_parallel, sharded, tensors, pipelined, accelerated):
        part()
        dist.barrier()


@pytest.mark.slow
def test_libraries_on_four_ranks() -> None:
    run_function(4, __name__, "everything", timeout=150)


@pytest.mark.slow
def test_distributed_checkpoint_loads_at_another_world_size() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_function(3, __name__, "save", folder=str(Path(folder, "saved")))
        run_function(2, __name__, "load", folder=str(Path(folder, "saved")))
