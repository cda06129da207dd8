"""Training on packed documents is independent of the layout, and equals training on single documents.

Targets are trained in a part of the tokens only, so that losses and auxiliary losses have different weights.
"""

import functools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fira.models.registry import to_document
from tests.integration.test_family_parity import MODELS, ONE
from tests.launch import run_function
from tests.ranks.packed_sequences import PackedSequences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]  # the first test waits for all trainings

SETTINGS = {"microbatch": 2, "dtype": "float64", "steps": 2, "observe": True}
MASKED = ["fira", "microrwkv"]  # attention, and a recurrent state with token shift
MASKED_LAYOUTS = [[2, 1, 1], [1, 2, 1], [1, 2, 2]]
COUNTS = [len(PackedSequences(61, 13).documents(number)) for number in range(5)]


def case(name: str, layout: list[int], **settings: Any) -> str:
    """A training on packed documents, unless the settings say otherwise."""
    document = to_document(MODELS[name])
    return json.dumps({"model": document, "layout": layout, "documents": "packed", **SETTINGS, **settings})


def first_step(name: str, **settings: Any) -> str:
    """The first step without noise and dropout, which would be drawn by the number of the sequence."""
    random = {"noise": 0.0, "dropout": 0.0}
    model = replace(MODELS[name], **{key: value for key, value in random.items() if hasattr(MODELS[name], key)})
    return case(name, ONE, model=to_document(model), steps=1, **settings)


def layouts(name: str) -> list[str]:
    """Trainings that are compared with one rank."""
    plain = [case(name, layout) for layout in ([2, 1, 1], [1, 2, 1])]
    return plain + ([case(name, [1, 2, 2])] if hasattr(MODELS[name], "num_experts") else [])


def masked(name: str, layout: list[int]) -> str:
    """A training on windows of a text whose documents are kept apart, as with --document-mask."""
    return case(name, layout, documents="masked")


def cases() -> list[str]:
    result = [masked(name, layout) for name in MASKED for layout in (ONE, *MASKED_LAYOUTS)]
    result += [case(name, ONE, documents="") for name in MASKED]
    result += [first_step(name, documents=documents) for name in MASKED for documents in ("masked", "separate")]
    for name in MODELS:
        single = first_step(name, documents="single", batch=sum(COUNTS))
        result += [*layouts(name), case(name, ONE), case(name, ONE, devices=2), first_step(name), single]
    return result


@functools.cache
def results(ranks: int) -> dict[str, dict[str, Any]]:
    """The results of all cases with this number of ranks, in one job."""
    names = [name for name in cases() if np.prod(json.loads(name)["layout"][:2]) == ranks]
    by_rank = run_function(
        ranks, "tests.ranks.parity_ranks", "train_all", timeout=170, cases=[json.loads(name) for name in names]
    )
    merged = {}
    for name, *parts in zip(names, *by_rank, strict=True):
        assert all(part["steps"] == parts[0]["steps"] for part in parts)
        weights = {key: value for part in parts for key, value in part["weights"].items()}
        merged[name] = {**parts[0], "weights": weights, "traced": None}  # each rank traces its own actions
    return merged


def result(name: str) -> dict[str, Any]:
    layout = json.loads(name)["layout"]
    return results(layout[0] * layout[1])[name]


def assert_close(one: str, other: str) -> None:
    """The first update divides gradients by their size, also where that is a rounding error."""
    for key, tolerance in (("steps", 1e-12), ("validation", 1e-9)):
        np.testing.assert_allclose(result(one)[key], result(other)[key], rtol=tolerance, err_msg=key)
    for key, values in result(other)["experts"].items():
        np.testing.assert_allclose(result(one)["experts"][key], values, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_layouts_are_bitwise_identical_to_one_rank(name: str) -> None:
    plain = result(case(name, ONE))
    for other in layouts(name):
        assert result(other) == plain, other
    assert_close(case(name, ONE, devices=2), case(name, ONE))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_documents_in_sequences_of_their_own(name: str) -> None:
    """Loss, auxiliary loss, gradient norm, expert statistics, and the validation loss after the step."""
    assert max(COUNTS) > 1
    assert_close(first_step(name), first_step(name, documents="single", batch=sum(COUNTS)))


@pytest.mark.parametrize("name", MASKED)
def test_masked_windows_are_bitwise_identical_to_one_rank(name: str) -> None:
    plain = result(masked(name, ONE))
    for layout in MASKED_LAYOUTS:
        assert result(masked(name, layout)) == plain, layout
    assert plain["steps"] != result(case(name, ONE, documents=""))["steps"]


@pytest.mark.parametrize("name", MASKED)
def test_masked_windows_equal_their_documents_in_sequences_of_their_own(name: str) -> None:
    assert_close(first_step(name, documents="masked"), first_step(name, documents="separate"))
