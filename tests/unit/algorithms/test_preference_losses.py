import math
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from rlhf_ray.algorithms.preference_losses import (
    AnswerLogprobs,
    BradleyTerryLoss,
    ChosenLoss,
    DpoLoss,
    IpoLoss,
    OrpoLoss,
    SimpoLoss,
    answer_logprobs,
    preferred,
)

LOG3 = math.log(3)  # its sigmoid is 3 / 4, that of its negative 1 / 4
EXACT = {"rtol": 0, "atol": 1e-10}


def numbers(*found: float) -> Tensor:
    return torch.tensor(found, dtype=torch.float64)


def answers(total: list[float], length: list[int]) -> AnswerLogprobs:
    return AnswerLogprobs(numbers(*total), torch.tensor(length))


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def drawn(seed: int, pairs: int = 5) -> AnswerLogprobs:
    """Answers of 1 to 9 tokens, of a log-probability per token around -1.5."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 10, (pairs,), generator=generator)
    mean = -0.1 - 3 * torch.rand(pairs, generator=generator, dtype=torch.float64)
    return AnswerLogprobs(mean * length, length)


def with_reference(loss: DpoLoss | IpoLoss) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The loss as a function of four sides in a row."""
    return lambda c, r, ref_c, ref_r: loss(c, r, reference_chosen=ref_c.total, reference_rejected=ref_r.total)


# Every loss of answers with the number of sides it takes.
LOSSES: list[tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], int]] = [
    (with_reference(DpoLoss(beta=0.3, label_smoothing=0.0)), 4),
    (with_reference(DpoLoss(beta=0.3, label_smoothing=0.2)), 4),
    (with_reference(IpoLoss(beta=0.3)), 4),
    (SimpoLoss(beta=2.0, gamma=0.5), 2),
    (OrpoLoss(coefficient=0.3), 2),
    (lambda chosen, rejected: (ChosenLoss(0.3)(chosen), {}), 2),
]


def test_the_log_probability_of_an_answer_by_hand() -> None:
    logprobs = numbers(0, -1, -2, -4, math.nan, 0, -0.5, -math.inf, math.nan, math.nan).view(2, 5)
    mask = torch.tensor([[False, False, True, True, False], [False, True, False, False, False]])
    found = answer_logprobs(logprobs, mask)
    assert (found.total.tolist(), found.length.tolist(), found.mean.tolist()) == ([-6, -0.5], [2, 1], [-3, -0.5])


def test_an_equal_pair_counts_half() -> None:
    assert preferred(numbers(2, 1, 1), numbers(1, 2, 1)).tolist() == [1, 0, 0.5]


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = numbers(LOG3, 2, 1 + LOG3, 0), numbers(0, 2, 1, LOG3)
    margins = numbers(0, 0, 2 * LOG3, 0)
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss, metrics = BradleyTerryLoss()(chosen, rejected, margins)
    # -log sigmoid of log 3, 0, -log 3 (after the margin) and -log 3
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2) + math.log(4) + math.log(4))
    assert floats(metrics) == {
        "accuracy": 2.5,  # the margin does not count here
        "margin": pytest.approx(LOG3),
        "chosen_score": pytest.approx(3 + 2 * LOG3),
        "rejected_score": pytest.approx(3 + LOG3),
    }
    loss.backward()  # sigmoid - 1 for the chosen, its negative for the rejected
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-1 / 4, -1 / 2, -3 / 4, -3 / 4])
    assert rejected.grad.tolist() == pytest.approx([1 / 4, 1 / 2, 3 / 4, 3 / 4])


def test_bradley_terry_is_linear_far_out() -> None:
    scores, zero = torch.tensor([1000.0, -1000.0], requires_grad=True), torch.zeros(2)
    loss, _ = BradleyTerryLoss()(scores, zero, zero)
    loss.backward()
    assert scores.grad is not None
    assert (loss.item(), scores.grad.tolist()) == (1000.0, [0.0, -1.0])


def test_bradley_terry_against_torch() -> None:
    chosen, rejected, margins = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = binary_cross_entropy_with_logits(chosen - rejected - margins, torch.ones_like(chosen), reduction="sum")
    torch.testing.assert_close(BradleyTerryLoss()(chosen, rejected, margins)[0], wanted, **EXACT)


def test_dpo_by_hand() -> None:
    """Log-ratios to the reference of 2 log 3 against 0, and of 2 log 3 on both sides: h is log 3 and 0."""
    loss, metrics = DpoLoss(beta=0.5, label_smoothing=0.0)(
        answers([-4, -5], [3, 2]),
        answers([-7, -6], [5, 1]),
        reference_chosen=numbers(-4 - 2 * LOG3, -5 - 2 * LOG3),
        reference_rejected=numbers(-7, -6 - 2 * LOG3),
    )
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert floats(metrics) == {
        "accuracy": 1.5,
        "margin": pytest.approx(LOG3),
        "chosen_reward": pytest.approx(2 * LOG3),
        "rejected_reward": pytest.approx(LOG3),
        "chosen_logprob": -9,
        "rejected_logprob": -13,
    }


def test_label_smoothing_by_hand() -> None:
    zero, chosen, rejected = numbers(0), answers([LOG3], [1]), answers([0], [1])
    loss, _ = DpoLoss(beta=1.0, label_smoothing=0.2)(chosen, rejected, reference_chosen=zero, reference_rejected=zero)
    assert loss.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4))


def test_dpo_begins_at_chance() -> None:
    """Where the policy is the reference: log 2 a pair, half of the pairs right."""
    chosen, rejected = drawn(0), drawn(1)
    loss, metrics = DpoLoss(beta=0.1, label_smoothing=0.0)(
        chosen, rejected, reference_chosen=chosen.total, reference_rejected=rejected.total
    )
    assert (loss.item(), metrics["accuracy"].item()) == (pytest.approx(5 * math.log(2)), 2.5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_against_torch(label_smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = drawn(0), drawn(1), drawn(2).total, drawn(3).total
    loss = DpoLoss(beta=0.7, label_smoothing=label_smoothing)
    h = 0.7 * ((chosen.total - ref_chosen) - (rejected.total - ref_rejected))
    wanted = binary_cross_entropy_with_logits(h, torch.full_like(h, 1 - label_smoothing), reduction="sum")
    found, _ = loss(chosen, rejected, reference_chosen=ref_chosen, reference_rejected=ref_rejected)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_ipo_by_hand() -> None:
    loss, metrics = IpoLoss(beta=0.25)(
        answers([-6], [3]),
        answers([-8], [2]),
        reference_chosen=numbers(-9),  # 1 a token below the policy
        reference_rejected=numbers(-7),  # 1/2 a token above it
    )
    assert loss.item() == pytest.approx((1.5 - 2) ** 2)
    assert floats(metrics) == {
        "accuracy": 1,
        "margin": 1,  # 0.25 * (3 + 1): of whole answers
        "chosen_reward": 0.75,
        "rejected_reward": -0.25,
        "chosen_logprob": -6,
        "rejected_logprob": -8,
    }


def test_ipo_against_torch() -> None:
    chosen, rejected, ref_chosen, ref_rejected = drawn(0), drawn(1), drawn(2).total, drawn(3).total
    found, _ = IpoLoss(beta=0.2)(chosen, rejected, reference_chosen=ref_chosen, reference_rejected=ref_rejected)
    per_token = (chosen.total - ref_chosen) / chosen.length - (rejected.total - ref_rejected) / rejected.length
    torch.testing.assert_close(found, mse_loss(per_token, torch.full_like(per_token, 2.5), reduction="sum"), **EXACT)


def test_simpo_by_hand() -> None:
    chosen, rejected = answers([-2 * LOG3], [4]), answers([-9 * LOG3], [6])
    loss, metrics = SimpoLoss(beta=2.0, gamma=LOG3)(chosen, rejected)
    assert loss.item() == pytest.approx(math.log(4 / 3))  # -log 3 + 3 log 3 - gamma is log 3
    assert floats(metrics) == {
        "accuracy": 1,
        "margin": pytest.approx(2 * LOG3),
        "chosen_reward": pytest.approx(-LOG3),
        "rejected_reward": pytest.approx(-3 * LOG3),
        "chosen_logprob": pytest.approx(-2 * LOG3),
        "rejected_logprob": pytest.approx(-9 * LOG3),
    }


def test_orpo_by_hand() -> None:
    """Probabilities per token 3/4 and 1/2 have odds 3 and 1."""
    chosen, rejected = answers([2 * math.log(3 / 4)], [2]), answers([5 * math.log(1 / 2)], [5])
    loss, metrics = OrpoLoss(coefficient=0.1)(chosen, rejected)
    assert loss.item() == pytest.approx(math.log(4 / 3) + 0.1 * math.log(4 / 3))
    assert floats(metrics) == {
        "accuracy": 1,
        "margin": pytest.approx(LOG3),
        "chosen_reward": pytest.approx(LOG3),
        "rejected_reward": pytest.approx(0, abs=1e-12),
        "chosen_logprob": pytest.approx(2 * math.log(3 / 4)),
        "rejected_logprob": pytest.approx(5 * math.log(1 / 2)),
        "nll": pytest.approx(math.log(4 / 3)),
    }


def test_orpo_against_torch() -> None:
    chosen, rejected = drawn(0), drawn(1)
    log_odds = torch.logit(chosen.mean.exp()) - torch.logit(rejected.mean.exp())
    wanted = -chosen.mean.sum() + 0.4 * binary_cross_entropy_with_logits(
        log_odds, torch.ones_like(log_odds), reduction="sum"
    )
    torch.testing.assert_close(OrpoLoss(coefficient=0.4)(chosen, rejected)[0], wanted, **EXACT)


@pytest.mark.parametrize("rejected", [0.0, -1e-8, -100.0, -1e4])
@pytest.mark.parametrize("chosen", [0.0, -1e-8, -100.0, -1e4])
def test_orpo_is_finite_at_the_ends(chosen: float, rejected: float) -> None:
    sides = [torch.tensor([mean], requires_grad=True) for mean in (chosen, rejected)]
    loss, metrics = OrpoLoss(coefficient=1.0)(*(AnswerLogprobs(total, torch.tensor([1])) for total in sides))
    loss.backward()
    read = [loss.item(), *floats(metrics).values(), *(side.grad.item() for side in sides if side.grad is not None)]
    assert all(math.isfinite(number) for number in read)
    assert len(read) == 10


def test_the_term_on_the_chosen_answer_by_hand() -> None:
    assert ChosenLoss(0.5)(answers([-6, -4], [3, 1])).item() == pytest.approx(0.5 * (2 + 4))


@pytest.mark.parametrize(("loss", "sides"), LOSSES)
def test_cutting_a_batch_changes_nothing(loss: Callable[..., Any], sides: int) -> None:
    given = [drawn(seed) for seed in range(sides)]
    whole, metrics = loss(*given)
    parts = [
        loss(*(AnswerLogprobs(side.total[rows], side.length[rows]) for side in given))
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(total for total, _ in parts), whole, **EXACT)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(found[name] for _, found in parts), value, **EXACT)


@pytest.mark.parametrize(("loss", "sides"), LOSSES)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Any], sides: int) -> None:
    given = [drawn(seed) for seed in range(sides)]

    def of_totals(*totals: Tensor) -> Tensor:
        found = loss(*(AnswerLogprobs(total, side.length) for total, side in zip(totals, given, strict=True)))[0]
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(of_totals, [side.total.clone().requires_grad_() for side in given])


def test_metrics_carry_no_gradient() -> None:
    trained = AnswerLogprobs(numbers(-1, -2).requires_grad_(), torch.tensor([1, 2]))
    losses = [
        BradleyTerryLoss()(trained.total, trained.total, numbers(0, 0)),
        *(loss(*[trained] * sides) for loss, sides in LOSSES),
    ]
    assert all(loss.requires_grad for loss, _ in losses)
    assert not any(value.requires_grad for _, metrics in losses for value in metrics.values())


def test_the_unit_is_the_pair() -> None:
    losses = (BradleyTerryLoss, DpoLoss, IpoLoss, SimpoLoss, OrpoLoss, ChosenLoss)
    assert {loss.unit for loss in losses} == {"pair"}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DpoLoss(beta=0.0, label_smoothing=0.0), "beta: got 0.0"),
        (lambda: DpoLoss(beta=0.1, label_smoothing=0.5), "label_smoothing: got 0.5"),
        (lambda: DpoLoss(beta=0.1, label_smoothing=-0.1), "label_smoothing: got -0.1"),
        (lambda: IpoLoss(beta=-1.0), "beta: got -1.0"),
        (lambda: SimpoLoss(beta=math.inf, gamma=0.0), "beta: got inf"),
        (lambda: SimpoLoss(beta=1.0, gamma=-0.5), "gamma: got -0.5"),
        (lambda: OrpoLoss(coefficient=0.0), "coefficient: got 0.0"),
        (lambda: ChosenLoss(math.nan), "coefficient: got nan"),
    ],
)
def test_wrong_numbers_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_sides_of_different_size_are_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        BradleyTerryLoss()(torch.zeros(2), torch.zeros(1), torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        AnswerLogprobs(torch.zeros(2), torch.ones(1, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        SimpoLoss(beta=1.0, gamma=0.0)(drawn(0, pairs=1), drawn(1, pairs=3))
