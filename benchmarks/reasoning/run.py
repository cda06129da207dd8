"""Small students of multi-step problems, trained alone and distilled from a teacher several times their size.

    python -m benchmarks.reasoning.run --folder /tmp/reasoning

tokenizer → teacher → for each seed, students of each method. All methods of a seed begin with the same weights and see
the same problems in the same order for the same number of steps. A run that is finished is not repeated. Writes
results.csv, one row per method, seed, kind and number of steps; summary.csv; results.png.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.reasoning.problems import KINDS, Problem, problems
from benchmarks.reasoning.summary import draw, summarise
from fira.data.tokenizer import train_tokenizer
from fira.evaluation.evaluation_log import EVALUATIONS
from fira.training.finish_marker import FINISHED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = (2, 3, 4, 5, 6)  # of the problems
NOT_MERGED = re.compile(r"[^A-Za-z .;?]")  # every digit, operator and parenthesis is a token
MARKER = "so "


@dataclass(frozen=True)
class Setting:
    """Sizes of the experiment. Flags of train.py for the teacher and for all students."""

    vocab_size: int = 384
    teacher_problems: int = 60_000
    student_problems: int = 3_000
    tests: int = 30  # test problems of each kind and number of steps
    common: str = "--model mooshak-tiny --seq-len 192 --threads 1 --eval-sequences 64 --save-every 1000000"
    teacher: str = "--batch-size 16 --steps 1400 --lr 2e-3 --min-lr 1e-4 --warmup 100"
    teacher_model: str = "d_model=128,n_head=4,n_kv_head=4,num_layers=4,d_ff=384,tied=true"
    student: str = "--batch-size 8 --steps 1500 --lr 3e-3 --min-lr 1e-4 --warmup 100"
    student_model: str = "d_model=64,n_head=4,n_kv_head=4,num_layers=2,d_ff=192,tied=true"
    distill: str = "--distill-temperature 2"


def prepare(folder: Path, setting: Setting) -> None:
    """Write the tokenizer, the training problems as chats, and a task for each kind and number of steps."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    taught = problems(setting.teacher_problems, STEPS, seed=1, test=False)
    tests = problems(setting.tests * len(KINDS) * len(STEPS), STEPS, seed=2, test=True)
    texts = (NOT_MERGED.sub("", f"{problem.question}\n{problem.completion}") for problem in taught[:2000])
    train_tokenizer(texts, setting.vocab_size).save(str(folder / "tokenizer.json"))
    for name, chosen in (("teacher", taught), ("student", taught[: setting.student_problems])):
        _write(folder / f"{name}.jsonl", ({"prompt": p.question, "completion": p.completion} for p in chosen))
    by_task: dict[str, list[Problem]] = {}
    for problem in tests:
        by_task.setdefault(f"{problem.kind}-{problem.steps}", []).append(problem)
    for task, chosen in by_task.items():
        _write(folder / "tasks" / f"{task}.jsonl", map(_example, chosen))


def _example(problem: Problem) -> dict[str, object]:
    messages = [{"role": "user", "content": problem.question}]
    return {"messages": messages, "answer": problem.answer, "after": MARKER, "max_tokens": 110}


def _write(path: Path, records: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def train(out: Path, flags: Sequence[str]) -> None:
    """Run train.py, unless the run is finished. It ends with an evaluation on all tasks."""
    if (out / FINISHED).exists():
        return
    tasks = ",".join(map(str, sorted((out.parent / "tasks").iterdir())))
    resume = ["--resume", "auto"] if out.exists() else []
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--tokenizer", str(out.parent / "tokenizer.json")]
    print(f"{out.name}", flush=True)
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run(
            [*command, "--eval-tasks", tasks, "--out", str(out), *flags, *resume],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        )


def run(folder: Path, setting: Setting, seeds: int) -> pd.DataFrame:
    """Run everything that is not finished. Return the scores: method, seed, kind, steps, exact_match."""
    if not (folder / "tokenizer.json").exists():
        prepare(folder, setting)
    teacher, common = folder / "teacher", setting.common.split()
    model, data = ["--model-set", setting.teacher_model], ["--data", str(folder / "teacher.jsonl")]
    train(teacher, ["--objective", "sft", *data, *model, *common, *setting.teacher.split()])
    methods = {
        "alone": ["--objective", "sft"],
        "distilled": ["--objective", "distill", "--teacher", str(teacher), *setting.distill.split()],
    }
    model, data = ["--model-set", setting.student_model], ["--data", str(folder / "student.jsonl")]
    found = [scores(teacher, "teacher", 0)]
    for seed in range(seeds):
        for method, flags in methods.items():
            out = folder / f"{method}-{seed}"
            train(out, [*flags, *data, *model, *common, *setting.student.split(), "--seed", str(seed)])
            found.append(scores(out, method, seed))
    return pd.concat(found, ignore_index=True)


def scores(out: Path, method: str, seed: int) -> pd.DataFrame:
    """The scores of a finished run by kind and number of steps."""
    table = pd.read_csv(out / EVALUATIONS)
    last = table[table["iter"] == table["iter"].max()]
    kinds = last["task"].str.split("-", expand=True)
    return pd.DataFrame(
        {"method": method, "seed": seed, "kind": kinds[0], "steps": kinds[1].astype(int), "exact_match": last["score"]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the data and the runs")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    found = run(options.folder.resolve(), Setting(), options.seeds)
    found.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    summary = summarise(found)
    summary.to_csv(HERE / "summary.csv", index=False, float_format="%.4f")
    print(summary.to_string(index=False))
    draw(summary, HERE / "results.png")


if __name__ == "__main__":
    main()
