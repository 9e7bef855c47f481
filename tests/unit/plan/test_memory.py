"""Memory by hand, what settings change it, and the verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.plan.arithmetic import arithmetic
from rlhf_ray.plan.cluster import ClusterShape, parse_cluster, unnamed_cluster
from rlhf_ray.plan.memory import (
    DRIVER_GIB,
    GIB,
    RESERVE_GIB,
    RoleMemory,
    StageMemory,
    gpu_turns,
    learner_parts,
    plan_memory,
)
from rlhf_ray.plan.networks import Network
from rlhf_ray.plan.placement import plan_placement

NET = Network(
    parameters=1000,
    trained=1000,
    multiplied=900,
    quantisable=900,
    largest=200,
    layers=4,
    hidden=10,
    vocabulary=20,
    full_logits=False,
    kept_per_token=80.0,
    key_value_elements=16,
)


def parts(*, workers: int = 1, tokens: int = 5, net: Network = NET, **settings: Any) -> dict[str, float]:
    found, host = learner_parts(net, schema.Learner(**settings), workers=workers, tokens=tokens, device="cpu")
    return found | {"host": host}


def test_a_learner_by_hand() -> None:
    found = parts()
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4000, 4000, 8000)
    # 400 bytes are kept, and those of one layer's gradients; logits [5, 20] and the output layer's gradient [20, 10].
    assert (found["activations"], found["logits"]) == (500, 400 + 800)
    # The gradients in one flat bucket, of which the rest of the memory has 1700.
    assert found["buckets"] == 4000 - 1700
    assert found["reserve"] == RESERVE_GIB["cpu"]["learner"] * GIB


def test_zero_shards_and_bfloat16_has_master_weights() -> None:
    assert parts(zero=1, workers=4)["optimizer"] == 12 * 250
    assert parts(zero=2, workers=4)["gradients"] == 8 * 250
    assert parts(zero=3, workers=4)["weights"] == 1000 + 4000
    half = parts(dtype="bfloat16")
    assert (half["weights"], half["optimizer"]) == (2000, 12000)
    away = parts(zero=2, workers=4, cpu_offload=True)
    assert (away["optimizer"], away["host"]) == (0, 12 * 250 + 4 * 250)


def test_an_adapter_trains_less() -> None:
    small = dataclasses.replace(NET, trained=100)
    found = parts(net=small, lora={})
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4000, 400, 800)
    quantised = parts(net=small, lora={"quantise": "nf4"}, dtype="bfloat16", zero=2)
    assert quantised["weights"] == pytest.approx(100 * 2 + 900 * 0.5625)


def test_checkpointed_activations_are_the_layers_inputs() -> None:
    found = parts(activation_checkpointing=True)
    assert found["activations"] == 4 * 10 * 4 * 5 + 2 * 100


def stage_memory(llama: Path, cluster: ClusterShape, **changes: Any) -> StageMemory:
    made: dict[str, Any] = {
        "method": "ppo",
        "iterations": 2,
        "prompts_per_iteration": 8,
        "policy": {"model": str(llama)},
        "reward": [{"kind": "model", "model": str(llama)}, {"kind": "function", "function": "f:f"}],
        "data": {"train": "p", "max_prompt_tokens": 16},
        "sampling": {"max_new_tokens": 16},
    }
    config = schema.Pipeline(run_dir="r", stages=[made | changes])
    stage = config.stages[0]
    (placement,) = plan_placement(stage, cluster, strategy="PACK")
    numbers = arithmetic(stage, 10, gpus=cluster.gpus)
    return plan_memory(config, stage, placement, numbers, cluster)


def by_role(memory: StageMemory) -> dict[str, RoleMemory]:
    return {role.role: role for role in memory.roles}


def test_workers_in_host_memory(llama_directory: Path) -> None:
    memory = stage_memory(llama_directory, parse_cluster("1x4xCPU-16"))
    roles = by_role(memory)
    assert list(roles) == ["policy", "critic", "reference", "reward/model", "reward/function", "generator"]
    assert {role.device for role in memory.roles} == {"host"}
    assert memory.host == pytest.approx(DRIVER_GIB + sum(role.total for role in memory.roles))
    assert memory.fits
    # 8 samples of 32 tokens in one mini-batch, whatever the token budget is.
    policy = roles["policy"].parts
    assert policy["sync"] == policy["weights"] == policy["gradients"]
    assert roles["reward/function"].parts == {"reserve": RESERVE_GIB["cpu"]["function"]}
    small = by_role(stage_memory(llama_directory, parse_cluster("1x4xCPU-16"), mini_batches=8))
    assert policy["activations"] == pytest.approx(8 * small["policy"].parts["activations"])


def test_a_node_with_too_little(llama_directory: Path) -> None:
    memory = stage_memory(llama_directory, parse_cluster("1x4xCPU-4"))
    assert memory.fits is False
    assert memory.advice is not None
    assert "missing" in memory.advice


def test_gpus_with_enough_and_with_too_little(llama_directory: Path) -> None:
    memory = stage_memory(llama_directory, parse_cluster("1x8xL4-24"))
    assert memory.fits
    assert {role.device for role in memory.roles} == {"GPU", "host"}
    assert by_role(memory)["generator"].room == pytest.approx(0.85 * 24)
    assert "holds 8 of 8 sequences of 32 tokens" in by_role(memory)["generator"].note

    tight = stage_memory(llama_directory, parse_cluster("1x8xOld-1.51"))
    policy = by_role(tight)["policy"]
    assert policy.fits is False
    assert policy.advice is not None
    assert policy.advice.startswith("policy.")


def test_roles_that_share_a_gpu_have_a_part_of_it(llama_directory: Path) -> None:
    memory = stage_memory(llama_directory, parse_cluster("1x1xH100-80"))
    assert {role.role: role.room for role in memory.roles if role.device == "GPU"} == pytest.approx(
        {"policy": 16, "critic": 16, "reference": 16, "reward/model": 16, "generator": 0.85 * 16}
    )


def test_without_a_cluster_there_is_no_verdict(llama_directory: Path) -> None:
    memory = stage_memory(llama_directory, unnamed_cluster())
    assert memory.fits is None
    # Room for all 8 samples of 32 tokens: 4 layers of 128 keys and values in float32.
    assert by_role(memory)["generator"].parts["cache"] * GIB == 8 * 32 * 2 * 4 * 128 * 4


def test_roles_on_one_gpu_add_up(llama_directory: Path) -> None:
    together = {"critic": {"colocate_with": "policy"}, "reference": {"colocate_with": "policy"}}
    memory = stage_memory(llama_directory, parse_cluster("1x4xL4-24"), **together)
    (shared,) = memory.shared
    roles = by_role(memory)
    assert shared.roles == ("policy", "critic", "reference")
    assert shared.total == pytest.approx(sum(roles[role].total for role in shared.roles))
    assert (shared.room, shared.fits, memory.fits) == (24, True, True)
    assert roles["reference"].room == 24

    tight = stage_memory(llama_directory, parse_cluster("1x4xOld-4"), **together)
    assert {role.role: role.fits for role in tight.roles if role.role in shared.roles} == dict.fromkeys(
        shared.roles, True
    )
    assert (tight.shared[0].fits, tight.fits) == (False, False)
    assert tight.shared[0].advice is not None


def test_an_engine_in_a_shared_bundle_has_its_part_of_the_whole_gpu(llama_directory: Path) -> None:
    awake = {"generator": {"colocate_with": "policy", "memory_share": 0.6}}
    memory = stage_memory(llama_directory, parse_cluster("1x4xL4-24"), **awake)
    assert by_role(memory)["generator"].room == pytest.approx(0.6 * 24)
    policy, engine = by_role(memory)["policy"], by_role(memory)["generator"]
    # Its buffers of logits lie idle while the policy learns.
    assert memory.shared[0].total == pytest.approx(policy.total + 0.6 * 24 - engine.parts["logits"])
    asleep = {
        "generator": awake["generator"] | {"sleep": True},
        "policy": {"model": str(llama_directory), "offload": True},
    }
    (shared,) = stage_memory(llama_directory, parse_cluster("1x4xL4-24"), **asleep).shared
    assert shared.moment == "proof"
    kept = sum(policy.parts[name] for name in ("weights", "sync", "reserve"))
    assert shared.total == pytest.approx(kept + 0.6 * 24)


TURNS = {
    "policy": {"weights": 2.0, "gradients": 3.0, "optimizer": 8.0, "activations": 20.0, "sync": 0.5, "reserve": 1.0},
    "critic": {"weights": 2.0, "gradients": 3.0, "optimizer": 8.0, "activations": 10.0, "reserve": 1.0},
    "reference": {"weights": 2.0, "activations": 4.0, "reserve": 1.0},
    "generator": {"weights": 2.0, "cache": 30.0, "logits": 1.0, "sync": 0.25, "reserve": 1.0},
}


def test_roles_that_take_turns_do_not_add_up() -> None:
    """Asleep the generator has 1.25 left, of its 34.25; away the learners have 1.5 and 1, of their 34.5 and 24."""
    found = gpu_turns(TURNS, sleeps=True, leaving=["policy", "critic"])
    assert found == {
        "sampling": 34.25 + 2.5 + 7,
        "transfer": 3.25 + 14.5 + 14 + 3,
        "proof": 34.25 + 3.5 + 1 + 3,
        "learning": 1.25 + 34.5 + 24 + 7,
    }
    assert max(found.values()) < sum(sum(parts.values()) for parts in TURNS.values())


def test_who_does_not_leave_stays_with_all_that_it_keeps() -> None:
    found = gpu_turns(TURNS, sleeps=False)
    assert found == {
        "sampling": 34.25 + 28.5 + 7,
        "transfer": 33.25 + 28.5 + 3,
        "proof": 34.25 + 28.5 + 3,
        "learning": 33.25 + 58.5 + 7,
    }
    one_side = gpu_turns(TURNS, sleeps=False, leaving=["critic"])
    assert one_side["sampling"] == found["sampling"] - 13
    assert one_side["learning"] == found["learning"]


def test_what_leaves_a_gpu_lies_in_host_memory(llama_directory: Path) -> None:
    stays = by_role(stage_memory(llama_directory, parse_cluster("1x1xH100-80")))
    turns = {"policy": {"model": str(llama_directory), "offload": True}, "generator": {"sleep": True}}
    leaves = by_role(stage_memory(llama_directory, parse_cluster("1x1xH100-80"), **turns))
    moved = sum(stays["policy"].parts[name] for name in ("weights", "gradients", "optimizer"))
    assert leaves["policy"].host == pytest.approx(moved + RESERVE_GIB["cpu"]["scorer"])
    # An engine that sleeps may use its share of the whole GPU.
    assert leaves["generator"].room == pytest.approx(0.85 * 80)
