"""Spans and what they add up to."""

from rlhf_ray.distributed.tracing import Recorder, Span, busy_seconds, seconds_by_method


def test_recorder_lists_what_is_under_way_and_hands_spans_out_once() -> None:
    recorder = Recorder()
    first, second = recorder.begin("generator", "generate"), recorder.begin("reward", "score")
    assert [(item.role, item.method) for item in recorder.active()] == [("generator", "generate"), ("reward", "score")]
    span = Span("generator", 0, "generate", 1.0, 3.0)
    recorder.finish(first, [span])
    assert [item.role for item in recorder.active()] == ["reward"]
    recorder.finish(second)
    assert recorder.active() == []
    assert recorder.drain() == [span]
    assert recorder.drain() == []


def test_seconds_are_those_of_the_slowest_rank() -> None:
    spans = [
        Span("policy", 0, "update", 0.0, 2.0),
        Span("policy", 0, "update", 5.0, 6.0),
        Span("policy", 1, "update", 0.0, 2.5),
        Span("policy", 0, "logprobs", 2.0, 2.5),
    ]
    assert seconds_by_method(spans) == {("policy", "update"): 3.0, ("policy", "logprobs"): 0.5}
    assert busy_seconds(spans) == {"policy": 6.0}
