"""A DPO stage: its pairs, its reference or what is known of it, and its samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlhf_ray.config import schema
from rlhf_ray.config.layouts import possible_gpus
from rlhf_ray.data.batches import Prompts
from rlhf_ray.data.pair_scores import choose_pairs, pair_table, read_scores
from rlhf_ray.data.reference_cache import ReferenceCache, cache_folder, make_folder, reference_key
from rlhf_ray.distributed.groups import RayGroup
from rlhf_ray.distributed.placement import RoleRequest
from rlhf_ray.models.digests import model_digest
from rlhf_ray.stages.actors import Actors, generator_request, learner_request, reference_request, scorer_requests
from rlhf_ray.stages.site import LearnerParts, Site, StageData
from rlhf_ray.trainers.dpo import DpoGroups, References, Samples, score_pairs, train_dpo, unknown_answers
from rlhf_ray.trainers.durable import write_table
from rlhf_ray.trainers.run import StageRun
from rlhf_ray.trainers.sft import total_steps
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator
from rlhf_ray.workers.learner import Learner

SCORES = "pairs.parquet"


def run_dpo(site: Site, stage: schema.Dpo) -> None:
    """Trains the policy, or goes on with it, to the stage's model."""
    model = site.initial_model(stage)
    data = site.data(stage, model)
    if stage.needs_reference and stage.cache:
        make_folder(cache_folder(stage.cache_dir))
    if stage.scores_pairs:
        data = _scored(site, stage, data, model)
    total = total_steps(stage, data.train)
    with site.stage_run(stage, total=total, data=data) as run, _cache(site, stage, model, run) as cache:
        has_reference = _has_reference(stage, data, cache, run)
        asked = requests(stage, has_reference=has_reference, gpus=site.cluster.gpus)
        with site.cluster.reserve(asked) as placement:
            actors = Actors(site, stage, placement, model)
            engines = None if stage.generator is None else _engines(stage, stage.generator, actors, data)
            policy = actors.learner(
                "policy",
                stage.policy,
                head="none",
                total_steps=total,
                dropout=stage.dropout,
                packing=stage.packing,
            )
            reference = actors.reference(stage.reference) if has_reference else None
            samples = None if engines is None else _samples(site, stage, policy, *engines)
            rewards = actors.scorers(stage.reward) if stage.generator is not None else {}
            actors.wait()
            groups = DpoGroups(policy, reference, rewards)
            turns = GpuTurns() if samples is None else samples.turns
            turns.learning()
            run.start_or_resume(LearnerParts({"policy": policy}, turns=turns))
            references = References(groups, cache, needed=stage.needs_reference)
            train_dpo(stage, groups, data.train, data.held_out, references, samples, run)
            run.finish()


def requests(stage: schema.Dpo, *, has_reference: bool, gpus: float) -> list[RoleRequest]:
    """What the stage's roles ask for while it trains.

    Args:
        stage: its settings.
        has_reference: whether the reference has workers of its own.
        gpus: those of the cluster.
    """
    asked = [learner_request("policy", stage.policy)]
    if has_reference:
        asked.append(reference_request(stage.reference))
    if stage.generator is not None:
        gpus = possible_gpus(stage, stage.generator, gpus=gpus)
        asked += [*scorer_requests(stage.reward), generator_request(stage.name, stage.generator, gpus=gpus)]
    return asked


def _engines(
    stage: schema.Dpo, settings: schema.Generator, actors: Actors, data: StageData
) -> tuple[RayGroup[Generator], Prompts]:
    """The generators, and the held-out prompts that they are made for."""
    prompts: Prompts = data.held_out.prompts(stage.evaluation.prompts, data.tokenizer)
    longest = max(len(tokens) for tokens in prompts.token_ids)
    return actors.generator(settings, max_length=longest + stage.evaluation.max_new_tokens), prompts


def _samples(
    site: Site, stage: schema.Dpo, policy: RayGroup[Learner], generator: RayGroup[Generator], prompts: Prompts
) -> Samples:
    assert stage.generator is not None, "samples come from a generator"
    turns = GpuTurns(generator if stage.generator.sleep else None, [policy] if stage.policy.offload else [])
    weights = WeightSync(
        policy,
        generator,
        settings=site.config.placement,
        generator_settings=stage.generator,
        learner_dtype=stage.policy.dtype,
        turns=turns,
    )
    return Samples(generator, weights, turns, prompts)


def _scored(site: Site, stage: schema.Dpo, data: StageData, model: str) -> StageData:
    """The data with the training pairs that the scorers leave; what those said is kept for a resumed run."""
    path = site.folder.stage(stage.name) / SCORES
    if not path.exists():
        with site.cluster.reserve(scorer_requests(stage.reward)) as placement:
            actors = Actors(site, stage, placement, model)
            scorers = actors.scorers(stage.reward)
            actors.wait()
            scores = score_pairs(stage, scorers, data.train, data.tokenizer)
        table = pair_table(data.train, scores, stage.pairs, data.tokenizer)
        write_table(path, table)
    pairs = choose_pairs(stage.data, data.train, read_scores(path), stage.pairs, seed=site.config.seed)
    return replace(data, train=pairs)


@contextmanager
def _cache(site: Site, stage: schema.Dpo, model: str, run: StageRun) -> Iterator[ReferenceCache | None]:
    """What is known of the reference; None where nothing is to be."""
    if not (stage.needs_reference and stage.cache):
        yield None
        return
    key = reference_key(_decides_reference(site, stage, model))
    with ReferenceCache(cache_folder(stage.cache_dir), key, run.message) as cache:
        yield cache


def _decides_reference(site: Site, stage: schema.Dpo, model: str) -> dict[str, str]:
    """What the reference's numbers depend on, which are the same from the policy's workers and from its own."""
    own = stage.reference.model
    asked = stage.policy if stage.adapter_is_off_in_reference else stage.reference
    weights = (
        model_digest(model, stage.policy.revision)
        if own is None
        else model_digest(site.model(own), stage.reference.revision)
    )
    gpus = possible_gpus(stage, asked, gpus=site.cluster.gpus)
    on_gpu = bool(gpus if asked.gpus is None else asked.gpus)
    parts = {"weights": weights, "dtype": asked.dtype, "device": "gpu" if on_gpu else "cpu"}
    lora = stage.policy.lora
    if stage.adapter_is_off_in_reference and lora is not None and lora.quantise != "none":
        parts["quantise"] = lora.quantise
    return parts


def _has_reference(stage: schema.Dpo, data: StageData, cache: ReferenceCache | None, run: StageRun) -> bool:
    """Whether the reference has workers of its own: for answers that are not known, or for samples."""
    if not stage.needs_reference:
        return False
    unknown = 1
    if cache is not None:
        unknown, answers = unknown_answers(stage, cache, data.train, data.held_out, steps=run.total)
        run.message(f"reference: {answers - unknown} of {answers} answers are in the cache {cache.folder.parent}")
    return not stage.adapter_is_off_in_reference and (unknown > 0 or stage.generator is not None)
