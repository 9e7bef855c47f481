"""Responses of one or two models to the same prompts: their scores compared, written as Parquet, and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlhf_ray.algorithms.masked import masked_row_sum
from rlhf_ray.algorithms.preference_losses import preferred
from rlhf_ray.data.batches import Rollouts
from rlhf_ray.shapes import SequenceFloat
from rlhf_ray.trainers.durable import write_table
from rlhf_ray.trainers.view import printable


@dataclass(frozen=True)
class Responses:
    """What one model answered.

    Args:
        model: its name.
        seed: root of the seeds that its responses were sampled with.
        rollouts: B responses, those of one prompt adjacent.
        scores: [B] their scores; None where nothing scored them.
    """

    model: str
    seed: int
    rollouts: Rollouts
    scores: SequenceFloat | None

    @property
    def per_prompt(self) -> int:
        """Responses to each prompt."""
        return len(self.rollouts) // len(set(self.rollouts.prompt_ids.tolist()))

    def logprobs(self) -> SequenceFloat:
        """[B] log-probability of each response, summed over its tokens, under the distribution it was taken from."""
        return masked_row_sum(self.rollouts.generator_logprobs, self.rollouts.sequences.response_mask)

    def lengths(self) -> list[int]:
        """B counts of response tokens."""
        lengths: list[int] = self.rollouts.sequences.response_mask.sum(1).tolist()
        return lengths


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is NaN where there is one case only."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Comparison:
    """The second model against the first, response by response.

    Args:
        difference: second less first score.
        wins: share of the responses that score higher than the first model's; a tie counts half.
    """

    difference: Estimate
    wins: float


def estimate(values: SequenceFloat, per_prompt: int) -> Estimate:
    """Mean with standard error; responses to one prompt are alike, so the cases are prompts where there are several.

    Args:
        values: [B] one for each response.
        per_prompt: responses to each prompt, adjacent; it divides B.
    """
    cases = values.double()
    if len(cases) > per_prompt:
        cases = cases.view(-1, per_prompt).mean(1)
    error = float(cases.std(correction=1)) / math.sqrt(len(cases)) if len(cases) > 1 else math.nan
    return Estimate(float(cases.mean()), error)


def compare(first: Responses, second: Responses) -> Comparison:
    """The second model's scores [B] against the first one's [B]; both to the same prompts in the same order."""
    assert first.scores is not None, "the first model's responses have no scores"
    assert second.scores is not None, "the second model's responses have no scores"
    # The same response may score differently in its last digits beside other responses.
    same = torch.isclose(second.scores, first.scores, rtol=1e-5, atol=1e-6)
    difference = (second.scores - first.scores).masked_fill(same, 0.0)
    return Comparison(
        difference=estimate(difference, first.per_prompt),
        wins=float(preferred(difference, torch.zeros_like(difference)).mean()),
    )


def write_responses(path: Path, answered: Sequence[Responses]) -> None:
    """Writes one row for each response, whole or not at all.

    Columns: model, prompt_id, prompt, sample, response, score (null where nothing scored), finished, length (tokens),
    logprob (of the response), seed, tokens (the response's ids).
    """
    tables = [_table(each) for each in answered]
    write_table(path, pa.concat_tables(tables))


def _table(each: Responses) -> pa.Table:
    rollouts, number = each.rollouts, len(each.rollouts)
    masks = rollouts.sequences.response_mask
    tokens = [row[mask].tolist() for row, mask in zip(rollouts.sequences.tokens, masks, strict=True)]
    scores = [None] * number if each.scores is None else each.scores.tolist()
    return pa.table(
        {
            "model": pa.array([each.model] * number, pa.string()),
            "prompt_id": pa.array(rollouts.prompt_ids.tolist(), pa.int64()),
            "prompt": pa.array(rollouts.prompts, pa.string()),
            "sample": pa.array([row % each.per_prompt for row in range(number)], pa.int32()),
            "response": pa.array(rollouts.responses, pa.string()),
            "score": pa.array(scores, pa.float32()),
            "finished": pa.array(rollouts.finished.tolist(), pa.bool_()),
            "length": pa.array(each.lengths(), pa.int32()),
            "logprob": pa.array(each.logprobs().tolist(), pa.float32()),
            "seed": pa.array([each.seed] * number, pa.int64()),
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
        }
    )


def show_responses(answered: Sequence[Responses], *, prompts: int) -> RenderableType:
    """The responses to the first `prompts` prompts, two models side by side. Generated text is shown as it is.

    Args:
        answered: one or two models.
    """
    first, per_prompt = answered[0], answered[0].per_prompt
    parts: list[RenderableType] = []
    for start in range(0, min(prompts * per_prompt, len(first.rollouts)), per_prompt):
        parts += [Rule(style="dim"), Text(_lines(first.rollouts.prompts[start]), style="dim")]
        if len(answered) == 1:
            parts += [_response(first, row) for row in range(start, start + per_prompt)]
            continue
        table = Table(box=SIMPLE_HEAD, show_lines=True, expand=True, header_style="bold", pad_edge=False)
        for each in answered:
            table.add_column(Text(each.model, overflow="fold"), ratio=1)
        for row in range(start, start + per_prompt):
            table.add_row(*(_response(each, row) for each in answered))
        parts.append(table)
    return Group(*parts)


def show_scores(answered: Sequence[Responses]) -> RenderableType:
    """Length, ends and score of each model's responses, and the comparison of two."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    scored = answered[0].scores is not None
    for heading in ("model", "responses", "tokens", "finished", *(["score"] if scored else [])):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for each in answered:
        lengths = each.lengths()
        cells = [
            str(len(lengths)),
            f"{sum(lengths) / len(lengths):.1f}",
            f"{float(each.rollouts.finished.float().mean()):.0%}",
        ]
        if each.scores is not None:
            cells.append(str(estimate(each.scores, each.per_prompt)))
        table.add_row(Text(each.model), *cells)
    if len(answered) == 1 or not scored:
        return table
    found = compare(*answered)
    line = f"second less first {found.difference}; the second scores higher in {found.wins:.0%} (a tie counts half)"
    return Group(table, Text(line, style="bold green"))


def _response(each: Responses, row: int) -> Text:
    score = () if each.scores is None else (f"{float(each.scores[row]):+.3f}  ", "bold yellow")
    end = "" if each.rollouts.finished[row] else " …"
    text = _lines(each.rollouts.responses[row])
    return Text.assemble(score, text, (end, "dim")) if score else Text.assemble(text, (end, "dim"))


def _lines(text: str) -> str:
    """Generated text with its line ends and nothing else that a terminal obeys."""
    return "\n".join(printable(line) for line in text.split("\n"))
