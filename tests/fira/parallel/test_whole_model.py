"""The whole model on every rank, compared with a model in one process."""

import pytest

from fira.models.registry import to_document
from tests.fira.models.small_families import BLUES, MICRORWKV
from tests.launch import run_function


@pytest.mark.slow
def test_weights_and_logits_are_those_of_one_process() -> None:
    """Stages in another order than the ranks, experts on two ranks, tied embeddings, buffers, adapters, --shard."""
    blues, microrwkv = to_document(BLUES), to_document(MICRORWKV)
    cases = [(blues, None), (microrwkv, None), (blues, "rank=2,alpha=4,targets=attention+experts")]
    layouts = [("1f1b", [2, 2, 2], None), ("1f1b", [1, 4, 2], "optimizer"), ("1f1b", [4, 1, 1], None)]
    layouts += [("interleaved", [2, 2, 1], "parameters"), ("1f1b", [1, 4, 2], "parameters")]
    arguments = {"cases": cases, "layouts": layouts}
    assert run_function(4, "tests.ranks.whole_model_ranks", "differences", **arguments) == [[]] * 4
