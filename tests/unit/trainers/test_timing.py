"""Times, rates and shares of an iteration, by hand."""

import pytest

from rlhf_ray.distributed.tracing import DRIVER, Activity, Span
from rlhf_ray.trainers.timing import Window, span_metrics

SPANS = [
    Span("generator", 0, "generate", 100.0, 102.0, tokens=40),
    Span("generator", 1, "generate", 100.0, 104.0, tokens=60),
    Span("policy", 0, "logprobs", 104.0, 105.0, tokens=300),
    Span("policy", 0, "update", 105.0, 107.0, tokens=300),
    Span("reference", 0, "logprobs", 104.0, 104.5, tokens=300),
    Span("policy", 0, "memory", 109.0, 109.5),
    Span(DRIVER, 0, "write rollouts", 107.0, 108.0),
]


def test_span_metrics_by_hand() -> None:
    assert span_metrics(SPANS, [], Window(100.0, 10.0, 0.25, waited_s=9.0)) == {
        "time/generate_s": 4.0,
        "time/policy_logprobs_s": 1.0,
        "time/policy_update_s": 2.0,
        "time/reference_logprobs_s": 0.5,
        "generator/tokens_per_s": 25.0,
        "policy/tokens_per_s": 150.0,
        "reference/tokens_per_s": 600.0,
        "generator/busy_share": pytest.approx(0.3),
        "policy/busy_share": pytest.approx(0.35),
        "reference/busy_share": pytest.approx(0.05),
        # Somebody works from 100 to 107 and half a second later on.
        "time/idle_share": pytest.approx(0.25),
        "time/iteration_s": 10.0,
        "driver/busy_share": pytest.approx(0.1),
        "driver/cpu_share": 0.025,
    }


def test_an_evaluation_is_no_part_of_the_shares() -> None:
    metrics = span_metrics(SPANS, [], Window(100.0, 20.0, 0.25), evaluation_s=10.0)
    assert metrics["generator/busy_share"] == pytest.approx(0.3)
    assert metrics["time/idle_share"] == pytest.approx(0.25)
    assert metrics["time/iteration_s"] == 20.0


def test_calls_over_the_border_of_an_iteration_count_where_they_lie() -> None:
    begun_before = [Span("generator", 0, "generate", 90.0, 104.0, tokens=140)]
    under_way = [Activity("generator", "generate", 106.0, workers=1)]
    metrics = span_metrics(begun_before, under_way, Window(100.0, 10.0, 0.0))
    assert metrics["generator/busy_share"] == pytest.approx(0.8)
    assert metrics["time/idle_share"] == pytest.approx(0.2)
    assert metrics["generator/tokens_per_s"] == 10.0


def test_responses_in_pieces_are_generated_like_those_in_one() -> None:
    pieces = [
        Span("generator", 0, "start", 100.0, 100.1),
        Span("generator", 0, "next_finished", 100.5, 102.0, tokens=40),
        Span("generator", 0, "next_finished", 102.0, 102.5, tokens=60),
    ]
    metrics = span_metrics(pieces, [], Window(100.0, 4.0, 0.0))
    assert metrics["time/generate_s"] == pytest.approx(2.0)
    assert metrics["generator/tokens_per_s"] == pytest.approx(50.0)
    assert metrics["generator/busy_share"] == pytest.approx(2.1 / 4)


def test_an_iteration_without_calls_is_idle() -> None:
    assert span_metrics([], [], Window(100.0, 10.0, 0.0))["time/idle_share"] == 1.0
