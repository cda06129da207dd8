"""Preferences of different lengths, and their tokens by the definition of Fira's chat template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Preference = dict[str, list[dict[str, str]]]  # messages of the prompt, of the chosen and of the rejected answer
Document = tuple[tuple[int, ...], tuple[bool, ...]]  # tokens, and which of them are trained


def make_preferences(count: int, turns: int = 2) -> list[Preference]:
    """Prompts of one to `turns` questions, with answers of different lengths; no two records are equal."""
    rng = np.random.default_rng(9)

    def message(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": "".join(rng.choice([*"abcdef "], size=rng.integers(1, most + 1))) + "."}

    result = []
    for _ in range(count):
        roles = ["user", "assistant"] * int(rng.integers(1, turns + 1))
        prompt = [message(role, 5) for role in roles[:-1]]
        answers = {name: [message("assistant", 10)] for name in ("chosen", "rejected")}
        if answers["chosen"] != answers["rejected"]:
            result.append({"prompt": prompt, **answers})
    return result


def write_preferences(path: Path, preferences: list[Preference]) -> Path:
    path.write_text("".join(json.dumps(preference) + "\n" for preference in preferences))
    return path


def encode_pair(tokenizer: Tokenizer, preference: Preference) -> tuple[Document, Document]:
    """<|prompter|>question</s><|assistant|>answer</s>…, with the chosen and with the rejected answer at the end."""
    chosen, rejected = (encode(tokenizer, preference["prompt"], preference[name]) for name in ("chosen", "rejected"))
    return chosen, rejected


def encode(tokenizer: Tokenizer, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> Document:
    ids: list[int] = []
    trained: list[bool] = []
    for message in [*prompt, *answer]:
        begin = tokenizer.token_to_id("<|assistant|>" if message["role"] == "assistant" else "<|prompter|>")
        text = [*tokenizer.encode(message["content"]).ids, tokenizer.token_to_id("</s>")]
        ids += [begin, *text]
        trained += [False, *[message is answer[0]] * len(text)]
    return tuple(ids), tuple(trained)


def documents_in(rows: Any) -> list[list[tuple[int, ...]]]:
    """The tokens of the documents of each row."""
    return [
        [tuple(tokens[numbers == number].tolist()) for number in range(numbers.max() + 1)]
        for tokens, numbers in zip(rows.tokens, rows.documents, strict=True)
    ]
