"""Token ids and masks of chats, compared with transformers and with a loop over the messages."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fira.data.chat_template import Chat, ChatTemplate, EncodedChat, Message
from fira.data.tokenizer import SPECIAL_TOKENS
from fira.data.tokenizer_config import TOKENIZER_CONFIG, TokenizerConfig, default_config
from fira.errors import UserError
from tests.fira.small_model import make_tokenizer

TOKENIZER = make_tokenizer()
CONFIG = default_config(TOKENIZER)
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "Die Bäume?"}, {"role": "assistant", "content": "im Wald 🙂"}],
    [
        {"role": "system", "content": "  Kurz.\n"},
        {"role": "user", "content": "हिन्दी"},
        {"role": "assistant", "content": "नमस्ते"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " \n ja\n\n"},
    ],
    [{"role": "assistant", "content": "e\u0301\u0301 दुनि\u093cया"}],  # changed by the normalisation to NFC
]
# The format of ChatML with plain text as marks of the roles, so that answers do not begin at a special token.
CHATML = """\
{%- for message in messages %}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim }}<|im_end|>
{% endgeneration %}
{% else %}
{{ message['content'] }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it from the two files of a checkpoint."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / TOKENIZER_CONFIG).write_bytes(CONFIG.to_json())
    return AutoTokenizer.from_pretrained(folder)


def encode(messages: list[Message], config: TokenizerConfig = CONFIG, **chat: Any) -> EncodedChat:
    (encoded,) = ChatTemplate(TOKENIZER, config).encode([Chat(messages, **chat)])
    assert encoded.ids.dtype == np.uint32
    assert encoded.trained.dtype == bool
    return encoded


def by_hand(messages: list[Message]) -> tuple[list[int], list[bool]]:
    """The ids and the mask of CHAT_TEMPLATE, message by message."""
    plain = Tokenizer.from_str(TOKENIZER.to_str())
    plain.encode_special_tokens = True
    eos, prompter, assistant = (TOKENIZER.token_to_id(name) for name in ("</s>", "<|prompter|>", "<|assistant|>"))
    ids, trained = [], []
    for message in messages:
        content = [
            token
            for part in re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", message["content"])
            for token in plain.encode(part).ids
        ]
        answer = message["role"] == "assistant"
        ids += [assistant if answer else prompter, *content, eos]
        trained += [False] + [answer] * (len(content) + 1)
    return ids, trained


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [None, CHATML])
def test_ids_and_mask_are_those_of_transformers(
    stock: PreTrainedTokenizerFast, messages: list[Message], template: str | None
) -> None:
    expected = stock.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True)
    encoded = encode(messages, replace(CONFIG, chat_template=template or CONFIG.chat_template))
    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.trained.tolist() == [mask == 1 for mask in expected["assistant_masks"]]
    assert any(expected["assistant_masks"])


texts = st.lists(st.one_of(st.sampled_from([*SPECIAL_TOKENS, "<s", "\ufdd0", " "]), st.text(max_size=5))).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), max_size=4), texts)
def test_special_tokens_in_a_message_are_text(
    stock: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], answer: str
) -> None:
    messages = [{"role": role, "content": content} for role, content in [*pairs, ("assistant", answer)]]
    encoded = encode(messages)
    without = [{**message, "content": re.sub("[\ufdd0-\ufdd3]", "", message["content"])} for message in messages]
    ids, trained = by_hand(without)
    assert encoded.ids.tolist() == ids
    assert encoded.trained.tolist() == trained
    assert ids == stock.apply_chat_template(without, sanitize_control_tokens=True)["input_ids"]


def test_prompt_is_that_of_transformers(stock: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(TOKENIZER, CONFIG)
    for messages in ([], CHATS[0][:1], CHATS[1][:2], CHATS[1]):
        ids = template.prompt(messages)
        assert ids == by_hand(messages)[0] + [TOKENIZER.token_to_id("<|assistant|>")]
        if messages:
            assert ids == stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_answers_of_the_context_are_not_trained() -> None:
    chat = encode(CHATS[1], context=1)
    expected = by_hand(CHATS[1][:3])[0]
    assert not chat.trained[: len(expected)].any()
    assert chat.trained.sum() == encode(CHATS[1]).trained[len(expected) :].sum() > 0


def test_many_chats_are_encoded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fira.data.chat_template.BATCH", 4)
    chats = [Chat([{"role": "assistant", "content": "x " * n + "</s>" * (n % 3)}], where=str(n)) for n in range(1, 12)]
    for chat, encoded in zip(chats, ChatTemplate(TOKENIZER, CONFIG).encode(iter(chats)), strict=True):
        assert encoded.where == chat.where
        assert (encoded.ids.tolist(), encoded.trained.tolist()) == by_hand([*chat.messages])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ name }}", CHATS[0], "row 3: .*'name' is undefined"),
        ("{{ messages[0].name }}", CHATS[0], "row 3: .* has no attribute 'name'"),
        ("{% for m in messages %}\n{% if %}", CHATS[0], "invalid in line 2"),
        ("{% generation %}{{ eos_token }}", CHATS[0], "invalid in line 1"),
        ("{{ messages[0].content }}", CHATS[0], "row 3: .* marks no answer"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], "row 3: .* unsafe"),
        ("{{ 1 / 0 }}", CHATS[0], "row 3: .*ZeroDivisionError"),
        ("{{ raise_exception('only\nusers') }}", CHATS[0], "row 3: .*only users"),
        (CONFIG.chat_template, [{"role": "tool", "content": "1"}], "row 3: .*role tool"),
        (CONFIG.chat_template, [{"role": "assistant", "content": "", "tool_calls": [{}]}], "row 3: .*tools"),
        (None, CHATS[0], "no chat template"),
    ],
)
def test_template_that_cannot_format_a_chat_raises(template: str | None, messages: list[Message], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(messages, replace(CONFIG, chat_template=template), where="chats.jsonl, row 3")
    assert "\n" not in str(caught.value)


def test_tools_are_given_to_the_template() -> None:
    template = "{% for tool in tools %}{% generation %}{{ tool | tojson }}{% endgeneration %}{% endfor %}"
    encoded = encode([], replace(CONFIG, chat_template=template), tools=[{"name": "ä"}])
    assert TOKENIZER.decode(encoded.ids.tolist()) == '{"name": "ä"}'
    with pytest.raises(UserError, match="tools"):
        encode(CHATS[0], tools=[{"name": "ä"}])


def test_variable_that_is_only_tested_may_be_missing() -> None:
    template = (
        "{% if thinking is defined or messages[0].name %}a{% else %}{% generation %}b{% endgeneration %}{% endif %}"
    )
    assert TOKENIZER.decode(encode(CHATS[0], replace(CONFIG, chat_template=template)).ids.tolist()) == "b"
