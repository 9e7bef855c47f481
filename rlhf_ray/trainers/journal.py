"""The journal of samples: every rollout of every iteration as Parquet, for people (pandas) and for recovery.

One file per iteration, complete or absent. Each row is a sample with what a reader wants to see and the token ids,
masks and log-probabilities from which the batch can be rebuilt exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlhf_ray.data.batches import Rollouts, Sequences, pad_rows
from rlhf_ray.errors import CheckpointError
from rlhf_ray.shapes import SequenceFloat, TokenFloat, TokenMask
from rlhf_ray.trainers.durable import write_table


@dataclass(frozen=True)
class JournalEntry:
    """One iteration's samples as they were written.

    Args:
        rollouts: B samples.
        scores: [B] sequence scores.
        parts: each scorer's own scores [B] by its name.
        kl: [B] KL per sequence in nats; NaN where none was measured.
    """

    rollouts: Rollouts
    scores: SequenceFloat
    parts: dict[str, SequenceFloat]
    kl: SequenceFloat


def write_rollouts(
    path: Path,
    rollouts: Rollouts,
    *,
    scores: SequenceFloat,
    parts: Mapping[str, SequenceFloat] | None = None,
    kl: SequenceFloat | None = None,
) -> None:
    """Writes one iteration's samples, whole or not at all.

    Columns: prompt, response, score, score_<part>, kl (null where not measured), length (response tokens), finished,
    policy_version (of the first response token), prompt_id, sample_index, answer (JSON), tokens, response_mask,
    generator_logprobs, policy_versions (0 outside the response).
    """
    # Arrow's own pool would keep what the thread of each writing has freed.
    pa.set_memory_pool(pa.system_memory_pool())
    sequences = rollouts.sequences
    columns: dict[str, pa.Array] = {
        "prompt": pa.array(rollouts.prompts, pa.string()),
        "response": pa.array(rollouts.responses, pa.string()),
        "score": _floats(scores),
        **{f"score_{name}": _floats(part) for name, part in (parts or {}).items()},
        "kl": pa.nulls(len(rollouts), pa.float32()) if kl is None else _floats(kl),
        "length": pa.array(sequences.response_mask.sum(1).numpy(), pa.int32()),
        "finished": pa.array(rollouts.finished.numpy(), pa.bool_()),
        "policy_version": pa.array(rollouts.oldest_versions().numpy(), pa.int32()),
        "prompt_id": pa.array(rollouts.prompt_ids.numpy(), pa.int64()),
        "sample_index": pa.array(_sample_indices(rollouts.prompt_ids.tolist()), pa.int32()),
        "answer": pa.array([_answer(answer) for answer in rollouts.answers], pa.string()),
        "tokens": _lists(sequences.tokens, sequences.attention_mask, pa.int32()),
        "response_mask": _lists(sequences.response_mask, sequences.attention_mask, pa.bool_()),
        "generator_logprobs": _lists(rollouts.generator_logprobs, sequences.attention_mask, pa.float32()),
        "policy_versions": _lists(rollouts.policy_versions, sequences.attention_mask, pa.int32()),
    }
    write_table(path, pa.table(columns))


def read_rollouts(path: Path) -> JournalEntry:
    """The samples of a file of `write_rollouts`, equal bit for bit; CheckpointError where it cannot be read."""
    try:
        table = pq.read_table(path, partitioning=None)
        columns: dict[str, list[Any]] = table.to_pydict()
        floats = {
            name: _tensor(table, name) for name in table.column_names if name in ("score", "kl") or _is_part(name)
        }
        rows = list(zip(columns["tokens"], columns["response_mask"], columns["generator_logprobs"], strict=True))
        rollouts = Rollouts(
            sequences=Sequences(
                tokens=pad_rows([tokens for tokens, _, _ in rows]),
                attention_mask=pad_rows([[1] * len(tokens) for tokens, _, _ in rows]).bool(),
                response_mask=pad_rows([mask for _, mask, _ in rows]).bool(),
            ),
            generator_logprobs=_padded_floats([logprobs for _, _, logprobs in rows]),
            finished=torch.tensor(columns["finished"], dtype=torch.bool),
            prompts=columns["prompt"],
            responses=columns["response"],
            answers=[None if answer is None else json.loads(answer) for answer in columns["answer"]],
            prompt_ids=torch.tensor(columns["prompt_id"], dtype=torch.long),
            policy_versions=pad_rows(columns["policy_versions"]),
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: not a readable journal of samples: {error}") from error
    parts = {name.removeprefix("score_"): values for name, values in floats.items() if _is_part(name)}
    return JournalEntry(rollouts=rollouts, scores=floats["score"], parts=parts, kl=floats["kl"])


def _is_part(column: str) -> bool:
    return column.startswith("score_")


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.detach().float().numpy(), pa.float32())


def _lists(values: Tensor, attention: TokenMask, kind: pa.DataType) -> pa.Array:
    """[B, T] -> B lists without the padding."""
    ends = attention.sum(1).cumsum(0).numpy()
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values[attention].numpy()).cast(kind))


def _tensor(table: pa.Table, name: str) -> SequenceFloat:
    return torch.tensor([float("nan") if v is None else v for v in table[name].to_pylist()], dtype=torch.float32)


def _padded_floats(rows: list[list[float]]) -> TokenFloat:
    longest = max((len(row) for row in rows), default=0)
    padded = [[*row, *[0.0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float32).reshape(len(rows), longest)


def _answer(answer: Any) -> str | None:
    """JSON of an expected answer; other objects by their text."""
    return None if answer is None else json.dumps(answer, ensure_ascii=False, default=str)


def _sample_indices(prompt_ids: list[int]) -> list[int]:
    """The number of each sample among those of its prompt, in order."""
    seen: dict[int, int] = {}
    indices = []
    for prompt_id in prompt_ids:
        indices.append(seen.get(prompt_id, 0))
        seen[prompt_id] = indices[-1] + 1
    return indices
