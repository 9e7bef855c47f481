"""Reward functions named from the pipeline files beside this one (`function: rewards:NAME`).

A reward function takes lists of prompts, responses and expected answers of equal length, then the keyword arguments
that the pipeline file gives, and returns one finite number for each response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ray.data.synthetic import judge

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def review_sentiment(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[Any]) -> list[float]:
    """Sentiment from -1 to 1 of each film review, prompt and response together, as its own grammar judges it."""
    return [judge(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def lexicon_valence(
    prompts: Sequence[str], responses: Sequence[str], answers: Sequence[Any], *, lexicon: str
) -> list[float]:
    """Mean valence per word of each response, from about -4 to 4; words that the lexicon lacks count 0.

    Args:
        lexicon: a file of lines `word TAB valence TAB ...`, such as VADER's lexicon.
    """
    valences = read_lexicon(lexicon)
    scores = []
    for response in responses:
        found = words(response)
        scores.append(sum(valences.get(word, 0.0) for word in found) / max(len(found), 1))
    return scores


def exact_answer(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[Any]) -> list[float]:
    """1 where the number behind `####` (without one: the last number) of response and answer is the same, else 0."""
    rewards = []
    for response, answer in zip(responses, answers, strict=True):
        wanted = final_number(str(answer))
        if wanted is None:
            raise ValueError(f"the expected answer {answer!r} holds no number")
        rewards.append(float(final_number(response) == wanted))
    return rewards


def words(text: str) -> list[str]:
    """The words of a text in lower case: letters, with apostrophes between them."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


@cache
def read_lexicon(path: str) -> dict[str, float]:
    """Words and their mean valence."""
    entries = (line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines() if "\t" in line)
    return {entry[0]: float(entry[1]) for entry in entries}


def final_number(text: str) -> float | None:
    """The number behind the last `####` of a text, without one the text's last number; None where there is none."""
    _, marker, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    return float(numbers[0 if marker else -1].replace(",", ""))
