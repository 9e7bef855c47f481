"""Times by hand, what makes them longer, how far they scale, and figures of an earlier run in their place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.config.load import CONFIG_FILE, run_files
from rlhf_ray.config.rules import check_rules
from rlhf_ray.distributed.bundles import Share
from rlhf_ray.distributed.nodes import Node
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan import time
from rlhf_ray.plan.arithmetic import arithmetic
from rlhf_ray.plan.cluster import ClusterShape, cluster_as_object, parse_cluster, running_cluster
from rlhf_ray.plan.data import Lengths, data_lengths
from rlhf_ray.plan.estimate import estimator, seconds
from rlhf_ray.plan.hardware import CORE, GPUS, Device, find_gpu, measure_core
from rlhf_ray.plan.measured import read_measured
from rlhf_ray.plan.memory import plan_memory
from rlhf_ray.plan.networks import Network
from rlhf_ray.plan.placement import plan_placement
from rlhf_ray.plan.scaling import scaled, scaling, too_many_learners
from rlhf_ray.plan.time import Hardware, StageTime, stage_time
from rlhf_ray.trainers.metric_rows import PLAN_FILE

NET = Network(
    parameters=1_200_000,
    trained=1_200_000,
    multiplied=1_000_000,
    quantisable=0,
    largest=200_000,
    layers=2,
    hidden=100,
    vocabulary=100,
    full_logits=False,
    kept_per_token=1.0,
    key_value_elements=400,
)
SLOW = Device("slow", bfloat16=2e-3, float32=1e-3, memory=1.0, link=0.1, network=0.01)
HARDWARE = Hardware(SLOW, SLOW, gpus_per_node=2, cores=100)
LENGTHS = Lengths(prompt=10, response=10, longest=20)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "model_config", lambda *arguments: None)
    monkeypatch.setattr(time, "network", lambda *arguments, **settings: NET)


def stage_of(**made: Any) -> Any:
    return schema.Pipeline(run_dir="r", stages=[made]).stages[0]


def sft(**changes: Any) -> Any:
    return stage_of(method="sft", policy={"model": "m"} | changes, data={"train": "d", "max_length": 100}, steps=5)


def ppo(**changes: Any) -> Any:
    made: dict[str, Any] = {
        "method": "ppo",
        "iterations": 5,
        "prompts_per_iteration": 64,
        "policy": {"model": "m"},
        "critic": {},
        "reward": [{"kind": "model", "model": "r"}],
        "data": {"train": "d", "max_prompt_tokens": 10},
        "sampling": {"max_new_tokens": 20},
    }
    return stage_of(**(made | changes))


def timed(stage: Any, *, gpu: bool = False, lengths: Lengths = LENGTHS, hardware: Hardware = HARDWARE) -> StageTime:
    share = Share(1, 1 if gpu else 0)
    roles = ["policy"]
    if stage.method == "ppo":
        roles += ["critic", "reference", "reward/model", "generator"]
    return stage_time(
        schema.Pipeline(run_dir="r", stages=[stage.model_dump()]),
        stage,
        arithmetic(stage, 1000, gpus=float(gpu)),
        dict.fromkeys(roles, share),
        lengths,
        hardware,
        cache_gib=None,
        factors={},
    )


def by_name(found: StageTime) -> dict[str, float]:
    return {task.name: task.seconds for task in found.tasks}


def test_a_training_step_by_hand() -> None:
    found = timed(sft())
    # 32 rows of 20 tokens. A token: 6 M for the matrices, and 3 x 2 x 2 layers x 100 x 20 for attention.
    flops = 32 * 20 * (6e6 + 3 * 2 * 2 * 100 * 20)
    adam = 1.2e6 * 28 / (0.7 * 1e9)
    assert by_name(found) == {"policy_update": pytest.approx(flops / (0.4 * 1e9) + adam)}
    assert found.iteration_s == pytest.approx(sum(found.phases.values()))
    assert found.run_s == pytest.approx(5 * found.iteration_s)
    assert (found.gpus, found.gpu_hours) == (0, 0)


def test_what_a_step_costs_more_and_less() -> None:
    plain = by_name(timed(sft()))["policy_update"]
    # A forward pass again is a third more of the operations.
    again = by_name(timed(sft(activation_checkpointing=True)))["policy_update"]
    assert again == pytest.approx(plain * 4 / 3, rel=0.02)
    assert by_name(timed(sft(dtype="bfloat16")))["policy_update"] < 0.6 * plain


def test_gradients_travel_within_nodes_and_between_them() -> None:
    two, four = (timed(sft(workers=workers), gpu=True).tasks[0].waiting for workers in (2, 4))
    sent = 2 * 1.2e6 * 4
    hop = time.HOP_S
    assert two == pytest.approx(sent * 1 / 2 / (0.7 * 0.1e9) + 2 * hop)
    # Each of the two GPUs of a node sends its half of the bytes to the other node.
    assert four == pytest.approx(sent * 1 / 2 / (0.7 * 0.1e9) + sent / 2 * 1 / 2 / (0.7 * 0.01e9) + 4 * hop)


def test_decoding_by_hand() -> None:
    fast = replace(SLOW, float32=1e3)
    hardware = replace(HARDWARE, core=fast)
    even = Lengths(prompt=10, response=20, longest=20)
    found = by_name(timed(ppo(generator={"compile": True}), lengths=even, hardware=hardware))["generate"]
    # 20 steps that read 4 MB of weights and, of each of 64 sequences, 1600 bytes for each of 20 tokens in the mean.
    assert found == pytest.approx(20 * ((4e6 + 64 * 20 * 1600) / 0.7e9 + time.STEP_S), rel=1e-3)


def test_the_longest_response_is_waited_for() -> None:
    def generate(lengths: Lengths, **generator: Any) -> float:
        return by_name(timed(ppo(generator=generator), lengths=lengths))["generate"]

    short = generate(Lengths(10, 10, 10))
    assert short < generate(Lengths(10, 10, 20)) < generate(Lengths(10, 10, 40))
    # Half the slots: two rounds, of which each has its fixed costs.
    assert generate(Lengths(10, 10, 10), max_sequences=32) > short
    # Twice the engines: the same steps with half the sequences in each.
    assert short / 2 < generate(Lengths(10, 10, 10), workers=2) < short


def test_roles_that_share_devices_take_turns() -> None:
    apart = timed(ppo())
    together = timed(ppo(), hardware=replace(HARDWARE, cores=1))
    scores = [task.seconds for task in apart.tasks if task.phase == "score"]
    assert apart.phases["score"] == pytest.approx(max(scores), rel=1e-6)
    assert together.phases["score"] == pytest.approx(sum(scores))
    assert apart.hidden_s > 0
    assert together.hidden_s == 0


def test_turns_move_what_leaves_the_gpu() -> None:
    hardware = replace(HARDWARE, gpu=replace(SLOW, host=0.5))
    stays = timed(ppo(), gpu=True, hardware=hardware)
    turns = timed(
        ppo(policy={"model": "m", "offload": True}, critic={"offload": True}, generator={"sleep": True}),
        gpu=True,
        hardware=hardware,
    )
    assert "turns" not in stays.phases
    # Weights and gradients in float32 and two moments of AdamW, once away and once back.
    once = 1.2e6 * (4 + 4 + 8) / (0.7 * 0.5e9)
    found = by_name(turns)
    for name in ("policy_offload", "policy_reload", "critic_offload", "critic_reload"):
        assert found[name] == pytest.approx(once)
    # An engine's weights come anew by the sync.
    assert (found["generator_sleep"], found["generator_wake"]) == (0, 0)
    assert turns.phases["turns"] == pytest.approx(2 * once)
    # A batch is sampled before it is judged.
    assert turns.hidden_s == 0
    assert turns.iteration_s > stays.iteration_s + stays.hidden_s + turns.phases["turns"]


def test_an_engine_with_adapters_keeps_its_weights_in_host_memory() -> None:
    hardware = replace(HARDWARE, gpu=replace(SLOW, host=0.5))
    found = by_name(
        timed(ppo(policy={"model": "m", "lora": {}}, generator={"sleep": True}), gpu=True, hardware=hardware)
    )
    assert found["generator_sleep"] == found["generator_wake"] == pytest.approx(1.2e6 * 4 / (0.7 * 0.5e9))


def test_on_a_cpu_nothing_is_moved() -> None:
    found = timed(ppo(policy={"model": "m", "offload": True}, generator={"sleep": True}))
    assert "turns" not in found.phases
    assert found.hidden_s == 0


def test_staleness_hides_the_shorter_of_sampling_and_learning() -> None:
    found = timed(ppo(staleness=1))
    rest = found.phases["score"] + found.phases["learn"]
    assert found.hidden_s == min(found.phases["generate"], rest)
    assert found.iteration_s < timed(ppo()).iteration_s


def test_more_gpus_help_until_something_is_waited_for() -> None:
    stage = ppo()
    roles = ["policy", "critic", "reference", "reward/model", "generator"]
    hardware = replace(HARDWARE, gpu=GPUS["H100"], gpus_per_node=8)
    long = Lengths(prompt=10, response=500, longest=1000)
    found, _ = scaling(lambda s: timed(s, gpu=True, lengths=long, hardware=hardware), stage, roles, most=4096)
    # 64 samples are too few for 128 policy workers.
    assert [scale.gpus for scale in found] == [5 * 2**n for n in range(7)]
    assert found[0].efficiency == 1
    assert found[1].limit == "generation tail: the longest response"
    assert found[-1].efficiency < 0.5
    # 64 prompts for 512 generators.
    assert timed(ppo(generator={"workers": 512}), gpu=True).tasks[0].rows == 64


@pytest.mark.parametrize(
    ("made", "most", "advice"),
    [
        (ppo(mini_batches=3, policy={"model": "m", "workers": 2}, critic={"workers": 3}), 7, "or lower mini_batches"),
        (ppo(prompts_per_iteration=4, sampling={"samples_per_prompt": 2}), 8, "raise prompts_per_iteration"),
        (ppo(policy={"model": "m", "workers": 5}, critic={"kind": "value_head"}), 12, "raise prompts_per_iteration"),
        (sft(workers=3), 10, "raise batch_size"),
    ],
)
def test_no_more_workers_than_a_pipeline_may_have(made: Any, most: int, advice: str) -> None:
    roles = ["policy", "reference", "reward/model", "generator"] if made.method == "ppo" else ["policy"]
    if made.method == "ppo" and made.critic_role.kind == "network":
        roles.insert(1, "critic")
    accepted = []
    for factor in range(1, 2 * most):
        written = scaled(made, factor, roles).model_dump()
        problems = check_rules(schema.Pipeline(run_dir="r", stages=[written]), pipeline_dir=Path())
        few = any("wanted at least one for each" in problem.text for problem in problems)
        why = too_many_learners(made, factor, roles)
        assert bool(why) == few
        assert not few or advice in why
        if not few:
            accepted.append(factor)
    assert accepted == list(range(1, most + 1))


def test_what_limits_is_named() -> None:
    slow_network = replace(GPUS["H100"], network=1e-3)
    hardware = replace(HARDWARE, gpu=slow_network, gpus_per_node=1)
    found, _ = scaling(lambda s: timed(s, gpu=True, hardware=hardware), sft(), ["policy"], most=64)
    assert found[-1].limit == "learner communication: all-reduce of gradients"
    few, _ = scaling(lambda s: timed(s, gpu=True), sft(), ["policy"], most=64)
    assert few[-1].limit.startswith(("learning", "learner"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD-Instinct-MI300X-OAM", "MI300X"),
        ("h100", "H100"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_by_its_name(text: str, name: str | None) -> None:
    assert find_gpu(text) == (GPUS[name] if name else None)


def test_this_machines_cores_are_measured() -> None:
    assert 0.01 < measure_core(0.01).float32 / CORE.float32 < 100


def test_lengths_of_data_that_are_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x" * size}) + "\n" for size in (40, 80, 4000)))
    stage = ppo(data={"train": str(file), "max_prompt_tokens": 60}, sampling={"max_new_tokens": 100})
    assert data_lengths(stage) == Lengths((10 + 20 + 60) / 3, 50, 100)
    drawn = {"train": str(file), "prompt_length": {"min": 2, "max": 8}}
    assert data_lengths(ppo(data=drawn)).prompt == 5


@pytest.mark.parametrize(("value", "text"), [(0.0123, "12 ms"), (12.34, "12.3 s"), (150, "2 min"), (9000, "2.5 h")])
def test_times_are_told_in_units_that_suit(value: float, text: str) -> None:
    assert seconds(value) == text


# ------------------------------------------------------------------------------ an earlier run


def planned(config: schema.Pipeline, cluster: ClusterShape, lengths: Lengths, factors: Any) -> StageTime:
    stage = config.stages[0]
    numbers = arithmetic(stage, 1000, gpus=cluster.total_gpus)
    placement = plan_placement(stage, cluster, strategy="PACK")[-1]
    memory = plan_memory(config, stage, placement, numbers, cluster)
    return estimator(config, numbers, placement, memory, cluster, lengths, factors)(stage)


def finished_run(folder: Path, model: Path, cluster: ClusterShape) -> tuple[Path, schema.Pipeline, StageTime]:
    """A run whose tasks took three times what is planned on the cluster, its pipeline and that plan."""
    prompts = folder / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 40}) + "\n")
    made = ppo(
        policy={"model": str(model)},
        reward=[{"kind": "model", "model": str(model)}],
        data={"train": str(prompts), "max_prompt_tokens": 10},
    )
    run = folder / "run"
    run.mkdir()
    config = schema.Pipeline(run_dir=str(run), stages=[made.model_dump()])
    (run / CONFIG_FILE).write_text(run_files(config, pipeline_dir=folder)[CONFIG_FILE])
    plan = planned(config, cluster, Lengths(8, 12, 18), {})
    names = {f"time/{task.name}_s": 3 * task.seconds for task in plan.tasks if task.name != "sync"}
    row = {
        "stage": "ppo",
        "response/length_mean": 12.0,
        "response/length_max": 18.0,
        # 64 samples of 20 tokens.
        "reference/tokens_per_s": 64 * 20 / names["time/reference_logprobs_s"],
        "time/iteration_s": 1.0,
        **names,
    }
    rows = [{**row, "iteration": number} for number in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return run, config, plan


def test_a_runs_figures_take_the_place_of_the_assumptions(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    cluster = parse_cluster("1x2xCPU-16")
    run, config, plan = finished_run(tmp_path, llama_directory, cluster)
    found = read_measured(run, config, cluster)
    read = found.lengths["ppo"]
    assert (round(read.prompt, 6), read.response, read.longest) == (8, 12, 18)
    assert set(found.factors["ppo"]) == {task.name for task in plan.tasks} - {"sync"}
    for factor in found.factors["ppo"].values():
        assert factor == pytest.approx(3.0)
    after = planned(config, cluster, Lengths(8, 12, 18), found.factors["ppo"])
    assert after.phases["learn"] == pytest.approx(3 * plan.phases["learn"])


def test_what_a_run_held_at_its_end_was_free_for_it(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    node = Node("10.0.0.1", Share(32, 8), Share(32, 8), 400.0, "H100")
    run, config, _ = finished_run(tmp_path, llama_directory, running_cluster([node], "the cluster of this run"))
    ended = running_cluster([replace(node, free=Share(28, 0))], "the cluster of this run")
    (run / PLAN_FILE).write_text(json.dumps({"cluster": cluster_as_object(ended), "stages": {}}))
    for factor in read_measured(run, config, parse_cluster("1x2xCPU-16")).factors["ppo"].values():
        assert factor == pytest.approx(3.0)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    config = schema.Pipeline(run_dir="r", stages=[sft().model_dump()])
    with pytest.raises(ConfigError, match=r"--measured: .* holds no run"):
        read_measured(tmp_path, config, parse_cluster("1x1xCPU-4"))
