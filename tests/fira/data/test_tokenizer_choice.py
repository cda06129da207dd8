"""The tokenizer of a run: given, or next to the shards of its data."""

from pathlib import Path

import numpy as np
import pytest

from fira.data.tokenizer_choice import choose_tokenizer
from fira.training.config import TrainConfig
from fira.training.setup import choose_model
from tests.fira.small_model import make_tokenizer


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{split}_000000.npy", np.arange(300, dtype=np.uint16))
    return tmp_path


def test_tokenizer_next_to_shards_is_used_unless_another_one_is_given(shards: Path) -> None:
    assert choose_tokenizer(None, str(shards)) is None
    path = shards / "tokenizer.json"
    make_tokenizer().save(str(path))
    assert choose_tokenizer(None, str(shards)) == str(path)
    assert choose_tokenizer("mine.json", str(shards)) == "mine.json"
    model, tokenizer = choose_model(TrainConfig(data=str(shards)), None)
    assert (model.vocab_size, tokenizer) == (make_tokenizer().get_vocab_size(), str(path))
    assert choose_model(TrainConfig(data=str(shards), vocab_size=512), None)[0].vocab_size == 512


def test_tokenizer_next_to_text_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert choose_tokenizer(None, str(tmp_path)) is None
    assert choose_tokenizer(None, None) is None
