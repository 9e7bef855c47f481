"""One thread, checked shapes, and small models in Hugging Face directories, made once for a whole test run."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# How long an example takes says more of the machine than of the code.
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")
# Also for the processes that tests start: the cache of the reference's log-probabilities stays out of the home folder.
os.environ["RLHF_RAY_CACHE"] = tempfile.mkdtemp(prefix="rlhf_ray_cache_")
# Before any test imports them: the shapes in the signatures of the algorithms are checked in every call.
install_import_hook("rlhf_ray.algorithms", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

TEXTS = ["The film was a joy, and we laughed.", "A dull and dreary film; nobody laughed."] * 20


def _make(directory: Path, family: str) -> Path:
    from rlhf_ray.config.schema import NewModel
    from rlhf_ray.models.loading import save_new_model

    save_new_model(directory, NewModel(family=family, vocab_size=300, max_length=64), TEXTS, seed=3)  # type: ignore[arg-type]
    return directory


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; its embeddings are not tied."""
    return _make(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2; its embeddings are tied."""
    return _make(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(params=["llama", "gpt2"], scope="session")
def model_directory(request: pytest.FixtureRequest) -> Path:
    """A tiny model of each family."""
    directory: Path = request.getfixturevalue(f"{request.param}_directory")
    return directory
