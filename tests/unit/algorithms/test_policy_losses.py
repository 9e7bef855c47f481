import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.masked import unit_count
from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss, truncated_importance_weights

PPO = ClippedPolicyLoss(clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0, aggregation="token_mean")


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def policy_loss(
    loss: ClippedPolicyLoss, ratios: Tensor, advantages: Tensor, *, mask: Tensor | None = None, **given: Tensor
) -> tuple[float, dict[str, float]]:
    """The loss where the ratios to the old policy are these."""
    old = torch.full_like(ratios, -1.0)
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else mask
    given = {"entropy": torch.zeros_like(old), "correction": torch.ones_like(old)} | given
    total, metrics = loss(old + ratios.log(), old, advantages, mask, **given)
    return total.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 2.0, -2.4),  # min(3, 1.2 * 2)
        (0.5, 2.0, -1.0),  # min(1, 0.8 * 2)
        (1.5, -2.0, 3.0),  # min(-3, 1.2 * -2)
        (0.5, -2.0, 1.6),  # min(-1, 0.8 * -2)
        (1.1, 2.0, -2.2),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, expected: float) -> None:
    assert policy_loss(PPO, row(ratio), row(advantage))[0] == pytest.approx(expected)


def test_metrics_by_hand() -> None:
    ratios, advantages = row(1.5, 0.5, 1.5, 0.5, 1.0), row(2, 2, -2, -2, 1)
    mask = torch.tensor([[True, True, True, True, False]])
    total, metrics = policy_loss(
        PPO, ratios, advantages, mask=mask, entropy=row(1, 2, 3, 4, 50), correction=row(1, 1, 1, 1, 50)
    )
    assert total == metrics["surrogate"] == pytest.approx(-2.4 - 1 + 3 + 1.6)
    # ratio - 1 - log ratio: 0.5 - log 1.5 and -0.5 - log 0.5, twice each
    assert metrics["approx_kl"] == pytest.approx(2 * (0.0945349 + 0.1931472), abs=1e-6)
    assert metrics["clip_fraction"] == 2  # the first and the last
    assert (metrics["entropy"], metrics["ratio"], metrics["correction_weight"]) == (10, pytest.approx(4), 4)
    assert metrics["dual_clip_fraction"] == 0


def test_asymmetric_clip_by_hand() -> None:
    loss = replace(PPO, clip_low=0.1, clip_high=0.4)
    assert policy_loss(loss, row(1.5), row(2))[0] == pytest.approx(-2.8)
    assert policy_loss(loss, row(0.5), row(-2))[0] == pytest.approx(1.8)


def test_dual_clip_by_hand() -> None:
    loss = replace(PPO, dual_clip=3.0)
    assert policy_loss(PPO, row(5), row(-2))[0] == pytest.approx(10)
    total, metrics = policy_loss(loss, row(5, 2, 5, 0.5), row(-2, -2, 2, -2))
    # bounded to 3 * 2; min(-4, -2.4); positive advantages as ever, 1.2 * 2; 0.8 * -2
    assert total == pytest.approx(6 + 4 - 2.4 + 1.6)
    assert (metrics["dual_clip_fraction"], metrics["clip_fraction"]) == (1, 2)


def test_log_ratio_is_clamped_to_20_before_exp() -> None:
    old = row(-40)
    total, metrics = PPO(row(-5), old, row(-1), torch.ones(1, 1, dtype=torch.bool), entropy=row(0), correction=row(1))
    assert total.item() == metrics["ratio"].item() == pytest.approx(485165195.40979, rel=1e-12)


def test_correction_weighs_the_surrogate_only_and_has_no_gradient() -> None:
    loss = replace(PPO, entropy_coefficient=0.1)
    total, metrics = policy_loss(loss, row(1.1), row(2), entropy=row(3), correction=row(0.5))
    assert metrics["surrogate"] == pytest.approx(-1.1)
    assert total == pytest.approx(-1.1 - 0.3)
    logprobs, correction = row(-1).requires_grad_(), row(0.5).requires_grad_()
    total, metrics = loss(
        logprobs, row(-1), row(2), torch.ones(1, 1, dtype=torch.bool), entropy=row(0), correction=correction
    )
    total.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == -1.0  # -weight * ratio * advantage
    assert correction.grad is None
    assert not any(value.requires_grad for value in metrics.values())


def test_clipped_tokens_have_no_gradient() -> None:
    loss = replace(PPO, dual_clip=3.0)
    logprobs = row(1.5, 0.5, 5.0, 1.1).log().requires_grad_()
    total, _ = loss(
        logprobs,
        torch.zeros(1, 4, dtype=torch.float64),
        row(2, -2, -2, 2),
        torch.ones(1, 4, dtype=torch.bool),
        entropy=torch.zeros(1, 4, dtype=torch.float64),
        correction=torch.ones(1, 4, dtype=torch.float64),
    )
    total.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, row(0, 0, 0, -2.2))


def test_token_mean_and_sequence_mean_by_hand() -> None:
    ratios = torch.ones(2, 4, dtype=torch.float64)
    advantages = torch.tensor([[0, -1, -2, -3], [0, 0, 0, -8]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True], [False, False, False, True]])
    total, _ = policy_loss(PPO, ratios, advantages, mask=mask)
    assert (PPO.unit, total / unit_count(mask, PPO.unit)) == ("token", pytest.approx(14 / 4))
    by_sequence = replace(PPO, aggregation="sequence_mean")
    total, metrics = policy_loss(by_sequence, ratios, advantages, mask=mask)
    assert (by_sequence.unit, total / unit_count(mask, by_sequence.unit)) == ("sequence", pytest.approx((2 + 8) / 2))
    assert metrics["ratio"] == pytest.approx(2)


def test_kl_loss_by_hand() -> None:
    logprobs, reference = row(math.nan, -1, -1, -4), row(0, -1 - math.log(2), -2, 0)
    mask = torch.tensor([[False, True, True, False]])
    # d = log 2 and 1: k2 0.2402 and 0.5; k3 0.1931 and e^-1.
    assert KlLoss("k2", 0.1, "token_mean")(logprobs, reference, mask).item() == pytest.approx(0.07402265)
    assert KlLoss("k3", 0.1, "token_mean")(logprobs, reference, mask).item() == pytest.approx(0.05610266)
    assert KlLoss("k2", 0.1, "sequence_mean")(logprobs, reference, mask).item() == pytest.approx(0.07402265 / 2)
    assert KlLoss("k2", 0.1, "sequence_mean").unit == "sequence"


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "expected"),
    [
        (1.0, 0.0, 2.0, 0.2, 1.62),  # max(1, (0.2 - 2)^2) / 2
        (1.0, 0.0, -1.0, 0.2, 2.0),  # max(4, 1.2^2) / 2
        (-1.0, 0.0, -2.0, 0.2, 1.62),  # max(1, (-0.2 + 2)^2) / 2
        (0.1, 0.0, 2.0, 0.2, 1.805),  # within the clip: 1.9^2 / 2
        (1.0, 0.0, 2.0, 0.0, 0.5),  # no clip
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, clip: float, expected: float) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = ValueLoss(clip, "token_mean")(row(value), row(old), row(target), mask)
    assert loss.item() == pytest.approx(expected)


def test_value_metrics_and_aggregation_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    arguments = row(1, 1, math.nan), row(0, 0, math.nan), row(2, -1, math.inf), mask
    total, metrics = ValueLoss(0.2, "token_mean")(*arguments)
    assert total.item() == pytest.approx(1.62 + 2)
    assert {name: value.item() for name, value in metrics.items()} == {
        "value": 2.0,
        "squared_error": 5.0,
        "clip_fraction": 1.0,
    }
    by_sequence = ValueLoss(0.2, "sequence_mean")
    assert by_sequence(*arguments)[0].item() == pytest.approx(1.81)
    assert (ValueLoss(0.2, "token_mean").unit, by_sequence.unit) == ("token", "sequence")


def test_truncated_importance_weights_by_hand() -> None:
    learner = row(math.log(0.5), math.log(0.9), math.log(0.1), 0, math.nan).requires_grad_()
    generator = row(math.log(0.25), math.log(0.3), math.log(0.4), -30, 0)
    mask = torch.tensor([[True, True, True, True, False]])
    weights, capped = truncated_importance_weights(learner, generator, mask, cap=2.0)  # ratios 2, 3, 1/4, e^20
    torch.testing.assert_close(weights, row(2, 2, 0.25, 2, 1))
    assert capped.tolist() == [[False, True, False, True, False]]
    assert not weights.requires_grad
    assert truncated_importance_weights(learner, generator, mask, cap=1e9)[0][0, 3].item() == pytest.approx(
        485165195.40979
    )


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("clip_low", (-0.1, 1.1, math.nan)),
        ("clip_high", (-0.1, math.nan, math.inf)),
        ("dual_clip", (1.0, 0.5, math.nan, math.inf)),
        ("entropy_coefficient", (-0.1, math.nan, math.inf)),
    ],
)
def test_a_policy_loss_refuses_bad_numbers(name: str, bad: tuple[float, ...]) -> None:
    for number in bad:
        with pytest.raises(ValueError, match=f"^{name}: got {number}"):
            replace(PPO, **{name: number})


def test_other_losses_refuse_bad_numbers() -> None:
    for number in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="coefficient"):
            KlLoss("k2", number, "token_mean")
        with pytest.raises(ValueError, match="clip"):
            ValueLoss(number, "token_mean")
        with pytest.raises(ValueError, match="cap"):
            truncated_importance_weights(row(0), row(0), torch.ones(1, 1, dtype=torch.bool), cap=number)
    with pytest.raises(ValueError, match="estimator: got 'k1'"):
        KlLoss("k1", 0.1, "token_mean")


Loss = Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def as_losses(aggregation: str) -> dict[str, Loss]:
    policy = replace(PPO, dual_clip=1.5, entropy_coefficient=0.01, aggregation=aggregation)
    value, kl = ValueLoss(0.2, aggregation), KlLoss("k3", 0.1, aggregation)
    return {
        "policy": lambda x: policy(
            x["new"], x["old"], x["advantages"], x["mask"], entropy=x["entropy"], correction=x["correction"]
        ),
        "value": lambda x: value(x["new"], x["old"], x["advantages"], x["mask"]),
        "kl": lambda x: (kl(x["new"], x["old"], x["mask"]), {}),
    }


def random_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("new", "old", "advantages", "entropy", "correction")
    batch = {name: torch.randn(6, 9, generator=generator, dtype=torch.float64) for name in names}
    return batch | {"mask": torch.rand(6, 9, generator=generator) < 0.6}


CASES = [(name, aggregation) for aggregation in ("token_mean", "sequence_mean") for name in as_losses(aggregation)]


def loss_and_gradient(loss: Loss, batches: list[dict[str, Tensor]], new: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    results = [loss(batch) for batch in batches]
    total = torch.stack([result[0] for result in results]).sum()
    metrics = [torch.stack(values).sum() for values in zip(*(result[1].values() for result in results), strict=True)]
    return total, torch.autograd.grad(total, new)[0], metrics


@pytest.mark.parametrize(("name", "aggregation"), CASES)
def test_micro_batches_change_nothing(name: str, aggregation: str) -> None:
    """Summed over micro-batches of any cut, loss, gradient and metrics are the whole batch's."""
    batch, loss = random_batch(1), as_losses(aggregation)[name]
    new = batch["new"].requires_grad_()
    whole = loss_and_gradient(loss, [batch], new)
    for cut in ([6], [1, 2, 3], [1] * 6):
        parts = [tensor.split(cut) for tensor in batch.values()]
        split = [dict(zip(batch, piece, strict=True)) for piece in zip(*parts, strict=True)]
        torch.testing.assert_close(loss_and_gradient(loss, split, new), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "aggregation"), CASES)
def test_padding_changes_nothing(name: str, aggregation: str) -> None:
    """Neither more padding nor what stands in it moves loss, gradient or metrics."""
    batch, loss = random_batch(2), as_losses(aggregation)[name]
    mask = batch.pop("mask")
    new = batch["new"].requires_grad_()
    wanted = loss_and_gradient(loss, [batch | {"mask": mask}], new)
    bad = torch.full((6, 3), math.nan, dtype=torch.float64)
    padded = {key: torch.cat([torch.where(mask, x, math.nan), bad], 1) for key, x in batch.items()}
    padded["mask"] = torch.cat([mask, torch.zeros_like(mask[:, :3])], 1)
    torch.testing.assert_close(loss_and_gradient(loss, [padded], new), wanted, rtol=0, atol=1e-10)
