"""Print rank, machine and a sum over ranks: `mpirun -hosts a,b -ppn 2 -np 4 python tests/ranks/hang_hosts.py`."""

import os

import torch
import torch.distributed as dist

import pipeline

world = pipeline.init()
total = torch.full((1 << 20,), float(world.rank))
dist.all_reduce(total)
words = (world.rank, world.local_rank, world.local_size, total.unique().item(), os.readlink("/proc/self/ns/net"))
os.write(1, (" ".join(map(str, words)) + "\n").encode())  # one write, so that the ranks' lines do not mix
