"""The partition does not depend on the unit of the costs."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.partition import partition


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_scaled_costs_give_the_same_partition(costs, data):
    """Scaling by a power of two is exact, so that equal partitions stay equal."""
    stages = data.draw(st.integers(1, len(costs)))
    for factor in (2.0**-20, 2.0**20):
        assert partition([factor * cost for cost in costs], stages) == partition(costs, stages)
