"""Quantised models: perplexity and bytes of a trained model, memory of loading, and decoding against transformers.

    python -m benchmarks.quantization.run [--run RUN] [--only quality|memory|speed]

--run: a trained run; default: fira-tiny is trained for 300 steps. Speed is measured with random weights. All contenders
decode greedily with a cache on the CPU. Writes quality.csv, memory.csv and speed.csv.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.measure import alternate, environment, merge, peak_allocated, ratio
from fira import encode, load_model
from fira.checkpoint.shard_index import TensorShard
from fira.generation.perplexity import perplexity
from fira.huggingface.export_model import as_transformers
from fira.models.language_model import LanguageModel
from fira.models.mooshak import MooshakConfig
from fira.models.registry import PRESETS, build, to_document
from fira.nn.quantization import FORMS
from fira.wait_policy import share_cores
from tests.fira.models.transformers_twin import twin
from tests.launch import ROOT
from tests.saving import save_checkpoint

HERE = Path(__file__).parent
ROUNDS = {1: 15, 16: 5}  # by rows: short calls, so that the contenders see the same load
PROMPT, NEW = 2, 16
SMALL: dict[str, Any] = {"vocab_size": 8192, "seq_len": 256}
MODELS = {
    "mooshak, 34M": MooshakConfig(**SMALL, d_model=512, n_head=8, num_layers=8, d_ff=1376),
    "mooshak, 156M": MooshakConfig(**SMALL, d_model=1024, n_head=16, num_layers=11, d_ff=2752),
    "fira-base, 333M": PRESETS["fira-base"],
}
CASES = [*((name, 1) for name in MODELS), ("mooshak, 156M", 16)]  # rows decoded together
PARTS = ("quality", "memory", "speed")
SPEED_FORMS = ("int8", "int4", "int8+head")
TEXT = sorted((ROOT / "fira" / "nn").glob("*.py"))  # Python code that is not in the training data
TOKENS = 8_000


def weight_bytes(model: LanguageModel) -> int:
    return sum(weight.nbytes for weight in model.weights().values())


def trained_run(folder: Path) -> Path:
    """Train fira-tiny for 300 steps in one process."""
    command = [sys.executable, ROOT / "scripts" / "train.py", "--steps", "300", "--plan", "none", "--out", folder]
    subprocess.run([str(part) for part in command], check=True, cwd=folder.parent)
    return folder


def quality(run: Path) -> None:
    """Print perplexity and bytes of a run in each form."""
    rows: list[dict[str, object]] = []
    for form in (None, *FORMS):
        model = load_model(run, quantize=form)
        ids = encode("\n".join(path.read_text() for path in TEXT), model.tokenizer)[:TOKENS]
        rows.append(
            {"form": form or "fp32", "perplexity": perplexity(model, ids).perplexity, "bytes": weight_bytes(model)}
        )
    for row in rows:
        row["change"] = float(row["perplexity"]) / float(rows[0]["perplexity"]) - 1  # type: ignore[arg-type]
        print(row, flush=True)
    merge(HERE / "quality.csv", rows, ["form"])


def save(model: LanguageModel, folder: Path) -> Path:
    weights = [TensorShard(name, value.detach(), 0, tuple(value.shape)) for name, value in model.weights().items()]
    documents, layout = {"config": to_document(model.config)}, {"pp": 1, "dp": 1, "ep": 1}
    return save_checkpoint(folder / "checkpoints", 1, weights, [], documents, {}, layout, keep=1)


def of_transformers(model: LanguageModel) -> Any:
    """The model of transformers with the same weights: Llama for mooshak, the class of an export otherwise."""
    if isinstance(model.config, MooshakConfig):
        other = twin(model.config, model.weights(), torch.float32)
    else:
        other = as_transformers(model)
    other.generation_config.pad_token_id = 0
    other.generation_config.eos_token_id = None
    return other


def memory(name: str) -> None:
    """Print the bytes of the weights, and the peak of torch's allocations while a model is loaded."""
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        saved = save(build(MODELS[name]), Path(folder))
        for form in (None, *SPEED_FORMS):
            size = weight_bytes(load_model(saved, quantize=form))
            peak = peak_allocated(lambda form=form: load_model(saved, quantize=form))  # type: ignore[misc]
            results.append({"model": name, "form": form or "fp32", "bytes": size, "peak_of_loading": peak})
            print(results[-1], flush=True)
    merge(HERE / "memory.csv", results, ["model", "form"])


def speed(name: str, rows: int) -> None:
    """Print tokens per second of each contender, including the prompt's time, and ratios against transformers."""
    torch.manual_seed(0)
    full = build(MODELS[name]).eval()
    with tempfile.TemporaryDirectory() as folder:
        saved = save(full, Path(folder))
        models = {"fp32": full} | {form: load_model(saved, quantize=form) for form in SPEED_FORMS}
    prompt, theirs = torch.randint(full.config.vocab_size, (rows, PROMPT)), of_transformers(full)

    def reference() -> Tensor:
        mask = torch.ones_like(prompt)
        return theirs.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True)

    contenders = {
        form: lambda model=model: model.generate(prompt, NEW, temperature=0) for form, model in models.items()
    }
    seconds = alternate({"transformers": reference, **contenders}, ROUNDS[rows])
    results: list[dict[str, object]] = []
    for form, times in seconds.items():
        row: dict[str, object] = {"model": name, "rows": rows, "form": form}
        row |= {"tokens/s": rows * NEW / statistics.median(times), "ratio": ratio(seconds["transformers"], times)}
        print(row, flush=True)
        results.append(row)
    merge(HERE / "speed.csv", results, ["model", "rows", "form"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    share_cores()  # as the commands do
    parts = PARTS if options.only is None else (options.only,)
    if "quality" in parts:
        with tempfile.TemporaryDirectory() as folder:
            quality(options.run or trained_run(Path(folder) / "run"))
    if "memory" in parts:
        memory("mooshak, 156M")
    if "speed" in parts:
        for name, rows in CASES:
            speed(name, rows)
    print(environment())


if __name__ == "__main__":
    main()
