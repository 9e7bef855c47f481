"""Which nodes a selector of labels asks for; the oracle of its grammar is Ray's own check."""

from __future__ import annotations

import pytest
from ray._private.label_utils import validate_label_selector

from rlhf_ray.config.load import load_pipeline
from rlhf_ray.config.node_labels import in_words, matches, wrong_label
from rlhf_ray.errors import ConfigError

NODE = {"pool": "large", "ray.io/accelerator-type": "H100"}


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ({}, True),
        ({"pool": "large"}, True),
        ({"pool": "small"}, False),
        ({"pool": "!large"}, False),
        ({"pool": "!small"}, True),
        ({"zone": "a"}, False),
        ({"zone": "!a"}, True),
        ({"pool": "in(small, large)"}, True),
        ({"pool": "in(small,tiny)"}, False),
        ({"pool": "in(small,large)"}, True),
        ({"pool": "!in(small, large)"}, False),
        ({"pool": "!in(small, tiny)"}, True),
        ({"pool": "large", "ray.io/accelerator-type": "A100"}, False),
        ({"pool": "large", "ray.io/accelerator-type": "H100"}, True),
    ],
)
def test_a_node_is_asked_for_by_its_labels(selector: dict[str, str], wanted: bool) -> None:
    assert matches(NODE, selector) is wanted
    assert matches(None, selector)


GOOD = ["H100", "!spot", "in(a, b)", "in(a,b)", "!in(a, b)", "in(a)", "a.b-c_d", "1"]
BAD = ["-spot", "spot_", "in()", "in(a,", "in(a b)", "!!a", "a!", "", "in(a,  b)", "a b", "x" * 64, "in(-a)", "not(a)"]


@pytest.mark.parametrize("value", GOOD)
def test_selectors_that_ray_takes(value: str) -> None:
    assert wrong_label("pool", value) is None
    assert validate_label_selector({"pool": value}) is None


@pytest.mark.parametrize("value", BAD)
def test_selectors_that_are_refused(value: str) -> None:
    wrong = wrong_label("pool", value)
    assert wrong is not None
    assert wrong.startswith(f"got {value!r}, wanted VALUE, !VALUE")


@pytest.mark.parametrize("key", ["pool", "ray.io/accelerator-type", "rlhf-ray/role", "a"])
def test_names_of_labels(key: str) -> None:
    assert wrong_label(key, "a") is None
    assert validate_label_selector({key: "a"}) is None


@pytest.mark.parametrize("key", ["", "-a", "a/b/", "a b", "/a", "x" * 64])
def test_names_that_are_refused(key: str) -> None:
    assert "wanted a name as Kubernetes takes it" in str(wrong_label(key, "a"))


def test_in_words() -> None:
    assert in_words({"pool": "large", "market": "!spot"}) == "pool=large, market=!spot"


def test_a_wrong_label_in_a_pipeline_is_named() -> None:
    def load(value: str) -> object:
        return load_pipeline("pipelines/quickstart.yaml", [f"ppo.generator.node_labels={value}"]).stages[-1]

    assert load("{pool: 'in(a, b)'}").generator.node_labels == {"pool": "in(a, b)"}  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"ppo\.generator\.node_labels\.pool \(override\): got 'not it', wanted VALUE, !VALUE"
    ):
        load("{pool: not it}")
    with pytest.raises(ConfigError, match=r"node_labels\.pool \(override\): got 1, wanted .*in quotes: '1'"):
        load("{pool: 1}")
    with pytest.raises(ConfigError, match=r"ppo\.generator\.node_labels \(override\): got 'large', wanted "):
        load("large")
