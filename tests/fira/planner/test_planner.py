"""The planner against hand-made numbers, brute force and what torch really keeps."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.errors import UserError
from fira.metrics.timeline_plot import draw_timelines, write_timeline
from fira.models.registry import build, make_config
from fira.nn.context import Context, TrainingContext
from fira.planner.candidates import Candidate, Constraints, candidates
from fira.planner.costs import estimate
from fira.planner.device_specs import Hardware, Link, load
from fira.planner.model_profile import Cost, ModelProfile, kept_bytes, profile_of
from fira.planner.plan import fewest_recomputed, plan_for
from fira.planner.plan_report import command_line, describe
from fira.planner.search import search
from fira.planner.step_time import Predictor
from fira.training.auto_layout import constraints_of
from fira.training.config import TrainConfig
from pipeline.mesh import Layout
from pipeline.schedule import SCHEDULES, ActionKind, gpipe, one_forward_one_backward, zero_bubble_h1
from pipeline.simulate import earliest_ends, peak_memory, simulate
from pipeline.timeline import read_trace

COSTS = st.lists(st.integers(1, 9), min_size=12, max_size=12)


def unit(stages: int, backward: float = 2.0) -> dict[ActionKind, list[float]]:
    return {kind: [backward if kind is ActionKind.BACKWARD else 1.0] * stages for kind in ActionKind}


def test_transfers_by_hand():
    """F0 ends at 1, is there at 1.5, F1 and B1 take 3, back at 5, B0 takes 2."""
    timeline = simulate(gpipe(2, 1), unit(2), transfer=0.5)
    assert [(str(action), start, end) for action, start, end in timeline.spans[1]] == [
        ("F1.0", 1.5, 2.5),
        ("B1.0", 2.5, 4.5),
    ]
    assert timeline.length == 7
    # Rank 1 is busy from 1.5 to 7.5 but for the last candidate there and back: F2 leaves at 8, B2 comes back at 12.
    spans = simulate(one_forward_one_backward(2, 3), unit(2), transfer=0.5).spans[0]
    assert [start for _, start, _ in spans] == [0, 1, 5, 7, 8, 12]


def test_nothing_travels_inside_a_rank():
    one = SCHEDULES["interleaved"].builder(1, 3)
    assert simulate(one, unit(2), transfer=9.0).length == simulate(one, unit(2)).length == 18
    v = SCHEDULES["zb-v"].builder(2, 1)  # rank 0: F0 and F3, rank 1: F1 F2
    assert simulate(v, unit(4), transfer=1.0).spans[0][1][1] == 5  # F0, a candidate, F1 F2, a candidate


def test_what_is_held_weighs_what_its_stage_keeps():
    assert peak_memory(gpipe(2, 3), [10, 1]) == (30, 3)
    assert peak_memory(zero_bubble_h1(2, 4), [10, 1]) == (20, 2)
    assert peak_memory(gpipe(2, 3), [10, 1], [5, 5]) == (30, 3)  # its backwards are whole
    assert peak_memory(zero_bubble_h1(2, 4), [10, 10], [5, 5]) == (25, 30)  # rank 1 keeps two halves for the end


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=50, deadline=None)
@given(ranks=st.integers(1, 4), microbatches=st.integers(1, 9), costs=COSTS, transfer=st.integers(0, 3))
def test_no_schedule_ends_sooner_than_the_bound(name, ranks, microbatches, costs, transfer):
    schedule = SCHEDULES[name].builder(ranks, microbatches)
    forward, back, weight = (costs[i::3][: schedule.stages] * 3 for i in range(3))
    split = {ActionKind.FORWARD: forward, ActionKind.BACKWARD_INPUT: back, ActionKind.BACKWARD_WEIGHT: weight}
    whole = [b + w for b, w in zip(back, weight, strict=True)]
    timeline = simulate(schedule, {**split, ActionKind.BACKWARD: whole}, transfer)
    if not any(action.kind is ActionKind.BACKWARD_WEIGHT for action in schedule.actions[0]):
        split |= {ActionKind.BACKWARD_INPUT: whole, ActionKind.BACKWARD_WEIGHT: [0] * len(whole)}
    bound = earliest_ends(schedule.placement, microbatches, split, transfer)
    assert all(b <= spans[-1][2] for b, spans in zip(bound, timeline.spans, strict=True))


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-2p", 1)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 8), (8, 16)])
def test_the_bound_is_reached_where_stages_are_equal(name, chunks, ranks, microbatches):
    schedule = SCHEDULES[name].builder(ranks, microbatches)
    costs = unit(schedule.stages)
    whole = {ActionKind.BACKWARD_INPUT: costs[ActionKind.BACKWARD], ActionKind.BACKWARD_WEIGHT: [0.0] * schedule.stages}
    ends = earliest_ends(schedule.placement, microbatches, costs if name == "zb-2p" else costs | whole)
    assert max(ends) == pytest.approx(simulate(schedule, costs).length)


HARDWARE = Hardware(
    name="paper",
    memory=1e9,
    memory_bandwidth=1e11,
    flops={"fp32": 1e12},
    seconds_per_layer=1e-6,
    ranks_per_node=2,
    inside=dict.fromkeys(("p2p", "all_to_all", "all_reduce"), Link(1e-5, 1e10)),
    between=dict.fromkeys(("p2p", "all_to_all", "all_reduce"), Link(1e-4, 1e9)),
)


@pytest.fixture(scope="module")
def tiny() -> ModelProfile:
    return profile_of(make_config("fira-tiny", {}))


def round_numbers(microbatch: int) -> list[Cost]:
    """Embedding, block, head."""
    blocks = [(1, 0, 1), (4, 4, 3), (2, 2, 2)]
    return [Cost(f * 1e-3, i * 1e-3, w * 1e-3, (i + w) * 1e-3, 1000 * microbatch, 1e-3) for f, i, w in blocks]


def test_a_step_by_hand(tiny):
    """Two ranks, two micro-batches, 1F1B: stages of embedding and three blocks, and of a block and the head.

    In ms: F 13 and 6, B 22 and 11. Rank 1 is busy from 13 to 47, rank 0 has B0 from 30 to 52 and B1 to 74; four layers
    are updated.
    """
    free = replace(HARDWARE, inside=dict.fromkeys(HARDWARE.inside, Link(0, math.inf)))
    predictor = Predictor(tiny, free, round_numbers, "fp32")
    assert predictor.stages(2) == [range(4), range(4, 6)]
    result = predictor.predict(Candidate(Layout(2, 1, 1), "1f1b", 1, 2, 0))
    assert result.seconds == pytest.approx(78e-3)
    assert result.parts == pytest.approx(
        {"compute": 52e-3, "uneven": 18e-3, "fill": 4e-3, "optimizer": 4e-3, "exchange": 0, "reduce": 0}
    )
    weights = 4 * sum(tiny.kinds[kind].parameters + tiny.kinds[kind].expert_parameters for kind in (0, 1, 1, 1))
    held = 2 * (4 * 1000 + 128 * 128 * 4)  # two micro-batches, and what goes to the next rank
    assert result.memory[0] == 4 * weights + held + 4 * max(tiny.kinds[0].largest, tiny.kinds[1].largest)


def test_ways_against_brute_force(tiny):
    found = {
        (w.layout.pp, w.layout.dp, w.layout.ep, w.schedule, w.microbatch) for w in candidates(tiny, 4, Constraints(8))
    }
    expected = set()
    for pp in range(1, 5):
        for dp in range(1, 5):
            for ep in range(1, 5):
                for name in SCHEDULES if pp > 1 else ["1f1b"]:
                    stages = pp * (2 if name in ("interleaved", "zb-v") else 1)
                    if pp * dp == 4 and dp % ep == 0 and 4 % ep == 0 and stages <= 6:
                        expected |= {(pp, dp, ep, name, m) for m in (1, 2, 4, 8) if m <= 8 // dp}
    assert found == expected


@settings(max_examples=5, deadline=None)
@given(
    flops=st.sampled_from([1e11, 1e12, 1e13]),
    memory=st.sampled_from([3e7, 5e7, 1e9]),
    bandwidth=st.sampled_from([1e8, 1e10]),
)
def test_the_search_finds_what_trying_all_finds(tiny, flops, memory, bandwidth):
    hardware = replace(HARDWARE, memory=memory, inside=dict.fromkeys(HARDWARE.inside, Link(1e-5, bandwidth)))

    def costs(microbatch: int) -> list[Cost]:
        seconds = [
            layer.flops_per_token(128) * microbatch * 128 / flops + 1e-4 for layer in (k.layer for k in tiny.kinds)
        ]
        return [Cost(s, s, s, 2 * s, 2_000_000 * microbatch, 1e-4) for s in seconds]

    predictor = Predictor(tiny, hardware, costs, "fp32")
    every = [predictor.predict(candidate) for candidate in candidates(tiny, 4, Constraints(16))]
    every = [e if max(e.memory) <= memory else predictor.predict(predictor.sparing(e.candidate)) for e in every]
    fitting = sorted(e.seconds for e in every if max(e.memory) <= memory)
    best = search(tiny, 4, Constraints(16), hardware, costs, "fp32", most=5).best
    assert [e.seconds for e in best] == pytest.approx(fitting[:5])
    assert all(predictor.least_seconds(e.candidate) <= e.seconds * (1 + 1e-9) for e in every)


@pytest.mark.parametrize("family", ["fira", "rish", "blues"])
def test_what_is_kept_without_computing_is_what_torch_keeps(family):
    profile = profile_of(make_config(f"{family}-tiny", {}))
    model = build(profile.config)
    tokens = torch.randint(profile.config.vocab_size, (2, profile.tokens))
    x = tokens
    for index in range(len(model.layers)):
        training = TrainingContext(tokens, aux_weights=torch.ones(2))
        context = Context(torch.full((2,), profile.tokens), keys=torch.arange(2), training=training)
        kept: dict[int, torch.Tensor] = {}
        x = x.detach().requires_grad_(x.is_floating_point())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            x = model.layers[index](x, context)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        really = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
        by_autograd, between = kept_bytes(profile, profile.layers[index], 2)
        assert by_autograd == pytest.approx(really, rel=0.02)
        assert (0 < between < really) == (index > 0)  # tokens have no gradient


def test_sixteen_thousand_ranks():
    config = TrainConfig(model="rish-base", precision="bf16", batch_size=16384)
    model = make_config(config.model, {})
    found, hardware = plan_for(model, constraints_of(config, 16384), config.precision, 16384, "h200")
    times = [estimate.seconds for estimate in found.best]
    assert times == pytest.approx(sorted(times), rel=1e-5)
    assert len(found.best) == 10
    for estimate_ in found.best:
        assert estimate_.candidate.layout.world == 16384
        assert max(estimate_.memory) <= hardware.memory
        assert sum(estimate_.parts.values()) == pytest.approx(estimate_.seconds)
    text = describe(found, hardware, 16384 * 4096, ["--model", "rish-base"])
    assert text.splitlines()[-1] == command_line(found.best[0].candidate, ["--model", "rish-base"])


def test_as_few_blocks_are_recomputed_as_must_be_to_fit(tiny, monkeypatch):
    costs = estimate(tiny, HARDWARE, "fp32")
    with_all = search(tiny, 1, Constraints(64), HARDWARE, costs, "fp32").best[0]
    assert not with_all.candidate.recompute
    few = Constraints(64, microbatch=64)
    plain = search(tiny, 1, few, HARDWARE, costs, "fp32").best[0]
    sizes = [
        max(Predictor(tiny, HARDWARE, costs, "fp32").memory(replace(plain.candidate, recompute=n))) for n in range(5)
    ]
    assert sizes[0] > sizes[2] > sizes[3]
    small = replace(HARDWARE, memory=(sizes[2] + sizes[3]) / 2)
    best = search(tiny, 1, few, small, costs, "fp32").best[0]
    assert best.candidate == replace(plain.candidate, recompute=3)
    assert max(best.memory) == sizes[3]
    again = 3 * costs(64)[1].forward
    assert best.seconds == pytest.approx(plain.seconds + again)
    with monkeypatch.context() as patch:
        patch.setattr("fira.planner.plan.memory_of", lambda device, ranks: small.memory)
        cuda = torch.device("cuda")
        assert fewest_recomputed(tiny.config, plain.candidate, "fp32", cuda, 1) == 3
        patch.setattr("fira.planner.plan.memory_of", lambda device, ranks: sizes[4] / 2)
        with pytest.raises(UserError, match="with all blocks recomputed a rank needs"):
            fewest_recomputed(tiny.config, plain.candidate, "fp32", cuda, 1)


@pytest.mark.parametrize(
    ("change", "ranks", "device", "words"),
    [
        ({}, 2, "h2000", "--device h2000: no such device; choose this, a100, h200, t4, or give a TOML file"),
        ({}, 2, "nowhere.toml", "no such device"),
        ({"model": "rish-base"}, 1, "t4", "does not fit: the smallest of .* needs .* NVIDIA T4 has 16.0"),
        ({"pp": 3}, 4, "t4", "no layout of 4 ranks"),
        ({"batch_size": 2, "pp": 1}, 4, "t4", "no layout of 4 ranks .* 2 sequences"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(change, ranks, device, words):
    config = TrainConfig(**{"model": "fira-tiny", **change})
    with pytest.raises(UserError, match=words) as error:
        constraints = constraints_of(config, config.recipe().batch_size)
        plan_for(make_config(config.model, {}), constraints, config.precision, ranks, device)
    assert "\n" not in str(error.value)


def test_a_device_file_that_lacks_a_figure(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nmemory = 1e9\n')
    with pytest.raises(UserError, match="the file does not say"):
        load(str(path))
    path.write_text("name =")
    with pytest.raises(UserError, match="not readable as TOML"):
        load(str(path))


def test_a_trace_says_what_the_action_lists_say(tmp_path):
    schedule = zero_bubble_h1(3, 5)
    timeline = simulate(schedule, unit(3), transfer=0.25)
    picture = write_timeline(timeline, str(tmp_path / "deep" / "out.json"), "simulated")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    path = tmp_path / "deep" / "out.json"
    back = read_trace(path)
    assert tuple(tuple(a for a, _, _ in spans) for spans in back.spans) == schedule.actions
    assert back.length == pytest.approx(timeline.length)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank, spans in enumerate(timeline.spans):  # no gap and no overlap: what is no action is waiting
        mine = [event for event in events if event["tid"] == rank]
        assert sum(event["dur"] for event in mine) == pytest.approx(spans[-1][2] * 1e6)
        assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"]) for a, b in pairwise(mine))
    assert Counter(event["name"] == "wait" for event in events)[False] == sum(map(len, schedule.actions))
    with pytest.raises(UserError, match="choose a path"):
        write_timeline(timeline, "/dev/null/out.json", "nowhere")


def test_the_picture_shows_all_of_every_timeline(tmp_path, monkeypatch):
    panels = {"short": simulate(gpipe(2, 2), unit(2)), "long": simulate(gpipe(2, 9), unit(2))}
    shown = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: shown.append(figure))
    draw_timelines(panels, tmp_path / "both.png", columns=2)
    assert all(axes.get_xlim()[1] >= panels["long"].length * 1e3 for axes in shown[0].axes)
