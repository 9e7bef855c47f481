"""The figures of a simulated driver, by hand."""

import pytest

from rlhf_ray.bench.driver import Observation, Scale, Times, figures

# 4 s until the first quarter is there, 18 s to judge with 2 scorers, 15 s to learn with 4 learners, 3 s to sync.
SMALL = Scale(scorers=4, learners=8)
TIMES = Times(generation=16.0, judging=36.0, learning=60.0, sync=3.0)


def seen(*memory: float, busy: float = 0.25, idle: float = 0.1, calls: int = 7) -> list[Observation]:
    metrics = {
        "time/iteration_s": 8.0,
        "driver/busy_share": busy,
        "driver/cpu_share": 0.5,
        "time/idle_share": idle,
    }
    return [Observation(metrics, each, 1.0, calls) for each in memory]


def test_figures_by_hand() -> None:
    """Of 7 iterations the first is left out; the memory of the last two is held against that of the two before."""
    found = {each.name: each for each in figures(seen(99, 1, 1, 10, 30, 25, 17), scale=SMALL, times=TIMES)}
    overhead = found["driver/overhead"]
    assert (overhead.value, overhead.floor, overhead.ratio) == (2.0, 40.0, pytest.approx(0.05))
    assert (overhead.repeats, overhead.missed) == (6, False)
    assert found["driver/no_worker_runs"].value == pytest.approx(0.8)
    memory = found["driver/memory"]
    assert (memory.value, memory.floor, memory.ratio) == (21.0, 20.0, 1.05)
    assert memory.at_most == 1.1
    assert found["driver/cpu"].value == 4.0
    assert found["driver/calls"].value == 7
    assert [each.name for each in found.values() if each.missed] == []


def test_memory_that_grows_misses_its_bound() -> None:
    for memory in ([1.0] * 5 + [1.5, 1.5], [1.0] * 31 + [1.06] * 15):
        assert [each.name for each in figures(seen(*memory)) if each.missed] == ["driver/memory"]


def test_a_driver_that_is_too_slow_misses_its_bound() -> None:
    found = figures(seen(*[1.0] * 7, busy=0.9, idle=0.7), scale=SMALL, times=TIMES)
    assert [each.name for each in found if each.missed] == ["driver/overhead", "driver/no_worker_runs"]
