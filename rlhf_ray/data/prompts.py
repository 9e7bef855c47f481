"""Prompts to sample from: read, checked, encoded, cut, and dealt out in a seeded order."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import LengthRange, PromptData, Source
from rlhf_ray.data.arrow import describe, open_table
from rlhf_ray.data.batches import Prompts
from rlhf_ray.data.encoding import Encoder, Message, blocks, check_messages, check_text
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streams import Stream
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Row:
    """A checked row: a text, or chat messages for the tokenizer's template."""

    place: str
    prompt: str | list[Message]
    answer: Any


def check_prompts(data: PromptData) -> dict[str, int]:
    """Rows of "train" and "evaluation", after reading and checking every one of them without a tokenizer.

    Raises DataError for the first thing wrong in the first wrong row, with file and line.
    """
    groups = {"train": data.train, "evaluation": data.evaluation or ()}
    return {name: sum(1 for source in sources for _ in _rows(data, source)) for name, sources in groups.items()}


def prompt_characters(data: PromptData, rows: int) -> list[int]:
    """Characters of each of the first prompts of every training source, `rows` of each."""
    first = (row for source in data.train for row in islice(_rows(data, source), rows))
    return [
        len(row.prompt) if isinstance(row.prompt, str) else sum(len(each["content"]) for each in row.prompt)
        for row in first
    ]


def _rows(data: PromptData, source: Source) -> Iterator[_Row]:
    table = open_table(source)
    prompt, answer = data.columns.prompt, data.columns.answer
    for number, row in table.rows([prompt] if answer is None else list(dict.fromkeys((prompt, answer)))):
        place = table.place(number)
        if answer is not None and row[answer] is None:
            raise DataError(f"{place}: column {answer!r} is null; wanted an answer. Remove or fill the row.")
        yield _Row(place, _checked_prompt(data, row[prompt], place), None if answer is None else row[answer])


def _checked_prompt(data: PromptData, value: object, place: str) -> str | list[Message]:
    column = data.columns.prompt
    if not isinstance(value, str | list):
        raise DataError(
            f"{place}: column {column!r} is {describe(value)}; wanted a string, or chat messages (a list of "
            f"{{role, content}})."
        )
    if isinstance(value, str):
        text = check_text(value, column, place)
        return [{"role": "user", "content": text}] if data.chat_template else text
    messages = check_messages(value, column, place)
    if messages[-1]["role"] not in ("user", "tool"):
        raise DataError(
            f"{place}: column {column!r} ends with a message of role {messages[-1]['role']!r}; wanted the user's "
            "last, for the model to answer."
        )
    if data.chat_template is False:
        raise DataError(
            f"{place}: column {column!r} holds chat messages, but data.chat_template is false; wanted a string, or "
            "leave that setting out."
        )
    if data.prompt_length is not None:
        raise DataError(
            f"{place}: column {column!r} holds chat messages, which data.prompt_length would cut; wanted a string, or "
            "leave that setting out."
        )
    return messages


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts of one or several sources.

    Args:
        report: how many rows were read ("rows"), are used ("used"), were left out as too long or too short ("dropped"),
            and were shortened ("cut"); under `prompt_length` being cut is the purpose and not counted.
        cut: row numbers of the shortened ones.
        tokens: token ids of each prompt in use.
        texts: their texts; empty under `prompt_length`, where they follow from the cut.
        messages: their chat messages; an empty list for a text.
        answers: their expected answers.
        ids: their row numbers over all sources.
        stream: the order in which they come.
        length: the range that a prompt's length is drawn from.
        seed: seed of those draws.
        tokenizer: decodes cut prompts.
    """

    report: dict[str, int]
    cut: frozenset[int]
    tokens: list[NDArray[np.int32]]
    texts: list[str]
    messages: list[list[Message]]
    answers: list[Any]
    ids: list[int]
    stream: Stream
    length: LengthRange | None
    seed: int
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        """Number of prompts in use."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        longest = max(len(tokens) for tokens in self.tokens)
        return longest if self.length is None else min(longest, self.length.max)

    def batch(self, iteration: int, count: int) -> Prompts:
        """The iteration-th (from 0) batch of `count` prompts of the endless stream; depends on seed and iteration only.

        With one source no prompt is repeated, or left out, within a pass over the data.
        """
        return self.take(iteration * count, count)

    def take(self, start: int, count: int) -> Prompts:
        """The prompts at the positions start ... start + count - 1 of the endless stream."""
        return self._prompts(self.stream.take(start, count))

    def rows(self, start: int, count: int) -> Prompts:
        """The prompts start ... start + count - 1 of the data, in the data's order; fewer at its end."""
        return self._prompts([(row, 0) for row in range(start, min(start + count, len(self)))])

    def all(self) -> Prompts:
        """Every prompt once, in the data's order."""
        return self.rows(0, len(self))

    def messages_of(self, prompt_id: int) -> list[Message]:
        """The chat messages of a prompt; an empty list for a text."""
        return self.messages[bisect_left(self.ids, prompt_id)]

    def _prompts(self, taken: Sequence[tuple[int, int]]) -> Prompts:
        rows = [row for row, _ in taken]
        token_ids = [self._drawn(row, number) for row, number in taken]
        if self.length is None:
            texts = [self.texts[row] for row in rows]
        else:
            texts = list(self.tokenizer.batch_decode(token_ids, skip_special_tokens=True))
        seen: Counter[int] = Counter()
        repeats = []
        for row in rows:
            repeats.append(seen[row])
            seen[row] += 1
        return Prompts(
            token_ids=token_ids,
            texts=texts,
            answers=[self.answers[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            repeats=repeats,
        )

    def _drawn(self, row: int, number: int) -> list[int]:
        """The row's tokens; under `prompt_length` the first n, n drawn anew in each pass."""
        ids: list[int] = self.tokens[row].tolist()
        if self.length is None:
            return ids
        generator = np.random.default_rng(derive_seed(self.seed, "prompt length", self.ids[row], number))
        return ids[: int(generator.integers(self.length.min, self.length.max, endpoint=True))]


def load_prompts(
    data: PromptData, tokenizer: PreTrainedTokenizerBase, *, seed: int, sources: Literal["train", "evaluation"]
) -> PromptSet:
    """The prompts of the training or the evaluation sources, encoded.

    Strings get the special tokens that the tokenizer puts in front of a text; messages go through its chat template,
    which brings its own. A prompt's text is what the policy reads: the string itself, the rendered template, or, where
    the prompt was cut, its decoded tokens.

    Raises DataError with file and row for a wrong row, for one longer than max_prompt_tokens under `too_long: error`,
    and for a source of which no row is left.
    """
    chosen = data.train if sources == "train" else data.evaluation
    assert chosen is not None, "there are no evaluation prompts"
    encoder = Encoder.of(tokenizer)
    tokens: list[NDArray[np.int32]] = []
    texts: list[str] = []
    messages: list[list[Message]] = []
    answers: list[Any] = []
    ids: list[int] = []
    sizes: list[int] = []
    cut: set[int] = set()
    report = {"rows": 0, "used": 0, "dropped": 0, "cut": 0}
    for source in chosen:
        before = len(ids)
        for block in blocks(_rows(data, source)):
            for row, (token_ids, text) in zip(
                block, _encode(encoder, block, keep_text=data.prompt_length is None), strict=True
            ):
                fitted = _fit(data, encoder, token_ids, row.place)
                if fitted is None:
                    report["dropped"] += 1
                else:
                    if fitted is not token_ids and data.prompt_length is None:
                        cut.add(report["rows"])
                        text = str(tokenizer.decode(fitted, skip_special_tokens=isinstance(row.prompt, str)))
                    tokens.append(np.asarray(fitted, dtype=np.int32))
                    if data.prompt_length is None:
                        texts.append(text)
                    messages.append([] if isinstance(row.prompt, str) else row.prompt)
                    answers.append(row.answer)
                    ids.append(report["rows"])
                report["rows"] += 1
        sizes.append(len(ids) - before)
        if not sizes[-1]:
            raise DataError(f"{source.path}: no row is left, all are {_why_dropped(data)}; change that, or the data.")
    report |= {"used": len(ids), "cut": len(cut)}
    stream = Stream(
        sizes=sizes,
        weights=[source.weight for source in chosen],
        seed=derive_seed(seed, "prompts", sources),
        shuffle=data.shuffle,
    )
    return PromptSet(
        report=report,
        cut=frozenset(cut),
        tokens=tokens,
        texts=texts,
        messages=messages,
        answers=answers,
        ids=ids,
        stream=stream,
        length=data.prompt_length,
        seed=derive_seed(seed, sources),
        tokenizer=tokenizer,
    )


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Prompts:
    """Texts as prompts, numbered from 0; with `chat` as a user's messages in the tokenizer's chat template.

    Raises DataError for a text without a token, and where there is no chat template.
    """
    rows = [
        _Row(f"prompt {number}", [{"role": "user", "content": text}] if chat else text, None)
        for number, text in enumerate(texts, 1)
    ]
    encoded = _encode(Encoder.of(tokenizer), rows, keep_text=True)
    return Prompts(
        token_ids=[token_ids for token_ids, _ in encoded],
        texts=[text for _, text in encoded],
        answers=[None] * len(rows),
        ids=list(range(len(rows))),
        repeats=[0] * len(rows),
    )


def _why_dropped(data: PromptData) -> str:
    if data.prompt_length is not None:
        return f"shorter than data.prompt_length.min ({data.prompt_length.min} tokens)"
    return f"longer than data.max_prompt_tokens ({data.max_prompt_tokens})"


def _encode(encoder: Encoder, rows: Sequence[_Row], *, keep_text: bool) -> list[tuple[list[int], str]]:
    """Token ids and text of each row, none of them empty."""
    strings = iter(encoder.texts([row.prompt for row in rows if isinstance(row.prompt, str)]))
    encoded = []
    for row in rows:
        if isinstance(row.prompt, str):
            token_ids, text = next(strings), row.prompt if keep_text else ""
        else:
            token_ids, text = (
                encoder.render(row.prompt, row.place, generation_prompt=True),
                encoder.render_text(row.prompt, row.place),
            )
        if not token_ids:
            raise DataError(
                f"{row.place}: the prompt has no token in this tokenizer's vocabulary; remove or fill the row."
            )
        encoded.append((token_ids, text))
    return encoded


def _fit(data: PromptData, encoder: Encoder, ids: list[int], place: str) -> list[int] | None:
    """The ids themselves, a shorter list, or None for a row that is left out."""
    if data.prompt_length is not None:
        return ids[: data.prompt_length.max] if len(ids) >= data.prompt_length.min else None
    most = data.max_prompt_tokens
    if len(ids) <= most:
        return ids
    match data.too_long:
        case "error":
            raise DataError(
                f"{place}: the prompt has {len(ids)} tokens, wanted at most {most} (data.max_prompt_tokens); "
                "raise that, or set data.too_long to drop, cut_left or cut_right."
            )
        case "drop":
            return None
        case "cut_right":
            return ids[:most]
        case "cut_left":
            return cut_left(ids, most, encoder.prefix)


def cut_left(ids: list[int], most: int, prefix: Sequence[int]) -> list[int]:
    """The last `most` ids; the special tokens in front of the text stay in front."""
    kept = len(prefix) if tuple(ids[: len(prefix)]) == tuple(prefix) and len(prefix) < most else 0
    return [*ids[:kept], *ids[len(ids) - (most - kept) :]]
