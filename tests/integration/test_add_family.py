"""A new model family consists of one file and its entry in the registry; every command then accepts it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT, run_ranks
from tests.ranks.stock_transformers import run_isolated

FAMILY_FILE = '''"""toy: one attention layer per block, pre-norm, with the embedding shared by the head."""

from dataclasses import dataclass

from torch import Tensor, nn

from fira.models.family import Family, Recipe
from fira.models.language_model import LanguageModel
from fira.nn.attention import SelfAttention
from fira.nn.base_layer import Layer
from fira.nn.context import Context
from fira.nn.embedding import Embedding, Head
from fira.nn.init import Normal


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 300
    seq_len: int = 32
    d_model: int = 16
    num_layers: int = 3


class Block(Layer):
    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(config.d_model, 2, f"layers.{index}.attention", Normal)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + self.attention(self.norm(x), context)


class Toy(LanguageModel):
    def __init__(self, config: ToyConfig) -> None:
        embedding = Embedding(config.vocab_size, config.d_model, positions=config.seq_len, std=0.02)
        blocks = [Block(config, index) for index in range(1, config.num_layers + 1)]
        head = Head(nn.LayerNorm(config.d_model), nn.Linear(config.d_model, config.vocab_size, bias=False))
        super().__init__(config, nn.Sequential(embedding, *blocks, head), tied=True)


FAMILY = Family(
    name="toy",
    model=Toy,
    config=ToyConfig,
    presets={"toy-tiny": ToyConfig()},
    recipes={"toy-tiny": Recipe(steps=4, lr=1e-2, min_lr=1e-3, warmup=1, batch_size=4)},
    tied=True,
)
'''


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the source tree with the family added."""
    tree = tmp_path / "tree"
    for folder in ("fira", "pipeline", "scripts"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "fira/models/toy.py").write_text(FAMILY_FILE)
    registry = tree / "fira/models/registry.py"
    source = registry.read_text().replace("MICRORWKV)", "MICRORWKV, TOY)")
    registry.write_text(source.replace("\n\nFAMILIES", "\nfrom fira.models.toy import FAMILY as TOY\n\nFAMILIES", 1))
    return tree


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_new_family_trains_resumes_exports_and_generates(source_tree: Path, tmp_path: Path) -> None:
    text, run, exported = tmp_path / "text.txt", tmp_path / "run", tmp_path / "exported"
    text.write_text(Path(__file__).read_text() * 3)
    environment = {"PYTHONPATH": str(source_tree), "FIRA_CACHE": str(tmp_path / "cache")}

    def command(ranks: int, script: str, *arguments: object) -> str:
        done = run_ranks(ranks, source_tree / "scripts" / script, *arguments, timeout=100, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    flags = ["--model", "toy-tiny", "--data", text, "--out", run, "--eval-sequences", 4, "--save-every", 2]
    command(2, "train.py", *flags, "--pp", 2, "--steps", 2)
    command(1, "train.py", *flags, "--steps", 4, "--resume", run)
    assert json.loads((run / "checkpoints/step-000004/config.json").read_text())["family"] == "toy"
    prompt = ["--prompt", "def f", "--max-new-tokens", 4, "--temperature", 0]
    generated = command(1, "generate.py", "--checkpoint", run, *prompt)
    command(1, "export.py", "--checkpoint", run, "--out", exported)
    results = run_isolated(tmp_path, exported)["exported"]
    assert results["single"].split("\n")[0] in generated
    assert np.isfinite(np.load(tmp_path / "exported.npy")).all()
