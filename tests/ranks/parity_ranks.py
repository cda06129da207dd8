"""Short training of a small model on synthetic tokens, run on each rank of a parity test."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch

from fira.data.loader import Loader, ValidationSequences
from fira.data.text_windows import TextWindows
from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.models.registry import build, from_document
from fira.optim.lr_schedule import learning_rate
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.compile_blocks import compile_blocks
from fira.parallel.expert_parallel import AllToAllDispatcher
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.packed_sequences import PackedSequences, SeparateDocuments, SingleDocuments
from tests.ranks.plain_reduction import PlainReduction

SEQ_LEN = 13
SEPARATOR = 5  # the token that begins a document where they are "masked"


class Tokens:
    """A fixed stream of token ids that a model can learn to predict."""

    def __init__(self, vocab_size: int, length: int = 4001) -> None:
        rng = np.random.default_rng(5)
        self.ids = (rng.integers(0, 7, length).cumsum() % vocab_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def meta_model(config: Any) -> LanguageModel:
    with torch.device("meta"):
        return build(config)


def train(
    layout: list[int],
    schedule: str = "1f1b",
    steps: int = 4,
    batch: int = 5,
    microbatch: int = 1,
    dropout: float = 0.0,
    dtype: str = "float32",
    devices: int = 1,
    recompute: int = 0,
    compiler: str | None = None,
    layers: int = 4,
    d_ff: int = 20,
    model: dict[str, Any] | None = None,
    observe: bool = False,
    parts: int = 1,
    reduction: str = "tree",
    documents: str = "",
    optimizer: dict[str, Any] | None = None,
    shard: str | None = None,
) -> dict[str, Any]:
    """Train a model on one layout.

    model: the document of a config; by default a small fira. observe: also evaluate after each step, and trace all
    steps. parts: of the experts' exchange. reduction: of gradients, "tree", or as on GPUs "plain" (after the backward)
    or "overlapped" (during it, where kernels are loaded first). documents: instead of windows of a text, train and
    validate on documents that are "packed" into sequences, or "single" ones; or on windows whose documents are kept
    apart, "masked", or are sequences of their own, "separate". optimizer: its settings.
    shard: what the replicas divide.

    Returns loss, auxiliary loss and gradient norm of each step, the last step's expert statistics, and the SHA-256 of
    this rank's weights and moments, for experts of each one; with `observe`, the validation losses and the numbers of
    traced actions as well.
    """
    torch.set_num_threads(1)
    config = FiraConfig(
        vocab_size=61,
        seq_len=SEQ_LEN,
        d_model=24,
        n_head=3,
        num_layers=layers,
        d_ff=d_ff,
        num_experts=4,
        dropout=dropout,
    )
    if model is not None:
        config = from_document(model)
    local_devices = [CPU] * devices
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), local_devices)
    if reduction != "tree":  # experts do not separate the rows of sending ranks
        mesh = dataclasses.replace(mesh, device_type="cuda")
    parameter_dtype = getattr(torch, dtype)
    built = parallelize(
        meta_model(config), mesh, 7, local_devices, schedule, parameter_dtype, recompute=recompute, shard=shard
    )
    if compiler:
        compile_blocks(built.modules(), config.seq_len, compiler)
    for module in built.moe:
        if isinstance(module.dispatcher, AllToAllDispatcher):
            module.dispatcher.parts = parts
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model)
    settings = OptimizerSettings(**(optimizer or {}))
    trainer = Trainer(built, mesh, split, schedule, settings, clip=1.0, fp16=False)
    if reduction != "tree":
        trainer.reduction = {"plain": PlainReduction, "overlapped": OverlappedReduction}[reduction](built, mesh)
        trainer.kernels.needed = reduction == "overlapped"
    separator = SEPARATOR if documents in ("masked", "separate") else None
    tokens: Any = (Tokens(config.vocab_size), Tokens(config.vocab_size, 100))
    loader: Any = Loader(TextWindows(tokens[0], SEQ_LEN, separator=separator), seed=3)
    unseen: Any = ValidationSequences(TextWindows(tokens[1], SEQ_LEN, complete=False, separator=separator))
    if documents == "separate":
        loader, unseen = SeparateDocuments(loader, batch), SeparateDocuments(unseen, len(unseen))
        batch = len(loader)
    elif documents in ("packed", "single"):
        loader = unseen = {"packed": PackedSequences, "single": SingleDocuments}[documents](config.vocab_size, SEQ_LEN)
    results, validation, traced = [], [], []
    for step in range(1, steps + 1):
        if observe:
            built.engine.start_trace()
        result = trainer.step(loader, batch, learning_rate(step, steps, 1e-2, 1e-3, 3), seed=11)
        results.append([result.loss, result.aux_loss, result.grad_norm])
        if observe:
            traced.append(len(built.engine.stop_trace()))
            validation.append(trainer.forward.mean(unseen, batch).loss)
    weights = {}
    for part in built.shards:
        moments = trainer.optimizer.moments.get(part.name, ())  # another rank may have them
        for number, tensor in enumerate((part.parameter.detach(), *moments) if part.kept else ()):
            for i, row in enumerate(tensor if part.expert else [tensor]):
                place = f"{part.name}[{part.start + i}]" if part.expert else part.name
                weights[f"{place}/{number}"] = hashlib.sha256(row.numpy()).hexdigest()
    experts = {"load": result.expert_load, "dropped": result.expert_dropped, "entropy": [result.router_entropy]}
    observed = {"validation": validation, "traced": traced} if observe else {}
    return {"steps": results, "experts": experts, "weights": weights, **observed}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
