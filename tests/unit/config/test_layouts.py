"""What the words of placement.layout stand for, and what shares no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.layouts import expand_layout, layout_settings, possible_gpus, roles_of
from rlhf_ray.config.load import dump_pipeline, load_pipeline
from rlhf_ray.config.schema import Pipeline
from rlhf_ray.errors import ConfigError

MODEL = {"kind": "classifier", "model": "hub/name", "label": "POSITIVE"}
FUNCTION = {"kind": "function", "function": "json:dumps", "name": "rule"}


def ppo(layout: str | None = None, **changes: Any) -> dict[str, Any]:
    stage = {
        "run_dir": "r",
        "method": "ppo",
        "iterations": 1,
        "policy": {"model": "hub/name", "workers": 4},
        "reward": [MODEL, FUNCTION],
        "data": {"train": "hub/data"},
        "placement": {} if layout is None else {"layout": layout},
    }
    return stage | changes


def loaded(tmp_path: Path, settings: dict[str, Any]) -> Pipeline:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(settings))
    return load_pipeline(file)


def of_stage(pipeline: Pipeline) -> dict[str, Any]:
    """The settings of the layout, by their place in the first stage."""
    return {".".join(map(str, path[2:])): value for path, value in layout_settings(pipeline).items()}


def test_without_a_word_nothing_changes(tmp_path: Path) -> None:
    pipeline = loaded(tmp_path, ppo())
    assert expand_layout(pipeline) is pipeline
    assert pipeline.stages[0].critic is None  # type: ignore[union-attr]


def test_separate(tmp_path: Path) -> None:
    pipeline = loaded(tmp_path, ppo("separate", generator={"gpus": 1}))
    assert of_stage(pipeline) == {
        "policy.whole_gpus": True,
        "critic.whole_gpus": True,
        "reference.whole_gpus": True,
        "reward.0.whole_gpus": True,
    }


def test_colocated(tmp_path: Path) -> None:
    pipeline = loaded(tmp_path, ppo("colocated"))
    assert of_stage(pipeline) == {
        "critic.colocate_with": "policy",
        "critic.workers": 4,
        "reference.colocate_with": "policy",
        "reference.workers": 4,
        "reward.0.colocate_with": "policy",
        "reward.0.workers": 4,
        "generator.colocate_with": "policy",
        "generator.workers": 4,
        "generator.sleep": True,
        "generator.memory_share": 0.5,
        "policy.offload": True,
        "critic.offload": True,
    }
    stage: Any = pipeline.stages[0]
    assert (stage.critic.colocate_with, stage.reward[0].workers, stage.generator.sleep) == ("policy", 4, True)
    assert (stage.reward[1].workers, stage.reward[1].colocate_with) == (1, None)


def test_colocated_roles_without_a_gpu_and_an_engine_without_a_share(tmp_path: Path) -> None:
    found = of_stage(loaded(tmp_path, ppo("colocated", critic={"gpus": 0}, generator={"engine": "hf"})))
    assert not {"critic.colocate_with", "critic.offload", "generator.memory_share"} & found.keys()
    assert found["policy.offload"] is found["generator.sleep"] is True


def test_shared_scorers(tmp_path: Path) -> None:
    with_critic = of_stage(loaded(tmp_path, ppo("shared_scorers", critic={"workers": 2})))
    assert with_critic == {
        "reference.colocate_with": "critic",
        "reference.workers": 2,
        "reward.0.colocate_with": "critic",
        "reward.0.workers": 2,
    }
    group = {"advantages": {"estimator": "group_relative"}, "sampling": {"samples_per_prompt": 4}}
    without = of_stage(loaded(tmp_path, ppo("shared_scorers", **group)))
    assert without == {"reward.0.colocate_with": "reference", "reward.0.workers": 1}
    off = of_stage(loaded(tmp_path, ppo("shared_scorers", **group, kl={"place": "off"})))
    assert off == {}
    on_policy = of_stage(loaded(tmp_path, ppo("shared_scorers", critic={"colocate_with": "policy"})))
    assert (on_policy["reference.colocate_with"], on_policy["reward.0.colocate_with"]) == ("policy", "policy")
    on_cpu = of_stage(loaded(tmp_path, ppo("shared_scorers", critic={"gpus": 0})))
    assert on_cpu == {"reward.0.colocate_with": "reference", "reward.0.workers": 1}


def test_other_methods(tmp_path: Path) -> None:
    collect = ppo("colocated", method="collect", policy={"model": "hub/name"})
    del collect["iterations"]
    assert of_stage(loaded(tmp_path, collect)) == {"reward.0.colocate_with": "generator", "reward.0.workers": 1}
    dpo = {key: value for key, value in ppo("colocated", method="dpo").items() if key not in ("iterations", "reward")}
    assert of_stage(loaded(tmp_path, dpo)) == {"reference.colocate_with": "policy", "reference.workers": 4}
    sampled = of_stage(
        loaded(tmp_path, dpo | {"generator": {}, "data": {"train": "hub/data", "evaluation": "hub/data"}})
    )
    assert {
        "generator.colocate_with": "policy",
        "generator.sleep": True,
        "policy.offload": True,
    }.items() <= sampled.items()
    sft = {key: value for key, value in dpo.items() if key != "method"} | {"method": "sft"}
    assert of_stage(loaded(tmp_path, sft)) == {}


def test_what_a_user_sets_stays(tmp_path: Path) -> None:
    chosen = {"generator": {"workers": 2, "sleep": False, "memory_share": 0.3}, "reference": {"gpus": 0}}
    pipeline = loaded(tmp_path, ppo("colocated", **chosen))
    stage: Any = pipeline.stages[0]
    assert (stage.generator.workers, stage.generator.sleep, stage.generator.memory_share) == (2, False, 0.3)
    assert stage.generator.colocate_with == "policy"
    assert stage.reference.colocate_with is None
    assert not {"generator.workers", "generator.sleep", "generator.memory_share"} & of_stage(pipeline).keys()


@pytest.mark.parametrize("layout", [None, "separate", "colocated", "shared_scorers"])
def test_a_resolved_file_loads_again_to_the_same(tmp_path: Path, layout: str | None) -> None:
    pipeline = loaded(tmp_path, ppo(layout))
    again = tmp_path / "again.yaml"
    again.write_text(dump_pipeline(pipeline))
    assert load_pipeline(again) == pipeline
    assert layout_settings(load_pipeline(again)) == layout_settings(pipeline)


def test_roles_without_workers_are_none(tmp_path: Path) -> None:
    (stage,) = loaded(tmp_path, ppo(critic={"kind": "value_head"}, kl={"place": "off"})).stages
    assert list(roles_of(stage)) == ["policy", "reward/classifier", "reward/rule", "generator"]
    (adapted,) = loaded(tmp_path, ppo(policy={"model": "hub/name", "lora": {}})).stages
    assert list(roles_of(adapted)) == ["policy", "critic", "reward/classifier", "reward/rule", "generator"]


def test_gpus_that_a_role_may_use(tmp_path: Path) -> None:
    """None on those of a role on the CPU; a role that is not there has none to lack."""
    for changes, gpus in (({"gpus": 0}, 0.0), ({}, 8.0)):
        policy = {"model": "hub/name", **changes}
        (stage,) = loaded(tmp_path, ppo(policy=policy, generator={"colocate_with": "policy"})).stages
        assert possible_gpus(stage, roles_of(stage)["generator"][1], gpus=8.0) == gpus
        assert possible_gpus(stage, roles_of(stage)["reference"][1], gpus=8.0) == 8.0


def test_what_may_share(tmp_path: Path) -> None:
    whole = ppo(reference={"colocate_with": "reward/classifier"}, reward=[MODEL | {"gpus": 1}])
    functions = ppo(reward=[FUNCTION, FUNCTION | {"name": "other", "colocate_with": "reward/rule"}])
    for settings in (whole, functions):
        assert loaded(tmp_path, settings).stages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ppo(reference={"colocate_with": "polcy"}), r"reference.colocate_with.*got 'polcy', wanted .*mean `policy`"),
        (
            ppo(reference={"colocate_with": "reference"}),
            r"reference.colocate_with.*wanted another role.*: policy, crit",
        ),
        (ppo(reference={"colocate_with": "reward/rule"}), r"'reward/rule', a function, which has no GPU"),
        (
            ppo(reference={"colocate_with": "critic"}, critic={"colocate_with": "policy"}),
            r"got 'critic', which is itself on the GPUs of policy; wanted policy",
        ),
        (
            ppo(generator={"colocate_with": "policy", "workers": 5}),
            r"generator.workers.*got 5, wanted at most 4, the w",
        ),
        (ppo(generator={"colocate_with": "policy", "gpus": 0.5}), r"generator.gpus.*got 0.5, wanted nothing, or 0"),
        (
            ppo(generator={"colocate_with": "policy", "tensor_parallel": 2}),
            r"generator.tensor_parallel.*got 2, wanted 1.*generator.colocate_with policy",
        ),
        (
            ppo(reference={"colocate_with": "generator"}, generator={"tensor_parallel": 2}),
            r"generator.tensor_parallel.*got 2, wanted 1.*reference.colocate_with generator",
        ),
        (
            ppo(reference={"colocate_with": "reward/classifier"}, reward=[MODEL | {"gpus": 2}]),
            r"got 'reward/classifier', whose workers have 2 GPUs each",
        ),
        (ppo("separate", reference={"colocate_with": "critic"}), r"layout separate each role has GPUs of its own"),
        (ppo("separate", reference={"gpus": 0.5}), r"reference.gpus.*got 0.5, but with placement.layout separate"),
        (ppo("colocated", reference={"colocate_with": "critic"}), r"got 'critic', but with placement.layout colocated"),
        (ppo("colocated", reference={"gpus": 0.5}), r"reference.gpus.*got 0.5, wanted nothing, or 0"),
        (ppo("colocated", staleness=1), r"staleness.*got 1, but with placement.layout colocated the generator sleeps"),
        (ppo("colocated", generator={"tensor_parallel": 2}), r"generator.tensor_parallel.*got 2, wanted 1"),
        (ppo(reference={"whole_gpus": True, "gpus": 1}), r"reference.whole_gpus.*no effect with reference.gpus"),
        (
            ppo(reference={"whole_gpus": True, "colocate_with": "critic"}),
            r"reference.whole_gpus.*no effect with reference.colocate_with",
        ),
        (
            ppo(reference={"node_labels": {"pool": "large"}, "colocate_with": "critic"}),
            r"reference.node_labels.*no effect with reference.colocate_with",
        ),
        (ppo("together"), r"placement.layout.*got 'together', wanted one of separate, colocated, shared_scorers"),
    ],
)
def test_what_contradicts_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, settings)
