"""Cutting rows over workers and merging what comes back, worked by hand."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_ray.data.batches import Batch
from rlhf_ray.distributed.groups import LocalGroup, Pending, Ready, arrivals, cut, gather, merge, shares
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.tracing import DRIVER, Recorder


@dataclass(frozen=True)
class Rows(Batch):
    values: Tensor
    names: list[str]


def test_shares_are_contiguous_and_differ_by_one() -> None:
    assert shares(7, 3) == [range(3), range(3, 5), range(5, 7)]
    assert shares(2, 3) == [range(1), range(1, 2), range(2, 2)]
    assert shares(0, 2) == [range(0), range(0)]


def test_shares_keep_groups_of_rows_together() -> None:
    assert shares(6, 2, group_size=2) == [range(4), range(4, 6)]
    with pytest.raises(AssertionError, match="5 rows are not whole groups of 2"):
        shares(5, 2, group_size=2)


def test_cut_takes_rows_of_each_kind() -> None:
    rows = Rows(torch.tensor([[1, 2], [3, 4], [5, 6]]), ["a", "b", "c"])
    part = cut(rows, range(1, 3))
    assert part.values.tolist() == [[3, 4], [5, 6]]
    assert part.names == ["b", "c"]
    assert cut(torch.arange(4), range(1, 3)).tolist() == [1, 2]
    assert cut(["a", "b", "c"], range(1)) == ["a"]


def test_merge_pads_tensors_on_the_right() -> None:
    assert merge([torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])]).tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0]]
    assert merge([torch.tensor([1.0]), torch.tensor([2.0, 3.0])]).tolist() == [1, 2, 3]
    deep = merge([torch.ones(1, 1, 2), torch.ones(1, 2, 2)])
    assert deep.tolist() == [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]


def test_merge_joins_lists_tuples_and_batches() -> None:
    assert merge([["a"], ["b", "c"]]) == ["a", "b", "c"]
    first, second = merge([(torch.tensor([1]), ["x"]), (torch.tensor([2]), ["y"])])
    assert first.tolist() == [1, 2]
    assert second == ["x", "y"]
    joined = merge([Rows(torch.tensor([[1, 2]]), ["a"]), Rows(torch.tensor([[3]]), ["b"])])
    assert joined.values.tolist() == [[1, 2], [3, 0]]
    assert joined.names == ["a", "b"]
    assert merge([None, None]) is None


def test_merge_refuses_what_has_no_rows() -> None:
    with pytest.raises(AssertionError, match="results of type float cannot be merged"):
        merge([1.0, 2.0])


class Scorer:
    """The protocol through which a loop names the method."""

    def score(self, rows: list[str]) -> list[int]:
        raise NotImplementedError


class LengthScorer(Scorer):
    def __init__(self, place: Place) -> None:
        self.place = place
        self.closed = False

    def score(self, rows: list[str]) -> list[int]:
        return [len(row) for row in rows]

    def fail(self) -> None:
        raise ValueError("no")

    def close(self) -> None:
        self.closed = True


def test_local_group_runs_the_workers_own_method_and_records_it() -> None:
    recorder = Recorder()
    worker = LengthScorer(Place("reward", 0, 1))
    group = LocalGroup(worker, role="reward", recorder=recorder)
    assert group.split(Scorer.score, ["a", "bb"]).result() == [1, 2]
    assert group.split_groups(2, Scorer.score, ["a", "bb"]).result() == [1, 2]
    assert gather(group.all(Scorer.score, ["ccc"]), group.first(Scorer.score, [])) == ([[3]], [])
    with pytest.raises(ValueError, match="no"):
        group.first(LengthScorer.fail)
    spans = [(span.role, span.rank, span.method) for span in recorder.drain() if span.role != DRIVER]
    assert spans == [("reward", 0, "score")] * 4
    assert recorder.active() == []
    group.close()
    assert worker.closed


def test_what_is_there_arrives_in_order() -> None:
    group = LocalGroup(LengthScorer(Place("reward", 0, 1)))
    assert list(arrivals(group.one(0, Scorer.score, ["a"]), Ready("two"))) == [(0, [1]), (1, "two")]
    assert list(arrivals()) == []


class Failing(Pending[int]):
    """Fails where it is waited for; notes that nobody will any longer."""

    def __init__(self) -> None:
        self.abandoned = False

    def result(self) -> int:
        raise ValueError("lost")

    def abandon(self) -> None:
        self.abandoned = True


def test_after_a_failure_no_arrival_is_waited_for() -> None:
    failing, late = Failing(), Failing()
    with pytest.raises(ValueError, match="lost"):
        list(arrivals(Ready(1), failing, late))
    assert failing.abandoned is late.abandoned is True


def test_gather_keeps_the_order() -> None:
    assert gather(Ready(1), Ready("two"), Ready(3.0)) == (1, "two", 3.0)
