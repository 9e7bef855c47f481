"""The stages with one role, the policy: supervised fine-tuning, and reward models."""

from __future__ import annotations

from functools import partial

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import RoleRequest
from rlhf_ray.stages.actors import Actors, learner_request
from rlhf_ray.stages.site import LearnerParts, Site
from rlhf_ray.trainers.reward_model import score_statistics, train_reward_model
from rlhf_ray.trainers.sft import total_steps, train_sft


def run_supervised(site: Site, stage: schema.Sft | schema.RewardModel) -> None:
    """Trains the policy, or goes on with it, to the stage's model."""
    model = site.initial_model(stage)
    data = site.data(stage, model)
    total = total_steps(stage, data.train)
    with (
        site.stage_run(stage, total=total, data=data) as run,
        site.cluster.reserve(requests(stage)) as placement,
    ):
        actors = Actors(site, stage, placement, model)
        policy = actors.learner(
            "policy",
            stage.policy,
            head="none" if stage.method == "sft" else "score",
            total_steps=total,
            dropout=stage.dropout,
            packing=stage.packing if stage.method == "sft" else None,
        )
        actors.wait()
        if stage.method == "sft":
            run.start_or_resume(LearnerParts({"policy": policy}))
            train_sft(stage, policy, data.train, data.held_out, run)
        else:
            notes = partial(score_statistics, policy, data.train)
            run.start_or_resume(LearnerParts({"policy": policy}, notes=notes))
            train_reward_model(stage, policy, data.train, data.held_out, run)
        run.finish()


def requests(stage: schema.Sft | schema.RewardModel) -> list[RoleRequest]:
    """What the stage's one role asks for."""
    return [learner_request("policy", stage.policy)]
