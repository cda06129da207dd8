"""Small students of multi-step problems, trained alone and distilled from a teacher several times their size.

    python -m benchmarks.reasoning.run --folder /tmp/reasoning

tokenizer → teacher and students without one → students with it → third stages. New students of a seed begin with the
same weights and read the same problems in the same order for the same number of steps. A run that is finished is not
repeated. Writes to the folder results.csv, one row per student, kind and number of steps; summary.csv; results.png.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.reasoning.problems import KINDS, TEST, TRAINING, Problem, problems
from benchmarks.reasoning.summary import draw, summarise
from fira.data.tokenizer import train_tokenizer
from fira.evaluation.task_scores import RESULTS
from fira.training.finish_marker import FINISHED

ROOT = Path(__file__).parents[2]
STEPS = (2, 3, 4, 5, 6)  # of the problems
NOT_MERGED = re.compile(r"[^A-Za-z .;?]")  # every digit, operator and parenthesis is a token
MARKER = "so "
SHAPE = "n_head=4,n_kv_head=4,num_experts=1,top_k=1,rope_theta=10000,max_position=192"  # of all models
RECIPE = "--model rish-tiny --batch-size 8 --optimizer muon --lr 5e-3 --min-lr 2e-4 --warmup 50 --lr-schedule cosine"


@dataclass(frozen=True)
class Setting:
    """Sizes of the experiment. Flags of train.py for the teacher, for all students, and for the third stage."""

    vocab_size: int = 384
    part: str = TEST  # scored
    errors: float = 0.15  # share of the steps of the solutions that are wrong
    teacher_problems: int = 80_000
    student_problems: int = 2_000  # the first ones of the teacher's
    tests: int = 25  # test problems of each kind and number of steps
    common: str = "--seq-len 192 --threads 1 --eval-every 250 --save-every 1000000"
    teacher: str = f"{RECIPE} --steps 3000"
    teacher_model: str = "d_model=128,num_layers=3,d_ff=384," + SHAPE
    student: str = f"{RECIPE} --steps 2000"
    student_model: str = "d_model=64,num_layers=2,d_ff=192," + SHAPE
    third_stage: str = "--batch-size 8 --steps 100 --lr 1e-4 --min-lr 1e-5 --warmup 10"


@dataclass(frozen=True)
class Method:
    """How a student is trained.

    init: the method of the student that is trained further; None: a new student. data: "problems" with solutions, or
    "answers", the same problems with the right answers alone.
    """

    flags: tuple[str, ...]
    teacher: bool = False
    init: str | None = None
    data: str = "problems"


DISTILL = ("--objective", "distill")
GRPO = (
    *["--objective", "grpo", "--group-size", "8", "--batch-size", "32", "--answer-tokens", "110", "--answer-after"],
    MARKER,
)
METHODS = {
    "alone": Method(("--objective", "sft")),
    "distilled": Method(DISTILL, teacher=True),
    "distilled + on-policy": Method((*DISTILL, "--teacher-online", "--on-policy", "1"), teacher=True, init="distilled"),
    "distilled + GRPO": Method(GRPO, init="distilled", data="answers"),
    "alone + GRPO": Method(GRPO, init="alone", data="answers"),
}


class Student(NamedTuple):
    """A student, or the teacher."""

    method: str
    seed: int

    def folder(self, parent: Path) -> Path:
        """The run folder."""
        return parent / f"{self.method.replace(' ', '')}-{self.seed}"


TEACHER = Student("teacher", 0)


def prepare(folder: Path, setting: Setting) -> None:
    """Write the tokenizer, problems and answers as chats, and a task for each kind and number of steps, if needed."""
    prepared, values = folder / "setting.json", json.dumps(asdict(setting), indent=2)
    if prepared.exists() and prepared.read_text() != values:
        raise SystemExit(f"{folder} has runs with another setting; choose another --folder")
    if prepared.exists():
        return
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    taught = problems(setting.teacher_problems, STEPS, seed=1, part=TRAINING, errors=setting.errors)
    tests = problems(setting.tests * len(KINDS) * len(STEPS), STEPS, seed=2, part=setting.part)
    texts = (NOT_MERGED.sub("", f"{problem.question}\n{problem.completion}") for problem in taught[:3000])
    train_tokenizer(texts, setting.vocab_size).save(str(folder / "tokenizer.json"))
    for count in (setting.student_problems, setting.teacher_problems):
        chats = ({"prompt": problem.question, "completion": problem.completion} for problem in taught[:count])
        _write(folder / f"problems-{count}.jsonl", chats)
    chosen = taught[: setting.student_problems]
    answers = ({"prompt": problem.question, "completion": f"{MARKER}{problem.answer}"} for problem in chosen)
    _write(folder / f"answers-{setting.student_problems}.jsonl", answers)
    by_task: dict[str, list[Problem]] = {}
    for problem in tests:
        by_task.setdefault(f"{problem.kind}-{problem.steps}", []).append(problem)
    for task, chosen in by_task.items():
        _write(folder / "tasks" / f"{task}.jsonl", map(_example, chosen))
    prepared.write_text(values)


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


def run(folder: Path, setting: Setting, seeds: dict[str, int], jobs: int = 1) -> pd.DataFrame:
    """Run everything that is not finished. Return the scores: method, seed, kind, steps, exact_match.

    seeds: number of seeds by method. jobs: runs at the same time.
    """
    prepare(folder, setting)
    students = [Student(method, seed) for method in METHODS for seed in range(seeds.get(method, 0))]
    stages = [
        [TEACHER, *(s for s in students if not METHODS[s.method].init and not METHODS[s.method].teacher)],
        [s for s in students if not METHODS[s.method].init and METHODS[s.method].teacher],
        [s for s in students if METHODS[s.method].init],
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for stage in stages:
            tuple(pool.map(lambda s: train(s.folder(folder), flags_of(folder, setting, s)), stage))
    return pd.concat([scores(s.folder(folder), s) for s in (TEACHER, *students)], ignore_index=True)


def flags_of(folder: Path, setting: Setting, student: Student) -> list[str]:
    """The flags of train.py for a student or the teacher."""
    flags = ["--seed", str(student.seed), *setting.common.split()]
    if student == TEACHER:
        data = folder / f"problems-{setting.teacher_problems}.jsonl"
        flags += ["--objective", "sft", "--data", str(data), "--model-set", setting.teacher_model]
        return [*flags, *setting.teacher.split()]
    method = METHODS[student.method]
    flags += ["--data", str(folder / f"{method.data}-{setting.student_problems}.jsonl")]
    if method.init:
        before = student._replace(method=method.init).folder(folder)
        flags += ["--init", str(before), *setting.third_stage.split()]
    else:
        flags += ["--model-set", setting.student_model, *setting.student.split()]
    if method.teacher:
        flags += ["--teacher", str(TEACHER.folder(folder))]
    return [*flags, *method.flags]


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
    parser.add_argument("--third-stage-seeds", type=int, default=3, help="of GRPO and on-policy (default: %(default)s)")
    parser.add_argument(
        "--errors", type=float, default=Setting.errors, help="share of wrong steps (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    options = parser.parse_args()
    third = min(options.third_stage_seeds, options.seeds)
    counts = {name: third if method.init else options.seeds for name, method in METHODS.items()}
    folder = options.folder.resolve()
    found = run(folder, Setting(errors=options.errors), counts, options.jobs)
    found.to_csv(folder / "results.csv", index=False, float_format="%.4f")
    summary = summarise(found)
    summary.to_csv(folder / "summary.csv", index=False, float_format="%.4f")
    print(summary.to_string(index=False))
    draw(summary, folder / "results.png")


if __name__ == "__main__":
    main()
