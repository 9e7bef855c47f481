import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from rlhf_ray.data.batches import Batch, Prompts, Rollouts, make_sequences, one_version, pad_rows


@dataclass(frozen=True)
class Versioned(Batch):
    rows: list[int]
    version: int


def rollouts(prompts: list[list[int]], responses: list[list[int]], *, version: int = 3) -> Rollouts:
    sequences = make_sequences(prompts, responses)
    return Rollouts(
        sequences=sequences,
        generator_logprobs=-sequences.tokens.float(),
        finished=torch.tensor([len(response) > 1 for response in responses]),
        prompts=[f"p{prompt[0]}" for prompt in prompts],
        responses=["r" for _ in responses],
        answers=[None for _ in responses],
        prompt_ids=torch.tensor([prompt[0] for prompt in prompts]),
        policy_versions=one_version(sequences, version),
    )


def test_make_sequences_by_hand() -> None:
    sequences = make_sequences([[5, 6], [7]], [[8], [9, 10, 11]])
    assert sequences.tokens.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert sequences.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert sequences.response_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert sequences.lengths().tolist() == [3, 4]


def test_position_0_is_never_trained() -> None:
    assert make_sequences([[]], [[4, 5]]).response_mask.tolist() == [[False, True]]


def test_no_rows() -> None:
    empty = make_sequences([], [])
    assert len(empty) == 0
    assert empty.tokens.shape == (0, 0)
    assert pad_rows([[], []]).shape == (2, 0)


def test_select_takes_rows_of_every_field_in_the_given_order() -> None:
    chosen = rollouts([[1, 2], [3], [4]], [[9], [8, 7], [6]]).select([2, 0])
    assert chosen.prompts == ["p4", "p1"]
    assert chosen.prompt_ids.tolist() == [4, 1]
    assert chosen.sequences.tokens.tolist() == [[4, 6, 0], [1, 2, 9]]
    assert chosen.policy_versions.tolist() == [[0, 3, 0], [0, 0, 3]]
    assert chosen.oldest_versions().tolist() == [3, 3]
    assert len(chosen) == 2
    assert len(chosen.select([])) == 0


def test_concat_pads_to_the_longest_row() -> None:
    joined = Rollouts.concat([rollouts([[1]], [[2]]), rollouts([[3, 4], [5]], [[6, 7], [8]])])
    assert joined.sequences.tokens.tolist() == [[1, 2, 0, 0], [3, 4, 6, 7], [5, 8, 0, 0]]
    assert joined.sequences.response_mask.tolist() == [
        [False, True, False, False],
        [False, False, True, True],
        [False, True, False, False],
    ]
    assert joined.sequences.response_mask.dtype == torch.bool
    assert joined.generator_logprobs[0].tolist() == [-1, -2, 0, 0]
    assert joined.finished.tolist() == [False, True, False]
    assert joined.prompts == ["p1", "p3", "p5"]


def test_concat_of_selected_parts_is_the_whole() -> None:
    whole = rollouts([[1, 2], [3], [4]], [[9], [8, 7], [6]])
    again = Rollouts.concat([whole.select([0]), whole.select([1, 2])])
    assert torch.equal(again.sequences.tokens, whole.sequences.tokens)
    assert again.prompts == whole.prompts


def test_concat_refuses_single_values_that_differ() -> None:
    with pytest.raises(AssertionError, match="batches disagree"):
        Versioned.concat([Versioned([1], 1), Versioned([2], 2)])


def test_batches_travel_as_numpy_and_come_back_equal() -> None:
    before = rollouts([[1, 2], [3]], [[9], [8, 7]])
    payload = pickle.dumps(before, protocol=5)
    assert b"torch" not in payload.replace(b"torch_", b"")  # no tensor is pickled as a tensor
    after = pickle.loads(payload)
    assert type(after) is Rollouts
    assert torch.equal(after.sequences.tokens, before.sequences.tokens)
    assert after.sequences.response_mask.dtype == torch.bool
    assert torch.equal(after.generator_logprobs, before.generator_logprobs)
    assert after.prompts == before.prompts


def test_read_only_arrays_become_tensors_that_may_be_written() -> None:
    buffers: list[pickle.PickleBuffer] = []
    payload = pickle.dumps(make_sequences([[1]], [[2]]), protocol=5, buffer_callback=buffers.append)
    after = pickle.loads(payload, buffers=[bytes(buffer) for buffer in buffers])
    after.tokens.add_(1)
    assert after.tokens.tolist() == [[2, 3]]


def test_length_of_a_batch_of_lists_and_frozen_fields() -> None:
    prompts = Prompts(token_ids=[[1], [2, 3]], texts=["a", "b"], answers=[None, 4], ids=[7, 9], repeats=[0, 1])
    assert len(prompts) == 2
    assert prompts.select([1]) == Prompts([[2, 3]], ["b"], [4], [9], [1])
    assert Prompts.concat([prompts.select([0]), prompts.select([1])]) == prompts
    with pytest.raises(FrozenInstanceError):
        prompts.texts = []  # type: ignore[misc]
