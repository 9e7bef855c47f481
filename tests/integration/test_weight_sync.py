"""Weight sync from DeepSpeed learners to two vLLM generators, and every fault that it must catch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import WorkerGroup, gather
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.trainers import weight_sync
from rlhf_ray.trainers.weight_sync import WeightSync
from rlhf_ray.workers.generator import Generator, Interrupted
from rlhf_ray.workers.learner import Learner
from tests.tiny_models import make_llama

GENERATOR = schema.Generator(max_sequences=16, workers=2)


def set_fault(text: str) -> None:
    os.environ["RLHF_RAY_FAULT"] = f"sync:{text}" if text else ""


class FaultyLearner(Learner):
    """A learner whose weights and faults a test can set."""

    def __init__(self, place: Place, **settings: Any) -> None:
        super().__init__(place, **settings)
        self.left_out = ""

    def set_fault(self, text: str, *, leave_out: str = "") -> None:
        set_fault(text)
        self.left_out = leave_out

    def nudge(self) -> None:
        """Moves every weight, as a training step would, on all ranks alike."""
        import deepspeed

        parameters = list(self.engine.module.parameters())
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)), torch.no_grad():
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.mul_(1.02).add_(0.003)

    def weights(self, *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in super().weights(bucket_bytes=bucket_bytes):
            yield [(name, tensor) for name, tensor in bucket if name != self.left_out]


class FaultyGenerator(Generator):
    """A generator that a test can give a fault, and ask for its adapter."""

    def set_fault(self, text: str) -> None:
        set_fault(text)

    def begin(self) -> None:
        """Begins what is started: the samples of a prompt follow the first of them one step later."""
        for _ in range(2):
            self._ended.update(self.engine.step())

    def repeat_id(self) -> None:
        """The next adapter gets the id of the present one."""
        self.engine._loads -= 1  # type: ignore[attr-defined]

    def adapter(self) -> tuple[str, int, set[int]]:
        """Name and id of the adapter in use, and all ids that vLLM holds."""
        request, llm = self.engine._adapter, self.engine._llm  # type: ignore[attr-defined]
        return request.lora_name, request.lora_int_id, llm.llm_engine.list_loras()


@dataclass(frozen=True)
class Groups:
    policy: WorkerGroup[FaultyLearner]
    generator: WorkerGroup[FaultyGenerator]
    sync: WeightSync
    over_gloo: WeightSync

    def set_fault(self, text: str = "", *, leave_out: str = "") -> None:
        gather(
            self.policy.all(FaultyLearner.set_fault, text, leave_out=leave_out),
            self.generator.all(FaultyGenerator.set_fault, text),
        )

    def nudge(self) -> None:
        self.policy.all(FaultyLearner.nudge).result()


@contextmanager
def started(cluster: Cluster, model: str, *, zero: int, lora: schema.Lora | None = None) -> Iterator[Groups]:
    learner = schema.Learner.model_validate({"workers": 2, "zero": zero, "lora": lora})
    environment = engine_environment(GENERATOR, gpu=False)
    requests = [
        RoleRequest("policy", workers=2, rendezvous=True),
        RoleRequest("generator", workers=2, env=environment, reuse="generator"),
    ]
    with cluster.reserve(requests) as placement:
        policy = placement.start(
            "policy", FaultyLearner, config=learner, model=model, revision=None, head="none", seed=1, total_steps=10
        )
        generator = placement.start(
            "generator",
            FaultyGenerator,
            config=GENERATOR,
            model=model,
            revision=None,
            tokenizer=model,
            max_model_len=160,
            seed=1,
            lora=lora,
        )
        gather(policy.ready, generator.ready)

        def sync_over(transport: str) -> WeightSync:
            settings = {"call_timeout_s": 60, "transport": transport, "bucket_mib": 1}
            return WeightSync(
                policy,
                generator,
                settings=schema.Placement.model_validate(settings),
                generator_settings=GENERATOR,
                learner_dtype=learner.dtype,
            )

        yield Groups(policy, generator, sync_over("auto"), sync_over("gloo"))


PROMPTS = Prompts(
    token_ids=[[1, *range(40, 48)], [1, *range(50, 90)]],
    texts=["", ""],
    answers=[None, None],
    ids=[0, 1],
    repeats=[0, 0],
)
SAMPLING = schema.Sampling(max_new_tokens=12, samples_per_prompt=3)


def sample_through_new_weights(groups: Groups, version: int, interrupted: Interrupted) -> tuple[Rollouts, Rollouts]:
    """Responses that have begun when the weights of `version` arrive, and what these weights alone sample.

    Their tokens of `version` have the learner's log-probabilities.
    """
    groups.generator.split(Generator.start, PROMPTS, SAMPLING, iteration=1).result()
    groups.generator.all(FaultyGenerator.begin).result()
    groups.nudge()
    assert groups.sync.sync(version, interrupted=interrupted)["sync/probe_diff_max"] < 1e-4
    parts = groups.generator.all(Generator.next_finished, 1, 3).result()
    rollouts = Rollouts.concat([part.rollouts.select(part.rows.argsort().tolist()) for part in parts])
    logprobs = groups.policy.split(Learner.logprobs, rollouts.sequences, temperature=1.0).result()
    groups.sync.check_rollouts(rollouts, logprobs, version=version)
    return rollouts, groups.generator.split(Generator.generate, PROMPTS, SAMPLING, iteration=1).result()


def check_interrupted(groups: Groups, version: int) -> None:
    """Kept responses have tokens of two versions; abandoned ones are those that the new weights alone sample."""
    kept, fresh = sample_through_new_weights(groups, version, "keep")
    mask = kept.sequences.response_mask
    assert set(kept.policy_versions[mask].tolist()) == {version - 1, version}
    assert kept.oldest_versions().tolist() == [version - 1] * 6
    assert not torch.equal(kept.generator_logprobs, fresh.generator_logprobs)
    abandoned, fresh = sample_through_new_weights(groups, version + 1, "abandon")
    assert torch.equal(abandoned.policy_versions, abandoned.sequences.response_mask * (version + 1))
    assert torch.equal(abandoned.sequences.tokens, fresh.sequences.tokens)
    assert torch.equal(abandoned.generator_logprobs, fresh.generator_logprobs)


FAULTS = {
    "policy:0:2:drop_tensor": "tensor 'model.embed_tokens.weight' of version 2 did not arrive",
    "policy:0:2:swap_tensors": "of version 2 arrived with digest",
    "policy:0:2:corrupt": "tensor 'model.embed_tokens.weight' of version 2 arrived with digest",
    "policy:0:2:stale_version": "weights of version 1 arrived where version 2 was announced; they are stale",
    "generator:1:2:keep_old": "generator 1, version 2: it does not compute with the learner's weights",
    "generator:1:2:skip_cache_reset": "generator 1, version 2: its prefix cache is of earlier weights",
}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER_FAULTS = {place: text.replace("model.embed_tokens.weight", FIRST) for place, text in FAULTS.items()}
# Another version is another adapter to vLLM: what the cache knows of the one before is not read.
ADAPTER_FAULTS["generator:1:2:skip_cache_reset"] = ""


def test_weights_arrive_and_every_fault_is_caught(
    cluster: Cluster, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3, tied embeddings, shared memory and gloo. After each fault the next sync heals the engines."""
    with started(cluster, make_llama(tmp_path / "llama"), zero=3) as groups:
        for version in (0, 1):
            metrics = groups.sync.sync(version)
            assert metrics["sync/probe_diff_max"] < 1e-4
            groups.nudge()
        for place, message in FAULTS.items():
            groups.set_fault(place)
            with pytest.raises(WeightSyncError) as caught:
                groups.sync.sync(2)
            assert message in str(caught.value), place
            groups.set_fault()
            assert groups.sync.sync(2)["sync/probe_diff_max"] < 1e-4
            groups.nudge()

        # The checkpoint of a tied model has no lm_head, the engine needs it; only the probe can see that.
        groups.set_fault(leave_out="lm_head.weight")
        with pytest.raises(WeightSyncError, match="it does not compute with the learner's weights"):
            groups.sync.sync(3)
        groups.set_fault()
        assert groups.sync.sync(3)["sync/probe_diff_max"] < 1e-4

        # Without the probe a forgotten reset passes: it is this check that catches it.
        groups.nudge()
        groups.set_fault("generator:1:4:skip_cache_reset")
        with monkeypatch.context() as unchecked:
            unchecked.setattr(weight_sync, "check_probe", lambda *args, **kwargs: (0.0, 0.0))
            groups.sync.sync(4)
        groups.set_fault()
        assert groups.sync.sync(5)["sync/probe_diff_max"] < 1e-4

        groups.nudge()
        for version in (6, 7):
            assert groups.over_gloo.sync(version)["sync/probe_diff_max"] < 1e-4
        check_interrupted(groups, 8)


def test_an_adapter_arrives_and_every_fault_is_caught(cluster: Cluster, tmp_path: Path) -> None:
    """As above, with the adapter's tensors alone; each version is a new adapter to vLLM, and the only one it holds."""
    lora = schema.Lora(rank=2, alpha=16.0)
    with started(cluster, make_llama(tmp_path / "llama"), zero=3, lora=lora) as groups:
        for version in (0, 1):
            metrics = groups.sync.sync(version)
            assert metrics["sync/probe_diff_max"] < 1e-4
            assert metrics["sync/share_of_model"] < 0.05
            held = groups.generator.all(FaultyGenerator.adapter).result()
            assert held == [(f"policy@{version}", version + 1, {version + 1})] * 2
            groups.nudge()
        for place, message in ADAPTER_FAULTS.items():
            groups.set_fault(place)
            if message:
                with pytest.raises(WeightSyncError) as caught:
                    groups.sync.sync(2)
                assert message in str(caught.value), place
            else:
                assert groups.sync.sync(2)["sync/probe_diff_max"] < 1e-4
            groups.set_fault()
            assert groups.sync.sync(2)["sync/probe_diff_max"] < 1e-4
            groups.nudge()

        # vLLM reads no file for an id that it knows: it would go on with the adapter before.
        groups.generator.all(FaultyGenerator.repeat_id).result()
        with pytest.raises(WeightSyncError, match="it does not compute with the learner's weights"):
            groups.sync.sync(3)
        assert groups.over_gloo.sync(3)["sync/probe_diff_max"] < 1e-4
        check_interrupted(groups, 4)
