"""Default layout of a model on a number of ranks."""

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
    """Choose those of pp, dp and ep that are None, for `world` ranks.

    pp: the smallest divisor of `world` that is at least its square root and for which every stage has a layer; the
    largest divisor with enough layers if there is none. ep: the largest common divisor of dp and num_experts.
    stages_per_rank: of the schedule. Raises UserError if the given values do not divide.
    """
    max_pp = layers // stages_per_rank
    if pp is None and dp is None:
        divisors = [n for n in range(1, world + 1) if world % n == 0 and n <= max_pp]
        pp = min((n for n in divisors if n * n >= world), default=divisors[-1])
    elif pp is None and dp and world % dp == 0:
        pp = world // dp
    dp = dp or (world // pp if pp and world % pp == 0 else None)
    if pp is None or dp is None or pp * dp != world:
        given = " × ".join(f"--{name} {n}" for name, n in (("pp", pp), ("dp", dp)) if n)
        raise UserError(f"{given} does not make {world} ranks; choose pp × dp = {world}, or omit one of them")
    if pp > max_pp:
        per_rank = f" with {stages_per_rank} stages per rank" if stages_per_rank > 1 else ""
        raise UserError(
            f"--pp {pp}{per_rank}: the model has {layers} layers, and every stage needs one; use --pp {max_pp} or less"
        )
    ep = ep or max(n for n in range(1, dp + 1) if dp % n == 0 and num_experts % n == 0)
    if dp % ep or num_experts % ep:
        raise UserError(
            f"--ep {ep} does not divide dp {dp} and the model's {num_experts} experts; choose one that does"
        )
    return Layout(pp, dp, ep)
