"""The rows of every stage's data, read and checked, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config import schema
from rlhf_ray.data.preferences import check_preferences, pair_characters
from rlhf_ray.data.prompts import check_prompts, prompt_characters
from rlhf_ray.data.texts import check_texts, texts_for_tokenizer

CHARACTERS_PER_TOKEN = 4.0
"""Of English text under vocabularies of 30,000 tokens and more; an assumption, for no tokenizer is loaded."""
RESPONSE_SHARE = 0.5
"""Mean length of a response over the longest that is allowed; an assumption."""
ROWS_READ = 1000
"""Rows of each source whose length is looked at."""


def check_data(config: schema.Pipeline) -> dict[str, dict[str, int]]:
    """Reads and checks every row of every stage's data, but for what a stage of this pipeline writes first.

    Returns:
        Rows of each stage's training and evaluation data, by stage.

    Raises:
        DataError: names file and row of the first mistake.
    """
    return {stage.name: _check(stage) for stage in config.stages}


def _check(stage: schema.Stage) -> dict[str, int]:
    groups = {name: getattr(stage.data, name) or () for name in ("train", "evaluation")}
    there = {name: tuple(source for source in sources if not source.stage) for name, sources in groups.items()}
    data = stage.data.model_copy(update=there)
    match data:
        case schema.TextData():
            return check_texts(data)
        case schema.PreferenceData():
            return check_preferences(data)
        case schema.PromptData():
            return check_prompts(data)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's rows.

    Args:
        prompt: mean of the prompts; of whole rows where nothing is sampled.
        response: mean of the responses that are sampled; 0 where none are.
        longest: of the longest response in a batch.
    """

    prompt: float
    response: float
    longest: float

    @property
    def row(self) -> float:
        """Mean of prompt and response together."""
        return self.prompt + self.response


def data_lengths(stage: schema.Stage) -> Lengths:
    """Lengths by the characters of the first rows of the data, and by what the settings allow of a response.

    Where an earlier stage writes the data, rows are taken to be as long as the settings allow.
    """
    there = tuple(source for source in stage.data.train if source.stage is None)
    data = stage.data.model_copy(update={"train": there})
    match data:
        case schema.TextData():
            characters, longest = [len(text) for text in texts_for_tokenizer(data, ROWS_READ)], data.max_length
        case schema.PreferenceData():
            characters, longest = pair_characters(data, ROWS_READ), data.max_length
        case schema.PromptData():
            characters, longest = prompt_characters(data, ROWS_READ), data.max_prompt_tokens
    tokens = [min(count / CHARACTERS_PER_TOKEN, longest) for count in characters]
    if isinstance(data, schema.PromptData) and data.prompt_length is not None:
        tokens = [(data.prompt_length.min + data.prompt_length.max) / 2]
    mean = max(1.0, sum(tokens) / len(tokens)) if tokens else float(longest)
    sampling = getattr(stage, "sampling", None)
    if sampling is None:
        return Lengths(mean, 0.0, 0.0)
    longest_response = float(sampling.max_new_tokens)
    return Lengths(mean, max(RESPONSE_SHARE * longest_response, float(sampling.min_new_tokens)), longest_response)
