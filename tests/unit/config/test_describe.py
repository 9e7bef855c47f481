"""Settings in words."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from rlhf_ray.config.describe import METHODS, Kind, field_kind, find_key, list_settings, wanted
from rlhf_ray.config.schema import Pipeline, Policy, Ppo, Section


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (Literal["a", "b"], "one of a, b"),
        (tuple[str, ...], "a list, each text"),
        (tuple[Annotated[float, Field(gt=0, lt=1)], float], "a list of 2, each a number, above 0 and below 1"),
        (dict[str, int], "a mapping"),
    ],
)
def test_what_a_type_takes(annotation: object, words: str) -> None:
    assert wanted(Kind(annotation)) == words


def test_what_settings_take() -> None:
    assert wanted(field_kind(Ppo.model_fields["iterations"])) == "a whole number, at least 1"
    assert wanted(field_kind(Ppo.model_fields["reward"])).endswith("kind: model or classifier or function")
    assert wanted(field_kind(Policy.model_fields["model"])).startswith("text or a section (family")


def test_a_key_is_found_wherever_it_stands() -> None:
    assert find_key(Ppo, "learning_rate") == [
        ("policy", "optimizer", "learning_rate"),
        ("critic", "optimizer", "learning_rate"),
    ]


@pytest.mark.parametrize("section", [Pipeline, *METHODS.values()])
def test_every_setting_has_a_meaning(section: type[Section]) -> None:
    assert [setting.key for setting in list_settings(section) if not setting.meaning] == []


def test_defaults_are_those_of_the_place() -> None:
    defaults = {setting.key: setting.default for setting in list_settings(Ppo)}
    assert defaults["policy.optimizer.learning_rate"] == "1e-06"
    assert defaults["critic.optimizer.learning_rate"] == "1e-05"
    assert defaults["iterations"] == "required"
    assert defaults["generator.prefix_caching"] == "true"
    assert defaults["sampling.stop"] == "[]"
