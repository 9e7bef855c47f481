"""A model's digest: the same for the same weights wherever they lie, another for any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.models import digests
from rlhf_ray.models.digests import model_digest


@pytest.fixture
def model(llama_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_directory, tmp_path / "model"))


def test_a_copy_is_the_same_model(llama_directory: Path, gpt2_directory: Path, model: Path) -> None:
    (model / "README.md").write_text("a card")
    assert model_digest(str(model)) == model_digest(str(llama_directory))
    assert model_digest(str(model)) != model_digest(str(gpt2_directory))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_other_byte_is_another_model(model: Path, name: str) -> None:
    before = model_digest(str(model))
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1
    (model / name).write_bytes(content)
    assert model_digest(str(model)) != before


def test_weights_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_digest(str(model))
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", lambda *_: pytest.fail("read again"))
        assert model_digest(str(model)) == first
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert model_digest(str(model)) == first


def test_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"main": "a1", "old": "b2", None: "a1"}
    monkeypatch.setattr(digests, "load_config", lambda name, revision: SimpleNamespace(_commit_hash=commits[revision]))
    assert model_digest("org/model") == model_digest("org/model", "main") != model_digest("org/model", "old")
    assert model_digest("org/other") != model_digest("org/model")
    commits[None] = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"org/model: .*set cache to false"):
        model_digest("org/model")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights"):
        model_digest(str(tmp_path))
