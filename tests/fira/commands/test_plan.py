"""The files of `fira plan --timeline`."""

import json
from pathlib import Path

import pytest

from fira.commands.plan import main


def test_title_of_the_timeline_names_model_device_and_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    flags = ["--model", "mooshak-tiny", "--model-set", "num_layers=6"]
    fixed = ["--pp", "2", "--schedule", "1f1b"]
    main([*flags, *fixed, "--ranks", "2", "--device", "h200", "--top", "1", "--timeline", str(out)])
    assert out.with_suffix(".png").stat().st_size > 5000
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mpirun"))
    names = [event["args"]["name"] for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "M"]
    title = next(name for name in names if not name.startswith("rank"))
    assert title.startswith("mooshak-tiny on 2 ranks of NVIDIA H200 in bf16, ")
    assert title.endswith(f" ms per step: {command}")
    assert " ".join(flags) in command
