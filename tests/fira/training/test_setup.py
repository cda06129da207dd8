"""A layout that does not fit the number of ranks."""

from tests.fira.training.small_runs import train


def test_invalid_layout_is_a_one_line_error_on_all_ranks(settings, tmp_path):
    result = train(settings, 4, "--out", tmp_path / "run", "--pp", 3, status=2)
    assert result.stderr.splitlines() == ["--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"]
    assert not (tmp_path / "run").exists()
