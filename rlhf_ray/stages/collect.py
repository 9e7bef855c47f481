"""A collect stage: engines that sample, scorers that judge, and no learner."""

from __future__ import annotations

from rlhf_ray.config import schema
from rlhf_ray.config.layouts import possible_gpus
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.distributed.placement import RoleRequest
from rlhf_ray.stages.actors import Actors, generator_request, scorer_requests
from rlhf_ray.stages.site import Site, stage_seed
from rlhf_ray.trainers.collect import CollectGroups, Origin, Tally, batches, collect


def run_collect(site: Site, stage: schema.Collect) -> None:
    """Samples, scores and writes, or goes on with it, to the stage's data."""
    model = site.initial_model(stage)
    data = site.data(stage, model)
    with (
        site.stage_run(stage, total=batches(stage, data.train), data=data) as run,
        site.cluster.reserve(requests(stage, gpus=site.cluster.gpus)) as placement,
    ):
        actors = Actors(site, stage, placement, model)
        longest = data.train.longest + stage.sampling.max_new_tokens
        groups = CollectGroups(actors.generator(stage.generator, max_length=longest), actors.scorers(stage.reward))
        actors.wait()
        tally = Tally()
        run.start_or_resume(tally)
        origin = Origin(
            encoder=Encoder.of(data.tokenizer),
            seed=stage_seed(stage, site.config.seed),
            policy=stage.policy.model,
            policy_version=site.version(stage.policy.model),
        )
        collect(stage, groups, data.train, origin, tally, run)
        run.finish()


def requests(stage: schema.Collect, *, gpus: float) -> list[RoleRequest]:
    """What the stage's roles ask for; `gpus` are those of the cluster."""
    gpus = possible_gpus(stage, stage.generator, gpus=gpus)
    return [*scorer_requests(stage.reward), generator_request(stage.name, stage.generator, gpus=gpus)]
