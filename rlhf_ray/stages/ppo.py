"""A PPO stage: its roles, its KL controller and its weight sync."""

from __future__ import annotations

from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController
from rlhf_ray.config import schema
from rlhf_ray.config.layouts import possible_gpus
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.distributed.placement import RoleRequest
from rlhf_ray.stages.actors import Actors, generator_request, learner_request, reference_request, scorer_requests
from rlhf_ray.stages.site import LearnerParts, Site
from rlhf_ray.trainers.ppo import KlController, PpoGroups, optimizer_steps, train_ppo
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.scaling import Scaling
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.learner import Learner


def run_ppo(site: Site, stage: schema.Ppo) -> None:
    """Trains the policy, or goes on with it, to the stage's model."""
    model = site.initial_model(stage)
    data = site.data(stage, model)
    with (
        site.stage_run(stage, total=stage.iterations, data=data) as run,
        site.cluster.reserve(requests(stage, gpus=site.cluster.gpus)) as placement,
    ):
        actors = Actors(site, stage, placement, model)
        groups = _start(actors, stage, max_length=_longest(stage, data.train, data.held_out))
        kl = _kl_controller(stage.kl)
        turns = _turns(stage, groups)
        weights = WeightSync(
            groups.policy,
            groups.generator,
            settings=site.config.placement,
            generator_settings=stage.generator,
            learner_dtype=stage.policy.dtype,
            turns=turns,
        )
        learners = {"policy": groups.policy}
        if groups.critic is not None and groups.critic is not groups.policy:
            learners["critic"] = groups.critic
        samples = SampleStream(stage, groups.generator, data.train)
        turns.learning()
        run.start_or_resume(LearnerParts(learners, kl, samples=samples, turns=turns))
        with Scaling(
            site.folder.path,
            stage.name,
            groups.generator,
            placement,
            message=run.message,
            done=run.iteration,
            total=run.total,
        ) as scaling:
            train_ppo(stage, groups, samples, data.held_out, weights, turns, kl, scaling, run)
        run.finish()


def requests(stage: schema.Ppo, *, gpus: float) -> list[RoleRequest]:
    """What the stage's roles ask for; `gpus` are those of the cluster."""
    asked = [learner_request("policy", stage.policy)]
    critic = stage.critic_role
    if critic is not None and critic.kind == "network":
        asked.append(learner_request("critic", critic))
    if _has_reference(stage):
        asked.append(reference_request(stage.reference))
    gpus = possible_gpus(stage, stage.generator, gpus=gpus)
    return [*asked, *scorer_requests(stage.reward), generator_request(stage.name, stage.generator, gpus=gpus)]


def _has_reference(stage: schema.Ppo) -> bool:
    """Whether the reference has workers of its own."""
    return stage.kl_place != "off" and not stage.adapter_is_off_in_reference


def _start(actors: Actors, stage: schema.Ppo, *, max_length: int) -> PpoGroups:
    settings = stage.critic_role
    shared_trunk = settings is not None and settings.kind == "value_head"
    steps = optimizer_steps(stage)
    temperature = stage.sampling.temperature
    generator = actors.generator(stage.generator, max_length=max_length)
    policy = actors.learner(
        "policy",
        stage.policy,
        head="both" if shared_trunk else "none",
        total_steps=steps["policy"],
        temperature=temperature,
    )
    critic: WorkerGroup[Learner] | None = policy if shared_trunk else None
    if settings is not None and not shared_trunk:
        critic = actors.learner(
            "critic",
            settings,
            head="value",
            total_steps=steps["critic"],
            model=None if settings.model is None else str(settings.model),
            revision=settings.revision,
            temperature=temperature,
        )
    reference = actors.reference(stage.reference) if _has_reference(stage) else None
    rewards = actors.scorers(stage.reward)
    actors.wait()
    return PpoGroups(policy=policy, critic=critic, reference=reference, generator=generator, rewards=rewards)


def _turns(stage: schema.Ppo, groups: PpoGroups) -> GpuTurns:
    """The groups whose settings let them leave the GPU."""
    leaving = [groups.policy] if stage.policy.offload else []
    critic = stage.critic_role
    if critic is not None and groups.critic is not None and groups.critic is not groups.policy and critic.offload:
        leaving.append(groups.critic)
    return GpuTurns(groups.generator if stage.generator.sleep else None, leaving)


def _kl_controller(settings: schema.Kl) -> KlController:
    if settings.controller == "adaptive":
        assert settings.target is not None, "the adaptive controller has a target"
        return AdaptiveKlController(settings.coefficient, target=settings.target, horizon=settings.horizon)
    return FixedKlController(settings.coefficient)


def _longest(stage: schema.Ppo, prompts: PromptSet, held_out: PromptSet | None) -> int:
    """Tokens of the longest prompt and the longest response together."""
    longest = max(found.longest for found in (prompts, held_out) if found is not None)
    return longest + max(stage.sampling.max_new_tokens, stage.evaluation.max_new_tokens or 0)
