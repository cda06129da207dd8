"""Losses of n-gram models on the data of a run, with which its losses are compared."""

from pathlib import Path

from fira.json_reader import mapping, number, read, record


def read_baselines(run: Path) -> dict[str, float]:
    """Return the losses by name from `{"baselines": {"unigram": 6.1}}` in a run's data.json; empty without file or key.

    Raises UserError for a damaged file.
    """
    path = run / "data.json"
    if not path.exists():
        return {}
    baselines: dict[str, float] = read(path, record({}, {"baselines": mapping(number())})).get("baselines", {})
    return baselines
