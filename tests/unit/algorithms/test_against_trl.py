"""Our equations against TRL's own code, where TRL is installed.

Where TRL has no function for an equation, the lines of its trainer are run out of its source.
"""

import importlib
import inspect
import os
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae, group_relative, leave_one_out
from rlhf_ray.algorithms.kl import k3
from rlhf_ray.algorithms.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_ray.algorithms.masked import masked_mean, masked_var, masked_whiten, unit_count
from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss
from rlhf_ray.algorithms.preference_losses import (
    AnswerLogprobs,
    BradleyTerryLoss,
    ChosenLoss,
    DpoLoss,
    IpoLoss,
    OrpoLoss,
    SimpoLoss,
    answer_logprobs,
)

pytest.importorskip("trl")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# TRL's glue to vLLM is for older releases of it; the equations do not need it.
importlib.import_module("trl.import_utils").is_vllm_available = lambda min_version=None: False
ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
grpo = importlib.import_module("trl.trainer.grpo_trainer")
rloo = importlib.import_module("trl.trainer.rloo_trainer")
dpo = importlib.import_module("trl.trainer.dpo_trainer")
reward = importlib.import_module("trl.trainer.reward_trainer")
cpo = importlib.import_module("trl.experimental.cpo.cpo_trainer")
orpo = importlib.import_module("trl.experimental.orpo.orpo_trainer")
utils = importlib.import_module("trl.trainer.utils")

EXACT = {"rtol": 0, "atol": 1e-10}


def run_lines(function: Any, first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """The variables after running the lines of a function from the one that starts with `first` to `last`."""
    lines = inspect.getsource(function).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i >= begin and line.strip().startswith(last))
    exec(textwrap.dedent("\n".join(lines[begin : end + 1])), names)
    return names


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefix_mask(*lengths: int, width: int) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


MASK = prefix_mask(5, 7, 2, width=7)


def test_mean_variance_and_whitening() -> None:
    x, count = random(0, 3, 7), MASK.sum()
    torch.testing.assert_close(masked_mean(x, MASK), ppo.masked_mean(x, MASK), **EXACT)
    variance = ppo.masked_var(x, MASK, unbiased=False)
    torch.testing.assert_close(masked_var(x, MASK), variance, **EXACT)
    bessel = torch.sqrt((variance + 1e-8) / (variance * count / (count - 1) + 1e-8))  # TRL divides by n - 1
    wanted = ppo.masked_whiten(x, MASK.double()).masked_fill(~MASK, 0)
    torch.testing.assert_close(masked_whiten(x, MASK) * bessel, wanted, **EXACT)


def test_log_probabilities_and_entropy() -> None:
    logits, tokens = 4 * random(1, 3, 7, 11), torch.arange(21).reshape(3, 7) % 11
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, temperature=0.7)
    predicting = logits[:, :-1] / 0.7
    torch.testing.assert_close(logprobs[:, 1:], utils.selective_log_softmax(predicting, tokens[:, 1:]), **EXACT)
    torch.testing.assert_close(entropy[:, 1:], utils.entropy_from_logits(predicting), **EXACT)


def test_gae() -> None:
    """On rows without padding: TRL runs over the padding, ours skips it."""
    rewards, values = random(2, 3, 7), random(3, 3, 7)
    wanted = run_lines(
        ppo.PPOTrainer.train,
        "lastgaelam = 0",
        "returns = advantages + values",
        {
            "torch": torch,
            "rewards": rewards,
            "values": values,
            "gen_length": 7,
            "responses": rewards,
            "args": SimpleNamespace(gamma=0.97, lam=0.9),
        },
    )
    everywhere, ended = torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, dtype=torch.float64)
    advantages, returns = gae(rewards, values, everywhere, ended, gamma=0.97, lam=0.9)
    torch.testing.assert_close(advantages, wanted["advantages"], **EXACT)
    torch.testing.assert_close(returns, wanted["returns"], **EXACT)


def test_ppo_losses() -> None:
    old, new = random(4, 3, 7), random(5, 3, 7)
    values, old_values, returns, advantages = (random(seed, 3, 7) for seed in range(6, 10))
    wanted = run_lines(
        ppo.PPOTrainer.train,
        "vpredclipped = torch.clamp(",
        "pg_loss = ",
        {
            "torch": torch,
            "masked_mean": ppo.masked_mean,
            "vpred": values,
            "mb_values": old_values,
            "mb_return": returns,
            "mb_advantage": advantages,
            "mb_logprobs": old,
            "new_logprobs": new,
            "padding_mask": ~MASK,
            "padding_mask_p1": ~MASK,
            "micro_batch_inds": torch.arange(3),
            "args": SimpleNamespace(cliprange_value=0.3, cliprange=0.2),
        },
    )
    tokens = unit_count(MASK, "token")
    value_loss, value_metrics = ValueLoss(0.3, "token_mean")(values, old_values, returns, MASK)
    torch.testing.assert_close(value_loss / tokens, wanted["vf_loss"], **EXACT)
    torch.testing.assert_close(
        value_metrics["clip_fraction"] / tokens, wanted["vf_clipfrac"].double(), rtol=0, atol=1e-6
    )
    policy = ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0, aggregation="token_mean"
    )
    nothing = torch.zeros_like(new)
    policy_loss, _ = policy(new, old, advantages, MASK, entropy=nothing, correction=nothing + 1)
    torch.testing.assert_close(policy_loss / tokens, wanted["pg_loss"], **EXACT)


class FakeAccelerator:
    num_processes = 1
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


@pytest.mark.parametrize(("theirs", "ours"), [("grpo", "sequence_mean"), ("bnpo", "token_mean")])
def test_grpo_loss(theirs: str, ours: str) -> None:
    """Asymmetric clip, dual clip, importance weights, KL as a loss and both aggregations at once.

    For negative advantages TRL's bound `delta` on the ratio is the dual clip.
    """
    old, new, reference, entropy = (random(seed, 3, 7) for seed in range(10, 14))
    weights, advantages = random(14, 3, 7).abs(), torch.tensor([1.3, -0.7, -2.0], dtype=torch.float64)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropy, None),
        accelerator=FakeAccelerator(),
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(delta=2.5, use_bias_correction_kl=False),
        loss_type=theirs,
        beta=0.04,
        epsilon_low=0.1,
        epsilon_high=0.3,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
    )
    ids = torch.zeros(3, 7, dtype=torch.long)
    wanted = grpo.GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": MASK.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "importance_sampling_ratio": weights,
        },
    )
    policy = ClippedPolicyLoss(clip_low=0.1, clip_high=0.3, dual_clip=2.5, entropy_coefficient=0.0, aggregation=ours)
    per_token = advantages[:, None].expand(3, 7)
    policy_loss, metrics = policy(new, old, per_token, MASK, entropy=entropy, correction=weights)
    units = unit_count(MASK, policy.unit)
    found = (policy_loss + KlLoss("k3", 0.04, ours)(new, reference, MASK)) / units
    torch.testing.assert_close(found, wanted, **EXACT)
    if ours == "token_mean":
        recorded = {name: values[0] for name, values in trainer._metrics["eval"].items()}
        assert (metrics["entropy"] / units).item() == pytest.approx(recorded["entropy"], abs=1e-6)
        assert (metrics["clip_fraction"] / units).item() == pytest.approx(recorded["clip_ratio/region_mean"], abs=1e-6)
        assert masked_mean(k3(new, reference), MASK).item() == pytest.approx(recorded["kl"], abs=1e-6)


def test_group_advantages() -> None:
    rewards = random(20, 12)
    grouped = {"torch": torch, "nanstd": utils.nanstd, "rewards": rewards, "num_generations": 4}
    names = run_lines(
        grpo.GRPOTrainer._generate_and_score_completions,
        "mean_grouped_rewards = torch.nanmean",
        "mean_grouped_rewards = mean_grouped_rewards.repeat_interleave",
        grouped,
    )
    names = run_lines(
        grpo.GRPOTrainer._generate_and_score_completions,
        "std_rewards = nanstd(rewards.view(",
        "std_rewards = std_rewards.repeat_interleave",
        names,
    )
    centred = rewards - names["mean_grouped_rewards"]
    torch.testing.assert_close(group_relative(rewards, group_size=4, divide_by_std=False), centred, **EXACT)
    divided = centred / (names["std_rewards"] + 1e-6)  # TRL's G / (G - 1) is in single precision
    torch.testing.assert_close(group_relative(rewards, group_size=4), divided, rtol=1e-7, atol=0)

    scores = rewards.view(-1, 4)
    siblings = {"grouped_sum": scores.sum(1, keepdim=True), "grouped_rewards": scores, "rewards": rewards}
    names = run_lines(
        rloo.RLOOTrainer._generate_and_score_completions,
        "baselines = (grouped_sum",
        "advantages = rewards - baselines",
        siblings | {"scorable_counts": torch.tensor(4.0)},
    )
    torch.testing.assert_close(leave_one_out(rewards, group_size=4), names["advantages"], **EXACT)


class FakeModel:
    """Gives the same logits whatever it is asked."""

    training = False

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("margin", [{}, {"margin": random(30, 5).abs()}], ids=["no margin", "margin"])
def test_reward_model_loss(margin: dict[str, Tensor]) -> None:
    scores = random(31, 10)
    trainer = SimpleNamespace(
        model=FakeModel(scores),
        accelerator=FakeAccelerator(),
        args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    wanted = reward.RewardTrainer.compute_loss(trainer, FakeModel(scores[:, None]), dict(margin))
    margins = margin.get("margin", torch.zeros(5, dtype=torch.float64))
    loss, metrics = BradleyTerryLoss()(scores[:5], scores[5:], margins)
    torch.testing.assert_close(loss / 5, wanted, **EXACT)
    for name in ("accuracy", "margin"):
        assert (metrics[name] / 5).item() == pytest.approx(trainer._metrics["eval"][name][0], abs=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["sigmoid"], DpoLoss(beta=0.3, label_smoothing=0.0)),
        (["ipo"], IpoLoss(beta=0.3)),
        (["sigmoid", "sft"], DpoLoss(beta=0.3, label_smoothing=0.0)),
    ],
)
def test_dpo_losses(theirs: list[str], ours: DpoLoss | IpoLoss) -> None:
    """From the policy's logits on, three pairs; our term on the chosen answer is TRL's `sft`."""
    logits, tokens = 3 * random(32, 6, 8, 11), torch.arange(48).reshape(6, 8) % 11
    logprobs = token_logprobs(logits, tokens)
    # TRL's `sft` is a mean over tokens, ours over answers: the same where the chosen answers are of one length.
    lengths = (4, 4, 4, 2, 6, 1) if "sft" in theirs else (3, 5, 1, 2, 6, 4)
    mask = torch.stack([torch.arange(8) >= 8 - length for length in lengths])
    reference = answer_logprobs(logprobs, mask).total + 3 * random(33, 6)
    trainer = SimpleNamespace(
        model=FakeModel(logits),
        accelerator=FakeAccelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=theirs,
        loss_weights=[1.0, 0.7][: len(theirs)],
        beta=0.3,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    chosen, rejected = answer_logprobs(logprobs[:3], mask[:3]), answer_logprobs(logprobs[3:], mask[3:])
    reference_chosen, reference_rejected = reference[:3], reference[3:]
    wanted = dpo.DPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {
            "input_ids": tokens,
            "completion_mask": mask.long(),
            "ref_chosen_logps": reference_chosen,
            "ref_rejected_logps": reference_rejected,
        },
        False,
    )
    loss, metrics = ours(chosen, rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    added = ChosenLoss(0.7 if "sft" in theirs else 0.0)(chosen)
    torch.testing.assert_close((loss + added) / unit_count(mask, ours.unit), wanted, **EXACT)
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_logprob": "logps/chosen",
        "rejected_logprob": "logps/rejected",
    }
    assert metrics.keys() == names.keys()
    for name, value in metrics.items():
        assert (value / 3).item() == pytest.approx(trainer._metrics["eval"][names[name]][0], abs=1e-6)


def drawn_answers(seed: int) -> AnswerLogprobs:
    return AnswerLogprobs(-5 * random(seed, 5).abs() - 0.1, torch.tensor([3, 1, 4, 1, 5]))


def test_label_smoothing_and_simpo() -> None:
    chosen, rejected, nothing = drawn_answers(34), drawn_answers(35), torch.zeros(5, dtype=torch.float64)
    trainer = SimpleNamespace(alpha=0.0, accelerator=FakeAccelerator(), beta=0.6, label_smoothing=0.1)
    trainer.loss_type = "sigmoid"
    wanted, *_ = cpo.CPOTrainer.cpo_loss(trainer, chosen.total, rejected.total)
    smoothed = DpoLoss(beta=0.6, label_smoothing=0.1)
    found, _ = smoothed(chosen, rejected, reference_chosen=nothing, reference_rejected=nothing)
    torch.testing.assert_close(found, wanted.sum(), **EXACT)

    trainer.loss_type, trainer.label_smoothing, trainer.simpo_gamma = "simpo", 0.0, 0.9
    wanted, chosen_rewards, rejected_rewards = cpo.CPOTrainer.cpo_loss(trainer, chosen.mean, rejected.mean)
    found, metrics = SimpoLoss(beta=0.6, gamma=0.9)(chosen, rejected)
    torch.testing.assert_close(found, wanted.sum(), **EXACT)
    torch.testing.assert_close(metrics["chosen_reward"], chosen_rewards.sum(), **EXACT)
    torch.testing.assert_close(metrics["rejected_reward"], rejected_rewards.sum(), **EXACT)


def test_orpo_loss() -> None:
    """The odds ratio's term in single precision, as TRL casts to it."""
    chosen, rejected = drawn_answers(36), drawn_answers(37)
    trainer = SimpleNamespace(accelerator=FakeAccelerator(), beta=0.4)
    subtracted, *_, log_odds = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen.mean, rejected.mean)
    loss, metrics = OrpoLoss(coefficient=0.4)(chosen, rejected)
    assert (loss - metrics["nll"]).item() == pytest.approx(-subtracted.sum().item(), abs=1e-5)
    assert (metrics["margin"] / 5).item() == pytest.approx(log_odds.item(), abs=1e-5)
