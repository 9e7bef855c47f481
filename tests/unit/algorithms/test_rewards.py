import math

import pytest
import torch

from rlhf_ray.algorithms.rewards import last_response_index, shape_scores, token_rewards

MASK = torch.tensor([[False, False, True, True, False], [False, True, False, True, True], [False] * 5])


def test_scores_are_clipped() -> None:
    scores = torch.tensor([12.0, -30.0, 3.0])
    finished = torch.tensor([True, True, True])
    assert shape_scores(scores, finished, clip=10.0, missing_eos_penalty=1.0).tolist() == [10.0, -10.0, 3.0]
    assert shape_scores(scores, finished, clip=0.0, missing_eos_penalty=1.0).tolist() == [12.0, -30.0, 3.0]


def test_the_penalty_falls_on_unfinished_responses_after_the_clip() -> None:
    scores, finished = torch.tensor([12.0, 12.0, 3.0]), torch.tensor([True, False, False])
    assert shape_scores(scores, finished, clip=10.0, missing_eos_penalty=1.5).tolist() == [10.0, 8.5, 1.5]


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_bad_settings_are_refused(bad: float) -> None:
    one, finished = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="clip"):
        shape_scores(one, finished, clip=bad, missing_eos_penalty=0.0)
    with pytest.raises(ValueError, match="missing_eos_penalty"):
        shape_scores(one, finished, clip=1.0, missing_eos_penalty=bad)


def test_last_response_index() -> None:
    assert last_response_index(MASK).tolist() == [3, 4, 0]


def test_token_rewards_by_hand() -> None:
    scores = torch.tensor([5.0, -1.0, 9.0], dtype=torch.float64)
    logprobs = torch.tensor(
        [[math.nan, -9.0, -1.0, -2.0, -math.inf], [0.0, -1.0, -1.0, -1.0, -1.0], [0.0] * 5], dtype=torch.float64
    )
    reference = torch.tensor(
        [[0.0, -1.0, -1.5, -1.0, -math.inf], [0.0, -2.0, -7.0, -1.0, -4.0], [-1.0] * 5], dtype=torch.float64
    )
    # k1: row 0 has 0.5 and -1, row 1 has 1, 0 and 3; the row without a response has none.
    expected = [[0.0, 0.0, -0.05, 5.1, 0.0], [0.0, -0.1, 0.0, 0.0, -1.3], [0.0] * 5]
    found = token_rewards(scores, logprobs, reference, MASK, coefficient=0.1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    # k2: 0.125 and 0.5; 0.5, 0 and 4.5.
    expected = [[0.0, 0.0, -0.0125, 4.95, 0.0], [0.0, -0.05, 0.0, 0.0, -1.45], [0.0] * 5]
    found = token_rewards(scores, logprobs, reference, MASK, coefficient=0.1, estimator="k2")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_without_kl_only_the_score_is_left() -> None:
    zeros = torch.zeros(3, 5)
    found = token_rewards(torch.tensor([5.0, -1.0, 9.0]), zeros - 3, zeros, MASK, coefficient=0.0)
    assert found.tolist() == [[0, 0, 0, 5, 0], [0, 0, 0, 0, -1], [0] * 5]
