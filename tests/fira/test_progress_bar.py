"""The text of a progress bar."""

from fira.progress_bar import progress_bar


def text(total: int, done: int, seconds: float, unit: str) -> str:
    """A bar after `done` of `total` units in some seconds."""
    with progress_bar(total, "label", shown=True, unit=unit) as bar:
        bar.n = done
        bar.start_t -= seconds
        return str(bar)


def test_small_counts_are_integers_and_a_rate_is_in_units_per_second() -> None:
    line = text(6, 3, 6, " layouts")
    assert line.startswith("label:  50%|")
    assert line.endswith("| 3/6 [00:06<00:06,  0.50 layouts/s]")


def test_bytes_have_prefixes() -> None:
    assert text(40_000_000, 10_000_000, 5, "B").endswith("| 10.0M/40.0M [00:05<00:15, 2.00MB/s]")
