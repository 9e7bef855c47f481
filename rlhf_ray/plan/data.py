"""The rows of every stage's data, read and checked."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.data.preferences import check_preferences
from rlhf_ray.data.prompts import check_prompts
from rlhf_ray.data.texts import check_texts


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
