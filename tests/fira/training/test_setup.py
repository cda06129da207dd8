"""Settings that do not fit the number of ranks or each other, and the model of preference training."""

from dataclasses import replace

import pytest

from fira.errors import UserError
from fira.models.blues import BluesConfig
from fira.models.family_options import with_options_of
from fira.models.fira import FiraConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.training.config import PREFERENCES, TrainConfig
from fira.training.setup import choose_model, with_larger_vocabulary
from tests.fira.training.small_runs import train


def test_invalid_layout_is_a_one_line_error_on_all_ranks(settings, tmp_path):
    result = train(settings, 4, "--out", tmp_path / "run", "--pp", 3, status=2)
    assert result.stderr.splitlines() == ["--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "expected"), [("", (0.0, 0.0)), ("dropout=0.2", (0.2, 0.0)), ("noise=1", (0.0, 1))])
def test_preferences_have_neither_dropout_nor_noise_unless_they_are_given(
    given: str, expected: tuple[float, float]
) -> None:
    presets = [choose_model(TrainConfig(model="blues-base", objective=kind), None)[0] for kind in ("pretrain", "dpo")]
    assert [(model.dropout, model.noise) for model in presets] == [(0.1, 0.05), (0.0, 0.0)]
    model, _ = choose_model(TrainConfig(model="blues-base", objective="dpo", model_set=given), None)
    assert (model.dropout, model.noise) == expected
    choose_model(TrainConfig(model="mooshak-base", objective="dpo"), None)  # which has neither


def test_preferences_have_a_recipe_of_their_own() -> None:
    assert TrainConfig(objective="dpo", init="run").recipe() == PREFERENCES
    assert TrainConfig(objective="dpo", lr=1e-6).recipe().lr == 1e-6


def test_resumed_run_has_the_options_of_its_checkpoint() -> None:
    preset, earlier = FiraConfig(value_embeddings=True, relu_squared=True), FiraConfig(softcap=15.0, d_model=8)
    assert with_options_of(earlier, preset, ["relu_squared"]) == replace(preset, value_embeddings=False, softcap=15)
    assert with_options_of(MicroRWKVConfig(), preset, []) == preset == with_options_of(BluesConfig(), preset, [])


def test_vocabulary_of_a_frozen_embedding_does_not_grow():
    config = TrainConfig(init="run", lora="rank=2,alpha=4,targets=experts")
    with pytest.raises(UserError, match="would grow from 300 to 302 tokens, but adapters train no embeddings; give a"):
        with_larger_vocabulary(config, 300, 302)
    assert with_larger_vocabulary(TrainConfig(init="run"), 300, 302).vocab_size == 302
