"""Generated answers, compared with generation of single prompts."""

import pytest
from tokenizers import Tokenizer

from fira.data.tokenizer_config import TokenizerConfig, default_config
from fira.evaluation.greedy_answers import GROUP, EncodedPrompt, GreedyDecoder, prompt_groups
from fira.evaluation.local_model import LocalModel
from tests.fira.evaluation.evaluation_examples import WORDS, model_with


def prompts_of(tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> list[EncodedPrompt]:
    texts = [" ".join(WORDS[n % 5 : 1 + n % 11]) or WORDS[0] for n in range(30)]
    return [EncodedPrompt(tokenizer.encode(text).ids[:20], stop, 5 + n % 3, False) for n, text in enumerate(texts)]


def test_groups_contain_every_prompt_once(tokenizer: Tokenizer) -> None:
    prompts = prompts_of(tokenizer)
    groups = [*prompt_groups(prompts)]
    assert sorted(index for group in groups for index in group) == list(range(len(prompts)))
    assert all(len({prompts[index].max_tokens for index in group}) == 1 for group in groups)
    assert [len(group) for group in groups] == [GROUP, 10 - GROUP] * 3


@pytest.mark.parametrize("stop", [(), ("e",), ("Wald", "st"), ("nowhere",)])
def test_answers_are_those_of_single_prompts(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    model, prompts = model_with(tokenizer), prompts_of(tokenizer, stop)
    answers = LocalModel(model, 2).answers(prompts)
    assert len(set(answers)) > 5
    eos = tokenizer.token_to_id("</s>")
    for prompt, answer in zip(prompts, answers, strict=True):
        (whole,) = model.generate([prompt.tokens], max_new_tokens=prompt.max_tokens, eos=eos, temperature=0)
        expected = tokenizer.decode(whole[len(prompt.tokens) :])
        for mark in stop:
            expected = expected.split(mark)[0]
        assert answer == expected
    cut = LocalModel(model, 2).answers(prompts_of(tokenizer)) != answers
    assert cut == (stop not in ((), ("nowhere",)))


def test_answer_ends_with_eos(tokenizer: Tokenizer) -> None:
    model, prompts = model_with(tokenizer), prompts_of(tokenizer)[::3]
    free = GreedyDecoder(tokenizer, TokenizerConfig()).answers(model, prompts)
    second = tokenizer.id_to_token(model.generate([prompts[0].tokens], max_new_tokens=2, temperature=0)[0][-1])
    ended = GreedyDecoder(tokenizer, TokenizerConfig(eos_token=second)).answers(model, prompts)
    assert free[0].startswith(ended[0])
    assert len(ended[0]) < len(free[0])
    assert GreedyDecoder(tokenizer, default_config(tokenizer)).answers(model, prompts) == free
