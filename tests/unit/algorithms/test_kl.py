import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController, estimator, k1, k2, k3


def of(name: str, d: float) -> float:
    reference = torch.tensor([[-3.0]], dtype=torch.float64)
    return estimator(name)(reference + d, reference).item()


def test_estimators_by_hand_at_d_log_2() -> None:
    d = math.log(2)
    assert of("k1", d) == pytest.approx(0.69314718)
    assert of("k2", d) == pytest.approx(0.24022651)  # 0.6931^2 / 2
    assert of("k3", d) == pytest.approx(0.19314718)  # 1/2 - 1 + 0.6931


def test_estimators_by_hand_at_d_minus_log_2() -> None:
    d = -math.log(2)
    assert of("k1", d) == pytest.approx(-0.69314718)
    assert of("k2", d) == pytest.approx(0.24022651)
    assert of("k3", d) == pytest.approx(0.30685282)  # 2 - 1 - 0.6931


def test_k3_clamps_d_to_20_before_exp() -> None:
    assert of("k3", -30.0) == pytest.approx(485165195.40979 - 21, rel=1e-12)  # e^20 - 1 - 20
    assert of("k3", 30.0) == pytest.approx(19.0000000020612, rel=1e-12)  # e^-20 - 1 + 20
    assert of("k1", 30.0) == 30.0
    assert of("k2", 30.0) == 450.0


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator: got 'k4', wanted k1, k2 or k3"):
        estimator.__wrapped__("k4")


@pytest.mark.parametrize("seed", range(3))
def test_against_torch_expectations_are_the_kl(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = log_softmax(torch.randn(2, 1, 9, generator=generator, dtype=torch.float64), -1)
    exact = kl_div(reference, policy, log_target=True, reduction="sum")
    for estimate in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimate(policy, reference)).sum(), exact, rtol=0, atol=1e-10)


def test_on_policy_gradients() -> None:
    """The expected gradient through the log-probability: the KL's for k2, none for k1."""
    generator = torch.Generator().manual_seed(4)
    logits, other = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reference = log_softmax(other, -1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    policy = log_softmax(logits, -1)
    wanted = gradient(kl_div(reference, policy, log_target=True, reduction="sum"))
    probability = log_softmax(logits, -1).exp().detach()
    found = gradient((probability * k2(log_softmax(logits, -1), reference)).sum())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    none = gradient((probability * k1(log_softmax(logits, -1), reference)).sum())
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-10)


def test_the_fixed_coefficient_stays() -> None:
    controller = FixedKlController(0.05)
    controller.update(100.0, 64)
    assert controller.coefficient == 0.05
    assert controller.state_dict() == {}
    controller.load_state_dict({"coefficient": 3.0})
    assert controller.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl_per_sequence", "expected"),
    [
        (2.2, 0.101),  # error 0.1: 0.1 * (1 + 0.1 * 10 / 100)
        (1.9, 0.0995),  # error -0.05
        (2.0, 0.1),
        (20.0, 0.102),  # error 9, clipped to 0.2
        (0.0, 0.098),  # error -1, clipped to -0.2
        (-5.0, 0.098),
    ],
)
def test_the_adaptive_coefficient_by_hand(kl_per_sequence: float, expected: float) -> None:
    controller = AdaptiveKlController(0.1, target=2.0, horizon=100.0)
    controller.update(kl_per_sequence, 10)
    assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_the_adaptive_coefficient_survives_a_checkpoint() -> None:
    controller = AdaptiveKlController(0.1, target=2.0, horizon=100.0)
    controller.update(20.0, 10)
    restored = AdaptiveKlController(0.1, target=2.0, horizon=100.0)
    restored.load_state_dict(controller.state_dict())
    for each in (controller, restored):
        each.update(2.2, 10)
    assert restored.coefficient == controller.coefficient == pytest.approx(0.102 * 1.01)


def test_numbers_that_make_no_sense_are_refused() -> None:
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="coefficient"):
            FixedKlController(bad)
        with pytest.raises(ValueError, match="target"):
            AdaptiveKlController(0.1, target=bad, horizon=10.0)
        with pytest.raises(ValueError, match="horizon"):
            AdaptiveKlController(0.1, target=1.0, horizon=bad)
    with pytest.raises(ValueError, match="coefficient"):
        AdaptiveKlController(0.0, target=1.0, horizon=10.0)
    controller = AdaptiveKlController(0.1, target=1.0, horizon=10.0)
    with pytest.raises(ValueError, match="kl_per_sequence"):
        controller.update(math.nan, 4)
    with pytest.raises(ValueError, match=r"horizon: got 10\.0"):
        controller.update(1.0, 50)
    with pytest.raises(ValueError, match="coefficient"):
        controller.load_state_dict({"coefficient": math.nan})
    assert controller.coefficient == 0.1
