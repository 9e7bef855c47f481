"""Preferences or texts from the policy itself: sample, score, choose, write.

One iteration is a batch of prompts; what is kept of it is one Parquet file, whole or absent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.selection import draw_rows, effective_sample_size, pairs_by_margin, tilted_weights
from rlhf_ray.config import schema
from rlhf_ray.data.arrow import PARTS
from rlhf_ray.data.batches import Prompts, Rollouts, one_version
from rlhf_ray.data.collected import Samples, pair_table, text_table, written_texts
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.errors import CheckpointError, DataError
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.durable import write_table
from rlhf_ray.trainers.evaluation import score_rollouts, worker_metrics
from rlhf_ray.trainers.metrics import rollout_metrics
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.workers.generator import Generator, sample_seeds
from rlhf_ray.workers.scorers import RewardScorer

# Why responses were left out, and why nothing is kept of a prompt: metric, words, advice.
_RESPONSES = (
    ("unfinished", "cut by the length limit", "raise sampling.max_new_tokens, or set unfinished to keep"),
    ("empty", "empty", "set sampling.min_new_tokens"),
    ("equal", "equal to another one of the prompt", "raise sampling.temperature"),
)
_PROMPTS = (
    ("too_few", "with too few responses left", "raise sampling.samples_per_prompt"),
    ("tied", "whose responses all score the same", "take a reward that tells them apart"),
    ("margin", "whose responses differ by less than min_margin", "lower min_margin"),
)


@dataclass(frozen=True)
class CollectGroups:
    """The worker groups of a collect stage; `rewards` are one for each scorer, by its name in the metrics."""

    generator: WorkerGroup[Generator]
    rewards: dict[str, WorkerGroup[RewardScorer]]


@dataclass(frozen=True)
class Tally:
    """What was kept and left out so far; all that a collect stage has to remember."""

    counts: Counter[str] = field(default_factory=Counter)

    def state(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": dict(self.counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` gave."""
        self.counts.clear()
        self.counts.update(state["counts"])

    def save(self, folder: Path) -> None:
        """Nothing: no worker changes while it samples and scores."""

    def load(self, folder: Path) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Origin:
    """Whose samples they are.

    Args:
        encoder: the tokenizer that prompts were encoded with.
        seed: the stage's seed.
        policy: name of the model in the pipeline file.
        policy_version: iterations of the stage that made it; 0 where none of this run did.
    """

    encoder: Encoder
    seed: int
    policy: str
    policy_version: int


def batches(config: schema.Collect, prompts: Sized) -> int:
    """Batches of the whole stage; the last may be smaller."""
    return math.ceil((config.prompts or len(prompts)) / config.prompts_per_batch)


def places_of(config: schema.Collect, prompts: Sized, iteration: int) -> range:
    """The places of a batch's prompts, from batch 1: of the data, or of its endless stream where `prompts` is set."""
    start = (iteration - 1) * config.prompts_per_batch
    return range(start, min(start + config.prompts_per_batch, config.prompts or len(prompts)))


def batch_of(config: schema.Collect, prompts: PromptSet, iteration: int) -> Prompts:
    """The prompts of a batch, from 1."""
    places = places_of(config, prompts, iteration)
    take = prompts.rows if config.prompts is None else prompts.take
    return take(places.start, len(places))


def collect(
    config: schema.Collect, groups: CollectGroups, prompts: PromptSet, origin: Origin, tally: Tally, run: StageRun
) -> None:
    """Samples, scores and writes the batches that are left.

    Raises:
        DataError: nothing is kept of all the samples.
        CheckpointError: a part that was written is gone.
    """
    folder = run.folder / "data"
    _check_parts(folder, run)
    for iteration in run.remaining():
        batch = batch_of(config, prompts, iteration)
        rollouts = groups.generator.split(Generator.generate, batch, config.sampling, iteration=iteration).result()
        scores, parts = score_rollouts(config.reward, groups.rewards, rollouts)
        journal = replace(rollouts, policy_versions=one_version(rollouts.sequences, origin.policy_version))
        run.write_rollouts(journal, scores=scores, parts=parts)
        number = config.sampling.samples_per_prompt
        samples = Samples(
            rollouts=rollouts,
            messages=[prompts.messages_of(prompt_id) for prompt_id in rollouts.prompt_ids.tolist()],
            scores=scores,
            parts=parts,
            seeds=sample_seeds(origin.seed, batch, number, iteration=iteration),
            origin={"iteration": iteration, "policy": origin.policy, "policy_version": origin.policy_version},
        )
        draws = [
            derive_seed(origin.seed, "draws", iteration, prompt_id, repeat)
            for prompt_id, repeat in zip(batch.ids, batch.repeats, strict=True)
        ]
        chosen = choose(config, rollouts, scores, seeds=draws)
        texts, changed = written_texts(samples, chosen.responses(), origin.encoder)
        if config.writes == "pairs":
            table = pair_table(samples, chosen.pairs, texts)
        else:
            table = text_table(samples, chosen.rows, texts, extra=chosen.extra)
        write_table(folder / part_name(iteration), table)
        counts = {"samples": len(rollouts), "kept": len(table), "responses": len(texts), "changed": changed}
        counts |= chosen.dropped
        tally.counts.update(counts)
        metrics = rollout_metrics(rollouts, scores, parts) | chosen.metrics(scores)
        metrics |= {f"collect/{name}": float(count) for name, count in counts.items()}
        memory = {"generator": groups.generator.all(Generator.memory)}
        run.finish_iteration(metrics | worker_metrics(memory, groups.rewards))
    run.message(summary(config, tally.counts))
    if not tally.counts["kept"]:
        raise DataError(_nothing_kept(config, tally.counts, run.folder))


@dataclass(frozen=True)
class Selection:
    """What is kept of a batch's samples.

    Args:
        pairs: (chosen, rejected) rows, where pairs are kept.
        rows: rows, where texts are kept.
        extra: further columns of the texts.
        effective: effective sample size of each prompt that is resampled.
        dropped: `dropped_<why>`: responses that were left out, then prompts of which nothing is kept.
    """

    pairs: list[tuple[int, int]]
    rows: list[int]
    extra: dict[str, list[float]]
    effective: list[float]
    dropped: dict[str, int]

    def responses(self) -> list[int]:
        """The rows that are kept, each once."""
        return list(dict.fromkeys([*self.rows, *(row for pair in self.pairs for row in pair)]))

    def metrics(self, scores: SequenceFloat) -> dict[str, float]:
        """Mean margin of the pairs, mean score of the texts, mean effective sample size; where there are any."""
        values = scores.double().tolist()
        found = {
            "collect/margin_mean": [values[i] - values[j] for i, j in self.pairs],
            "collect/score_mean": [values[row] for row in self.rows],
            "collect/effective_samples": self.effective,
        }
        return {name: sum(numbers) / len(numbers) for name, numbers in found.items() if numbers}


def choose(config: schema.Collect, rollouts: Rollouts, scores: SequenceFloat, *, seeds: Sequence[int]) -> Selection:
    """What `keep` keeps of each prompt's adjacent samples; `seeds` are those of the prompts' draws (resample)."""
    found = Selection([], [], {"weight": [], "ess": []} if config.keep == "resample" else {}, [], {})
    dropped = dict.fromkeys([why for why, *_ in (*_RESPONSES, *_PROMPTS)], 0)
    number = config.sampling.samples_per_prompt
    for prompt, seed in enumerate(seeds):
        usable = []
        texts: set[str] = set()
        for row in range(prompt * number, (prompt + 1) * number):
            why = _unusable(config, rollouts, row, texts)
            if why is None:
                usable.append(row)
                texts.add(rollouts.responses[row].strip())
            else:
                dropped[why] += 1
        why = _choose_of_prompt(config, scores, usable, seed, found)
        if why is not None:
            dropped[why] += 1
    found.dropped.update({f"dropped_{why}": count for why, count in dropped.items()})
    return found


def _unusable(config: schema.Collect, rollouts: Rollouts, row: int, earlier: set[str]) -> str | None:
    """Why a response cannot be kept, or None; later stages refuse empty texts, and pairs of equal ones."""
    text = rollouts.responses[row].strip()
    if config.unfinished == "drop" and not rollouts.finished[row]:
        return "unfinished"
    if not text or not rollouts.prompts[row].strip():
        return "empty"
    # Among texts an equal one stands for its share of the policy.
    return "equal" if config.writes == "pairs" and text in earlier else None


def _choose_of_prompt(
    config: schema.Collect, scores: SequenceFloat, usable: list[int], seed: int, found: Selection
) -> str | None:
    """Adds what is kept of one prompt's usable samples; why that is nothing, or None."""
    if len(usable) < (2 if config.writes == "pairs" else 1):
        return "too_few"
    own = scores[usable]
    if config.writes == "pairs":
        pairs = pairs_by_margin(own, min_margin=config.min_margin)
        most = 1 if config.keep == "best_worst" else config.max_pairs
        found.pairs.extend((usable[i], usable[j]) for i, j in pairs[:most])
        return None if pairs else "tied" if bool((own == own[0]).all()) else "margin"
    if config.keep == "best_of_n":
        found.rows.append(usable[int(own.argmax())])
        return None
    weights = tilted_weights(own, beta=config.beta)
    effective = effective_sample_size(weights)
    drawn = draw_rows(weights, config.draws, seed=seed)
    found.rows.extend(usable[i] for i in drawn)
    found.effective.append(effective)
    found.extra["weight"].extend(float(weights[i]) for i in drawn)
    found.extra["ess"].extend(effective for _ in drawn)
    return None


def part_name(iteration: int) -> str:
    """`part_000001.parquet` for 1."""
    return f"part_{iteration:06d}.parquet"


def _check_parts(folder: Path, run: StageRun) -> None:
    """Every batch that is done has its part; a later one is of a course of events that was given up."""
    done = {part_name(iteration) for iteration in range(1, run.iteration + 1)}
    there = {path.name for path in folder.glob(PARTS)}
    if missing := done - there:
        raise CheckpointError(f"{folder / min(missing)} is gone; remove {run.folder} to collect anew")
    for name in there - done:
        (folder / name).unlink()


def summary(config: schema.Collect, counts: Mapping[str, int]) -> str:
    """What was kept and what was left out, in words."""
    kept = f"kept {counts['kept']} {config.writes} of {counts['samples']} responses"
    lines = [kept, *_reasons(counts, "responses", _RESPONSES), *_reasons(counts, "prompts", _PROMPTS)]
    if counts["changed"]:
        lines.append(f"{counts['changed']} of {counts['responses']} texts are not encoded to the tokens sampled")
    return "; ".join(lines)


def _reasons(counts: Mapping[str, int], what: str, table: Sequence[tuple[str, str, str]]) -> list[str]:
    found = [f"{counts[f'dropped_{why}']} {words}" for why, words, _ in table if counts[f"dropped_{why}"]]
    return [f"dropped {what}: {', '.join(found)}"] if found else []


def _nothing_kept(config: schema.Collect, counts: Mapping[str, int], folder: Path) -> str:
    advice = [remedy for why, _, remedy in (*_RESPONSES, *_PROMPTS) if counts[f"dropped_{why}"]]
    return (
        f"{config.name}: no {config.writes} to write: {summary(config, counts)}. What may help: {'; '.join(advice)}. "
        f"Then remove {folder} and resume, or start a new run."
    )
