"""GPU checks that run a program of this file on two ranks: `mpirun -np 2 python -m fira.doctor.rank_checks NAME`."""

import ctypes
import sys

import torch
import torch.distributed as dist

from fira.devices import choose_devices
from fira.doctor.gpu_check import Target, mpirun, run_program
from fira.doctor.one_step import one_step
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World, init

ELEMENTS = 1_000_003  # of a tensor; odd, and larger than one piece of a staged copy


def collectives(target: Target) -> str:
    """Sums, exchanges and messages of device tensors between two ranks have the expected values."""
    return _on_two_ranks(target, "exchange")


def contexts(target: Target) -> str:
    """Each rank has a CUDA context on its own device only."""
    return _on_two_ranks(target, "train_and_list_contexts")


def _on_two_ranks(target: Target, program: str) -> str:
    words = [*mpirun(2), sys.executable, "-m", "fira.doctor.rank_checks", program, target.device]
    output = run_program(words, environment={"PIPELINE_MPI_HANG_DIR": target.folder, "PIPELINE_MPI_TIMEOUT_S": "60"})
    return output.strip().splitlines()[-1]


def exchange(world: World, device: torch.device) -> str:
    """Several operations in flight at the same time, each with the values that arithmetic predicts."""
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


def train_and_list_contexts(world: World, device: torch.device) -> str:
    """Train one step on two pipeline ranks, then ask the driver for the contexts of this process."""
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


def main(program: str, device: str) -> None:
    world = init()
    chosen = choose_devices(device, None, world.local_rank)[0]
    result = {"exchange": exchange, "train_and_list_contexts": train_and_list_contexts}[program](world, chosen)
    dist.barrier()
    if world.rank == 0:
        print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
