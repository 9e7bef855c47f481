"""What can be known of a pipeline before anything is started."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.data.prompts import check_prompts
from rlhf_ray.data.texts import check_texts


def check_data(config: schema.Pipeline) -> dict[str, dict[str, int]]:
    """Reads and checks every row of every stage's data.

    Returns:
        Rows of each stage's training and evaluation data, by stage.

    Raises:
        DataError: names file and row of the first mistake.
    """
    return {
        stage.name: check_texts(stage.data) if stage.method == "sft" else check_prompts(stage.data)
        for stage in config.stages
    }
