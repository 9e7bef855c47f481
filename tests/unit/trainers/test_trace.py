"""trace.json: its events, and that it stays whole through kills, resumes and long runs."""

import json

from rlhf_ray.distributed.tracing import DRIVER, Span
from rlhf_ray.trainers.trace import TraceFile, read_trace

GENERATE = Span("generator", 1, "generate", 1000.5, 1002.0, 3, tokens=40, cpu_s=1.25)


def calls(path):
    return [event for event in read_trace(path) if event["ph"] == "X"]


def test_events_by_hand(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == []
    trace.write("ppo", [GENERATE, Span(DRIVER, 1, "between calls", 1002.0, 1002.001, 3)])
    trace.write("ppo", [Span("policy", 0, "send_weights", 1003.0, 1004.0, 3, nbytes=80)])
    trace.write("ppo", [Span("policy", 0, "memory", 1004.0, 1004.1, 3)])
    trace.close()
    args = {"stage": "ppo", "iteration": 3}
    assert json.loads((tmp_path / "trace.json").read_text()) == [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "generator"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {"name": "rank 1"}},
        {"ph": "X", "name": "generate", "cat": "ppo", "pid": 0, "tid": 1, "ts": 1000500000, "dur": 1500000}
        | {"args": args | {"tokens": 40, "cpu_s": 1.25}},
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "driver"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "between calls"}},
        {"ph": "X", "name": "between calls", "cat": "ppo", "pid": 1, "tid": 1, "ts": 1002000000, "dur": 1000}
        | {"args": args},
        {"ph": "M", "name": "process_name", "pid": 2, "tid": 0, "args": {"name": "policy"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 0, "args": {"name": "rank 0"}},
        {"ph": "X", "name": "send_weights", "cat": "ppo", "pid": 2, "tid": 0, "ts": 1003000000, "dur": 1000000}
        | {"args": args | {"bytes": 80}},
    ]


def test_a_run_that_was_killed_goes_on_with_its_trace(tmp_path):
    path = tmp_path / "trace.json"
    first = TraceFile(path)
    first.write("ppo", [GENERATE])
    first.write("ppo", [GENERATE, GENERATE])
    first.close()
    whole = path.read_bytes()
    for torn in range(len(whole) - 60, len(whole)):
        path.write_bytes(whole[:torn])
        second = TraceFile(path)
        second.write("ppo", [Span("generator", 1, "probe", 1010.0, 1011.0, 4), Span("policy", 0, "update", 1, 2, 4)])
        second.close()
        events = json.loads(path.read_text())
        assert [event["name"] for event in events if event["ph"] == "X"][-2:] == ["probe", "update"]
        assert 4 <= len(calls(path)) <= 5
        names = [(event["pid"], event["args"]["name"]) for event in events if event["name"] == "process_name"]
        assert names == [(0, "generator"), (1, "policy")]


def test_a_long_run_keeps_its_newest_calls(tmp_path):
    path = tmp_path / "trace.json"
    trace = TraceFile(path, limit_bytes=10_000)
    for iteration in range(1000):
        trace.write("sft", [Span("policy", iteration % 2, "update", iteration, iteration + 1, iteration)])
        assert path.stat().st_size <= 10_200
    trace.close()
    events = json.loads(path.read_text())
    iterations = [event["args"]["iteration"] for event in calls(path)]
    assert iterations == list(range(iterations[0], 1000))
    assert len(iterations) > 20
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["policy", "rank 0", "rank 1"]


def test_without_a_trace_there_are_no_events(tmp_path):
    assert read_trace(tmp_path / "trace.json") == []
