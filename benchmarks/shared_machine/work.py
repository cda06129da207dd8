"""Training steps and decoding of fira-tiny, timed on request. Started by run.py under mpirun."""

import torch

import pipeline
from benchmarks.turns import serve
from fira.data.random_tokens import RandomTokens
from fira.devices import keep_freed_memory
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS, RECIPES, build
from fira.wait_policy import share_cores
from pipeline.mesh import CPU, Layout

CONFIG, BATCH = PRESETS["fira-tiny"], RECIPES["fira-tiny"].batch_size
STEPS, NEW, PROMPT = 2, 128, 32  # training steps, new tokens, and tokens of the prompt in a call
UNITS = {"train": STEPS * BATCH * CONFIG.seq_len, "decode": NEW}  # tokens per call


def main() -> None:
    world = pipeline.init(timeout_s=3600)  # a rank waits while other jobs are timed
    share_cores()
    keep_freed_memory()
    loader = RandomTokens(CONFIG.vocab_size, CONFIG.seq_len)
    trainer = make_trainer(CONFIG, Layout(dp=world.size), "1f1b", CPU, min(8, BATCH // world.size))
    model = build(CONFIG).eval()
    prompt = torch.arange(PROMPT)[None]

    def train() -> None:
        for _ in range(STEPS):
            trainer.step(loader, BATCH, 1e-3, 0, [])

    contenders = {"train": train}
    if world.size == 1:
        contenders["decode"] = lambda: model.generate(prompt, NEW, temperature=0)
    for contender in contenders.values():
        contender()
    serve(contenders, world.rank)


if __name__ == "__main__":
    main()
