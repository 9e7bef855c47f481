"""Texts for supervised fine-tuning: read, checked, encoded with their trained tokens marked, dealt out by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rlhf_ray.config.schema import Source, TextColumns, TextData
from rlhf_ray.data.arrow import Table, open_table
from rlhf_ray.data.batches import Sequences, pad_rows
from rlhf_ray.data.encoding import Encoder, Message, blocks, check_messages, check_text
from rlhf_ray.data.prompts import cut_left
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streams import Stream
from rlhf_ray.data.token_rows import TokenRows
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = (("messages",), ("prompt", "response"), ("text",))


@dataclass(frozen=True)
class _Row:
    """A checked row: chat messages, or a prompt (empty for plain text) and the text that is trained on."""

    place: str
    messages: list[Message]
    prompt: str
    response: str


def check_texts(data: TextData) -> dict[str, int]:
    """Rows of "train" and "evaluation", after reading and checking every one of them without a tokenizer.

    Raises DataError for the first thing wrong in the first wrong row, with file and line.
    """
    groups = {"train": data.train, "evaluation": data.evaluation or ()}
    return {name: sum(1 for source in sources for _ in _rows(data, source)) for name, sources in groups.items()}


def texts_for_tokenizer(data: TextData, rows: int | None = None) -> list[str]:
    """The raw training texts, prompts included, to train a fresh tokenizer on; of each source the first `rows`."""
    found = (row for source in data.train for row in islice(_rows(data, source), rows))
    return [
        "\n".join(m["content"] for m in row.messages) if row.messages else row.prompt + row.response for row in found
    ]


def _form(columns: TextColumns, table: Table) -> tuple[str, ...]:
    """Settings of the form that the rows have: the first whose columns are there, renamed columns before defaults."""
    renamed = {name for name, value in columns if value != TextColumns.model_fields[name].default}
    forms = [form for form in _FORMS if renamed & set(form)] or list(_FORMS)
    for form in forms:
        if all(getattr(columns, name) in table.columns for name in form):
            return form
    nearest = max(forms, key=lambda form: sum(getattr(columns, name) in table.columns for name in form))
    absent = next(name for name in nearest if getattr(columns, name) not in table.columns)
    wanted = "; or ".join(" and ".join(repr(getattr(columns, name)) for name in form) for form in forms)
    raise DataError(f"{table.missing(getattr(columns, absent), table.name)} Wanted columns: {wanted}.")


def _rows(data: TextData, source: Source) -> Iterator[_Row]:
    table = open_table(source)
    columns = data.columns
    form = _form(columns, table)
    for number, row in table.rows([getattr(columns, name) for name in form]):
        place = table.place(number)
        if form == ("messages",):
            yield _Row(place, _checked_messages(row[columns.messages], columns.messages, place), "", "")
        elif form == ("text",):
            yield _Row(place, [], "", check_text(row[columns.text], columns.text, place))
        else:
            prompt = check_text(row[columns.prompt], columns.prompt, place)
            yield _Row(place, [], prompt, check_text(row[columns.response], columns.response, place))


def _checked_messages(value: object, column: str, place: str) -> list[Message]:
    messages = check_messages(value, column, place)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: column {column!r} ends with a message of role {messages[-1]['role']!r}; wanted the assistant's "
            "last, to train on."
        )
    if len(messages) == 1:
        raise DataError(f"{place}: column {column!r} has one message only; wanted a user's before the assistant's.")
    return messages


@dataclass(frozen=True)
class TextSet:
    """Encoded texts of one or several sources.

    Args:
        report: how many rows were read ("rows"), are used ("used"), were left out ("dropped": too long, or nothing to
            train on within max_length) and were shortened ("cut").
        rows: token ids of each text in use; -1 - id of those that are not trained.
        stream: the order in which they come.
    """

    report: dict[str, int]
    rows: TokenRows
    stream: Stream

    def __len__(self) -> int:
        """Number of texts in use."""
        return len(self.rows)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass; the last may be smaller."""
        return self.stream.steps_per_epoch(batch_size)

    def batch(self, step: int, batch_size: int) -> Sequences:
        """The step-th (from 0) batch of the endless stream; depends on seed and step only.

        Each epoch starts a new batch, so with one source every epoch holds each text once.
        """
        return self._sequences(self.stream.batch(step, batch_size))

    def all(self) -> Sequences:
        """Every text once, in the data's order."""
        return self._sequences(range(len(self)))

    def _sequences(self, rows: Sequence[int]) -> Sequences:
        marked = [self.rows[row][0] for row in rows]
        tokens = pad_rows([np.where(ids < 0, ~ids, ids).tolist() for ids in marked])
        lengths = torch.tensor([len(ids) for ids in marked])
        attention = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        trained = torch.zeros_like(attention)
        trained[attention] = torch.from_numpy(np.concatenate(marked) >= 0)
        return Sequences(tokens=tokens, attention_mask=attention, response_mask=trained)


def load_texts(
    data: TextData, tokenizer: PreTrainedTokenizerBase, *, seed: int, sources: Literal["train", "evaluation"]
) -> TextSet:
    """The texts of the training or the evaluation sources, encoded, each ending in an end-of-sequence token.

    Trained are: the response and its end; of chat messages the assistant's and their ends; of plain text all of it.
    Position 0 is never trained. Text cut on the right does not end, so it gets no end-of-sequence token.

    Raises DataError with file and row for a wrong row, for one longer than max_length under `too_long: error`, and for
    a source of which no row is left.
    """
    chosen = data.train if sources == "train" else data.evaluation
    assert chosen is not None, "there are no evaluation texts"
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, which every training text ends in; set `eos_token` in its "
            "tokenizer_config.json."
        )
    encoder = Encoder.of(tokenizer)
    rows = TokenRows(1)
    sizes: list[int] = []
    report = {"rows": 0, "used": 0, "dropped": 0, "cut": 0}
    for source in chosen:
        before = len(rows)
        for block in blocks(_rows(data, source)):
            for row, (ids, mask) in zip(block, _encode(encoder, block), strict=True):
                report["rows"] += 1
                if data.train_on_prompt:
                    mask = [True] * len(ids)
                fitted = _fit(data, encoder, ids, mask, row.place)
                if fitted is None or not any(fitted[1][1:]):
                    report["dropped"] += 1
                    continue
                report["cut"] += len(fitted[0]) < len(ids)
                kept, mask = fitted[0], [False, *fitted[1][1:]]
                rows.add([token if use else ~token for token, use in zip(kept, mask, strict=True)])
        sizes.append(len(rows) - before)
        if not sizes[-1]:
            raise DataError(
                f"{source.path}: no row is left, all are longer than data.max_length ({data.max_length} tokens) or "
                "have no token to train on within it; "
                "raise it, or change data.too_long."
            )
    report["used"] = len(rows)
    stream = Stream(
        sizes=sizes,
        weights=[source.weight for source in chosen],
        seed=derive_seed(seed, "texts", sources),
        shuffle=data.shuffle,
    )
    return TextSet(report=report, rows=rows, stream=stream)


def _encode(encoder: Encoder, rows: Sequence[_Row]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each row and which of them are trained."""
    eos = encoder.tokenizer.eos_token_id
    pairs = [row for row in rows if row.prompt]
    texts = [row for row in rows if not row.prompt and not row.messages]
    encoded_pairs = iter(encoder.continuations([row.prompt for row in pairs], [row.response for row in pairs]))
    encoded_texts = iter(encoder.texts([row.response for row in texts]))
    encoded = []
    for row in rows:
        if row.messages:
            encoded.append(_encode_chat(encoder, row, eos))
            continue
        head, tail = next(encoded_pairs) if row.prompt else ([], next(encoded_texts))
        if tail[-1:] != [eos] or (not head and len(tail) == 1):
            tail = [*tail, eos]
        encoded.append(([*head, *tail], [False] * len(head) + [True] * len(tail)))
    return encoded


def _encode_chat(encoder: Encoder, row: _Row, eos: int) -> tuple[list[int], list[bool]]:
    """Ids of a conversation; each assistant message is trained from after its header to its end-of-sequence token.

    The spans come from rendering beginnings of the conversation: what the template writes for one more message must
    extend what it wrote before.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for number, message in enumerate(row.messages, 1):
        if message["role"] != "assistant":
            continue
        before = encoder.render(row.messages[: number - 1], row.place, generation_prompt=True)
        after = encoder.render(row.messages[:number], row.place, generation_prompt=False)
        if before[: len(ids)] != ids or after[: len(before)] != before:
            raise DataError(
                f"{row.place}: the tokenizer's chat template changes what it wrote before message {number} once that "
                "message is there, so the assistant's "
                "tokens cannot be told apart; take a template that only appends, or `prompt` and `response` columns."
            )
        span = after[len(before) :]
        end = span.index(eos) + 1 if eos in span else len(span)
        mask += [False] * (len(before) - len(mask)) + [True] * end + [False] * (len(span) - end)
        ids = after
    # What a template writes after the last end (a line break) is never sampled.
    last = len(mask) - mask[::-1].index(True)
    ids, mask = ids[:last], mask[:last]
    return (ids, mask) if ids[-1] == eos else ([*ids, eos], [*mask, True])


def _fit(
    data: TextData, encoder: Encoder, ids: list[int], mask: list[bool], place: str
) -> tuple[list[int], list[bool]] | None:
    """Ids and mask of at most max_length tokens, or None for a row that is left out."""
    most = data.max_length
    if len(ids) <= most:
        return ids, mask
    match data.too_long:
        case "error":
            raise DataError(
                f"{place}: the text has {len(ids)} tokens, wanted at most {most} (data.max_length); "
                "raise that, or set data.too_long to drop, cut_left or cut_right."
            )
        case "drop":
            return None
        case "cut_right":
            return ids[:most], mask[:most]
        case "cut_left":
            kept = cut_left(
                list(range(len(ids))),
                most,
                range(len(encoder.prefix)) if tuple(ids[: len(encoder.prefix)]) == encoder.prefix else (),
            )
            return [ids[i] for i in kept], [mask[i] for i in kept]
