import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.data.packing import balance, pack, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def test_micro_batches_by_hand() -> None:
    # Longest first: 9 | 6 + 3 | 3 + 2; the row of 9 is above the budget of 8 ... and 6 + 3 is too.
    assert plan_micro_batches([3, 9, 2, 6, 3], max_tokens=8) == [[1], [3], [0, 4, 2]]
    assert plan_micro_batches([3, 9, 2, 6, 3], max_tokens=9) == [[1], [3, 0], [4, 2]]
    assert plan_micro_batches([1, 1, 1], max_tokens=9, max_sequences=2) == [[0, 1], [2]]
    assert plan_micro_batches([], max_tokens=9) == []


@given(LENGTHS, st.integers(1, 80), st.none() | st.integers(1, 5))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], most: int, rows: int | None) -> None:
    groups = plan_micro_batches(lengths, max_tokens=most, max_sequences=rows)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert sum(lengths[row] for row in group) <= most or len(group) == 1
        assert rows is None or len(group) <= rows


def test_balance_by_hand() -> None:
    # 5 -> a, 4 -> b, 3 -> b (4 < 5), 3 -> a, 3 -> b (7 < 8): 8 and 10.
    assert balance([3, 5, 3, 4, 3], 2) == [[1, 2], [0, 3, 4]]
    assert balance([1.0], 3) == [[0], [], []]


@given(LENGTHS, st.integers(1, 6))
def test_balance_deals_every_row_once_and_keeps_the_parts_close(costs: list[int], parts: int) -> None:
    shares = balance(costs, parts)
    assert len(shares) == parts
    assert sorted(row for share in shares for row in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def rows_of_two_one_and_three() -> Sequences:
    return make_sequences([[11], [21], [31]], [[12], [], [32, 33]])


def test_pack_by_hand() -> None:
    packed = pack(rows_of_two_one_and_three(), [2, 0, 1])
    assert packed.tokens.tolist() == [[31, 32, 33, 11, 12, 21]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=12), st.randoms())
def test_a_pack_holds_every_row_whole(sizes: list[tuple[int, int]], random: object) -> None:
    sequences = make_sequences([list(range(1, p + 1)) for p, _ in sizes], [list(range(50, 50 + r)) for _, r in sizes])
    rows = list(range(len(sizes)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    packed = pack(sequences, rows)
    lengths = sequences.lengths()[rows].tolist()
    parts = zip(packed.tokens[0].split(lengths), packed.position_ids[0].split(lengths), rows, lengths, strict=True)
    for tokens, positions, row, length in parts:
        assert torch.equal(tokens, sequences.tokens[row, :length])
        assert torch.equal(positions, torch.arange(length))
