"""Default layouts and errors of layouts that do not divide."""

import pytest

from fira.errors import UserError
from fira.parallel.layout import choose_layout
from pipeline.mesh import Layout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"world": 1}, (1, 1, 1)),
        ({"world": 2}, (2, 1, 1)),
        ({"world": 4}, (2, 2, 2)),
        ({"world": 6}, (3, 2, 2)),
        ({"world": 9}, (3, 3, 1)),
        ({"world": 16}, (4, 4, 4)),
        ({"world": 7}, (1, 7, 1)),  # 7 stages are too many for 6 layers
        ({"world": 16, "stages_per_rank": 2}, (2, 8, 4)),  # at most 3 stages of two: the largest divisor is 2
        ({"world": 6, "stages_per_rank": 2}, (3, 2, 2)),
        ({"world": 4, "pp": 1}, (1, 4, 4)),
        ({"world": 4, "dp": 4}, (1, 4, 4)),
        ({"world": 4, "dp": 2, "ep": 1}, (2, 2, 1)),
        ({"world": 6, "pp": 6}, (6, 1, 1)),
        ({"world": 8, "pp": 1, "num_experts": 6}, (1, 8, 2)),
    ],
)
def test_chosen_layout(arguments, expected):
    assert choose_layout(**{"layers": 6, "num_experts": 4, **arguments}) == Layout(*expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp": 3}, r"--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"),
        ({"dp": 3}, "--dp 3 does not make 4 ranks"),
        ({"pp": 2, "dp": 3}, "--pp 2 × --dp 3 does not make 4 ranks"),
        ({"pp": 4, "layers": 3}, "--pp 4: the model has 3 layers, and every stage needs one; use --pp 3 or less"),
        ({"pp": 4, "stages_per_rank": 2}, "--pp 4 with 2 stages per rank: .* use --pp 3 or less"),
        ({"pp": 1, "ep": 3}, "--ep 3 does not divide dp 4 and the model's 4 experts"),
        ({"pp": 1, "ep": 4, "num_experts": 6}, "--ep 4 does not divide dp 4 and the model's 6 experts"),
    ],
)
def test_layout_that_does_not_divide_raises(arguments, message):
    with pytest.raises(UserError, match=message):
        choose_layout(**{"world": 4, "layers": 6, "num_experts": 4, **arguments})
