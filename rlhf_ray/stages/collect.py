"""A collect stage."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.stages.site import Site


def run_collect(site: Site, stage: schema.Collect) -> None:
    """Samples, scores and writes, or goes on with it."""
    raise NotImplementedError(stage.method)
