import pytest

from rlhf_ray.data import streams
from rlhf_ray.data.streams import Stream


def one(size: int, *, seed: int = 1, shuffle: bool = True) -> Stream:
    return Stream(sizes=[size], weights=[1.0], seed=seed, shuffle=shuffle)


def test_every_pass_over_one_source_holds_each_row_once() -> None:
    taken = one(7).take(0, 21)
    for number in range(3):
        part = taken[7 * number : 7 * number + 7]
        assert sorted(row for row, _ in part) == list(range(7))
        assert {passed for _, passed in part} == {number}
    assert taken[:7] != [(row, 0) for row, _ in taken[7:14]]


def test_a_batch_depends_on_seed_and_position_only() -> None:
    whole = one(5).take(0, 40)
    fresh = one(5)
    assert [fresh.take(start, 4) for start in (36, 0, 12)] == [whole[36:40], whole[0:4], whole[12:16]]
    assert one(5, seed=2).take(0, 40) != whole


def test_without_shuffling_rows_come_in_order() -> None:
    assert [row for row, _ in one(3, shuffle=False).take(2, 5)] == [2, 0, 1, 2, 0]


def test_sources_are_drawn_by_weight_in_whole_passes_of_their_own() -> None:
    stream = Stream(sizes=[10, 50], weights=[3.0, 1.0], seed=4, shuffle=True)
    rows = [row for row, _ in stream.take(0, 4000)]
    assert sum(row < 10 for row in rows) / 4000 == pytest.approx(0.75, abs=0.03)
    first, second = ([row for row in rows if (row < 10) == mine] for mine in (True, False))
    assert sorted(first[:10]) == list(range(10))
    assert sorted(first[10:20]) == list(range(10))
    assert sorted(second[:50]) == list(range(10, 60))
    assert len(stream) == 60


def test_mixed_streams_go_on_over_the_chunks_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK", 16)
    whole = Stream(sizes=[3, 4, 5], weights=[1.0, 2.0, 1.0], seed=9, shuffle=True).take(0, 100)
    fresh = Stream(sizes=[3, 4, 5], weights=[1.0, 2.0, 1.0], seed=9, shuffle=True)
    assert [fresh.take(start, 10) for start in (90, 40, 0)] == [whole[90:], whole[40:50], whole[:10]]
    middle = [row for row, _ in whole if 3 <= row < 7]
    assert all(sorted(middle[i : i + 4]) == [3, 4, 5, 6] for i in range(0, len(middle) - 4, 4))
