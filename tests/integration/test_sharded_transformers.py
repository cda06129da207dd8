"""The transformers classes train under DeepSpeed, FSDP2, DDP and Trainer with the losses of this project's trainer.

Two ranks, fp32. Losses include the auxiliary loss and are means over the ranks; gradient norms are before clipping.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig
from fira.models.registry import to_document
from pipeline.mpi.launchers import without_launcher
from tests.fira.models import small_families as small
from tests.fira.small_model import perturbed
from tests.launch import ROOT, inherited, members, run_function
from tests.reference_training import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODELS = {
    "fira": replace(small.FIRA, value_embeddings=True, switch_coefficient=0.1, z_coefficient=0.01),
    "rish": small.RISH,
    "mooshak": small.MOOSHAK,
    "blues": replace(small.BLUES, noise=0.0),
    "microrwkv": small.MICRORWKV,
}
SETTINGS = Settings(clip=1.0, steps=5, peak=5e-3, weight_decay=0.0)
METHODS = ["ddp", "fsdp2", "trainer", "zero1", "zero2", "zero3"]
INSTALLED = [name for name in METHODS if not name.startswith("zero") or find_spec("deepspeed")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    (folder / "settings.json").write_text(json.dumps(asdict(SETTINGS)))
    for name, config in MODELS.items():
        kind, wrapped = (RishAICausalLM, RishAIConfig) if name == "rish" else (FiraLMForCausalLM, FiraLMConfig)
        torch.manual_seed(0)
        perturbed(kind(wrapped(shape=to_document(config))), 0.1).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def ours(cases: Path) -> dict[str, Any]:
    """Sum of loss and auxiliary loss, and gradient norm of each step, [steps, 2] by family."""
    run = {"settings": asdict(SETTINGS), "layout": [1, 2, 1], "dtype": "float32", "microbatch": 2, "validation": 30}
    runs = [{"model": to_document(config), "exported": str(cases / name), **run} for name, config in MODELS.items()]
    trained, _ = run_function(2, "tests.ranks.reference_ranks", "train_all", timeout=120, cases=runs)
    return {
        name: np.array([[loss + aux, norm] for loss, aux, norm, _ in result["steps"]])
        for name, result in zip(MODELS, trained, strict=True)
    }


@pytest.fixture(scope="module")
def theirs(cases: Path) -> dict[str, Any]:
    """Losses and gradient norms by method and family, of one job for all methods that are installed."""
    program = ["tests/ranks/sharded_transformers.py", str(cases), *INSTALLED]
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=without_launcher(inherited()) | {"OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = job.wait(200)
        finally:
            for pid in members(job.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait()
        output.seek(0)
        assert status == 0, output.read()
    return json.loads((cases / "results.json").read_text())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_those_of_the_trainer(method: str, name: str, ours: dict[str, Any], theirs: dict[str, Any]):
    if method not in INSTALLED:
        pytest.skip("needs deepspeed: pip install -e '.[deepspeed]'")
    expected = ours[name]
    assert abs(np.diff(expected[:, 0])).max() > 0.02  # the weights change
    np.testing.assert_allclose(theirs[method][name], expected, rtol=1e-6)
