"""Small students of multi-step problems, trained alone and distilled from a teacher several times their size.

    python -m benchmarks.reasoning.run --folder /tmp/reasoning

tokenizer → teacher → students of each number of training problems, seed and method. New students of a seed begin with
the same weights and read the same problems in the same order for the same number of steps. A run that is finished is
not repeated. Writes results.csv, one row per student, kind and number of steps; summary.csv; results.png.
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
from typing import NamedTuple

import pandas as pd

from benchmarks.reasoning.problems import KINDS, Problem, problems
from benchmarks.reasoning.summary import draw, summarise
from fira.data.tokenizer import train_tokenizer
from fira.evaluation.task_scores import RESULTS
from fira.training.finish_marker import FINISHED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = (2, 3, 4, 5, 6)  # of the problems
NOT_MERGED = re.compile(r"[^A-Za-z .;?]")  # every digit, operator and parenthesis is a token
MARKER = "so "
SHAPE = "n_head=4,n_kv_head=4,num_experts=1,top_k=1,rope_theta=10000,max_position=192"  # of all models


@dataclass(frozen=True)
class Setting:
    """Sizes of the experiment. Flags of train.py for the teacher, for all students, and for the third stage."""

    vocab_size: int = 384
    teacher_problems: int = 60_000
    student_problems: tuple[int, ...] = (1_000, 3_000)  # the first ones of the teacher's
    tests: int = 25  # test problems of each kind and number of steps
    common: str = "--seq-len 192 --threads 1 --eval-every 250 --save-every 1000000"
    teacher: str = "--model rish-tiny --batch-size 8 --steps 2000 --lr 2.5e-3 --min-lr 2e-4 --warmup 50"
    teacher_model: str = "d_model=96,num_layers=3,d_ff=288," + SHAPE
    student: str = "--model rish-tiny --batch-size 8 --steps 2000 --lr 2.5e-3 --min-lr 2e-4 --warmup 50"
    student_model: str = "d_model=64,num_layers=2,d_ff=192," + SHAPE
    third_stage: str = "--batch-size 8 --steps 100 --lr 1e-4 --min-lr 1e-5 --warmup 10"


@dataclass(frozen=True)
class Method:
    """How a student is trained. init: the method of the student that is trained further; None: a new student."""

    flags: tuple[str, ...]
    teacher: bool = False
    init: str | None = None


DISTILL = ("--objective", "distill", "--distill-temperature", "2")
GRPO = ("--objective", "grpo", "--answer-after", MARKER, "--group-size", "8", "--batch-size", "32")
METHODS = {
    "alone": Method(("--objective", "sft")),
    "distilled": Method(DISTILL, teacher=True),
    "distilled + on-policy": Method((*DISTILL, "--teacher-online", "--on-policy", "1"), teacher=True, init="distilled"),
    "distilled + GRPO": Method(GRPO, init="distilled"),
    "alone + GRPO": Method(GRPO, init="alone"),
}


class Student(NamedTuple):
    """A student, or the teacher. problems: number of its training problems."""

    problems: int
    method: str
    seed: int

    def folder(self, parent: Path) -> Path:
        """The run folder."""
        return parent / f"{self.method.replace(' ', '')}-{self.problems}-{self.seed}"


def prepare(folder: Path, setting: Setting) -> None:
    """Write the tokenizer, the training problems as chats, and a task for each kind and number of steps."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    taught = problems(setting.teacher_problems, STEPS, seed=1, test=False)
    tests = problems(setting.tests * len(KINDS) * len(STEPS), STEPS, seed=2, test=True)
    texts = (NOT_MERGED.sub("", f"{problem.question}\n{problem.completion}") for problem in taught[:3000])
    train_tokenizer(texts, setting.vocab_size).save(str(folder / "tokenizer.json"))
    for count in (*setting.student_problems, setting.teacher_problems):
        chats = ({"prompt": problem.question, "completion": problem.completion} for problem in taught[:count])
        _write(folder / f"problems-{count}.jsonl", chats)
    by_task: dict[str, list[Problem]] = {}
    for problem in tests:
        by_task.setdefault(f"{problem.kind}-{problem.steps}", []).append(problem)
    for task, chosen in by_task.items():
        _write(folder / "tasks" / f"{task}.jsonl", map(_example, chosen))


def _example(problem: Problem) -> dict[str, object]:
    messages = [{"role": "user", "content": problem.question}]
    return {"prompt": messages, "answer": problem.answer, "after": MARKER, "max_tokens": 110}


def _write(path: Path, records: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def train(out: Path, flags: Sequence[str]) -> None:
    """Run train.py, unless the run is finished. It ends with an evaluation on all tasks."""
    if (out / FINISHED).exists():
        return
    tasks = ",".join(map(str, sorted((out.parent / "tasks").iterdir())))
    if out.exists():
        flags = [*flags, "--resume", "auto"]
    if "--init" not in flags:
        flags = [*flags, "--tokenizer", str(out.parent / "tokenizer.json")]
    print(out.name, flush=True)
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "train.py"), "--eval-tasks", tasks, "--out", str(out), *flags],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        )


def run(folder: Path, setting: Setting, seeds: dict[str, int]) -> pd.DataFrame:
    """Run everything that is not finished. Return the scores: problems, method, seed, kind, steps, exact_match.

    seeds: number of seeds by method.
    """
    if not (folder / "tokenizer.json").exists():
        prepare(folder, setting)
    teacher, common = folder / "teacher", setting.common.split()
    data = ["--data", str(folder / f"problems-{setting.teacher_problems}.jsonl")]
    train(
        teacher, ["--objective", "sft", *data, "--model-set", setting.teacher_model, *common, *setting.teacher.split()]
    )
    found = [scores(teacher, Student(setting.teacher_problems, "teacher", 0))]
    for count in setting.student_problems:
        for seed in range(max(seeds.values())):
            for student in (Student(count, method, seed) for method in seeds if seed < seeds[method]):
                train(student.folder(folder), [*student_flags(folder, setting, student), *common])
                found.append(scores(student.folder(folder), student))
    return pd.concat(found, ignore_index=True)


def student_flags(folder: Path, setting: Setting, student: Student) -> list[str]:
    """The flags of train.py for a student."""
    method = METHODS[student.method]
    data = ["--data", str(folder / f"problems-{student.problems}.jsonl")]
    flags = [*method.flags, *data, "--seed", str(student.seed)]
    if method.teacher:
        flags += ["--teacher", str(folder / "teacher")]
    if method.init:
        before = student._replace(method=method.init).folder(folder)
        return ["--init", str(before), *setting.third_stage.split(), *flags]
    return [*flags, "--model-set", setting.student_model, *setting.student.split()]


def scores(out: Path, student: Student) -> pd.DataFrame:
    """The scores of a finished run by kind and number of steps."""
    rows = []
    for task, found in json.loads((out / RESULTS).read_text())["tasks"].items():
        kind, steps = task.split("-")
        score = found["scores"]["exact_match"]["value"]
        rows.append({**student._asdict(), "kind": kind, "steps": int(steps), "exact_match": score})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the data and the runs")
    parser.add_argument("--seeds", type=int, default=10, help="of each method (default: %(default)s)")
    parser.add_argument("--third-stage-seeds", type=int, default=0)
    options = parser.parse_args()
    counts = {name: options.third_stage_seeds if method.init else options.seeds for name, method in METHODS.items()}
    found = run(options.folder.resolve(), Setting(), counts)
    found.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    summary = summarise(found)
    summary.to_csv(HERE / "summary.csv", index=False, float_format="%.4f")
    print(summary.to_string(index=False))
    draw(summary, HERE / "results.png")


if __name__ == "__main__":
    main()
