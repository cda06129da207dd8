"""Training steps that diverge, and training in lower precision."""

import numpy as np
import pytest

from tests.fira.training.small_runs import PP2_DP2_EP2, losses, train


def test_divergence_ends_all_ranks_before_the_update(settings, tmp_path):
    run = tmp_path / "run"
    result = train(settings, 4, *PP2_DP2_EP2, "--out", run, "--lr", 1e30, "--clip", 0, "--save-every", 1, status=2)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "no weight was changed" in lines[0]
    assert "not finite" in lines[0] or "loss is" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "blocks"), [("bf16", "full"), ("fp16", "auto")])
def test_lower_precision_gives_similar_losses(settings, uninterrupted, tmp_path, precision, blocks):
    run = tmp_path / "run"
    train(settings, 2, "--pp", 2, "--out", run, "--precision", precision, "--recompute", blocks, "--schedule", "gpipe")
    assert (losses(run) != losses(uninterrupted)).any()
    np.testing.assert_allclose(losses(run)[:, 0], losses(uninterrupted)[:, 0], rtol=0.02)
