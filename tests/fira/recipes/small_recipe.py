"""A recipe with all kinds of stages on a few chats, and a program that runs it."""

import json
from pathlib import Path

from tests.launch import ROOT
from tests.project.commands import make_checkout

SMALL = 'model_set = "d_model=16,num_layers=1,d_ff=16,n_head=2,num_experts=2"\nvocab_size = 300\nseq_len = 64'
STEPS = "batch_size = 4\neval_sequences = 4\nsteps = 4\nsave_every = '1'\nthreads = 1\nplan = 'none'"
STAGES = {
    "tokenizer": 'command = "prepare"\ndata = "texts/"\nvocab_size = 300',
    "base": f'command = "train"\ndata = "texts/"\n{SMALL}\n{STEPS}',
    "chat": f'command = "train"\ninit = "{{base}}"\nobjective = "sft"\ndata = "chats.jsonl"\n{STEPS}',
    "preferred": f'command = "train"\ninit = "{{chat}}"\nobjective = "dpo"\ndata = "preferences.jsonl"\n{STEPS}',
    "scores": 'command = "evaluate"\ntitle = "DPO"\ncheckpoint = "{preferred}"\ndata = ["domain_test.txt"]\n'
    'tasks = "{base}/../../answers.jsonl,questions.jsonl"',
    "exported": 'command = "export"\ncheckpoint = "{preferred}"',
}


def write_recipe(folder: Path, stages: dict[str, str] = STAGES) -> Path:
    """Write the files that the stages read, unless they exist, and the recipe with its outputs in `out`."""
    if not (folder / "texts").exists():
        make_checkout(folder)
        answers = [{"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "answer": f"{n + 1}"} for n in range(3)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    path = folder / "small.toml"
    tables = "\n\n".join(f"[stages.{name}]\n{content}" for name, content in stages.items())
    path.write_text(f'title = "A <small> recipe"\nout = "out/small"\n\n{tables}\n')
    return path


PROGRAM = ROOT / "scripts" / "recipe.py"
