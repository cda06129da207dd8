import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from fira.data.tokenizer_config import (
    CHAT_TEMPLATE,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TokenizerConfig,
    default_config,
    read_config_beside,
)
from fira.errors import UserError

CHATML = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1, "<|im_end|>": 2}, unk_token="a"))


def read(folder: Path, document: Any, tokenizer: Tokenizer = CHATML) -> TokenizerConfig:
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(document))
    return read_config_beside(tokenizer, folder / "tokenizer.json")


def test_default_is_what_the_vocabulary_contains(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert default_config(tokenizer) == TokenizerConfig("</s>", "<s>", "[UNK]", CHAT_TEMPLATE)
    assert default_config(CHATML) == TokenizerConfig("<|endoftext|>")
    assert read_config_beside(CHATML, tmp_path / "tokenizer.json") == TokenizerConfig("<|endoftext|>")
    assert read(tmp_path, {}, tokenizer) == default_config(tokenizer)


def test_written_config_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = TokenizerConfig("<|assistant|>", None, "</s>", "ä {{ messages }}\n")
    (tmp_path / TOKENIZER_CONFIG).write_bytes(config.to_json())
    assert read_config_beside(tokenizer, tmp_path / "tokenizer.json") == TokenizerConfig(
        "<|assistant|>", "<s>", "</s>", "ä {{ messages }}\n"
    )


def test_forms_of_transformers_are_read(tmp_path: Path) -> None:
    document = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "bos_token": None,
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
        "model_max_length": 1e30,
    }
    assert read(tmp_path, document) == TokenizerConfig("<|im_end|>", None, None, "d")
    (tmp_path / TEMPLATE).write_text("from the file")
    assert read(tmp_path, document).chat_template == "from the file"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"eos_token": "</s>"}, "eos_token '</s>' is not in the vocabulary"),
        ({"eos_token": ["</s>"]}, "eos_token is not a token"),
        ({"eos_token": {}}, "eos_token is not a token"),
        ({"chat_template": 3}, "chat_template is not a template"),
        ({"chat_template": [{"name": "rag", "template": "t"}]}, "chat_template is not a template"),
        ([], "not an object"),
    ],
)
def test_invalid_config_is_named(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{message}"):
        read(tmp_path, document)


def test_template_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8"):
        read(tmp_path, {})
