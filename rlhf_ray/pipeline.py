"""A pipeline file made real: for each stage in order its data, its actors, its trainer, and the tear-down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.kl import AdaptiveKlController, FixedKlController
from rlhf_ray.config import schema
from rlhf_ray.config.load import run_files
from rlhf_ray.config.rules import reward_names
from rlhf_ray.data.preferences import PreferenceSet, load_preferences
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.texts import TextSet, load_texts, texts_for_tokenizer
from rlhf_ray.distributed.groups import RayGroup, WorkerGroup, gather
from rlhf_ray.distributed.placement import Cluster, Placement, RoleRequest
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_tokenizer, save_new_model
from rlhf_ray.plan import check_data
from rlhf_ray.trainers.durable import write_folder
from rlhf_ray.trainers.metrics import check_tracking
from rlhf_ray.trainers.ppo import KlController, PpoGroups, train_ppo
from rlhf_ray.trainers.reward_model import score_statistics, train_reward_model
from rlhf_ray.trainers.run import RunFolder, StageResult, StageRun
from rlhf_ray.trainers.sft import total_steps, train_sft
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.scorers import ClassifierScorer, FunctionScorer, ModelScorer, ReferenceScorer, RewardScorer


def run_pipeline(config: schema.Pipeline, *, pipeline_dir: Path, resume: bool) -> None:
    """Runs the stages in order, or goes on where an earlier run of the folder stopped.

    Args:
        config: the pipeline; `run_dir` is its folder.
        pipeline_dir: where reward functions are looked up.
        resume: go on in a folder that holds this run; else the folder must not hold one.

    Raises:
        UserError: config, data or a model is wrong; before any worker starts where it can be known.
        Interrupted: asked to stop; the run can be resumed.
        RlhfRayError: anything else that went wrong, with role, rank and method.
    """
    check_tracking(config.tracking)
    check_data(config)
    files = run_files(config, pipeline_dir=pipeline_dir)
    folder = RunFolder.open(config.run_dir) if resume else RunFolder.create(config.run_dir, files)
    with folder:
        if all(_result(folder, stage) is not None for stage in config.stages):
            print(f"{folder.path} is done; its model is {folder.stage(config.stages[-1].name) / 'model'}", flush=True)
            return
        recorder = Recorder()
        early = {stage.name: _load_data(stage, stage.policy.model, config.seed) for stage in _known_models(config)}
        placement = config.placement
        with Cluster(
            placement.address,
            strategy=placement.strategy,
            start_timeout_s=placement.start_timeout_s,
            call_timeout_s=placement.call_timeout_s,
            recorder=recorder,
        ) as cluster:
            for stage in config.stages:
                site = _Site(config, folder, cluster, recorder, pipeline_dir, early)
                if stage.method == "ppo":
                    _run_ppo(site, stage)
                else:
                    _run_supervised(site, stage)


@dataclass(frozen=True)
class _Site:
    """What every stage of a run shares."""

    config: schema.Pipeline
    folder: RunFolder
    cluster: Cluster
    recorder: Recorder
    pipeline_dir: Path
    early: dict[str, _Data]

    def data(self, stage: schema.Stage, model: str) -> _Data:
        """The stage's encoded data; its tokenizer is written to where `tokenizer` says."""
        data = self.early.pop(stage.name, None) or _load_data(stage, model, self.config.seed)
        write_folder(Path(self.tokenizer(stage)), lambda partial: data.tokenizer.save_pretrained(partial))
        return data

    def tokenizer(self, stage: schema.Stage) -> str:
        """The directory of the stage's tokenizer, so that every worker has the same one."""
        return str((self.folder.stage(stage.name) / "tokenizer").absolute())

    def model(self, name: str) -> str:
        """The directory or hub name behind a model's name in the pipeline file."""
        prefix, _, stage = name.partition(":")
        return str(self.folder.stage(stage) / "model") if prefix == "stage" else name

    def initial_model(self, stage: schema.Stage) -> str:
        """The policy's initial model; a fresh one is made once, in the stage's folder."""
        model = stage.policy.model
        if isinstance(model, str):
            return self.model(model)
        path = self.folder.stage(stage.name) / "initial_model"
        if not (path / "config.json").exists():
            assert stage.method == "sft", "only supervised fine-tuning starts from a fresh model"
            texts = texts_for_tokenizer(stage.data)
            write_folder(path, lambda partial: save_new_model(partial, model, texts, seed=self.config.seed))
        return str(path)

    @contextmanager
    def stage_run(self, stage: schema.Stage, *, total: int) -> Iterator[StageRun]:
        with StageRun(
            self.folder,
            stage,
            total=total,
            seed=self.config.seed,
            tracking=self.config.tracking,
            recorder=self.recorder,
        ) as run:
            yield run


def _result(folder: RunFolder, stage: schema.Stage) -> StageResult | None:
    """The stage's result; None where there is something left to do."""
    return folder.result(stage.name, total=stage.iterations if stage.method == "ppo" else stage.steps)


DataSet: TypeAlias = TextSet | PreferenceSet | PromptSet
_LOADERS: dict[str, Callable[..., DataSet]] = {
    "sft": load_texts,
    "reward_model": load_preferences,
    "ppo": load_prompts,
}


@dataclass(frozen=True)
class _Data:
    """A stage's encoded data, none where it has none for evaluation, and the tokenizer that encoded it."""

    train: DataSet
    held_out: DataSet | None
    tokenizer: PreTrainedTokenizerBase


def _known_models(config: schema.Pipeline) -> list[schema.Stage]:
    """The stages whose data can be encoded before anything is started: no earlier stage makes their tokenizer."""
    return [s for s in config.stages if isinstance(s.policy.model, str) and not s.policy.model.startswith("stage:")]


def _load_data(stage: schema.Stage, model: Any, seed: int) -> _Data:
    tokenizer = load_tokenizer(stage.policy.tokenizer or model, stage.policy.tokenizer_revision)
    load = _LOADERS[stage.method]
    train = load(stage.data, tokenizer, seed=seed, sources="train")
    held_out = load(stage.data, tokenizer, seed=seed, sources="evaluation") if stage.data.evaluation else None
    return _Data(train, held_out, tokenizer)


@dataclass(frozen=True)
class _LearnerParts:
    """How a stage's learners, and the KL coefficient where there is one, are saved and restored.

    Args:
        learners: the groups by role; `policy` is the one whose model is the result.
        kl: the KL coefficient.
        notes: what the model's config.json says besides, asked for at each saving.
    """

    learners: Mapping[str, WorkerGroup[Learner]]
    kl: KlController | None = None
    notes: Callable[[], dict[str, float]] = dict

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()} if self.kl else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.kl:
            self.kl.load_state_dict(state["kl"])

    def save(self, folder: Path) -> None:
        gather(*(group.all(Learner.save, folder.absolute() / role) for role, group in self.learners.items()))

    def load(self, folder: Path) -> None:
        gather(*(group.all(Learner.load, folder.absolute() / role) for role, group in self.learners.items()))

    def save_model(self, folder: Path) -> None:
        self.learners["policy"].all(Learner.save_model, folder.absolute(), self.notes()).result()


def _run_supervised(site: _Site, stage: schema.Sft | schema.RewardModel) -> None:
    if _result(site.folder, stage) is not None:
        return
    model = site.initial_model(stage)
    data = site.data(stage, model)
    train: Any = data.train
    held_out: Any = data.held_out
    total = total_steps(stage, train)
    with ExitStack() as stack:
        run = stack.enter_context(site.stage_run(stage, total=total))
        _report(run, "train", train.report)
        if held_out is not None:
            _report(run, "evaluation", held_out.report)
        request = _learner_request("policy", stage.policy)
        placement = stack.enter_context(site.cluster.reserve([request]))
        policy = placement.start(
            "policy",
            Learner,
            config=stage.policy,
            model=_absolute(model),
            revision=stage.policy.revision,
            head="none" if stage.method == "sft" else "score",
            seed=site.config.seed,
            total_steps=total,
            tokenizer=site.tokenizer(stage),
            dropout=stage.dropout,
            packing=stage.packing if stage.method == "sft" else False,
            timeout_s=site.config.placement.call_timeout_s,
        )
        policy.ready.result()
        if stage.method == "sft":
            run.start_or_resume(_LearnerParts({"policy": policy}))
            train_sft(stage, policy, train, held_out, run)
        else:
            notes = partial(score_statistics, policy, train)
            run.start_or_resume(_LearnerParts({"policy": policy}, notes=notes))
            train_reward_model(stage, policy, train, held_out, run)
        run.finish()


def _run_ppo(site: _Site, stage: schema.Ppo) -> None:
    if _result(site.folder, stage) is not None:
        return
    model = site.initial_model(stage)
    data = site.data(stage, model)
    prompts, held_out = data.train, data.held_out
    assert isinstance(prompts, PromptSet)
    assert held_out is None or isinstance(held_out, PromptSet)
    with ExitStack() as stack:
        run = stack.enter_context(site.stage_run(stage, total=stage.iterations))
        _report(run, "train", prompts.report)
        if held_out is not None:
            _report(run, "evaluation", held_out.report)
        placement = stack.enter_context(site.cluster.reserve(_ppo_requests(stage, gpus=site.cluster.gpus)))
        groups = _start_ppo(site, stage, placement, model, max_length=_longest(stage, prompts, held_out))
        kl = _kl_controller(stage.kl)
        weights = WeightSync(
            groups.policy,
            groups.generator,
            settings=site.config.placement,
            generator_settings=stage.generator,
            learner_dtype=stage.policy.dtype,
        )
        learners = {"policy": groups.policy}
        if groups.critic is not None and groups.critic is not groups.policy:
            learners["critic"] = groups.critic
        run.start_or_resume(_LearnerParts(learners, kl))
        train_ppo(stage, groups, prompts, held_out, weights, kl, run)
        run.finish()


def _ppo_requests(stage: schema.Ppo, *, gpus: float) -> list[RoleRequest]:
    requests = [_learner_request("policy", stage.policy)]
    critic = stage.critic_role
    if critic is not None and critic.kind == "network":
        requests.append(_learner_request("critic", critic))
    if stage.kl_place != "off":
        requests.append(_request("reference", stage.reference))
    requests += [
        _request(f"reward/{name}", reward) for name, reward in zip(reward_names(stage), stage.reward, strict=True)
    ]
    generator = stage.generator
    if generator.tensor_parallel > 1 and generator.gpus is None:
        if not gpus:
            raise ConfigError(
                f"{stage.name}.generator.tensor_parallel: got {generator.tensor_parallel}, wanted 1: there is no GPU"
            )
        generator = generator.model_copy(update={"gpus": float(generator.tensor_parallel)})
    on_gpu = bool(gpus if generator.gpus is None else generator.gpus)
    environment = engine_environment(generator, gpu=on_gpu)
    requests.append(_request("generator", generator, env=environment, reuse="generator"))
    return requests


def _learner_request(role: str, settings: schema.Learner) -> RoleRequest:
    return RoleRequest(role, workers=settings.workers, cpus=settings.cpus, gpus=settings.gpus, rendezvous=True)


def _request(
    role: str, settings: schema.Workers, *, env: Mapping[str, str] | None = None, reuse: str | None = None
) -> RoleRequest:
    gpus = 0.0 if isinstance(settings, schema.FunctionReward) and settings.gpus is None else settings.gpus
    return RoleRequest(role, workers=settings.workers, cpus=settings.cpus, gpus=gpus, env=env or {}, reuse=reuse)


def _start_ppo(site: _Site, stage: schema.Ppo, placement: Placement, model: str, *, max_length: int) -> PpoGroups:
    seed = site.config.seed
    tokenizer = site.tokenizer(stage)
    critic_settings = stage.critic_role
    warmup = critic_settings.warmup_iterations if critic_settings is not None else 0
    started: list[RayGroup[Any]] = []

    def learner(role: str, settings: schema.Learner, head: Any, name: str, revision: str | None) -> RayGroup[Learner]:
        group = placement.start(
            role,
            Learner,
            config=settings,
            model=_absolute(name),
            revision=revision,
            head=head,
            seed=seed,
            total_steps=(stage.iterations - (warmup if role == "policy" else 0)) * stage.epochs * stage.mini_batches,
            temperature=stage.sampling.temperature,
            tokenizer=tokenizer,
            timeout_s=site.config.placement.call_timeout_s,
        )
        started.append(group)
        return group

    share = placement.share("generator").gpus
    # Roles that share a GPU share its memory: an engine takes memory_share of its own part.
    part = share if 0 < share < 1 else 1.0
    generator = placement.start(
        "generator",
        Generator,
        config=stage.generator.model_copy(update={"memory_share": stage.generator.memory_share * part}),
        model=_absolute(model),
        revision=stage.policy.revision,
        tokenizer=tokenizer,
        max_model_len=max_length,
        seed=seed,
    )
    started.append(generator)
    shared_trunk = critic_settings is not None and critic_settings.kind == "value_head"
    policy = learner("policy", stage.policy, "both" if shared_trunk else "none", model, stage.policy.revision)
    critic: RayGroup[Learner] | None = policy if shared_trunk else None
    if critic_settings is not None and not shared_trunk:
        own = critic_settings.model
        name, revision = (
            (model, stage.policy.revision) if own is None else (site.model(str(own)), critic_settings.revision)
        )
        critic = learner("critic", critic_settings, "value", name, revision)
    reference: RayGroup[ReferenceScorer] | None = None
    if stage.kl_place != "off":
        own = stage.reference.model
        name, revision = (model, stage.policy.revision) if own is None else (site.model(own), stage.reference.revision)
        reference = placement.start(
            "reference", ReferenceScorer, config=stage.reference, model=_absolute(name), revision=revision
        )
        started.append(reference)
    rewards: dict[str, WorkerGroup[RewardScorer]] = {}
    for name, settings in zip(reward_names(stage), stage.reward, strict=True):
        group = _start_reward(site, placement, f"reward/{name}", settings, policy_tokenizer=tokenizer)
        started.append(group)
        rewards[name] = group
    gather(*(group.ready for group in started))
    return PpoGroups(policy=policy, critic=critic, reference=reference, generator=generator, rewards=rewards)


def _start_reward(
    site: _Site, placement: Placement, role: str, settings: schema.Reward, *, policy_tokenizer: str
) -> RayGroup[Any]:
    if isinstance(settings, schema.FunctionReward):
        return placement.start(role, FunctionScorer, config=settings, search_path=site.pipeline_dir.absolute())
    if isinstance(settings, schema.ClassifierReward):
        own = settings.model_copy(update={"model": _absolute(settings.model)})
        return placement.start(role, ClassifierScorer, config=own)
    return placement.start(
        role,
        ModelScorer,
        config=settings,
        model=_absolute(site.model(settings.model)),
        policy_tokenizer=policy_tokenizer,
    )


def _kl_controller(settings: schema.Kl) -> KlController:
    if settings.controller == "adaptive":
        assert settings.target is not None, "the adaptive controller has a target"
        return AdaptiveKlController(settings.coefficient, target=settings.target, horizon=settings.horizon)
    return FixedKlController(settings.coefficient)


def _longest(stage: schema.Ppo, prompts: PromptSet, held_out: PromptSet | None) -> int:
    """Tokens of the longest prompt and the longest response together."""
    longest = max(found.longest for found in (prompts, held_out) if found is not None)
    return longest + max(stage.sampling.max_new_tokens, stage.evaluation.max_new_tokens or 0)


def _absolute(name: str) -> str:
    """A local directory as a path that holds in every process; a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _report(run: StageRun, what: str, report: Mapping[str, int]) -> None:
    """Says how many rows were dropped or cut, where any were."""
    if report.get("dropped") or report.get("cut"):
        counts = ", ".join(f"{count} {name}" for name, count in report.items())
        run.message(f"{what} data: {counts}")
