"""Choose how to spread a model over the ranks there are."""

from fira.errors import UserError
from pipeline.mesh import Layout


def choose_layout(
    world: int,
    layers: int,
    num_experts: int,
    pp: int | None = None,
    dp: int | None = None,
    ep: int | None = None,
    stages_per_rank: int = 1,
) -> Layout:
    """The layout for `world` ranks; what is None is chosen, the rest is kept.

    Pipeline stages first, about as many as replicas: the smallest divisor of the world that reaches its square root
    and does not exceed the number of layers. Experts are spread as widely as replicas and experts divide.
    stages_per_rank: the schedule's. Raises UserError where what is asked for does not divide.
    """
    most = layers // stages_per_rank
    if pp is None and dp is None:
        fitting = [n for n in range(1, world + 1) if world % n == 0 and n <= most]
        pp = min((n for n in fitting if n * n >= world), default=fitting[-1])
    elif pp is None and dp and world % dp == 0:
        pp = world // dp
    dp = dp or (world // pp if pp and world % pp == 0 else None)
    if pp is None or dp is None or pp * dp != world:
        wanted = " × ".join(f"--{name} {n}" for name, n in (("pp", pp), ("dp", dp)) if n)
        raise UserError(f"{wanted} does not make {world} ranks; choose pp × dp = {world}, or leave one out")
    if pp > most:
        per_rank = f" with {stages_per_rank} stages a rank" if stages_per_rank > 1 else ""
        raise UserError(
            f"--pp {pp}{per_rank}: the model has {layers} layers, and every stage needs one; use --pp {most} or less"
        )
    ep = ep or max(n for n in range(1, dp + 1) if dp % n == 0 and num_experts % n == 0)
    if dp % ep or num_experts % ep:
        raise UserError(
            f"--ep {ep} does not divide dp {dp} and the model's {num_experts} experts; choose one that does"
        )
    return Layout(pp, dp, ep)
