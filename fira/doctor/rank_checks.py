"""GPU checks that several ranks execute together."""

import ctypes

import torch
import torch.distributed as dist

from fira.devices import choose_devices
from fira.doctor.gpu_check import Target
from fira.doctor.one_step import one_step
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import init

ELEMENTS = 1_000_003  # of a tensor; odd, and larger than one piece of a staged copy


def collectives(target: Target) -> str:
    """Sums in flight at the same time, exchanges and messages of device tensors have the values that are expected."""
    world = init()
    device = choose_devices(target.device, None, world.local_rank)[0]
    group = make_mesh(Layout(1, world.size, 1), (0,), [device]).groups["dp"]
    rank, size = world.rank, world.size
    counts = torch.arange(ELEMENTS, device=device, dtype=torch.float32) % 97

    sums = [counts * (rank + 1 + k) for k in range(4)]
    for work in [dist.all_reduce(tensor, group=group, async_op=True) for tensor in sums]:
        work.wait()
    for k, tensor in enumerate(sums):
        assert torch.equal(tensor, counts * sum(r + 1 + k for r in range(size))), f"sum {k} is wrong"

    sent = torch.full((size * 1000,), float(rank), device=device, dtype=torch.bfloat16)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    expected = torch.arange(size, device=device).repeat_interleave(1000).to(torch.bfloat16)
    assert torch.equal(received, expected), "the exchange in bf16 is wrong"

    message = counts + 1 if rank == 0 else torch.empty_like(counts)
    if rank == 0:
        dist.send(message, 1, group=group)
    elif rank == 1:
        dist.recv(message, 0, group=group)
        assert torch.equal(message, counts + 1), "the message is wrong"
    backend = dist.get_backend(group).split(":")[-1]
    return f"all_reduce, all_to_all and messages of {device.type} tensors over {backend}"


def contexts(target: Target) -> str:
    """After a step on several pipeline ranks, each has a CUDA context on its own device only."""
    world = init()
    device = choose_devices(target.device, None, world.local_rank)[0]
    one_step(Layout(world.size, 1, 1), "1f1b", device, 2 * world.size)
    if device.type == "cpu":
        return "the CPU has no contexts"
    library = ctypes.CDLL("libcuda.so.1")
    active = []
    for index in range(torch.cuda.device_count()):
        flags, state = ctypes.c_uint(), ctypes.c_int()
        assert library.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(state)) == 0
        active += [index] if state.value else []
    assert active == [device.index], f"rank {world.rank} on {device} has contexts on the devices {active}"
    return "each rank has one context, on its own device"
