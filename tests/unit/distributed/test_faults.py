"""Injected faults: where they act, and what they do."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_ray.distributed.faults import VARIABLE, fault
from rlhf_ray.errors import ConfigError


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert fault("sync", role="policy", rank=0, iteration=1) is None


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("sync:policy:0:2:drop_tensor", "drop_tensor"),
        ("sync:*:*:*:corrupt", "corrupt"),
        ("learn:policy:0:2:drop_tensor", None),
        ("sync:critic:0:2:drop_tensor", None),
        ("sync:policy:1:2:drop_tensor", None),
        ("sync:policy:0:3:drop_tensor", None),
    ],
)
def test_it_acts_at_its_place_only(monkeypatch: pytest.MonkeyPatch, specification: str, expected: str | None) -> None:
    monkeypatch.setenv(VARIABLE, specification)
    assert fault("sync", role="policy", rank=0, iteration=2) == expected


def test_raise_and_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "learn:policy:1:3:raise")
    with pytest.raises(RuntimeError, match="injected fault: learn, policy rank 1, iteration 3"):
        fault("learn", role="policy", rank=1, iteration=3)
    monkeypatch.setenv(VARIABLE, "learn:policy:1:3:sleep:0.05")
    start = time.monotonic()
    assert fault("learn", role="policy", rank=1, iteration=3) is None
    assert time.monotonic() - start >= 0.05


def test_kill_ends_the_process() -> None:
    code = "from rlhf_ray.distributed.faults import fault; fault('learn', role='policy', rank=0, iteration=1)"
    environment = os.environ | {VARIABLE: "learn:policy:0:1:kill"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL


def test_a_wrong_specification_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "learn:policy:kill")
    with pytest.raises(ConfigError, match="got 'learn:policy:kill', wanted phase:role:rank:iteration:action"):
        fault("learn", role="policy", rank=0, iteration=1)
