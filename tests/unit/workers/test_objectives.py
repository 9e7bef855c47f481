"""Objectives: which output meets which column."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss
from rlhf_ray.algorithms.preference_losses import ChosenLoss, DpoLoss, SimpoLoss
from rlhf_ray.data.batches import Experience, PreferencePairs, ReferencedPairs, make_sequences
from rlhf_ray.models.forward import Outputs
from rlhf_ray.workers.objectives import (
    BradleyTerryObjective,
    JointObjective,
    LanguageObjective,
    PolicyObjective,
    PreferenceObjective,
    ValueObjective,
)

SURROGATE = ClippedPolicyLoss(
    clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0, aggregation="token_mean"
)


def row(*numbers: float) -> Tensor:
    return torch.tensor([list(numbers)], dtype=torch.float32)


# One row: a prompt token and two response tokens.
SEQUENCES = make_sequences([[5]], [[6, 7]])
OUTPUTS = Outputs(logprobs=row(9, -1, -2), entropy=row(9, 0.5, 0.25), values=row(9, 1, 3), final_values=torch.zeros(1))
EXPERIENCE = Experience(
    sequences=SEQUENCES,
    old_logprobs=row(9, -1, -2),
    reference_logprobs=row(9, -1.5, -2),
    values=row(9, 1, 3),
    advantages=row(9, 2, -1),
    returns=row(9, 3, 3),
    correction=row(9, 1, 0.5),
)


def test_policy() -> None:
    loss, metrics = PolicyObjective(SURROGATE, None)(OUTPUTS, EXPERIENCE)
    # The ratio is 1: -(1 * 2) - (0.5 * -1).
    assert loss.item() == pytest.approx(-1.5)
    assert metrics["entropy"].item() == pytest.approx(0.75)


def test_policy_with_kl() -> None:
    loss, metrics = PolicyObjective(SURROGATE, KlLoss("k2", 0.4, "token_mean"))(OUTPUTS, EXPERIENCE)
    # k2 = 0.5^2 / 2 on the first response token, 0 on the second.
    assert metrics["kl_loss"].item() == pytest.approx(0.05)
    assert loss.item() == pytest.approx(-1.45)


def test_value() -> None:
    loss, _ = ValueObjective(ValueLoss(0.0, "token_mean"))(OUTPUTS, EXPERIENCE)
    assert loss.item() == pytest.approx(0.5 * 4)


def test_joint() -> None:
    objective = JointObjective(PolicyObjective(SURROGATE, None), ValueObjective(ValueLoss(0.0, "token_mean")), 0.1)
    loss, metrics = objective(OUTPUTS, EXPERIENCE)
    assert loss.item() == pytest.approx(-1.5 + 0.1 * 2)
    assert metrics["loss"].item() == pytest.approx(-1.5)
    assert metrics["critic/loss"].item() == pytest.approx(2.0)
    assert metrics["critic/value"].item() == pytest.approx(4.0)


def test_language() -> None:
    loss, _ = LanguageObjective()(OUTPUTS, SEQUENCES)
    assert loss.item() == pytest.approx(3.0)


def test_bradley_terry() -> None:
    pairs = PreferencePairs(
        chosen=make_sequences([[1], [1]], [[2, 3], [2]]),
        rejected=make_sequences([[1], [1]], [[4], [4, 5, 6]]),
        ids=[0, 1],
        margins=torch.tensor([0.0, 0.5]),
    )
    objective = BradleyTerryObjective()
    assert objective.sequences(pairs).lengths().tolist() == [3, 2, 2, 4]
    zeros = torch.zeros(4, 4)
    # Chosen scores 2 and 1, rejected scores 1 and 3.
    outputs = Outputs(zeros, zeros, zeros, final_values=torch.tensor([2.0, 1.0, 1.0, 3.0]))
    loss, metrics = objective(outputs, pairs)
    assert objective.unit == "pair"
    assert loss.item() == pytest.approx(log(1 + exp(-1)) + log(1 + exp(2.5)))
    assert metrics["accuracy"].item() == 1
    assert metrics["margin"].item() == pytest.approx(1 - 2)


def test_preferences() -> None:
    pairs = PreferencePairs(
        chosen=make_sequences([[1], [1]], [[2, 3], [2]]),
        rejected=make_sequences([[1], [1]], [[4], [4, 5, 6]]),
        ids=[0, 1],
        margins=torch.zeros(2),
    )
    rows = ReferencedPairs(pairs, torch.tensor([-5.0, -2.0]), torch.tensor([-3.0, -6.0]))
    # Chosen answers of -1 - 2 and -1, rejected ones of -4 and -1 - 2 - 3; what is not an answer's is not read.
    logprobs = torch.tensor([[9.0, -1, -2, 9], [9, -1, 9, 9], [9, -4, 9, 9], [9, -1, -2, -3]])
    outputs = Outputs(logprobs, torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4))
    objective = PreferenceObjective(DpoLoss(beta=0.5, label_smoothing=0.0), None)
    assert objective.unit == "pair"
    assert objective.sequences(rows).lengths().tolist() == [3, 2, 2, 4]
    loss, metrics = objective(outputs, rows)
    # Rewards 0.5 * (2, 1) and 0.5 * (-1, 0).
    assert [side.tolist() for side in objective.rewards(logprobs, rows)] == [[1.0, 0.5], [-0.5, 0.0]]
    assert loss.item() == pytest.approx(log(1 + exp(-1.5)) + log(1 + exp(-0.5)))
    assert metrics["margin"].item() == pytest.approx(2)
    assert metrics["rejected_logprob"].item() == pytest.approx(-10)
    with_nll, metrics = PreferenceObjective(objective.loss, ChosenLoss(0.2))(outputs, rows)
    assert metrics["nll_loss"].item() == pytest.approx(0.2 * (1.5 + 1))
    assert with_nll.item() == pytest.approx(loss.item() + 0.5)


def test_a_loss_without_a_reference_reads_none() -> None:
    pairs = PreferencePairs(make_sequences([[1]], [[2, 3]]), make_sequences([[1]], [[4]]), [0], torch.zeros(1))
    rows = ReferencedPairs(pairs, torch.full((1,), torch.nan), torch.full((1,), torch.nan))
    logprobs = torch.tensor([[0.0, -1, -2], [0, -4, 0]])
    objective = PreferenceObjective(SimpoLoss(beta=2.0, gamma=0.5), None)
    # 2 * (-1.5) - 2 * (-4) - 0.5
    assert objective.judge(logprobs, rows)[0].item() == pytest.approx(log(1 + exp(-4.5)))
    assert [side.tolist() for side in objective.rewards(logprobs, rows)] == [[-3.0], [-8.0]]


def test_entropy_is_trained_only_where_its_weight_is_not_zero() -> None:
    assert PolicyObjective(SURROGATE, None).entropy == "reported"
    bonus = ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.1, aggregation="token_mean"
    )
    assert PolicyObjective(bonus, None).entropy == "trained"


def test_units_must_agree() -> None:
    with pytest.raises(AssertionError, match="one aggregation"):
        PolicyObjective(SURROGATE, KlLoss("k2", 0.1, "sequence_mean"))
    with pytest.raises(AssertionError, match="one aggregation"):
        JointObjective(PolicyObjective(SURROGATE, None), ValueObjective(ValueLoss(0.2, "sequence_mean")), 1.0)
