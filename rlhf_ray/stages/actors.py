"""What the roles of a stage ask the cluster for, and how their actors are started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config import schema
from rlhf_ray.config.role_rules import reward_names
from rlhf_ray.distributed.groups import RayGroup, WorkerGroup, gather
from rlhf_ray.distributed.placement import Placement, RoleRequest
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.heads import Head
from rlhf_ray.stages.site import Site, absolute, stage_seed
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.scorers import ClassifierScorer, FunctionScorer, ModelScorer, ReferenceScorer, RewardScorer


def learner_request(role: str, settings: schema.Learner) -> RoleRequest:
    """Workers that form one process group."""
    return _request(role, settings, rendezvous=True)


def scorer_requests(rewards: Sequence[schema.Reward]) -> list[RoleRequest]:
    """One role for each scorer."""
    return [_request(f"reward/{name}", reward) for name, reward in zip(reward_names(rewards), rewards, strict=True)]


def reference_request(settings: schema.Reference) -> RoleRequest:
    """The reference's workers."""
    return _request("reference", settings)


def generator_request(stage: str, settings: schema.Generator, *, gpus: float) -> RoleRequest:
    """The engines' workers; `gpus` are those of the cluster.

    Raises:
        ConfigError: tensor parallelism without a GPU.
    """
    if settings.tensor_parallel > 1 and settings.gpus is None:
        if not gpus:
            raise ConfigError(
                f"{stage}.generator.tensor_parallel: got {settings.tensor_parallel}, wanted 1: there is no GPU"
            )
        settings = settings.model_copy(update={"gpus": float(settings.tensor_parallel)})
    on_gpu = bool(gpus if settings.gpus is None else settings.gpus)
    # vLLM frees the memory of an engine that sleeps a second time when it is closed: its process must end with it.
    reuse = None if settings.sleep and on_gpu else "generator"
    return _request("generator", settings, env=engine_environment(settings, gpu=on_gpu), reuse=reuse)


def own_part(settings: schema.Generator, placement: Placement) -> schema.Generator:
    """The settings of engines that have a part of a GPU: they take memory_share of that part.

    Of a GPU that they share by colocate_with, and where they sleep, they take memory_share of the whole.
    """
    room = placement.room("generator").gpus
    part = room if 0 < room < 1 and not settings.sleep else 1.0
    return settings.model_copy(update={"memory_share": settings.memory_share * part})


def _request(
    role: str,
    settings: schema.Workers,
    *,
    rendezvous: bool = False,
    env: Mapping[str, str] | None = None,
    reuse: str | None = None,
) -> RoleRequest:
    gpus = 0.0 if isinstance(settings, schema.FunctionReward) and settings.gpus is None else settings.gpus
    return RoleRequest(
        role,
        workers=settings.workers,
        cpus=settings.cpus,
        gpus=gpus,
        env=env or {},
        rendezvous=rendezvous,
        reuse=reuse,
        colocate_with=settings.colocate_with,
        whole_gpus=settings.whole_gpus,
        strategy=settings.strategy,
        node_labels=settings.node_labels,
    )


class Actors:
    """Starts the actors of one stage; they start side by side until `wait`.

    Args:
        site: the run.
        stage: the stage's settings.
        placement: what `Cluster.reserve` gave for the stage's requests.
        model: directory or hub name of the policy's initial model.
    """

    def __init__(self, site: Site, stage: schema.Stage, placement: Placement, model: str) -> None:
        self._site = site
        self._stage = stage
        self._placement = placement
        self._model = model
        self._tokenizer = site.tokenizer(stage)
        self._started: list[RayGroup[Any]] = []

    def generator(self, settings: schema.Generator, *, max_length: int) -> RayGroup[Generator]:
        """Engines with the policy's initial weights, for prompt and response of max_length tokens together.

        Where the policy trains an adapter, they take that alone. Engines that sleep do so before another actor starts:
        vLLM measures what is free, and leaves it to the others.
        """
        group: RayGroup[Generator] = self._start(
            "generator",
            Generator,
            config=own_part(settings, self._placement),
            model=self._model,
            revision=self._stage.policy.revision,
            tokenizer=self._tokenizer,
            max_model_len=max_length,
            seed=stage_seed(self._stage, self._site.config.seed),
            lora=policy.lora if isinstance(policy := self._stage.policy, schema.Learner) else None,
        )
        if settings.sleep and self._placement.share("generator").gpus:
            group.ready.result()
            group.all(Generator.sleep, keep_weights=False).result()
        return group

    def learner(
        self,
        role: str,
        settings: schema.Learner,
        *,
        head: Head,
        total_steps: int,
        model: str | None = None,
        revision: str | None = None,
        temperature: float = 1.0,
        dropout: bool = False,
        packing: bool | None = None,
    ) -> RayGroup[Learner]:
        """Learners that start from `model`, or from the policy's initial one."""
        return self._start(
            role,
            Learner,
            config=settings,
            model=self._model if model is None else self._site.model(model),
            revision=self._stage.policy.revision if model is None else revision,
            head=head,
            seed=self._site.config.seed,
            total_steps=total_steps,
            temperature=temperature,
            tokenizer=self._tokenizer,
            dropout=dropout,
            packing=packing,
            timeout_s=self._site.config.placement.call_timeout_s,
        )

    def reference(self, settings: schema.Reference) -> RayGroup[ReferenceScorer]:
        """Scorers with the reference's weights: those of its own model, or the policy's initial ones."""
        own = settings.model
        return self._start(
            "reference",
            ReferenceScorer,
            config=settings,
            model=self._model if own is None else self._site.model(own),
            revision=self._stage.policy.revision if own is None else settings.revision,
        )

    def scorers(self, rewards: Sequence[schema.Reward]) -> dict[str, WorkerGroup[RewardScorer]]:
        """One group for each scorer, by its name in the metrics."""
        return {
            name: self._scorer(f"reward/{name}", settings)
            for name, settings in zip(reward_names(rewards), rewards, strict=True)
        }

    def _scorer(self, role: str, settings: schema.Reward) -> RayGroup[Any]:
        if isinstance(settings, schema.FunctionReward):
            return self._start(role, FunctionScorer, config=settings, search_path=self._site.pipeline_dir.absolute())
        if isinstance(settings, schema.ClassifierReward):
            own = settings.model_copy(update={"model": absolute(settings.model)})
            return self._start(role, ClassifierScorer, config=own)
        model = self._site.model(settings.model)
        return self._start(role, ModelScorer, config=settings, model=model, policy_tokenizer=self._tokenizer)

    def _start(self, role: str, worker: type[Any], **arguments: Any) -> RayGroup[Any]:
        group: RayGroup[Any] = self._placement.start(role, worker, **arguments)
        self._started.append(group)
        return group

    def wait(self) -> None:
        """Returns once all of them are ready; the first that fails, or is on a wrong GPU, is raised at once."""
        self._placement.verify()
        gather(*(group.ready for group in self._started))
