"""Who answers for the reference of a DPO stage, and which of its numbers are the same ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import schema
from rlhf_ray.data.preferences import PreferenceSet
from rlhf_ray.stages import dpo
from rlhf_ray.stages.site import StageData
from tests.tiny_models import make_llama

SITE: Any = SimpleNamespace(cluster=SimpleNamespace(gpus=0), model=lambda name: name)
RUN: Any = SimpleNamespace(total=1, message=lambda text: None)


def stage(model: str, **changes: Any) -> schema.Dpo:
    policy = {"model": model} | changes.pop("policy", {})
    return schema.Dpo.model_validate({"method": "dpo", "policy": policy, "data": {"train": "x.jsonl"}} | changes)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"policy": {"lora": {}}}, True),
        ({"policy": {"lora": {"rank": 2}, "zero": 2}, "loss": {"beta": 0.3}}, True),
        ({"policy": {"lora": {}, "dtype": "bfloat16"}}, False),
        ({"policy": {"lora": {}, "dtype": "bfloat16"}, "reference": {"adapter_off": False}}, True),
        ({"policy": {"lora": {"quantise": "nf4", "result": "adapter"}}}, False),
        ({"policy": {"lora": {"quantise": "nf4", "result": "adapter"}}, "reference": {"adapter_off": False}}, True),
        ({"policy": {"lora": {}, "gpus": 1}}, False),
        ({"policy": {"gpus": 1}}, True),
        ({"reference": {"dtype": "bfloat16"}}, False),
    ],
)
def test_answers_are_shared_where_they_are_the_same_numbers(
    tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    model = make_llama(tmp_path / "llama")
    wanted = dpo._decides_reference(SITE, stage(model), model)
    assert (dpo._decides_reference(SITE, stage(model, **changes), model) == wanted) == same


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({}, ["policy", "reference"]),
        ({"policy": {"lora": {}}}, ["policy"]),
        ({"policy": {"lora": {}}, "generator": {}}, ["policy", "generator"]),
        ({"policy": {"lora": {}}, "reference": {"adapter_off": False}}, ["policy", "reference"]),
        ({"policy": {"lora": {}}, "reference": {"model": "org/other"}}, ["policy", "reference"]),
        ({"loss": {"kind": "simpo"}}, ["policy"]),
    ],
)
def test_the_reference_has_workers_unless_the_policy_answers(changes: dict[str, Any], roles: list[str]) -> None:
    settings = stage("org/base", **changes)
    pairs: Any = PreferenceSet({}, [], [], None)  # type: ignore[arg-type]
    data = StageData(pairs, None, tokenizer=None)  # type: ignore[arg-type]
    has_reference = dpo._has_reference(settings, data, None, RUN)
    requests = dpo.requests(settings, has_reference=has_reference, gpus=0)
    assert [request.role for request in requests] == roles
