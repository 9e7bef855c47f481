"""A DPO stage."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.stages.site import Site


def run_dpo(site: Site, stage: schema.Dpo) -> None:
    """Trains the policy, or goes on with it, to the stage's model."""
    raise NotImplementedError(stage.method)
