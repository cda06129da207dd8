"""Special tokens and chat template of a tokenizer, in the files that transformers keeps next to tokenizer.json."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fira import files
from fira.data.tokenizer import ASSISTANT, END_NAMES, PROMPTER
from fira.errors import UserError
from fira.json_reader import anything, parse, record

TOKENIZER_CONFIG = "tokenizer_config.json"  # file name in checkpoints and exports
TEMPLATE = "chat_template.jinja"  # where transformers 5 stores the template by default
# Roles are user, assistant and system; a system message becomes a message of the prompter. An answer ends with EOS,
# which is trained with it.
CHAT_TEMPLATE = """\
{%- if tools -%}{{ raise_exception("tools are not supported") }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" and not message.tool_calls -%}
<|assistant|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- elif message.role in ("user", "system") -%}
<|prompter|>{{ message.content }}{{ eos_token }}
{%- else -%}
{{ raise_exception("tools and the role " ~ message.role ~ " are not supported") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@dataclass(frozen=True)
class TokenizerConfig:
    """Names of the special tokens, and the Jinja template that formats a chat; None where there is none."""

    eos_token: str | None = None
    bos_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None

    def to_json(self) -> bytes:
        """Return the content of tokenizer_config.json, which `AutoTokenizer` of transformers reads."""
        document = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings()}
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"

    def settings(self) -> dict[str, str]:
        """Return the arguments of transformers' tokenizers. Padding is EOS."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return given if self.eos_token is None else given | {"pad_token": self.eos_token}


def default_config(tokenizer: Tokenizer) -> TokenizerConfig:
    """Return the config of a tokenizer of `train_tokenizer`; with CHAT_TEMPLATE if it has the tokens of the roles."""
    present = tokenizer.get_vocab(with_added_tokens=True).keys()
    return TokenizerConfig(
        eos_token=next((name for name in END_NAMES if name in present), None),
        bos_token="<s>" if "<s>" in present else None,
        unk_token="[UNK]" if "[UNK]" in present else None,
        chat_template=CHAT_TEMPLATE if {PROMPTER, ASSISTANT} <= present else None,
    )


def read_config(tokenizer: Tokenizer, folder: Path, read: Callable[[str], bytes | None]) -> TokenizerConfig:
    """Return the config in tokenizer_config.json and chat_template.jinja, `default_config` for what they do not name.

    folder: for error messages. read: returns the content of a file of the folder, None if there is no such file.
    Raises UserError for an invalid file, or if a special token is not in the vocabulary.
    """
    stored: dict[str, Any] = {}
    if (raw := read(TOKENIZER_CONFIG)) is not None:
        stored = parse(raw, folder / TOKENIZER_CONFIG, SCHEMA)
    settings = {name: _text(stored[name]) for name in FIELDS if stored.get(name) is not None}
    if (raw := read(TEMPLATE)) is not None:
        try:
            settings["chat_template"] = raw.decode()
        except UnicodeDecodeError:
            raise UserError(f"{folder / TEMPLATE}: not UTF-8; restore the file") from None
    for name, token in settings.items():
        if name != "chat_template" and tokenizer.token_to_id(token) is None:
            raise UserError(f"{folder / TOKENIZER_CONFIG}: {name} {token!r} is not in the vocabulary; correct it")
    return replace(default_config(tokenizer), **settings)


def read_config_beside(tokenizer: Tokenizer, path: Path) -> TokenizerConfig:
    """Return the config next to the tokenizer.json `path`; see `read_config`."""

    def read(name: str) -> bytes | None:
        beside = path.with_name(name)
        return files.read(beside) if beside.is_file() else None

    return read_config(tokenizer, path.parent, read)


def _text(value: Any) -> str:
    """Return the text of a token, which may be an AddedToken, or of a template, which may have several versions."""
    if isinstance(value, dict):
        return str(value["content"])
    if isinstance(value, list):
        return str({entry["name"]: entry["template"] for entry in value}["default"])
    return str(value)


def _token(value: Any, place: str) -> None:
    """Schema of a token: a text, an AddedToken as `{"content": "</s>", …}`, or null."""
    if not isinstance(value, dict | str | None) or (isinstance(value, dict) and "content" not in value):
        raise UserError(f"{place} is not a token")


def _template(value: Any, place: str) -> None:
    """Schema of a chat template: a text, null, or a list of named templates, one of which is the default."""
    named = isinstance(value, list) and all(isinstance(e, dict) and {"name", "template"} <= e.keys() for e in value)
    if named and any(entry["name"] == "default" for entry in value):
        return
    if not isinstance(value, str | None):
        raise UserError(f"{place} is not a template")


FIELDS: dict[str, Callable[[Any, str], None]] = {
    "eos_token": _token,
    "bos_token": _token,
    "unk_token": _token,
    "chat_template": _template,
}
SCHEMA = record({}, {**FIELDS, "added_tokens_decoder": anything})
