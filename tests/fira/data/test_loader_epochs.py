"""The first read of a resumed loader, in any epoch."""

import numpy as np
import pytest

from fira.data.loader import Loader
from fira.data.packed import PackedTokens


@pytest.mark.parametrize("epoch", range(4))
def test_first_read_in_a_later_epoch_equals_an_uninterrupted_run(tmp_path, epoch: int) -> None:
    np.save(tmp_path / "t.npy", np.arange(101, dtype=np.uint16))
    tokens = PackedTokens([tmp_path / "t.npy"])
    expected, _ = Loader(tokens, 10, seed=7).batch(0, 40)
    batch, _ = Loader(tokens, 10, seed=7).batch(10 * epoch, 3)
    np.testing.assert_array_equal(batch, expected[10 * epoch : 10 * epoch + 3])
