"""Spans and what they add up to."""

import pytest
import torch

from rlhf_ray.data.batches import PreferencePairs, Prompts, ReferencedPairs, Rollouts, make_sequences, one_version
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import BETWEEN_CALLS, DRIVER, Recorder, Span, covered_seconds, seconds_by_method
from rlhf_ray.distributed.transports import ReceivedWeights, SentWeights
from rlhf_ray.distributed.work import Work, work_of


def test_recorder_lists_what_is_under_way_and_hands_spans_out_once() -> None:
    recorder = Recorder()
    first, second = recorder.begin("generator", "generate"), recorder.begin("reward", "score", workers=2)
    assert [(item.role, item.method, item.workers) for item in recorder.active()] == [
        ("generator", "generate", 1),
        ("reward", "score", 2),
    ]
    span = Span("generator", 0, "generate", 1.0, 3.0)
    recorder.finish(first, [span])
    assert [item.role for item in recorder.active()] == ["reward"]
    recorder.finish(second)
    assert recorder.active() == []
    assert [found for found in recorder.drain() if found.role != DRIVER] == [span]
    assert recorder.drain() == []


def test_the_driver_notes_its_work_and_the_time_between_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 13.0, 14.0, 14.5, 15.0, 16.0, 17.0, 17.5])
    monkeypatch.setattr("rlhf_ray.distributed.tracing.time.time", lambda: next(clock))
    recorder = Recorder()  # 10
    recorder.iteration = 3
    first = recorder.begin("policy", "update")  # 12
    second = recorder.begin("critic", "update")  # 13
    recorder.finish(first)
    recorder.finish(second)  # 14: nothing runs
    with recorder.driver("write rollouts"):  # 14.5 to 15
        pass
    third = recorder.begin("policy", "update")  # 16
    recorder.finish(third)  # 17
    recorder.finish(third)
    recorder.begin("policy", "update")  # 17.5
    found = [(span.rank, span.method, span.start, span.end, span.iteration) for span in recorder.drain()]
    assert found == [
        (1, BETWEEN_CALLS, 10.0, 12.0, 3),
        (0, "write rollouts", 14.5, 15.0, 3),
        (1, BETWEEN_CALLS, 14.0, 16.0, 3),
        (1, BETWEEN_CALLS, 17.0, 17.5, 3),
    ]


def test_seconds_are_those_of_the_slowest_rank() -> None:
    spans = [
        Span("policy", 0, "update", 0.0, 2.0),
        Span("policy", 0, "update", 5.0, 6.0),
        Span("policy", 1, "update", 0.0, 2.5),
        Span("policy", 0, "logprobs", 2.0, 2.5),
    ]
    assert seconds_by_method(spans) == {("policy", "update"): 3.0, ("policy", "logprobs"): 0.5}


def test_covered_seconds_count_each_moment_once_and_only_within() -> None:
    # Within 1 to 10: 1-3, 4-6 (of three that overlap), 9-10.
    intervals = [(9.0, 12.0), (4.0, 5.0), (0.0, 3.0), (4.5, 6.0), (4.2, 4.4), (20.0, 21.0), (-2.0, -1.0)]
    assert covered_seconds(intervals, start=1.0, end=10.0) == pytest.approx(2 + 2 + 1)
    assert covered_seconds([], start=1.0, end=10.0) == 0.0


def rollouts() -> Rollouts:
    sequences = make_sequences([[5, 6], [7]], [[1, 2, 3], [4]])
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(2, 5),
        finished=torch.ones(2, dtype=torch.bool),
        prompts=["a", "b"],
        responses=["c", "d"],
        answers=[None, None],
        prompt_ids=torch.tensor([0, 1]),
        policy_versions=one_version(sequences, 0),
    )


def test_work_is_what_was_sampled_else_what_was_read() -> None:
    prompts = Prompts([[5, 6], [7]], ["a", "b"], [None, None], [0, 1], [0, 0])
    assert work_of([prompts], rollouts()) == Work(tokens=4)
    assert work_of([prompts], [rollouts(), rollouts()]) == Work(tokens=8)
    assert work_of([prompts], None) == Work(tokens=3)
    assert work_of(["settings", rollouts()], torch.zeros(2)) == Work(tokens=7)
    sequences = make_sequences([[5], [7]], [[1, 2, 3], [4]])
    pairs = PreferencePairs(sequences, make_sequences([[5], [7]], [[1], [4]]), [0, 1], torch.zeros(2))
    assert work_of([ReferencedPairs(pairs, torch.zeros(2), torch.zeros(2))], {}) == Work(tokens=6 + 4)
    assert work_of([], SentWeights(1, {}, 80)) == Work(nbytes=80)
    assert work_of([], [ReceivedWeights(1, {}, 80), ReceivedWeights(1, {}, 80)]) == Work(nbytes=160)


def test_a_call_is_for_the_iteration_under_way_or_a_later_one_that_it_names() -> None:
    class Worker:
        def score(self, batch: Rollouts, iteration: int = 0) -> torch.Tensor:
            return torch.zeros(len(batch))

    recorder = Recorder()
    recorder.iteration = 4
    group = LocalGroup(Worker(), role="reward", recorder=recorder)
    group.split(Worker.score, rollouts()).result()
    group.split(Worker.score, rollouts(), iteration=0).result()
    group.split(Worker.score, rollouts(), iteration=5).result()
    spans = [span for span in recorder.drain() if span.role == "reward"]
    assert [(span.iteration, span.tokens) for span in spans] == [(4, 7), (4, 7), (5, 7)]
