"""Chats of different lengths, and their tokens by the definition of Fira's chat template."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BYTES = 257  # tokens of `tokenizer_without_roles`
Messages = list[dict[str, str]]
EncodedMessages = tuple[list[int], list[bool]]  # tokens, and which of them are trained


def make_chats(count: int, longest: int = 3) -> list[Messages]:
    """Chats of one to `longest` turns with words of different lengths; no two are equal."""
    rng = np.random.default_rng(9)

    def words(most: int) -> str:
        return "".join(rng.choice([*"abcdef "], size=rng.integers(1, most + 1))) + "."

    return [
        [
            {"role": role, "content": words(7)}
            for _ in range(rng.integers(1, longest + 1))
            for role in ("user", "assistant")
        ]
        for _ in range(count)
    ]


def write_chats(path: Path, chats: list[Messages]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def encode(tokenizer: Tokenizer, messages: Messages) -> EncodedMessages:
    """<|prompter|>question</s><|assistant|>answer</s>…; the answers and their </s> are trained."""
    ids, trained = [], []
    for message in messages:
        answer = message["role"] == "assistant"
        begin = tokenizer.token_to_id("<|assistant|>" if answer else "<|prompter|>")
        text = [*tokenizer.encode(message["content"]).ids, tokenizer.token_to_id("</s>")]
        ids += [begin, *text]
        trained += [False, *[answer] * len(text)]
    return ids, trained


def tokenizer_without_roles() -> Tokenizer:
    """A vocabulary of bytes and an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer
