"""Random settings give a valid run or a one-line error: no traceback, no hang, bounded memory, no write elsewhere."""

from pathlib import Path

import pytest

from tests.launch import run_function


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_settings_are_valid_or_end_with_a_one_line_error(examples: int, tmp_path: Path) -> None:
    environment = dict.fromkeys(("FIRA_CACHE", "TORCHINDUCTOR_CACHE_DIR", "HOME"), str(tmp_path))
    environment["PYTHONHASHSEED"] = "0"  # the examples would depend on it
    arguments = {"examples": examples, "folder": str(tmp_path)}
    (counts,) = run_function(1, "tests.ranks.settings_ranks", "fuzz", timeout=150, env=environment, **arguments)
    assert sum(counts.values()) >= examples
    assert counts["valid"] > examples / 20
    assert counts["error"] > examples / 4
