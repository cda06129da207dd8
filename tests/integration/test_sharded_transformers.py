"""The transformers classes train under DeepSpeed, FSDP2 and DDP with the losses of this project's trainer.

DeepSpeed is not among the pinned packages, because its installation takes minutes: pip install deepspeed.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fira.models.registry import to_document
from pipeline.mpi.launchers import without_launcher
from tests.fira.models import small_families as small
from tests.launch import ROOT, inherited, members, run_function
from tests.reference_training import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="an extra test, where DeepSpeed is installed"),
]

MODELS = {
    "fira": replace(small.FIRA, noise=0.0, balance_rate=0.0),
    "rish": small.RISH,
    "mooshak": small.MOOSHAK,
    "blues": replace(small.BLUES, noise=0.0),
    "microrwkv": small.MICRORWKV,
}
SETTINGS = Settings(clip=0.5, steps=4, batch=4, peak=5e-3, low=5e-4, warmup=1, weight_decay=0.0)
METHODS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    """Initial weights and losses of this project's trainer."""
    common = {"settings": asdict(SETTINGS), "layout": [1, 1, 1], "dtype": "float32", "microbatch": 2, "validation": 30}
    runs = [{"model": to_document(config), **common} for config in MODELS.values()]
    (found,) = run_function(1, "tests.ranks.reference_ranks", "train_all", timeout=120, cases=runs)
    return {
        name: {"model": run["model"], "settings": run["settings"], **results}
        for name, run, results in zip(MODELS, runs, found, strict=True)
    }


@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_those_of_the_trainer(method: str, cases: dict[str, Any], tmp_path: Path):
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = str(ROOT / "tests/ranks/sharded_transformers.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    job = subprocess.Popen(
        [*command, method, str(tmp_path)],
        env=without_launcher(inherited()) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        assert job.wait(240) == 0
    finally:
        for pid in members(job.pid):
            os.kill(pid, signal.SIGKILL)
        job.wait()
    losses = json.loads((tmp_path / f"{method}.json").read_text())
    for name, case in cases.items():
        ours = [loss + aux for loss, aux, *_ in case["steps"]]
        assert losses[name] == pytest.approx(ours, rel=2e-5), name
        assert ours[-1] < ours[0] - 0.05, name  # the weights have changed
