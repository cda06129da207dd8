"""Supervised fine-tuning starts from a run, an export, a Llama and a FlexOlmo, also without tokens of the roles."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedTokenizerFast

from fira import load_model
from fira.data.tokenizer import TOKENIZER, load_tokenizer, train_tokenizer
from fira.huggingface.export_model import export
from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.init import initialise
from tests.chats import BYTES, encode, make_chats, tokenizer_without_roles, write_chats
from tests.fira.small_model import save
from tests.integration.test_reference_training import assembled
from tests.launch import run_function

pytestmark = pytest.mark.slow

SEED = 42
SMALL: dict[str, Any] = {"seq_len": 128, "d_model": 12, "num_layers": 2, "n_head": 3}
FIRA = FiraConfig(**SMALL, vocab_size=261, d_ff=10, dropout=0.0)
WITHOUT_ROLES = {
    "microrwkv": MicroRWKVConfig(**SMALL, vocab_size=BYTES, n_group=2, window=5, d_moe=10, top_k=2),
    "mooshak": MooshakConfig(**SMALL, vocab_size=BYTES, d_ff=10),
    "mooshak-tied": MooshakConfig(**SMALL, vocab_size=BYTES, d_ff=10, tied=True, softcap=2.0, value_embeddings=True),
}
TRANSFORMERS: dict[str, Any] = {
    "vocab_size": BYTES,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)
# The folder, the layout, and the number of tokens in the model.
CASES = [
    ("run", {"dp": 2}, 261),
    ("export", {"pp": 2}, 261),
    ("flexolmo", {"dp": 2, "ep": 2}, BYTES),
    ("llama", {"pp": 2}, BYTES + 2),
    *((name, layout, BYTES + 2) for name in WITHOUT_ROLES for layout in ({"pp": 2}, {"dp": 2})),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chats, and a folder of each case."""
    root = tmp_path_factory.mktemp("start")
    write_chats(root / "chats.jsonl", make_chats(40))
    tokenizer = train_tokenizer([], 261)
    tokenizer.save(str(root / TOKENIZER))
    save(root / "run", build(FIRA), {TOKENIZER: (root / TOKENIZER).read_bytes()})
    export(root / "run", root / "export")
    plain = tokenizer_without_roles()
    for name, config in WITHOUT_ROLES.items():
        save(root / name, build(config), {TOKENIZER: plain.to_str().encode()})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TRANSFORMERS)).save_pretrained(root / "llama")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>").save_pretrained(root / "llama")
    routing = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}
    flexolmo = transformers.FlexOlmoForCausalLM(transformers.FlexOlmoConfig(**TRANSFORMERS, **routing))
    flexolmo.save_pretrained(root / "flexolmo")
    with_template = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>", chat_template=TEMPLATE)
    with_template.save_pretrained(root / "flexolmo")
    return root


@functools.cache
def started(root: Path) -> list[list[dict[str, Any]]]:
    """The results of all cases on both ranks, in one job: [case][rank]."""
    same = {"objective": "sft", "data": str(root / "chats.jsonl"), "precision": "fp32", "seed": SEED}
    sizes = {"batch_size": 4, "micro_batch_size": 1}
    cases = [{**same, **sizes, "init": str(root / name), **layout} for name, layout, _ in CASES]
    environment = {"FIRA_CACHE": str(root / "cache")}
    by_rank = run_function(2, "tests.ranks.sft_ranks", "start_all", timeout=120, env=environment, cases=cases)
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def expected_model(folder: Path, vocabulary: int) -> LanguageModel:
    """The saved model in float64, with the initial values of a new run in the additional rows of its tables."""
    saved = load_model(folder)
    model = build(replace(saved.config, vocab_size=vocabulary))
    for index in reversed(range(len(model.layers))):  # the embedding last, because the head may share it
        initialise(model.layers[index], f"layers.{index}", SEED)
    weights = model.weights()
    with torch.no_grad():
        for name, value in saved.weights().items():
            weights[name][: len(value)] = value
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize(("number", "case"), [*enumerate(CASES)], ids=lambda value: str(value))
def test_run_starts_with_the_weights_and_the_template_of_the_folder(
    root: Path, number: int, case: tuple[str, dict[str, int], int]
) -> None:
    name, _, vocabulary = case
    ranks, model = started(root)[number], expected_model(root / name, vocabulary)
    weights = assembled(ranks, "weights")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.weights()[key].detach()) for key, value in weights.items())
    lines = [line for line in ranks[0]["log"] if "vocabulary" in line]
    expected = f"{name}: the vocabulary grows from {BYTES} to {vocabulary} tokens"
    assert [line.partition(",")[0] for line in lines] == ([expected] if vocabulary == BYTES + 2 else [])
    total, count = 0.0, 0
    for ids, targets in ranks[0]["documents"]:
        logits = model(torch.tensor([ids]), Context())[0]
        total += float(F.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
        count += sum(target >= 0 for target in targets)
    assert ranks[0]["vocabulary"] == vocabulary
    assert [rank["loss"] for rank in ranks] == [pytest.approx(total / count, rel=1e-6)] * 2


@pytest.mark.parametrize("name", ["run", "llama", "flexolmo"])
def test_documents_have_the_template_of_the_folder(root: Path, name: str) -> None:
    """That of Fira, unless the folder has another one, which here trains all messages."""
    tokenizer, plain = load_tokenizer(root / TOKENIZER), tokenizer_without_roles()
    plain.add_special_tokens(["<|prompter|>", "<|assistant|>"])
    own = tokenizer if name == "run" else plain
    expected = {}
    for messages in make_chats(40):
        ids, trained = encode(tokenizer, messages)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if name == "llama":
            text = text.replace("</s>", "<|endoftext|>")
        if name == "flexolmo":
            pairs = [(f"[{message['role']}]", message["content"]) for message in messages]
            text = "".join(f"{role}{content}<|endoftext|>" for role, content in pairs)
            trained = [flag for role, content in pairs for flag in [False] * len(role) + [True] * (len(content) + 1)]
        expected[text] = trained
    documents = started(root)[[case[0] for case in CASES].index(name)][0]["documents"]
    assert len(documents) > 4
    for ids, targets in documents:
        trained = expected[own.decode(ids, skip_special_tokens=False)]
        assert targets == [token if flag else -100 for token, flag in zip(ids[1:], trained[1:], strict=True)] + [-100]
