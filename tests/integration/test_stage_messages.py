"""Messages between pipeline stages are sent in the dtype of the matrix products."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fira.data.random_tokens import RandomTokens
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS
from pipeline.mesh import Layout
from tests.launch import run_function


def sent_dtypes(autocast: str | None) -> list[str]:
    """The dtypes of the messages that this rank sends in a step."""
    found, isend = set(), dist.isend

    def record(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found.add(str(tensor.dtype))
        return isend(tensor, *arguments, **options)

    dist.isend = record
    config = replace(PRESETS["fira-tiny"], vocab_size=32, seq_len=8, d_model=16, d_ff=16, num_layers=2)
    dtype = getattr(torch, autocast) if autocast else None
    trainer = make_trainer(config, Layout(2, 1, 1), "1f1b", torch.device("cpu"), autocast=dtype)
    trainer.step(RandomTokens(config.vocab_size, config.seq_len), 2, 1e-3, seed=0)
    return sorted(found)


@pytest.mark.parametrize(("autocast", "dtype"), [("bfloat16", "torch.bfloat16"), (None, "torch.float32")])
def test_activations_and_gradients_are_sent_in_the_dtype_of_autocast(autocast, dtype):
    assert run_function(2, __name__, "sent_dtypes", autocast=autocast) == [[dtype]] * 2
