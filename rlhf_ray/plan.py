"""What can be known of a pipeline before anything is started."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.data.preferences import check_preferences
from rlhf_ray.data.prompts import check_prompts
from rlhf_ray.data.texts import check_texts


def check_data(config: schema.Pipeline) -> dict[str, dict[str, int]]:
    """Reads and checks every row of every stage's data.

    Returns:
        Rows of each stage's training and evaluation data, by stage.

    Raises:
        DataError: names file and row of the first mistake.
    """
    return {stage.name: _check(stage) for stage in config.stages}


def _check(stage: schema.Stage) -> dict[str, int]:
    match stage:
        case schema.Sft():
            return check_texts(stage.data)
        case schema.RewardModel() | schema.Dpo():
            return check_preferences(stage.data)
        case schema.Ppo() | schema.Collect():
            return check_prompts(stage.data)
