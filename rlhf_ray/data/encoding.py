"""Text and chat messages to token ids: one rule for prompts and for training texts, so that both read alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.data.arrow import describe, did_you_mean
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
Item = TypeVar("Item")


def blocks(items: Iterable[Item], size: int = 1024) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one shorter: what a tokenizer takes at a time."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and the special tokens that it puts in front of a text (none, or the beginning-of-sequence token).

    What a tokenizer appends to a text is left out: a prompt never ends in an end-of-sequence token.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """The encoder of a tokenizer; the prefix is read off a probe text encoded with and without special tokens."""
        with_special, plain = (list(tokenizer("a", add_special_tokens=flag)["input_ids"]) for flag in (True, False))
        start = next((i for i in range(len(with_special)) if plain and with_special[i : i + len(plain)] == plain), 0)
        return cls(tokenizer, tuple(with_special[:start]))

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens; those spelled out in a text are still recognised."""
        return (
            [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
            if texts
            else []
        )

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the prefix in front, unless the text spells it out itself."""
        size = len(self.prefix)
        return [ids if tuple(ids[:size]) == self.prefix else [*self.prefix, *ids] for ids in self.plain(texts)]

    def continuations(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, response ids) of each pair; the response's are those that follow the prompt in the whole text.

        Where tokens would merge over the seam the response is encoded behind another beginning instead: the prompt's
        ids stay those that sampling sees.
        """
        heads = self.texts(prompts)
        wholes = self.texts([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        return [
            (head, whole[len(head) :] if whole[: len(head)] == head else self._behind_a_seam(response))
            for head, whole, response in zip(heads, wholes, responses, strict=True)
        ]

    def _behind_a_seam(self, response: str) -> list[int]:
        """The response's ids inside a text: some tokenizers put a space before whatever comes first."""
        for seam in ("\n", ".", "a"):
            head, whole = self.plain([seam, seam + response])
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.plain([response])[0]

    def answers(
        self, prompts: Sequence[str | list[Message]], answers: Sequence[str], places: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of each pair, the answer's up to its end-of-sequence token.

        Behind chat messages the answer stands in the template as the assistant's.
        """
        strings = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str)]
        plain = iter(self.continuations([str(prompts[row]) for row in strings], [answers[row] for row in strings]))
        encoded = []
        for prompt, answer, place in zip(prompts, answers, places, strict=True):
            head, tail = next(plain) if isinstance(prompt, str) else self._chat_answer(prompt, answer, place)
            eos = self.tokenizer.eos_token_id
            encoded.append((head, tail if tail[-1:] == [eos] else [*tail, eos]))
        return encoded

    def _chat_answer(self, prompt: list[Message], answer: str, place: str) -> tuple[list[int], list[int]]:
        """What follows the answer's end-of-sequence token is never sampled, and left out."""
        head = self.render(prompt, place, generation_prompt=True)
        whole = self.render([*prompt, {"role": "assistant", "content": answer}], place, generation_prompt=False)
        if whole[: len(head)] != head:
            raise DataError(
                f"{place}: the tokenizer's chat template changes what it wrote before the answer once that is there, "
                "so its tokens cannot be told apart; take a template that only appends, or strings."
            )
        tail = whole[len(head) :]
        eos = self.tokenizer.eos_token_id
        return head, tail[: tail.index(eos) + 1] if eos in tail else tail

    def render(self, messages: Sequence[Message], place: str, *, generation_prompt: bool) -> list[int]:
        """Token ids of chat messages in the tokenizer's template, which brings its own special tokens."""
        ids: Any = self._apply(messages, place, generation_prompt=generation_prompt, tokenize=True)
        return list(ids)

    def render_text(self, messages: Sequence[Message], place: str) -> str:
        """The text behind `render` with the generation prompt, special tokens spelled out."""
        return str(self._apply(messages, place, generation_prompt=True, tokenize=False))

    def _apply(self, messages: Sequence[Message], place: str, *, generation_prompt: bool, tokenize: bool) -> Any:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{place}: chat messages need a chat template, and the tokenizer has none; "
                "take a tokenizer with `chat_template`, or data whose prompts are strings (and leave "
                "`data.chat_template` out)."
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=generation_prompt, tokenize=tokenize, return_dict=False
            )
        except Exception as error:  # templates raise whatever they like, jinja's own errors among them
            raise DataError(f"{place}: the tokenizer's chat template refuses these messages: {error}") from error


def check_text(value: object, column: str, place: str) -> str:
    """The value, if it is a string with something in it; DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} is {describe(value)}; wanted a string.")
    if not value.strip():
        raise DataError(f"{place}: column {column!r} is empty; wanted a text. Remove or fill the row.")
    return value


def check_messages(value: object, column: str, place: str) -> list[Message]:
    """The value as a list of messages with role and content only; DataError for the first one that is none."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{place}: column {column!r} is {describe(value)}; wanted chat messages, a list of {{role, content}}."
        )
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place}: column {column!r}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {describe(message)}; wanted an object {{role, content}}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: {key!r} is {describe(message[key]) if key in message else 'missing'}; wanted a string."
                )
        if message["role"] not in ROLES:
            raise DataError(
                f"{where}: unknown role {message['role']!r}; wanted one of "
                f"{', '.join(ROLES)}{did_you_mean(message['role'], ROLES)}"
            )
        if not message["content"].strip() and message["role"] != "system":
            raise DataError(f"{where}: 'content' is empty; wanted a text.")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
