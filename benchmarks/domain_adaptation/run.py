"""A base model is adapted to a domain, with the loss on texts of the domain and on general text before and after.

    python -m benchmarks.domain_adaptation.run [--seeds 0 1 2] [--folder DIR] [--out DIR]

The domain is the documentation of Python's standard library, and general text is its source code. `train.main` is the
command scripts/train.py, and so on. Writes results.csv and results.png.
"""

import argparse
import io
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.domain_adaptation.documentation import Data, write_data
from benchmarks.domain_adaptation.picture import draw
from benchmarks.measure import environment
from fira.commands import evaluate, export, train
from fira.data.sources import input_files

HERE = Path(__file__).parent
MODEL = (
    "--model fira-tiny --model-set num_layers=2,value_embeddings=false --vocab-size 1024 "
    "--optimizer adamw --lr 6e-3 --min-lr 3e-4 --lr-schedule cosine"
)
LORA = "rank=16,alpha=32,targets=attention+experts+head"
LOSS = re.compile(r"^(.+): perplexity .*?: ([\d.]+) nats per token", re.M)


@dataclass(frozen=True)
class Setting:
    """The base model, the numbers of steps in which it is trained and adapted, and the sequences of a batch."""

    model: tuple[str, ...] = tuple(MODEL.split())
    base: int = 300
    adaptation: int = 100
    questions: int = 60
    batch: int = 16


@dataclass(frozen=True)
class Method:
    """How a model is adapted. lr: learning rate. general: share of general text. lora: train adapters only."""

    name: str
    lr: float
    general: float = 0.0
    lora: bool = False

    def flags(self) -> list[str]:
        return ["--lr", str(self.lr), *(["--lora", LORA] if self.lora else [])]

    def text(self, data: Data) -> str:
        mixture = f"{data.domain}={1 - self.general:g},{data.general}={self.general:g}"
        return mixture if self.general else str(data.domain)


METHODS = [
    Method("full", lr=2e-3),
    Method("full, lower learning rate", lr=5e-4),
    Method("full, 20 % general text", lr=2e-3, general=0.2),
    Method("LoRA", lr=4e-3, lora=True),
]


@dataclass(frozen=True)
class Experiment:
    """All models of one seed, whose runs are in a folder."""

    data: Data
    folder: Path
    seed: int
    setting: Setting

    def rows(self, methods: Sequence[Method]) -> Iterator[dict[str, Any]]:
        """Yield a row of results.csv for each model: before and after training on questions."""
        base = self.train("base", self.setting.base, *self.setting.model, "--data", self.data.general)
        yield self.evaluate("base", "text", base)
        yield self.evaluate("base", "questions", self.train_questions(base, METHODS[0]))
        for method in methods:
            flags = ["--init", base, "--data", method.text(self.data), *method.flags()]
            adapted = self.train(method.name, self.setting.adaptation, *flags)
            yield self.evaluate(method.name, "text", adapted)
            yield self.evaluate(method.name, "questions", self.train_questions(adapted, method))

    def train(self, name: str, steps: int, *flags: object) -> Path:
        """Train a model, and return its run folder."""
        out = self.folder / name.replace(" ", "_")
        schedule = ["--steps", steps, "--warmup", steps // 10, "--eval-every", steps, "--save-every", steps]
        common = ["--batch-size", self.setting.batch, "--seed", self.seed, "--threads", 1, "--out", out, "--quiet"]
        train.main(words(*flags, *schedule, *common))
        return out

    def train_questions(self, model: Path, method: Method) -> Path:
        """Train a model on questions and answers, in the way in which it was adapted."""
        name = f"{model.name}_questions"
        if method.lora:  # new adapters, on the merged model
            merged = self.folder / f"{model.name}_merged"
            export.main(words("--checkpoint", model, "--out", merged, "--quiet"))
            model = merged
        flags = ["--init", model, "--objective", "sft", "--data", self.data.questions, *method.flags()]
        return self.train(name, self.setting.questions, *flags)

    def evaluate(self, method: str, stage: str, run: Path) -> dict[str, Any]:
        """Evaluate the losses on both test texts and the accuracy in the test questions."""
        task = self.data.chats_test if stage == "questions" else self.data.questions_test
        texts = [self.data.domain_test, self.data.general_test]
        with redirect_stdout(io.StringIO()) as printed:
            evaluate.main(words("--checkpoint", run, "--data", *texts, "--tasks", task, "--quiet"))
        losses = {Path(path).stem: float(loss) for path, loss in LOSS.findall(printed.getvalue())}
        scores = json.loads((run / "evaluation.json").read_text())["tasks"][task.stem]["scores"]
        validation = pd.read_csv(run / "training_log.csv")["val_loss"].iloc[-1]
        return {
            "seed": self.seed,
            "method": method,
            "trained_on": stage,
            "domain_loss": losses["domain_test"],
            "general_loss": losses["general_test"],
            "answer_loss": validation if stage == "questions" else None,
            "accuracy": scores["acc"]["value"],
        }


def words(*arguments: object) -> list[str]:
    """The arguments of a command."""
    return [*map(str, arguments)]


def measure(
    folder: Path, sources: Sequence[Path], seeds: Sequence[int], methods: Sequence[Method], setting: Setting
) -> pd.DataFrame:
    """Return the results of several seeds. folder: of texts and runs. sources: files of the standard library."""
    data = write_data(folder, sources)
    rows = []
    for seed in seeds:
        for row in Experiment(data, folder / f"seed-{seed}", seed, setting).rows(methods):
            rows.append(row)
            print(row, flush=True)
    return pd.DataFrame(rows)


def summary(results: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds as a table in Markdown."""
    columns = ["domain_loss", "general_loss", "answer_loss", "accuracy"]
    lines = [f"| | | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for (method, stage), rows in results.groupby(["method", "trained_on"], sort=False):
        known = [rows[name].astype(float).dropna() for name in columns]
        cells = [f"{values.mean():.3f} ± {values.std():.3f}" if len(values) else "" for values in known]
        lines.append(f"| {method} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="of texts and runs, empty; default: a temporary one")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results; default: that of this file")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(options.folder or Path(temporary), input_files(None), options.seeds, METHODS, Setting())
    results.to_csv(options.out / "results.csv", index=False, float_format="%.4f")
    draw(results, options.out / "results.png")
    print(summary(results), f"{time.perf_counter() - started:.0f} s; {environment()}", sep="\n\n")


if __name__ == "__main__":
    main()
