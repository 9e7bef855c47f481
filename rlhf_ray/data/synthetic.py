"""A corpus that needs no download: short film reviews by a small grammar, and the grammar's own judge of sentiment.

A row is {prompt, response, text, label}. The prompt is a neutral opening ("The quiet comedy by Marta Weiss about a
sailor was"); the response goes on positively or negatively, one half each, and often with one word of the other side.
Prompts of "train" and "test" are disjoint. A preference pair is a prompt with two responses, of which the judge prefers
the first: mostly a positive and a negative one, in two of five pairs a better and a worse one of the same side.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import TypedDict

from rlhf_ray.data.seeds import derive_seed

SPLITS = {"train": 8000, "test": 400}
"""The splits and how many rows they have where nothing else is asked for."""


class Review(TypedDict):
    """One row; label is 1 for a positive review and 0 for a negative one."""

    prompt: str
    response: str
    text: str
    label: int


class Preference(TypedDict):
    """One pair: two responses, and by how much the judge prefers the text with the first."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


ARTICLES = ("The", "This")
ORIGINS = ("new", "old", "quiet", "long", "small", "recent")
GENRES = ("comedy", "drama", "thriller", "western", "musical", "cartoon", "mystery", "romance")
DIRECTORS = (
    "Marta Weiss",
    "Henry Cole",
    "Lucia Romero",
    "Ivan Petrov",
    "Aiko Tanaka",
    "Omar Haddad",
    "Clara Jensen",
    "Pierre Blanc",
)
SUBJECTS = ("sailor", "teacher", "doctor", "family", "king", "robot", "soldier", "village", "painter", "thief")
VERBS = ("was", "felt", "seemed")

QUALITIES = {
    1: (
        "superb", "warm", "clever", "moving", "charming", "brilliant", "lovely", "honest", "elegant", "funny", "fresh",
        "gripping", "tender", "bright", "rich", "vivid", "witty", "graceful", "inspired", "delightful",
    ),
    0: (
        "awful", "dull", "clumsy", "boring", "shallow", "terrible", "ugly", "fake", "messy", "stale", "tired", "hollow",
        "cold", "lazy", "weak", "noisy", "silly", "painful", "bland", "dreadful",
    ),
}  # fmt: skip
FEELINGS = {
    1: ("loved", "enjoyed", "admired", "adored", "praised", "liked", "cherished", "applauded"),
    0: ("hated", "disliked", "regretted", "despised", "mocked", "resented", "loathed", "booed"),
}
EFFECTS = {
    1: ("shines", "works", "delights", "charms", "succeeds", "sparkles"),
    0: ("fails", "drags", "annoys", "bores", "collapses", "disappoints"),
}
ASPECTS = (
    "story",
    "acting",
    "music",
    "ending",
    "dialogue",
    "camera",
    "pace",
    "cast",
    "script",
    "editing",
    "costumes",
    "scenery",
    "first half",
    "second half",
)
PEOPLE = ("I", "we", "my friends", "the critics", "the children", "my sister", "the audience")
TIMES = (
    "from start to end",
    "in every scene",
    "most of the time",
    "after ten minutes",
    "in the last act",
    "on a big screen",
)
NEUTRAL = (
    "It runs for about two hours.",
    "I saw it on a rainy Sunday.",
    "It takes place near the sea.",
    "The plot follows two brothers.",
    "It was filmed in the north.",
    "There are many songs in it.",
    "It is based on a short book.",
    "We watched it at home.",
)

_LABEL_OF_WORD = {
    word: label for table in (QUALITIES, FEELINGS, EFFECTS) for label, words in table.items() for word in words
}


def reviews(split: str, rows: int, seed: int = 0) -> list[Review]:
    """The first rows of a split; row i depends on seed, split and i only.

    Prompts repeat, in the same order, after as many rows as the split has openings, with another response each time.
    """
    openings = _openings()[split]
    return [
        _review(openings[row % len(openings)], Random(derive_seed("reviews", seed, split, row))) for row in range(rows)
    ]


def preferences(split: str, rows: int, seed: int = 0) -> list[Preference]:
    """The first pairs of a split, the better response preferred; row i depends on seed, split and i only.

    Prompts are those of `reviews`, in the same order; the responses are others.
    """
    openings = _openings()[split]
    return [
        _preference(openings[row % len(openings)], Random(derive_seed("preferences", seed, split, row)))
        for row in range(rows)
    ]


def judge(text: str) -> float:
    """Sentiment in [-1, 1]: (positive - negative) / (positive + negative) words, 0 where there are none.

    Where both are equally many the last of them, which stands in the verdict, counts once more.
    """
    labels = [_LABEL_OF_WORD[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _LABEL_OF_WORD]
    if labels and 2 * sum(labels) == len(labels):
        labels.append(labels[-1])
    return (2 * sum(labels) - len(labels)) / len(labels) if labels else 0.0


def vocabulary() -> list[str]:
    """Every word that the grammar can write, in lower case, sorted."""
    tables = [
        ARTICLES,
        ORIGINS,
        GENRES,
        DIRECTORS,
        SUBJECTS,
        VERBS,
        ASPECTS,
        PEOPLE,
        TIMES,
        NEUTRAL,
        tuple(_LABEL_OF_WORD),
    ]
    frames = "by about a and but the if you ask me it one could call on whole for of us what is work most"
    return sorted(
        {word for table in tables for phrase in (*table, frames) for word in re.findall(r"[a-z]+", phrase.lower())}
    )


@cache
def _openings() -> dict[str, tuple[str, ...]]:
    """The openings of each split, shuffled: one tenth of the combinations belongs to "test"."""
    combinations = [
        f"{article} {origin} {genre} by {director} about a {subject} {verb}"
        for article in ARTICLES
        for origin in ORIGINS
        for genre in GENRES
        for director in DIRECTORS
        for subject in SUBJECTS
        for verb in VERBS
    ]
    Random(derive_seed("openings")).shuffle(combinations)
    tenth = len(combinations) // 10
    return {"test": tuple(combinations[:tenth]), "train": tuple(combinations[tenth:])}


def _review(prompt: str, random: Random) -> Review:
    label = random.randrange(2)
    response = _response(label, random)
    return {"prompt": prompt, "response": response, "text": prompt + response, "label": label}


def _preference(prompt: str, random: Random) -> Preference:
    margin = 0.0
    while margin == 0:
        responses = [_response(random.randrange(2), random) for _ in range(2)]
        worse, better = sorted(judge(prompt + response) for response in responses)
        margin = better - worse
    rejected, chosen = sorted(responses, key=lambda response: judge(prompt + response))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def _response(label: int, random: Random) -> str:
    words = random.sample(QUALITIES[label], 2)
    response = f" {words[0]} and {words[1]}."
    # One word of the other side, in two of five reviews: never enough to turn the judgement.
    if random.random() < 0.4:
        response = f" {words[0]} but {random.choice(QUALITIES[1 - label])}. {_opinion(label, random)}"
    for _ in range(random.choice((1, 2, 2, 3))):
        response += f" {_opinion(label, random) if random.random() < 0.75 else random.choice(NEUTRAL)}"
    return f"{response} {_verdict(label, random)}"


def _opinion(label: int, random: Random) -> str:
    aspect = random.choice(ASPECTS)
    form = random.randrange(4)
    if form == 0:
        sentence = f"the {aspect} {random.choice(VERBS)} {random.choice(QUALITIES[label])} {random.choice(TIMES)}"
    elif form == 1:
        sentence = f"{random.choice(PEOPLE)} {random.choice(FEELINGS[label])} the {aspect}"
    elif form == 2:
        sentence = f"the {aspect} {random.choice(EFFECTS[label])} {random.choice(TIMES)}"
    else:
        sentence = f"one could call the {aspect} {random.choice(QUALITIES[label])}"
    return sentence[0].upper() + sentence[1:] + "."


def _verdict(label: int, random: Random) -> str:
    quality, effect = random.choice(QUALITIES[label]), random.choice(EFFECTS[label])
    return random.choice(
        (
            f"If you ask me, it is {quality}.",
            f"On the whole it {effect}.",
            f"For most of us it {effect}.",
            f"What {quality} work!",
        )
    )
