"""Small tasks of every form, and a model whose answers to them differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fira import FIRA
from fira.evaluation.task_forms import Request
from tests.fira.small_model import CONFIG, make_model

WORDS = ["Die", "Bäume", "stehen", "im", "Wald", "नमस्ते", "def", "main", "return", "pass", "None"]
CHOICES = [
    {
        "query": " ".join(WORDS[n % 5 : n % 5 + 1 + n % 4]) + ("  " if n % 3 == 0 else ""),
        "choices": [WORDS[(n + 3 * k) % 11] + " " * (k == 1) + WORDS[(n + k) % 7] * k for k in range(2 + n % 3)],
        "answer": n % 2,
        "source": "ignored",
    }
    for n in range(23)
]
PAIRS = [
    {"sentence_good": " ".join(WORDS[n : n + 3]) + ".", "sentence_bad": " ".join(WORDS[n : n + 3][::-1]) + "."}
    for n in range(9)
]
LAST_WORDS = [{"text": " ".join(WORDS[n % 7 :] + WORDS[: n % 11])} for n in range(15)] + [{"text": "Wald"}]
RECORDS: dict[str, list[dict[str, Any]]] = {"choices": CHOICES, "pairs": PAIRS, "words": LAST_WORDS}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def write_tasks(folder: Path) -> list[str]:
    """Write a file per form, and return their paths."""
    return [str(write_jsonl(folder / f"{name}.jsonl", records)) for name, records in RECORDS.items()]


def greedy_requests(model: FIRA, tokenizer: Tokenizer) -> list[Request]:
    """Continuations that the model generates greedily, and whose tokens are those of their text."""
    found = []
    for word in WORDS:
        ids = tokenizer.encode(word).ids
        (generated,) = model.generate([ids], max_new_tokens=2, temperature=0)
        for whole in (generated[:-1], generated):
            text = tokenizer.decode(whole)
            if tokenizer.encode(text).ids == whole and text.startswith(word) and not text[len(word) :].isspace():
                found.append(Request(word, text[len(word) :]))
    assert len(found) > 3
    return found


@torch.no_grad()
def model_with(tokenizer: Tokenizer, seq_len: int = 32) -> FIRA:
    """A model that generates words of the tokenizer, not parts of characters."""
    model = make_model(replace(CONFIG, seq_len=seq_len))
    weight = model.layers[-1].get_parameter("project.weight")
    for token in range(len(weight)):
        weight[token] *= tokenizer.decode([token]).strip().isalpha()
    model.tokenizer = tokenizer
    return model
