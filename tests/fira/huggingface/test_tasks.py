"""Tasks in JSONL files, compared with lm-eval on the same model; and lm-eval without its data."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.errors import UserError
from fira.evaluation.likelihoods import likelihoods
from fira.evaluation.local_model import LocalModel
from fira.evaluation.request_encoding import RequestEncoder
from fira.evaluation.task_evaluation import encode_task
from fira.evaluation.task_files import read_tasks
from fira.evaluation.task_forms import Request
from tests.fira.evaluation.evaluation_examples import WORDS, greedy_requests, model_with, write_tasks

pytest.importorskip("lm_eval", reason="needs lm-eval")
pytestmark = pytest.mark.slow

# The tasks hellaswag, blimp and lambada_openai of lm-eval, with data in files.
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "pairs": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "words": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}


def write_harness_tasks(folder: Path, data: list[str]) -> Path:
    for path in data:
        name = Path(path).stem
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {path}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(source + TASKS[name])
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_scores_equal_lm_eval(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from fira.huggingface.tasks import evaluate_tasks

    data = write_tasks(tmp_path)
    model = model_with(tokenizer)
    expected = evaluate_tasks(model, [*TASKS], str(write_harness_tasks(tmp_path, data)))
    encoder = RequestEncoder(tokenizer, own_config(model), model.config.seq_len)
    for task in read_tasks(data):
        found = encode_task(task, encoder).scores(LocalModel(model, 4))
        assert found.examples == expected[task.name].examples
        assert found.scores.keys() == expected[task.name].scores.keys()
        for metric, (value, error) in found.scores.items():
            assert value == pytest.approx(expected[task.name].scores[metric][0], rel=1e-5)
            if metric != "perplexity":  # lm-eval estimates its error with random samples
                assert error == pytest.approx(expected[task.name].scores[metric][1], rel=1e-9)


def test_answers_to_requests_equal_lm_eval(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each log-probability, after encoding and truncation by each side."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from fira.huggingface.export_model import as_fast_tokenizer, as_transformers

    model = model_with(tokenizer, seq_len=20)
    fast = as_fast_tokenizer(own_tokenizer(model), own_config(model), 20)
    harness = HFLM(pretrained=as_transformers(model), tokenizer=fast, batch_size=3, max_length=20)
    encoder = RequestEncoder(tokenizer, own_config(model), 20)
    pairs = [
        (where, request)
        for task in read_tasks(write_tasks(tmp_path))
        for where, example in task.examples
        for request in example.requests()
    ]
    pairs += [("x", request) for request in greedy_requests(model, tokenizer)]
    encoded = [encoder.request(request, where) for where, request in pairs]
    assert sum(request.truncated for request in encoded) > 3
    found = likelihoods(encoded, 20, 2, LocalModel(model, 2).reports)
    instances = [Instance("loglikelihood", {}, tuple(request), number) for number, (_, request) in enumerate(pairs)]
    for ours, theirs in zip(found, harness.loglikelihood(instances, disable_tqdm=True), strict=True):
        assert ours.log_probability == pytest.approx(theirs[0], rel=1e-5)
        assert ours.greedy == theirs[1]
    assert len({answer.greedy for answer in found}) == 2


def test_answers_in_a_chat_equal_lm_eval(tokenizer: Tokenizer) -> None:
    """With the text of a chat that lm-eval formats, and choices without a space before them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from fira.huggingface.export_model import as_fast_tokenizer, as_transformers

    model = model_with(tokenizer, seq_len=64)
    fast = as_fast_tokenizer(own_tokenizer(model), own_config(model), 64)
    harness = HFLM(pretrained=as_transformers(model), tokenizer=fast, batch_size=1, max_length=64)
    encoder = RequestEncoder(tokenizer, own_config(model), 64)
    questions = [
        [{"role": "user", "content": "im Wald"}],
        [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), WORDS, strict=False)],
    ]
    requests = [Request(question, choice) for question in questions for choice in ("Die Bäume", "main")]
    encoded = [encoder.request(request, "x") for request in requests]
    found = likelihoods(encoded, 64, 2, LocalModel(model, 2).reports)
    texts = [harness.apply_chat_template(question) for question, _ in requests]
    instances = [
        Instance("loglikelihood", {}, (text, choice), 0) for text, (_, choice) in zip(texts, requests, strict=True)
    ]
    for ours, theirs in zip(found, harness.loglikelihood(instances, disable_tqdm=True), strict=True):
        assert ours.log_probability == pytest.approx(theirs[0], rel=1e-5)


def test_missing_dataset_is_one_line(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fira.huggingface.tasks import evaluate_tasks

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (
        "dataset_path: nobody/no-such-dataset",
        'dataset_path: json\ndataset_kwargs: {data_files: "no.json"}',
    ):
        (tmp_path / "missing.yaml").write_text(f"task: missing\n{source}\ntest_split: train" + TASKS["words"])
        with pytest.raises(UserError, match=r"^--tasks missing: its dataset cannot be loaded .*JSONL file") as error:
            evaluate_tasks(model_with(tokenizer), ["missing"], str(tmp_path))
        assert "\n" not in str(error.value)
