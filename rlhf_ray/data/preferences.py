"""Preference pairs: read, checked, encoded behind the prompt that both answers share, dealt out by seed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import PreferenceColumns, PreferenceData, Source
from rlhf_ray.data.arrow import Table, describe, open_table
from rlhf_ray.data.batches import PreferencePairs, Prompts, Sequences, make_sequences
from rlhf_ray.data.encoding import Encoder, Message, blocks, check_messages, check_text
from rlhf_ray.data.prompts import cut_left
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streams import Stream
from rlhf_ray.data.token_rows import TokenRows
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Pair:
    """A checked row: the prompt (a text, or the messages before the answer) and the texts of both answers."""

    place: str
    prompt: str | list[Message]
    chosen: str
    rejected: str
    margin: float


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt and of the two answers behind it; whether the prompt is a text, not chat messages."""

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    margin: float
    is_text: bool


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs whose token ids stand in a file.

    Args:
        rows: prompt, chosen and rejected answer of every pair that was encoded.
        margins: of those.
        is_text: of those.
        used: numbers of the pairs that are in use, in their order.
        exchanged: whether the answers have changed places, of the pairs in use.
    """

    rows: TokenRows
    margins: NDArray[np.float64]
    is_text: NDArray[np.bool_]
    used: NDArray[np.int64]
    exchanged: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of pairs in use."""
        return len(self.used)

    def __getitem__(self, row: int) -> EncodedPair:
        """The pair in use of this number."""
        number = int(self.used[row])
        prompt, chosen, rejected = self.rows[number]
        if self.exchanged[row]:
            chosen, rejected = rejected, chosen
        return EncodedPair(prompt, chosen, rejected, float(self.margins[number]), bool(self.is_text[number]))

    def kept(self, keep: Sequence[bool], exchange: Sequence[bool]) -> EncodedPairs:
        """The pairs to keep, with the answers of some exchanged."""
        mask = np.asarray(keep, dtype=np.bool_)
        exchanged = self.exchanged ^ np.asarray(exchange, dtype=np.bool_)
        return replace(self, used=self.used[mask], exchanged=exchanged[mask])


class _UnusableError(DataError):
    """A pair that `unusable: drop` leaves out."""


def check_preferences(data: PreferenceData) -> dict[str, int]:
    """Usable pairs of "train" and "evaluation", after reading and checking every row without a tokenizer.

    Raises DataError for the first thing wrong in the first wrong row, with file and line, and for a source of which no
    pair is left.
    """
    groups = {"train": data.train, "evaluation": data.evaluation or ()}
    return {name: sum(_count(data, source) for source in sources) for name, sources in groups.items()}


def pair_characters(data: PreferenceData, rows: int) -> list[int]:
    """Characters of a prompt with one of its answers, the mean of both, of the first pairs of every training source."""
    found = (pair for source in data.train for pair in islice(_pairs(data, source), rows) if pair is not None)
    return [_characters(pair.prompt) + (len(pair.chosen) + len(pair.rejected)) // 2 for pair in found]


def _characters(prompt: str | list[Message]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(each["content"]) for each in prompt)


def _count(data: PreferenceData, source: Source) -> int:
    rows, usable = 0, 0
    for pair in _pairs(data, source):
        rows += 1
        usable += pair is not None
    if not usable:
        raise DataError(_none_left(source, rows=rows, unusable=rows))
    return usable


def _none_left(source: Source, *, rows: int, unusable: int, too_long: str = "") -> str:
    return (
        f"{source.path}: no pair is left of {rows}: {unusable} have equal or empty answers or prompts that differ"
        f"{too_long}; at least one is wanted."
    )


def _pairs(data: PreferenceData, source: Source) -> Iterator[_Pair | None]:
    """The pairs of a source; None for one that is left out as unusable."""
    table = open_table(source)
    columns = data.columns
    # A renamed prompt column must be there; the default one is absent where rows are whole dialogues.
    renamed = columns.prompt != PreferenceColumns.model_fields["prompt"].default
    separate = renamed or columns.prompt in table.columns
    wanted = [*([columns.prompt] if separate else []), columns.chosen, columns.rejected]
    first: str | None = None
    for number, row in table.rows([*wanted, *([] if columns.margin is None else [columns.margin])]):
        place = table.place(number)
        kind = _kind(row[columns.chosen], columns.chosen, place)
        if (other := _kind(row[columns.rejected], columns.rejected, place)) != kind:
            raise DataError(
                f"{place}: column {columns.chosen!r} is {_KINDS[kind]} and column {columns.rejected!r} is "
                f"{_KINDS[other]}; wanted the same in both."
            )
        first = first or kind
        if kind != first:
            raise DataError(
                f"{place}: column {columns.chosen!r} is {_KINDS[kind]}, but {_KINDS[first]} in the rows before; wanted "
                "one form in all rows of a source."
            )
        margin = 0.0 if columns.margin is None else _margin(row[columns.margin], columns.margin, place)
        prompt = row[columns.prompt] if separate else None
        if separate:
            _kind(prompt, columns.prompt, place)
        try:
            if kind == "messages":
                pair = _message_pair(data, prompt, row[columns.chosen], row[columns.rejected], place, margin)
            else:
                pair = _text_pair(data, table, prompt, row[columns.chosen], row[columns.rejected], place, margin)
            if pair.chosen.strip() == pair.rejected.strip():
                raise _UnusableError(
                    f"{place}: columns {columns.chosen!r} and {columns.rejected!r} have the same answer, "
                    f"{describe(pair.chosen)}; wanted two different ones. {_REMEDY}"
                )
        except _UnusableError:
            if data.unusable == "error":
                raise
            yield None
            continue
        yield pair


_KINDS = {"text": "a string", "messages": "a list of chat messages"}
_REMEDY = "Remove or repair the row, or set data.unusable to drop."


def _kind(value: object, column: str, place: str) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "messages"
    raise DataError(f"{place}: column {column!r} is {describe(value)}; wanted a string or a list of chat messages.")


def _margin(value: object, column: str, place: str) -> float:
    """The value as a number; files of text alone hold it as a string."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise DataError(f"{place}: column {column!r} is {describe(value)}; wanted a finite number.")
    return number


def _answer(value: str, column: str, place: str) -> str:
    if not value.strip():
        raise _UnusableError(f"{place}: column {column!r} has an empty answer; wanted a text. {_REMEDY}")
    return value


def _text_pair(
    data: PreferenceData, table: Table, prompt: object, chosen: str, rejected: str, place: str, margin: float
) -> _Pair:
    columns = data.columns
    if prompt is not None:
        if isinstance(prompt, list):
            raise DataError(
                f"{place}: column {columns.prompt!r} is a list of chat messages and column {columns.chosen!r} a "
                "string; wanted strings in both, or chat messages in both."
            )
        text = check_text(prompt, columns.prompt, place)
    else:
        text, chosen = _split(data, table, chosen, place)
        other, rejected = _split(data, table, rejected, place)
        if other != text:
            raise _UnusableError(
                f"{place}: columns {columns.chosen!r} and {columns.rejected!r} do not share their prompt: up to the "
                f"last {data.answer_marker!r} they have {len(text)} and {len(other)} characters, which differ from "
                f"character {_first_difference(text, other) + 1} on; wanted the same dialogue before the answer. "
                f"{_REMEDY}"
            )
    chosen, rejected = _answer(chosen, columns.chosen, place), _answer(rejected, columns.rejected, place)
    if data.chat_template:
        return _Pair(place, [{"role": "user", "content": text}], chosen, rejected, margin)
    return _Pair(place, text, chosen, rejected, margin)


def _split(data: PreferenceData, table: Table, dialogue: str, place: str) -> tuple[str, str]:
    """What stands up to the last answer marker, and the answer behind it."""
    before, marker, answer = dialogue.rpartition(data.answer_marker)
    if not marker:
        raise DataError(
            f"{table.missing(data.columns.prompt, place)} Without it the answers must be whole dialogues that hold "
            f"{data.answer_marker!r} (data.answer_marker) before the answer; got {describe(dialogue)}."
        )
    return before + marker, answer


def _first_difference(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _message_pair(
    data: PreferenceData, prompt: object, chosen: list[object], rejected: list[object], place: str, margin: float
) -> _Pair:
    columns = data.columns
    if data.chat_template is False:
        raise DataError(
            f"{place}: column {columns.chosen!r} is a list of chat messages, but data.chat_template is false; leave it "
            "out, or take strings."
        )
    head, answer = _dialogue(data, prompt, chosen, columns.chosen, place)
    other, worse = _dialogue(data, prompt, rejected, columns.rejected, place)
    if head != other:
        difference = next((i for i, (a, b) in enumerate(zip(head, other, strict=False), 1) if a != b), None)
        where = f"{len(head)} and {len(other)} messages" if difference is None else f"message {difference} differs"
        raise _UnusableError(
            f"{place}: columns {columns.chosen!r} and {columns.rejected!r} do not share their prompt: before the "
            f"answer {where}; wanted the same messages up to the last one. {_REMEDY}"
        )
    return _Pair(place, head, answer, worse, margin)


def _dialogue(
    data: PreferenceData, prompt: object, value: list[object], column: str, place: str
) -> tuple[list[Message], str]:
    """The messages before the answer, and the answer's text."""
    name = data.columns.prompt
    last = value[-1] if value else None
    if isinstance(last, dict) and isinstance(last.get("content"), str):
        _answer(last["content"], column, place)
    messages = check_messages(value, column, place)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: column {column!r} ends with a message of role {messages[-1]['role']!r}; wanted the assistant's "
            "answer last."
        )
    head = messages[:-1]
    if isinstance(prompt, list):
        before = check_messages(prompt, name, place)
        holds_prompt = head == before
    else:
        before = [{"role": "user", "content": "" if prompt is None else check_text(prompt, name, place)}]
        holds_prompt = prompt is None or before[0] in head
    if head and not holds_prompt:
        raise _UnusableError(
            f"{place}: the messages before the answer in column {column!r} are not those of column {name!r}; wanted "
            f"the prompt's messages and the answer, or the answer's message only. {_REMEDY}"
        )
    if not head:
        if prompt is None:
            raise DataError(
                f"{place}: column {column!r} has one message only and there is no column {name!r}; wanted the "
                "prompt's messages before the assistant's."
            )
        head = before
    if head[-1]["role"] == "assistant":
        raise DataError(f"{place}: column {column!r} has an assistant's message before the answer; wanted a user's.")
    return head, messages[-1]["content"]


@dataclass(frozen=True)
class PreferenceSet:
    """Encoded pairs of one or several sources.

    Args:
        report: how many rows were read ("rows"), are used ("used"), were left out ("dropped"; among them "unusable":
            equal or empty answers, or prompts that differ; the others are too long), and were shortened ("cut").
        pairs: the pairs in use.
        sizes: number of pairs in use of each source, in the order of the sources.
        stream: the order in which they come.
    """

    report: dict[str, int]
    pairs: EncodedPairs
    sizes: list[int]
    stream: Stream

    def __len__(self) -> int:
        """Number of pairs in use."""
        return len(self.pairs)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass; the last may be smaller."""
        return self.stream.steps_per_epoch(batch_size)

    def batch(self, step: int, batch_size: int) -> PreferencePairs:
        """The step-th (from 0) batch of the endless stream; depends on seed and step only.

        Each epoch starts a new batch, so with one source every epoch holds each pair once.
        """
        return self.select(self.stream.batch(step, batch_size))

    def all(self) -> PreferencePairs:
        """Every pair once, in the data's order."""
        return self.select(range(len(self)))

    def select(self, rows: Sequence[int]) -> PreferencePairs:
        """The pairs of these numbers."""
        pairs = [self.pairs[row] for row in rows]

        def sequences(answers: Sequence[NDArray[np.int32]]) -> Sequences:
            return make_sequences([pair.prompt.tolist() for pair in pairs], [answer.tolist() for answer in answers])

        return PreferencePairs(
            chosen=sequences([pair.chosen for pair in pairs]),
            rejected=sequences([pair.rejected for pair in pairs]),
            ids=list(rows),
            margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        )

    def prompts(self, count: int, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """The first `count` different prompts, or all where there are fewer; a prompt's id is its first pair's."""
        first: dict[bytes, int] = {}
        for row in range(len(self)):
            if len(first) == count:
                break
            first.setdefault(self.pairs[row].prompt.tobytes(), row)
        rows = list(first.values())
        return Prompts(
            token_ids=[self.pairs[row].prompt.tolist() for row in rows],
            texts=[self.prompt_text(row, tokenizer) for row in rows],
            answers=[None] * len(rows),
            ids=rows,
            repeats=[0] * len(rows),
        )

    def prompt_text(self, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the policy reads before the answers of a pair; of chat messages with the template's special tokens."""
        pair = self.pairs[row]
        return str(tokenizer.decode(pair.prompt.tolist(), skip_special_tokens=pair.is_text))

    def kept(self, data: PreferenceData, *, keep: Sequence[bool], exchange: Sequence[bool], seed: int) -> PreferenceSet:
        """The training pairs to keep, with chosen and rejected exchanged in those of `exchange`; both have [len(self)].

        The report then has "exchanged" pairs, and those not kept among the "dropped" ones.

        Raises DataError for a source of which no pair is kept.
        """
        pairs = self.pairs.kept(keep, exchange)
        sizes, start = [], 0
        for source, size in zip(data.train, self.sizes, strict=True):
            sizes.append(sum(keep[start : start + size]))
            start += size
            if not sizes[-1]:
                raise DataError(
                    f"{source.path}: no pair is left of {size}: none of its chosen answers scores pairs.min_margin "
                    "above the rejected one; lower that, set pairs.relabel, or look at the scores."
                )
        swapped = sum(use and swap for use, swap in zip(keep, exchange, strict=True))
        dropped = self.report["dropped"] + len(self) - len(pairs)
        report = self.report | {"used": len(pairs), "dropped": dropped, "exchanged": swapped}
        return PreferenceSet(report, pairs, sizes, _stream(data.train, sizes, "train", data.shuffle, seed))


def load_preferences(
    data: PreferenceData, tokenizer: PreTrainedTokenizerBase, *, seed: int, sources: Literal["train", "evaluation"]
) -> PreferenceSet:
    """The pairs of the training or the evaluation sources, encoded, both answers ending in an end-of-sequence token.

    The prompt's tokens are the same in both rows, also where it is cut. An answer cut on the right does not end, so it
    gets no end-of-sequence token.

    Raises DataError with file and row for a wrong row, for a pair longer than max_length under `too_long: error`, and
    for a source of which no pair is left.
    """
    selected = data.train if sources == "train" else data.evaluation
    assert selected is not None, "there are no evaluation pairs"
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, which every answer ends in; set `eos_token` in its "
            "tokenizer_config.json."
        )
    encoder = Encoder.of(tokenizer)
    report = {"rows": 0, "used": 0, "dropped": 0, "unusable": 0, "cut": 0}
    rows, margins, is_text = TokenRows(3), array("d"), bytearray()
    sizes: list[int] = []
    for source in selected:
        before = {**report}
        for block in blocks(_pairs(data, source)):
            usable = [pair for pair in block if pair is not None]
            report["rows"] += len(block)
            report["unusable"] += len(block) - len(usable)
            report["dropped"] += len(block) - len(usable)
            for pair, ids in zip(usable, _encode(encoder, usable), strict=True):
                fitted = _fit(data, encoder, ids, pair.place)
                if fitted is None:
                    report["dropped"] += 1
                    continue
                report["used"] += 1
                report["cut"] += fitted != ids
                rows.add(*fitted)
                margins.append(pair.margin)
                is_text.append(isinstance(pair.prompt, str))
        sizes.append(report["used"] - before["used"])
        if not sizes[-1]:
            gone = {name: report[name] - before[name] for name in report}
            too_long = (
                f", {gone['dropped'] - gone['unusable']} do not fit into data.max_length ({data.max_length} tokens) or "
                "differ beyond it"
            )
            raise DataError(_none_left(source, rows=gone["rows"], unusable=gone["unusable"], too_long=too_long))
    encoded = EncodedPairs(
        rows,
        margins=np.array(margins),
        is_text=np.frombuffer(is_text, dtype=np.bool_),
        used=np.arange(len(rows)),
        exchanged=np.zeros(len(rows), dtype=np.bool_),
    )
    return PreferenceSet(report, encoded, sizes, _stream(selected, sizes, sources, data.shuffle, seed))


def _stream(sources: Sequence[Source], sizes: Sequence[int], name: str, shuffle: bool, seed: int) -> Stream:
    weights = [source.weight for source in sources]
    return Stream(sizes=sizes, weights=weights, seed=derive_seed(seed, "preferences", name), shuffle=shuffle)


_Ids = tuple[list[int], list[int], list[int]]


def _encode(encoder: Encoder, pairs: Sequence[_Pair]) -> list[_Ids]:
    """Token ids of each prompt and of the two answers behind it, each with its end-of-sequence token."""
    prompts, places = [pair.prompt for pair in pairs], [pair.place for pair in pairs]
    chosen = encoder.answers(prompts, [pair.chosen for pair in pairs], places)
    rejected = encoder.answers(prompts, [pair.rejected for pair in pairs], places)
    return [(head, better, worse) for (head, better), (_, worse) in zip(chosen, rejected, strict=True)]


def _fit(data: PreferenceData, encoder: Encoder, ids: _Ids, place: str) -> _Ids | None:
    """Ids of at most max_length tokens per row, the prompt alike in both, or None for a pair that is left out."""
    head, chosen, rejected = ids
    most = data.max_length
    longest = max(len(chosen), len(rejected))
    if len(head) + longest > most:
        match data.too_long:
            case "error":
                raise DataError(
                    f"{place}: prompt and longer answer have {len(head) + longest} tokens, wanted at most {most} "
                    "(data.max_length); raise that, or set data.too_long to drop, cut_left or cut_right."
                )
            case "drop":
                return None
            case "cut_right":
                room = most - len(head)
                if room < 1:
                    return None
                chosen, rejected = chosen[:room], rejected[:room]
            case "cut_left":
                room = most - longest
                if room < 1:
                    return None
                head = cut_left(head, room, encoder.prefix)
    return None if chosen == rejected else (head, chosen, rejected)
