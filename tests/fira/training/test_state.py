"""Restoring the training state of a checkpoint."""

from tests.fira.training.small_runs import train


def test_checkpoint_of_another_model_is_refused(settings, uninterrupted, tmp_path):
    resume = ["--resume", uninterrupted]
    result = train(settings, 1, "--out", tmp_path / "run", "--model-set", "d_model=32,n_head=2", *resume, status=2)
    message = "is of another model: its d_model is 16 (here 32), d_ff is 16 (here 256), dropout is 0.1 (here 0.0); give"
    assert message in result.stderr


def test_checkpoint_of_another_family_is_refused_without_a_list_of_its_fields(settings, uninterrupted, tmp_path):
    flags = ["--model", "mooshak-tiny", "--model-set", "num_layers=2", "--resume", uninterrupted]
    result = train(settings, 1, "--out", tmp_path / "run", *flags, status=2)
    assert "is of another model: its family is fira (here mooshak); give the flags" in result.stderr
