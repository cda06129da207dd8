"""Settings that do not fit the number of ranks or each other."""

import pytest

from fira.errors import UserError
from fira.training.config import TrainConfig
from fira.training.setup import with_larger_vocabulary
from tests.fira.training.small_runs import train


def test_invalid_layout_is_a_one_line_error_on_all_ranks(settings, tmp_path):
    result = train(settings, 4, "--out", tmp_path / "run", "--pp", 3, status=2)
    assert result.stderr.splitlines() == ["--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"]
    assert not (tmp_path / "run").exists()


def test_vocabulary_of_a_frozen_embedding_does_not_grow():
    config = TrainConfig(init="run", lora="rank=2,alpha=4,targets=experts")
    with pytest.raises(UserError, match="would grow from 300 to 302 tokens, but adapters train no embeddings; give a"):
        with_larger_vocabulary(config, 300, 302)
    assert with_larger_vocabulary(TrainConfig(init="run"), 300, 302).vocab_size == 302
