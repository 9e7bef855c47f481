"""Training pairs seen through scorers: what those read, what they said, and what becomes of the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlhf_ray.config.schema import PairScoring, PreferenceData
from rlhf_ray.data.batches import Rollouts, Sequences, one_version
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.shapes import SequenceFloat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairScores:
    """Weighted sums of the scores of both answers of each pair, in the data's order.

    Args:
        chosen: [B] of the answers that the data prefer.
        rejected: [B] of the others.
    """

    chosen: SequenceFloat
    rejected: SequenceFloat


def answer_rollouts(
    pairs: PreferenceSet, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[Rollouts, Rollouts]:
    """The chosen and the rejected answers of some pairs as if they had been sampled, for scorers to read."""
    batch = pairs.select(rows)
    prompts = [pairs.prompt_text(row, tokenizer) for row in rows]

    def rollouts(sequences: Sequences) -> Rollouts:
        answers = [row[mask] for row, mask in zip(sequences.tokens, sequences.response_mask, strict=True)]
        return Rollouts(
            sequences=sequences,
            generator_logprobs=torch.zeros(sequences.tokens.shape),
            finished=torch.tensor([int(answer[-1]) == tokenizer.eos_token_id for answer in answers]),
            prompts=prompts,
            responses=[str(tokenizer.decode(answer.tolist(), skip_special_tokens=True)) for answer in answers],
            answers=[None] * len(rows),
            prompt_ids=torch.tensor(rows),
            policy_versions=one_version(sequences, 0),
        )

    return rollouts(batch.chosen), rollouts(batch.rejected)


def choose_pairs(
    data: PreferenceData, pairs: PreferenceSet, scores: PairScores, settings: PairScoring, *, seed: int
) -> PreferenceSet:
    """The pairs to train on: exchanged first where that is asked for, then dropped below the margin.

    Raises DataError, naming the source, where no pair of it is left.
    """
    keep, exchange = decide(scores, settings)
    return pairs.kept(data, keep=keep, exchange=exchange, seed=seed)


def decide(scores: PairScores, settings: PairScoring) -> tuple[list[bool], list[bool]]:
    """Of each pair: whether it is kept, and whether its answers are exchanged; an equal score exchanges nothing."""
    margin = scores.chosen - scores.rejected
    exchange = (margin < 0) & settings.relabel
    margin = torch.where(exchange, -margin, margin)
    keep = torch.ones_like(exchange) if settings.min_margin is None else margin >= settings.min_margin
    return keep.tolist(), exchange.tolist()


def pair_table(
    pairs: PreferenceSet, scores: PairScores, settings: PairScoring, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """Every scored pair for people to read: its texts as in the data, both scores, and what became of it."""
    keep, exchange = decide(scores, settings)
    texts = [
        (pairs.prompt_text(row, tokenizer), *(str(tokenizer.decode(a, skip_special_tokens=True)) for a in answers))
        for row in range(len(pairs))
        for pair in [pairs.pairs[row]]
        for answers in [(pair.chosen.tolist(), pair.rejected.tolist())]
    ]
    columns = {name: pa.array([row[i] for row in texts], pa.string()) for i, name in enumerate(_TEXTS)}
    return pa.table(
        columns
        | {
            "chosen_score": pa.array(scores.chosen.numpy(), pa.float32()),
            "rejected_score": pa.array(scores.rejected.numpy(), pa.float32()),
            "kept": pa.array(keep, pa.bool_()),
            "exchanged": pa.array(exchange, pa.bool_()),
        }
    )


_TEXTS = ("prompt", "chosen", "rejected")


def read_scores(path: Path) -> PairScores:
    """The scores in a file of `pair_table`, bit for bit."""
    table = pq.read_table(path, columns=["chosen_score", "rejected_score"], partitioning=None)
    return PairScores(*(torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names))
