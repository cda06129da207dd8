"""Exports to GGUF, run by llama.cpp through the package xllamacpp."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fira import load_model
from fira.checkpoint.load_model import own_config
from fira.data.chat_template import ChatTemplate
from fira.huggingface.export_model import export, gguf_path
from fira.nn.context import Context
from tests.fira.huggingface.gguf_models import CONFIGS, save
from tests.launch import ROOT

pytest.importorskip("xllamacpp")
ANSWER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from llama_logits import complete, log_probabilities, start
server = start(sys.argv[2], 64)
given = json.load(sys.stdin)
rows = [log_probabilities(server, ids, 320).tolist() for ids in given["ids"]]
json.dump([rows, [complete(server, request) for request in given["requests"]]], open(sys.argv[3], "w"))
"""


def ask(folder: Path, kind: str, ids: list[list[int]], requests: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The log-probabilities after each token of some texts, and the answers to some requests."""
    arguments = [ROOT / "benchmarks" / "gguf", gguf_path(folder, kind), folder / "answers.json"]
    given = json.dumps({"ids": ids, "requests": requests})
    command = [sys.executable, "-c", ANSWER, *map(str, arguments)]
    done = subprocess.run(command, input=given, text=True, timeout=100, capture_output=True)
    assert done.returncode == 0, done.stderr
    rows, answers = json.loads(arguments[-1].read_text())
    return torch.tensor(rows), answers


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same_model(name: str, tmp_path: Path) -> None:
    step = save(tmp_path / "run", CONFIGS[name], scale=0.2)
    model, folder = load_model(step), export(step, tmp_path / "out", "gguf")
    ids = torch.randint(310, (4, 48), generator=torch.Generator().manual_seed(1))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def f(x):"}]
    greedy = {"max_tokens": 6, "temperature": 0}
    prompt = ChatTemplate(model.tokenizer, own_config(model)).prompt(messages)
    text = "import json\n\n\ndef test(x):\n    return x  # é"
    requests = [
        greedy | {"messages": messages},
        greedy | {"prompt": prompt},
        greedy | {"prompt": text},
    ]
    rows, (chat, same, continued) = ask(folder, "f16", ids.tolist(), requests)
    expected = model(ids, Context()).log_softmax(-1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0.05)
    assert expected.std(-1).mean() > 1  # tokens differ in probability
    assert same["text"].rstrip("\ufffd") == chat["message"]["content"].rstrip("\ufffd") != ""  # the end of an answer
    assert chat["usage"]["prompt_tokens"] == len(prompt)
    assert continued["usage"]["prompt_tokens"] == len(model.tokenizer.encode(text).ids)
