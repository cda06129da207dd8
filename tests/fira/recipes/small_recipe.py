"""A recipe with all kinds of stages on a few chats."""

import json
from pathlib import Path

from tests.project.commands import make_checkout

SMALL = 'model_set = "d_model=16,num_layers=1,d_ff=16,n_head=2,num_experts=2"\nvocab_size = 300\nseq_len = 64'
STEPS = (
    'batch_size = 4\nmicro_batch_size = 2\neval_sequences = 4\nsteps = 4\nsave_every = "1"\nplan = "none"\nthreads = 1'
)
STAGES = {
    "tokens": 'command = "prepare"\ndata = "texts/"\nvocab_size = 300',
    "base": f'command = "train"\ndata = "texts/"\n{SMALL}\n{STEPS}',
    "chat": f'command = "train"\ninit = "{{base}}"\nobjective = "sft"\ndata = "chats.jsonl"\n{STEPS}',
    "preferred": f'command = "train"\ninit = "{{chat}}"\nobjective = "dpo"\ndata = "preferences.jsonl"\n{STEPS}',
    "scores": 'command = "evaluate"\ntitle = "DPO <1>"\ncheckpoint = "{preferred}"\ndata = ["domain_test.txt"]\n'
    'tasks = "answers.jsonl,questions.jsonl"',
    "exported": 'command = "export"\ncheckpoint = "{preferred}"',
}


def write_recipe(folder: Path, stages: dict[str, str] = STAGES) -> Path:
    """Write the files that the stages read, unless they exist, and the recipe, whose outputs are in `out`."""
    if not (folder / "texts").exists():
        folder.mkdir(exist_ok=True)
        make_checkout(folder)
        messages = [[{"role": "user", "content": f"What is {n} + 1?"}] for n in range(3)]
        answers = [{"prompt": prompt, "answer": "<2>", "max_tokens": 8} for prompt in messages]
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    path = folder / "small.toml"
    tables = "\n\n".join(f"[stages.{name}]\n{content}" for name, content in stages.items())
    path.write_text(f'title = "A <small> recipe"\nout = "out"\n\n{tables}\n')
    return path
