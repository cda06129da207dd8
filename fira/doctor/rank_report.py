"""What `mpirun -np N fira doctor` prints: the screen, the links between ranks, and the comparison of schedules."""

import sys

import torch.distributed as dist

from fira.devices import choose_devices
from fira.doctor import screen
from fira.doctor.finding import ShowLine
from fira.doctor.launcher import find_library, foreign_launcher
from fira.doctor.links import describe_links, measure_links
from fira.doctor.schedule_check import check_schedules
from pipeline.mpi import init
from pipeline.mpi.launchers import launched_rank

TIMEOUT_S = 240.0  # longer than the other ranks wait while rank 0 examines the machine


def examine_ranks(show_line: ShowLine) -> bool:
    """Print the report on rank 0 and return on all ranks whether the machine is usable (collective)."""
    refuse_foreign_launcher()
    world = init(TIMEOUT_S)
    show: ShowLine = show_line if world.rank == 0 else lambda line: None
    usable = [screen.is_usable(screen.show(world, show)) if world.rank == 0 else True]
    dist.broadcast_object_list(usable, src=0)
    if not usable[0]:
        return False
    device = choose_devices("auto", None, world.local_rank)[0]
    links, backend = measure_links(world, device)
    show(f"\n{describe_links(links, world.size, device, backend)}\n")
    return check_schedules(world, device, show)


def refuse_foreign_launcher() -> None:
    """End all ranks, with one line on stderr, if the MPI library would abort at its start.

    Without this, the library's message states neither the cause nor what to do.
    """
    library, _ = find_library()
    message = foreign_launcher(library) if library else None
    if message and launched_rank():
        sys.exit(0)  # with another status, mpirun would kill rank 0 before it prints
    if message:
        print(message, file=sys.stderr)
        sys.exit(2)
