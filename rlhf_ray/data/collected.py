"""What a collect stage writes: pairs and texts as Parquet, in the form that later stages read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rlhf_ray.data.batches import Rollouts
from rlhf_ray.data.encoding import Encoder, Message
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.errors import DataError
from rlhf_ray.shapes import SequenceFloat

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class Samples:
    """One batch of samples and what is known of each.

    Args:
        rollouts: B samples.
        messages: the chat messages of each sample's prompt; an empty list for a text.
        scores: [B] their weighted sums of scores.
        parts: each scorer's own scores [B] by its name.
        seeds: the seed that each was sampled with.
        origin: columns with one value for all of them.
    """

    rollouts: Rollouts
    messages: list[list[Message]]
    scores: SequenceFloat
    parts: Mapping[str, SequenceFloat]
    seeds: list[int]
    origin: Mapping[str, int | str]


def check_form(prompts: PromptSet) -> None:
    """DataError where prompts are texts and chat messages in turn, or where messages were cut: one column holds both.

    A cut conversation is no longer one that a later stage could put into a template.
    """
    chats = sum(1 for messages in prompts.messages if messages)
    if 0 < chats < len(prompts):
        raise DataError(
            f"data.train: {chats} of {len(prompts)} prompts are chat messages and the others strings; wanted one form, "
            "which is written with the responses. Set data.chat_template to true to make messages of the strings."
        )
    if chats and prompts.report["cut"]:
        raise DataError(
            f"data.train: {prompts.report['cut']} of {len(prompts)} prompts are chat messages longer than "
            "data.max_prompt_tokens and cut, so they cannot be written as messages; raise that, or set data.too_long "
            "to drop."
        )


def written_texts(samples: Samples, rows: Sequence[int], encoder: Encoder) -> tuple[dict[int, str], int]:
    """The text to write for each of these samples, and how many have none that is encoded to the sampled tokens.

    It is the text that the scorers saw, or the one with special tokens spelled out where only that gives the tokens
    back. None does where the response does not end in the end-of-sequence token (the length limit, a stop string),
    where its tokens are not those that the tokenizer makes of their text, and where the prompt was cut within a word.
    """
    texts = {row: samples.rollouts.responses[row] for row in rows}
    changed = _changed(samples, texts, encoder)
    spelled = {row: _spelled_out(samples, row, encoder) for row in changed}
    still = _changed(samples, spelled, encoder)
    texts |= {row: text for row, text in spelled.items() if row not in still}
    return texts, len(still)


def _changed(samples: Samples, texts: Mapping[int, str], encoder: Encoder) -> set[int]:
    """The samples that a later stage would encode to other tokens than were sampled."""
    rollouts = samples.rollouts
    prompts = [samples.messages[row] or rollouts.prompts[row] for row in texts]
    places = [f"prompt {int(rollouts.prompt_ids[row])}" for row in texts]
    encoded = encoder.answers(prompts, list(texts.values()), places)
    return {
        row for row, (head, answer) in zip(texts, encoded, strict=True) if (head, answer) != _token_ids(rollouts, row)
    }


def _token_ids(rollouts: Rollouts, row: int) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response."""
    sequences = rollouts.sequences
    length, size = int(sequences.attention_mask[row].sum()), int(sequences.response_mask[row].sum())
    tokens: list[int] = sequences.tokens[row, :length].tolist()
    return tokens[: length - size], tokens[length - size :]


def _spelled_out(samples: Samples, row: int, encoder: Encoder) -> str:
    """The response with its special tokens as text, but for the end-of-sequence token at its end."""
    head, answer = _token_ids(samples.rollouts, row)
    if answer[-1:] == [encoder.tokenizer.eos_token_id]:
        answer = answer[:-1]
    # Behind its prompt, because some tokenizers drop the space before whatever comes first.
    before, whole = (
        str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for ids in (head, [*head, *answer])
    )
    return whole.removeprefix(before) if whole.startswith(before) else samples.rollouts.responses[row]


def pair_table(samples: Samples, pairs: Sequence[tuple[int, int]], texts: Mapping[int, str]) -> pa.Table:
    """One row for each (chosen, rejected) of the samples.

    Columns: prompt (a string, or chat messages), chosen and rejected (in the same form), margin, chosen_score and
    rejected_score, chosen_score_<scorer> and rejected_score_<scorer>, chosen_seed and rejected_seed, prompt_id, and
    those of the origin.
    """
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    sides = {"chosen": chosen, "rejected": rejected}
    margins = [float(samples.scores[i].double() - samples.scores[j].double()) for i, j in pairs]
    columns = {"prompt": _prompts(samples, chosen)}
    columns |= {side: _answers(samples, rows, texts) for side, rows in sides.items()}
    columns["margin"] = pa.array(margins, pa.float64())
    for side, rows in sides.items():
        columns |= _scores(samples, rows, f"{side}_score")
    for side, rows in sides.items():
        columns[f"{side}_seed"] = _integers(samples.seeds, rows)
    return pa.table(columns | _origin(samples, chosen))


def text_table(
    samples: Samples,
    rows: Sequence[int],
    texts: Mapping[int, str],
    *,
    extra: Mapping[str, Sequence[float]],
) -> pa.Table:
    """One row for each of these samples; `extra` are further columns of numbers.

    Columns: messages (the whole conversation, where the prompt was chat messages), prompt, response, score,
    score_<scorer>, seed, the extra ones, prompt_id, and those of the origin.
    """
    columns: dict[str, pa.Array] = {}
    if any(samples.messages):
        whole = [[*samples.messages[row], {"role": "assistant", "content": texts[row]}] for row in rows]
        columns["messages"] = pa.array(whole, _MESSAGES)
    columns |= {"prompt": _prompts(samples, rows), "response": pa.array([texts[row] for row in rows], pa.string())}
    columns |= _scores(samples, rows, "score")
    columns["seed"] = _integers(samples.seeds, rows)
    columns |= {name: pa.array(list(values), pa.float64()) for name, values in extra.items()}
    return pa.table(columns | _origin(samples, rows))


def _prompts(samples: Samples, rows: Sequence[int]) -> pa.Array:
    if any(samples.messages):
        return pa.array([samples.messages[row] for row in rows], _MESSAGES)
    return pa.array([samples.rollouts.prompts[row] for row in rows], pa.string())


def _answers(samples: Samples, rows: Sequence[int], texts: Mapping[int, str]) -> pa.Array:
    if any(samples.messages):
        return pa.array([[{"role": "assistant", "content": texts[row]}] for row in rows], _MESSAGES)
    return pa.array([texts[row] for row in rows], pa.string())


def _scores(samples: Samples, rows: Sequence[int], name: str) -> dict[str, pa.Array]:
    found = {name: samples.scores, **{f"{name}_{part}": scores for part, scores in samples.parts.items()}}
    return {column: pa.array([float(scores[row]) for row in rows], pa.float32()) for column, scores in found.items()}


def _integers(values: Sequence[int], rows: Sequence[int]) -> pa.Array:
    return pa.array([values[row] for row in rows], pa.int64())


def _origin(samples: Samples, rows: Sequence[int]) -> dict[str, pa.Array]:
    columns: dict[str, Any] = {"prompt_id": _integers(samples.rollouts.prompt_ids.tolist(), rows)}
    for name, value in samples.origin.items():
        columns[name] = pa.array([value] * len(rows), pa.string() if isinstance(value, str) else pa.int64())
    return columns
