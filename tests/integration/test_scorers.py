"""Scorers as Ray actors: the same numbers as in one process, and errors that name the sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.distributed.groups import Place, gather
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.errors import WorkerError
from rlhf_ray.workers.scorers import (
    ClassifierScorer,
    FunctionScorer,
    ModelScorer,
    ReferenceScorer,
    RewardScorer,
)
from tests.tiny_models import TEXTS, make_classifier, make_llama, make_reward_model

FUNCTIONS = """
def length(prompts, responses, answers, *, unit):
    return [len(response) / unit for response in responses]

def picky(prompts, responses, answers):
    if any(len(response) > 35 for response in responses):
        raise ValueError("too long")
    return [0.0] * len(responses)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scorers")
    make_llama(root / "policy")
    make_classifier(root / "classifier")
    make_reward_model(root / "reward_model")
    (root / "my_rewards.py").write_text(FUNCTIONS)
    return root


@pytest.fixture(scope="module")
def rollouts(folder: Path) -> Rollouts:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [text[:20] for text in TEXTS[:7]]
    responses = [text[20 : 30 + 5 * index] for index, text in enumerate(TEXTS[:7])]
    sequences = make_sequences(tokenizer(prompts)["input_ids"], tokenizer(responses)["input_ids"])
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.zeros(7, dtype=torch.bool),
        prompts=prompts,
        responses=responses,
        answers=[None] * 7,
        prompt_ids=torch.arange(7) + 100,
        policy_versions=one_version(sequences, 0),
    )


def test_scorers_in_actors_give_what_they_give_here_and_name_the_sample_that_fails(
    cluster: Cluster, folder: Path, rollouts: Rollouts
) -> None:
    reference = schema.Reference()
    model = schema.ModelReward(kind="model", model=str(folder / "reward_model"))
    classifier = schema.ClassifierReward(kind="classifier", model=str(folder / "classifier"), label="POSITIVE")
    function = schema.FunctionReward(kind="function", function="my_rewards:length", arguments={"unit": 4}, batch_size=2)
    policy = str(folder / "policy")
    picky = schema.FunctionReward(kind="function", function="my_rewards:picky")
    roles = ("model", "classifier", "function", "picky")
    requests = [RoleRequest("reference", 2, cpus=0.5), *(RoleRequest(role, cpus=0.5) for role in roles)]
    with cluster.reserve(requests) as placement:
        references = placement.start("reference", ReferenceScorer, config=reference, model=policy)
        models = placement.start(
            "model", ModelScorer, config=model, model=str(folder / "reward_model"), policy_tokenizer=policy
        )
        classifiers = placement.start("classifier", ClassifierScorer, config=classifier)
        functions = placement.start("function", FunctionScorer, config=function, search_path=folder)
        picked = placement.start("picky", FunctionScorer, config=picky, search_path=folder)
        logprobs, by_model, by_classifier, by_function = gather(
            references.split(ReferenceScorer.logprobs, rollouts.sequences, 0.8),
            models.split(RewardScorer.score, rollouts),
            classifiers.split(RewardScorer.score, rollouts),
            functions.split(RewardScorer.score, rollouts),
        )
        assert models.first(RewardScorer.counts).result() == {"truncated": 0}
        with pytest.raises(WorkerError, match=r"picky worker 0.*row 6 \(prompt 106,.*ValueError: too long"):
            picked.split(RewardScorer.score, rollouts).result()
        assert picked.split(RewardScorer.score, rollouts.select([0, 1])).result().tolist() == [0.0, 0.0]

    place = Place("here", 0, 1)
    torch.testing.assert_close(
        logprobs, ReferenceScorer(place, config=reference, model=policy).logprobs(rollouts.sequences, 0.8)
    )
    here = ModelScorer(place, config=model, model=str(folder / "reward_model"), policy_tokenizer=policy)
    torch.testing.assert_close(by_model, here.score(rollouts))
    torch.testing.assert_close(by_classifier, ClassifierScorer(place, config=classifier).score(rollouts))
    assert by_function.tolist() == [len(response) / 4 for response in rollouts.responses]
