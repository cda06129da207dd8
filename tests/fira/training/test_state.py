"""Restoring the training state of a checkpoint."""

from tests.fira.training.small_runs import train


def test_checkpoint_of_another_model_is_refused(settings, uninterrupted, tmp_path):
    resume = ["--resume", uninterrupted]
    result = train(settings, 1, "--out", tmp_path / "run", "--model-set", "d_model=32,n_head=2", *resume, status=2)
    message = "is of another model: its d_model is 16 (here 32), d_ff is 16 (here 256), dropout is 0.1 (here 0.0); give"
    assert message in result.stderr
