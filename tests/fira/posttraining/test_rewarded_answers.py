"""Prompts and answers of packed chats, sampled answers, and their rewards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fira.data.derived_batches import DerivedBatches
from fira.data.loader import Loader
from fira.data.rows import Rows
from fira.data.tokenizer import TOKENIZER, train_tokenizer
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build
from fira.posttraining.answer_sampler import sample
from fira.posttraining.chat_corpus import prepare_chats
from fira.posttraining.grpo import advantages
from fira.posttraining.on_policy import OnPolicyAnswers
from fira.posttraining.prompted_answers import PromptedAnswer, packed, prompted_answers
from fira.posttraining.rewarded_answers import ExactReward, RewardedAnswers
from tests.chats import encode, make_chats, write_chats

SEQ_LEN = 80


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A vocabulary of bytes."""
    return train_tokenizer([], 261)


def sequences_of(folder: Path, tokenizer: Tokenizer, answer_tokens: int = 0) -> Any:
    tokenizer.save(str(folder / TOKENIZER))
    data = write_chats(folder / "chats.jsonl", make_chats(40))
    return prepare_chats(
        str(data),
        folder / TOKENIZER,
        261,
        SEQ_LEN,
        folder / "cache",
        progress=False,
        answer_tokens=answer_tokens,
    )


def test_prompts_and_last_answers_are_those_of_the_chats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = sequences_of(tmp_path, tokenizer)
    found = set()
    for windows in (corpus.sources[0].train, corpus.sources[0].val):
        rows = windows.rows(range(len(windows)), len(windows) + 1)  # the last one is padding
        documents = prompted_answers(rows)
        assert documents[-1] == []
        found |= {(tuple(prompt), tuple(answer)) for sequence in documents for prompt, answer in sequence}
        again = prompted_answers(packed(documents, SEQ_LEN))
        assert again == documents
    expected = set()
    for chat in make_chats(40):
        ids, _ = encode(tokenizer, chat)
        answer, _ = encode(tokenizer, chat[-1:])
        cut = len(ids) - len(answer) + 1
        expected.add((tuple(ids[:cut]), tuple(ids[cut:])))
    assert found == expected


def test_sequences_have_room_for_longer_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    windows = sequences_of(tmp_path, tokenizer, answer_tokens=40).sources[0].train
    rows = windows.rows(range(len(windows)), len(windows))
    used = [[min(SEQ_LEN, len(p) + max(40, len(a))) for p, a in sequence] for sequence in prompted_answers(rows)]
    assert max(map(sum, used)) <= SEQ_LEN
    assert (
        max(map(len, used))
        == 1
        < max(len(sequence) for sequence in prompted_answers(sequence_rows(tmp_path, tokenizer)))
    )


def sequence_rows(folder: Path, tokenizer: Tokenizer) -> Rows:
    windows = sequences_of(folder, tokenizer).sources[0].train
    return windows.rows(range(len(windows)), len(windows))


def test_sample_ends_at_eos_or_at_its_limit() -> None:
    torch.manual_seed(0)
    model = build(
        MooshakConfig(vocab_size=12, seq_len=30, d_model=12, num_layers=1, n_head=2, n_kv_head=2, d_ff=8)
    ).eval()
    prompts, limits = 4 * [[3, 4], [5], [6, 7, 8]], 4 * [9, 2, 7]
    answers = sample(model, prompts, limits, eos=1, seed=4)
    alone = [[new[0] for new in continuation(model, [p], 9, Sampling(seed=4 + n))] for n, p in enumerate(prompts)]
    for answer, limit, long in zip(answers, limits, alone, strict=True):
        end = long.index(1) + 1 if 1 in long else len(long)
        assert answer == long[: min(limit, end)]
    assert {answer[-1] == 1 for answer in answers} == {True, False}


class Reversed:
    """Instead of a sampler: the answers of the data backwards, and one token less in each further sequence."""

    def sampled(self, sequences: Any, first: int) -> list[list[PromptedAnswer]]:
        return [
            [PromptedAnswer(prompt, answer[::-1][: max(1, len(answer) - row)]) for prompt, answer in sequence]
            for row, sequence in enumerate(sequences)
        ]


def test_share_of_sequences_on_policy_depends_on_number_and_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = sequence_rows(tmp_path, tokenizer)
    count = len(rows.tokens)
    changed: dict[tuple[float, int], list[int]] = {}
    for share, seed in ((0.0, 1), (0.4, 1), (0.4, 2), (1.0, 1)):
        answers = OnPolicyAnswers(Reversed(), share, seed)  # type: ignore[arg-type]
        new = answers(rows, 5)
        split = [answers(Rows(*(a[n : n + 1] for a in rows[:3])), 5 + n) for n in range(count)]  # type: ignore[arg-type]
        changed[share, seed] = [n for n in range(count) if (new.tokens[n] != rows.tokens[n]).any()]
        assert changed[share, seed] == [n for n in range(count) if (split[n].tokens[0] != rows.tokens[n]).any()]
    assert changed[0.0, 1] == []
    assert changed[1.0, 1] == [*range(count)]
    assert 0 < len(changed[0.4, 1]) < count
    assert changed[0.4, 1] != changed[0.4, 2]


def test_advantages_of_a_group() -> None:
    rewards = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = advantages(rewards)
    torch.testing.assert_close(
        torch.tensor(found[:, 0]), torch.tensor([0.5, -0.5, -0.5, 0.5]).double() / (1 / 3**0.5 + 1e-4)
    )
    assert not found[:, 1].any()
    assert not advantages(rewards[:1]).any()


def test_rewards_of_final_answers(tokenizer: Tokenizer) -> None:
    reward = ExactReward(tokenizer, "so ")
    for answer, expected in (("3+4=7 so 7", 1), ("so 8 so  7 ", 1), ("7", 0), ("3+4=8 so 8", 0), ("so 7.", 0)):
        ids = [*tokenizer.encode(answer).ids, tokenizer.token_to_id("</s>")]
        assert reward(ids, tokenizer.encode("4+3=7 so 7").ids) == expected


def test_data_without_final_answers_are_found_before_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    windows = sequences_of(tmp_path, tokenizer).sources[0].train
    ExactReward(tokenizer, None).check(windows)
    ExactReward(tokenizer, ".").check(windows)  # the end of each answer
    with pytest.raises(UserError, match=r"--answer-after 'a': the answer '[^a]*' of the data does not contain it"):
        ExactReward(tokenizer, "a").check(windows)


def test_rewards_are_stored_at_the_tokens_of_the_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    windows = sequences_of(tmp_path, tokenizer).sources[0].train
    answers = RewardedAnswers(Reversed(), lambda new, old: float(len(new) == len(old)), 2)  # type: ignore[arg-type]
    loader = DerivedBatches(Loader(windows, 3), answers, 2)
    rows, data = loader.batch(4, 4), Loader(windows, 3).batch(2, 2)
    for name in ("weights", "advantages"):
        assert ((rows.stored[name] != 0) <= (rows.targets >= 0)).all()
    for row, documents in enumerate(prompted_answers(rows)):
        originals = prompted_answers(data)[row // 2]
        assert [prompt for prompt, _ in documents] == [prompt for prompt, _ in originals]
        assert rows.stored["answers"][row] == len(documents)
        equal = [len(new) == len(old) for (_, new), (_, old) in zip(documents, originals, strict=True)]
        assert rows.stored["wrong"][row] == equal.count(False)
        np.testing.assert_allclose(rows.stored["weights"][row].sum(), len(documents))
        gain = (rows.stored["weights"] * rows.stored["advantages"])[row].sum()
        # Of a group whose first answer is right and whose second one is wrong, or of one without a right answer.
        np.testing.assert_allclose(gain, (0.5, -0.5, 0, 0)[row] / (0.5**0.5 + 1e-4) * len(documents))
