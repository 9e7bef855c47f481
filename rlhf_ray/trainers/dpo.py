"""Direct preference optimization (arXiv:2305.18290) and its relatives: learning from pairs without a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from rlhf_ray.algorithms import kl
from rlhf_ray.algorithms.masked import masked_row_sum
from rlhf_ray.algorithms.preference_losses import ChosenLoss, DpoLoss, IpoLoss, OrpoLoss, SimpoLoss
from rlhf_ray.config import schema
from rlhf_ray.data.batches import PreferencePairs, Prompts, ReferencedPairs, Rollouts, Sequences
from rlhf_ray.data.pair_scores import PairScores, answer_rollouts
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.data.reference_cache import ReferenceCache, answer_digests
from rlhf_ray.distributed.groups import Pending, WorkerGroup, gather
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.evaluation import evaluate_prompts, weighted_sum, worker_metrics
from rlhf_ray.trainers.metrics import prefixed
from rlhf_ray.trainers.preference_report import report_pairs
from rlhf_ray.trainers.reference import reference_answer_logprobs, reference_logprobs
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import PreferenceObjective
from rlhf_ray.workers.scorers import ReferenceScorer, RewardScorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED_AT_ONCE = 256
"""Pairs in one call to the scorers, and in one look into the cache."""


@dataclass(frozen=True)
class DpoGroups:
    """The worker groups of a DPO stage.

    Args:
        reference: None where the policy with its adapter off is the reference, and where nobody needs to be asked: the
            loss has no reference, or all its answers are known.
        rewards: one group for each scorer of the evaluation's samples, by its name in the metrics.
    """

    policy: WorkerGroup[Learner]
    reference: WorkerGroup[ReferenceScorer] | None
    rewards: dict[str, WorkerGroup[RewardScorer]]


@dataclass(frozen=True)
class Samples:
    """What an evaluation samples with: engines, how they get the policy's weights, when, and held-out prompts."""

    generator: WorkerGroup[Generator]
    weights: WeightSync
    turns: GpuTurns
    prompts: Prompts


class References:
    """The reference's log-probabilities of answers: from the cache where they are known, else asked for and kept.

    Args:
        groups: who is asked.
        cache: what is known; None: everything is asked for.
        needed: whether the loss has a reference; without one every answer has 0.
    """

    def __init__(self, groups: DpoGroups, cache: ReferenceCache | None, *, needed: bool) -> None:
        self._groups = groups
        self._cache = cache
        self._needed = needed

    def ask(self, pairs: PreferencePairs) -> AskedPairs:
        """Starts what has to be computed: the answers of a pair together, where one of them is not known."""
        if not self._needed:
            return AskedPairs(pairs, torch.zeros(2 * len(pairs)))
        if self._cache is None:
            return AskedPairs(pairs, self._ask(pairs))
        digests = list(zip(answer_digests(pairs.chosen), answer_digests(pairs.rejected), strict=True))
        missing = {pair: row for row, pair in reversed(list(enumerate(digests))) if self._cache.missing(pair)}
        pending = self._ask(pairs.select(sorted(missing.values()))) if missing else None
        asked = [digests[row] for row in sorted(missing.values())]
        return AskedPairs(pairs, pending, self._cache, digests, asked)

    def _ask(self, pairs: PreferencePairs) -> Pending[SequenceFloat]:
        both = Sequences.concat([pairs.chosen, pairs.rejected])
        adjacent = torch.arange(len(both)).view(2, -1).T.flatten().tolist()
        return reference_answer_logprobs(self._groups.reference, self._groups.policy, both.select(adjacent))


class AskedPairs:
    """Pairs whose reference's log-probabilities may still be on their way."""

    def __init__(
        self,
        pairs: PreferencePairs,
        found: SequenceFloat | Pending[SequenceFloat] | None,
        cache: ReferenceCache | None = None,
        digests: Sequence[tuple[bytes, bytes]] = (),
        asked: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._pairs = pairs
        self._found = found
        self._cache = cache
        self._digests = digests
        self._asked = asked

    def result(self) -> ReferencedPairs:
        """Waits for what is missing; may be called again."""
        if isinstance(self._found, Pending):
            self._found = self._found.result()
            if self._cache is not None:
                self._cache.add(list(chain(*self._asked)), self._found)
        found = self._found if self._cache is None else self._cache.find(list(chain(*self._digests)))
        assert found is not None, "there is a cache or an answer"
        return ReferencedPairs(self._pairs, *found.view(-1, 2).unbind(1))


def train_dpo(
    config: schema.Dpo,
    groups: DpoGroups,
    pairs: PreferenceSet,
    held_out: PreferenceSet | None,
    references: References,
    samples: Samples | None,
    run: StageRun,
) -> None:
    """Runs the optimizer steps that are left; an iteration is one step."""
    objective = preference_objective(config.loss)
    judged = None if held_out is None else references.ask(held_out.all())
    if run.iteration == 0:
        before = scoring_metrics(pairs) if config.scores_pairs else {}
        run.record(before | evaluate(config, groups, objective, judged, samples, run, iteration=0))
    for step, batch in batches_one_ahead(config, pairs, references, run):
        stats = groups.policy.all(Learner.update, batch, objective, epochs=1, mini_batches=1, iteration=step).result()[
            0
        ]
        metrics = prefixed("policy", stats)
        metrics["policy/tokens"] = float(objective.sequences(batch).attention_mask.sum())
        if run.evaluation_due(step, every=config.evaluation.every):
            metrics |= evaluate(config, groups, objective, judged, samples, run, iteration=step)
        metrics |= worker_metrics(memory_asked(groups, samples), groups.rewards)
        run.finish_iteration(metrics)


def memory_asked(groups: DpoGroups, samples: Samples | None) -> dict[str, Pending[list[float]]]:
    """The peak memory of each role's workers, the scorers' aside."""
    asked = {"policy": groups.policy.all(Learner.memory)}
    if groups.reference is not None:
        asked["reference"] = groups.reference.all(ReferenceScorer.memory)
    if samples is not None:
        asked["generator"] = samples.generator.all(Generator.memory)
    return asked


def batches_one_ahead(
    config: schema.Dpo, pairs: PreferenceSet, references: References, run: StageRun
) -> Iterator[tuple[int, ReferencedPairs]]:
    """Each step that is left with its batch; while it is learnt from, the reference is at the next one."""

    def ask(step: int) -> AskedPairs:
        return references.ask(pairs.batch(step - 1, config.batch_size))

    following: AskedPairs | None = None
    for step in run.remaining():
        batch = (following or ask(step)).result()
        following = ask(step + 1) if step < run.total else None
        yield step, batch


def preference_objective(settings: schema.PreferenceLoss) -> PreferenceObjective:
    """The objective of a loss's settings."""
    nll = ChosenLoss(settings.nll_coefficient) if settings.nll_coefficient else None
    match settings.kind:
        case "sigmoid":
            return PreferenceObjective(DpoLoss(settings.beta, settings.label_smoothing), nll)
        case "ipo":
            return PreferenceObjective(IpoLoss(settings.beta), nll)
        case "simpo":
            return PreferenceObjective(SimpoLoss(settings.beta, settings.gamma), nll)
        case "orpo":
            return PreferenceObjective(OrpoLoss(settings.odds_coefficient), None)


def evaluate(
    config: schema.Dpo,
    groups: DpoGroups,
    objective: PreferenceObjective,
    held_out: AskedPairs | None,
    samples: Samples | None,
    run: StageRun,
    *,
    iteration: int,
) -> dict[str, float]:
    """Metrics on the held-out pairs, and of samples where there is a generator; none without held-out pairs."""
    if held_out is None:
        return {}
    with run.evaluating():
        metrics = evaluate_pairs(groups.policy, objective, held_out.result(), run, iteration=iteration)
        if samples is not None:
            metrics |= evaluate_samples(config, groups, samples, run, iteration=iteration)
    return metrics


def evaluate_pairs(
    policy: WorkerGroup[Learner],
    objective: PreferenceObjective,
    pairs: ReferencedPairs,
    run: StageRun,
    *,
    iteration: int,
) -> dict[str, float]:
    """The loss and its metrics, and how well the implicit rewards agree with the preferences, under `evaluation/`.

    The run keeps the report on the implicit rewards that they are part of.
    """
    logprobs = policy.split(Learner.logprobs, objective.sequences(pairs), 1.0).result()
    loss, sums = objective.judge(logprobs, pairs)
    chosen, rejected = objective.rewards(logprobs, pairs)
    report = report_pairs(chosen, rejected, pairs.pairs)
    means = {name: float(total) / len(pairs) for name, total in ({"loss": loss} | sums).items()}
    report = replace(report, metrics=report.metrics | means)
    run.write_report(report, iteration=iteration, margins=chosen - rejected)
    return {f"evaluation/{name}": value for name, value in report.metrics.items()}


def evaluate_samples(
    config: schema.Dpo, groups: DpoGroups, samples: Samples, run: StageRun, *, iteration: int
) -> dict[str, float]:
    """Metrics of responses to held-out prompts, which are kept, and their KL to the reference where there is one.

    KL is in nats per sequence: `evaluation/kl_k1` and `evaluation/kl_k3`, means over the samples.
    """
    metrics = samples.weights.sync(version=iteration)
    settings = config.evaluation
    sampling = schema.Sampling(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)
    found = evaluate_prompts(
        samples.generator, samples.prompts, sampling, scorers=groups.rewards, rewards=config.reward
    )
    samples.turns.learning()
    distance = None
    if config.needs_reference:
        k1, k3 = sample_kl(groups, found.rollouts, settings.temperature or 1.0)
        metrics |= {"evaluation/kl_k1": float(k1.mean()), "evaluation/kl_k3": float(k3.mean())}
        distance = k1
    run.write_evaluation(found.rollouts, iteration=iteration, scores=found.scores, parts=found.parts, kl=distance)
    return metrics | found.metrics


def sample_kl(groups: DpoGroups, rollouts: Rollouts, temperature: float) -> tuple[SequenceFloat, SequenceFloat]:
    """The estimators k1 and k3 of KL(policy || reference), each summed over a response: [B] and [B]."""
    policy, reference = gather(
        groups.policy.split(Learner.logprobs, rollouts.sequences, temperature),
        reference_logprobs(groups.reference, groups.policy, rollouts.sequences, temperature),
    )
    mask = rollouts.sequences.response_mask
    return masked_row_sum(kl.k1(policy, reference), mask), masked_row_sum(kl.k3(policy, reference), mask)


def score_pairs(
    config: schema.Dpo,
    scorers: Mapping[str, WorkerGroup[RewardScorer]],
    pairs: PreferenceSet,
    tokenizer: PreTrainedTokenizerBase,
) -> PairScores:
    """The scorers' weighted sums for both answers of every pair."""
    chosen, rejected = [], []
    for start in range(0, len(pairs), SCORED_AT_ONCE):
        rows = range(start, min(start + SCORED_AT_ONCE, len(pairs)))
        both = Rollouts.concat(answer_rollouts(pairs, rows, tokenizer))
        found = gather(*(group.split(RewardScorer.score, both) for group in scorers.values()))
        better, worse = weighted_sum(config.reward, dict(zip(scorers, found, strict=True))).chunk(2)
        chosen.append(better)
        rejected.append(worse)
    return PairScores(torch.cat(chosen), torch.cat(rejected))


def scoring_metrics(pairs: PreferenceSet) -> dict[str, float]:
    """How many training pairs the scores have left, exchanged and dropped, under `data/`.

    Dropped are also those that the data's own rules have left out.
    """
    return {f"data/pairs_{name}": float(pairs.report[name]) for name in ("used", "exchanged", "dropped")}


def unknown_answers(
    config: schema.Dpo, cache: ReferenceCache, pairs: PreferenceSet, held_out: PreferenceSet | None, *, steps: int
) -> tuple[int, int]:
    """How many answers of the stage's pairs the cache does not have, and how many there are."""
    rows: set[int] = set()
    for step in range(steps):
        rows.update(pairs.stream.batch(step, config.batch_size))
        if len(rows) == len(pairs):
            break
    unknown, answers = 0, 0
    wanted = [(pairs, sorted(rows))]
    if held_out is not None:
        wanted.append((held_out, list(range(len(held_out)))))
    for source, numbers in wanted:
        for start in range(0, len(numbers), SCORED_AT_ONCE):
            batch = source.select(numbers[start : start + SCORED_AT_ONCE])
            for side in (batch.chosen, batch.rejected):
                unknown += len(cache.missing(answer_digests(side)))
                answers += len(side)
    return unknown, answers
