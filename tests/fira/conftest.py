from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import fira
from fira.data.tokenizer import eos_id
from tests.fira.small_model import CONFIG, make_model, make_tokenizer, save


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A run folder with a checkpoint of `make_model()` and its tokenizer."""
    save(tmp_path / "run", make_model(), {"tokenizer.json": tokenizer.to_str().encode()})
    return tmp_path / "run"


@pytest.fixture
def model(tokenizer: Tokenizer) -> Any:
    model = make_model(replace(CONFIG, seq_len=200))
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def scripted_model(model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with a method `will_generate`, which replaces the sampled tokens by those of its arguments."""
    scripted: list[int] = []
    monkeypatch.setattr("fira.decoding.decoding.draw", lambda *_: torch.tensor([scripted.pop(0)]))
    model.will_generate = lambda *texts: scripted.extend(
        token for text in texts for token in [*fira.encode(text, tokenizer), eos_id(tokenizer)]
    )
    return model
