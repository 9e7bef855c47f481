"""The oracle: what is filtered away, and that responses end where they should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.engines.hf_generation import HfEngine, filtered_logprobs
from tests.tiny_models import make_llama

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def kept(**settings: Any) -> list[float]:
    context = torch.tensor([3])
    return [round(float(p), 6) for p in filtered_logprobs(LOGITS.clone(), context, schema.Sampling(**settings)).exp()]


def test_filters_by_hand() -> None:
    assert kept() == [0.5, 0.25, 0.15, 0.1]
    assert kept(top_k=2) == [0.666667, 0.333333, 0.0, 0.0]
    assert kept(top_p=0.75) == [0.666667, 0.333333, 0.0, 0.0]
    assert kept(top_p=0.76) == [0.555556, 0.277778, 0.166667, 0.0]
    assert kept(min_p=0.3) == [0.555556, 0.277778, 0.166667, 0.0]
    # 0.5 ** 2, 0.25 ** 2, ... over their sum 0.345
    assert kept(temperature=0.5) == [0.724638, 0.181159, 0.065217, 0.028986]


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    found = filtered_logprobs(logits, torch.tensor([0, 1, 1]), schema.Sampling(repetition_penalty=2.0))
    total = math.log(math.exp(1.0) + math.exp(-4.0) + math.exp(1.0))
    assert found.tolist() == pytest.approx([1.0 - total, -4.0 - total, 1.0 - total])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama that a third of its vocabulary ends."""
    path = Path(make_llama(tmp_path_factory.mktemp("models") / "llama", layers=1))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(200, 300)]}))
    return str(path)


@pytest.fixture(scope="module")
def engine(llama: str) -> HfEngine:
    return HfEngine(config=schema.Generator(engine="hf"), model=llama, revision=None, tokenizer=llama, max_model_len=64)


PROMPTS = [[1, 50, 60, 70], [1, 80]]


def test_a_response_depends_on_its_seed_alone(engine: HfEngine) -> None:
    sampling = schema.Sampling(max_new_tokens=8)
    together = engine.generate(PROMPTS, sampling, seeds=[1, 2])
    assert together == [
        *engine.generate(PROMPTS[:1], sampling, seeds=[1]),
        *engine.generate(PROMPTS[1:], sampling, seeds=[2]),
    ]
    assert engine.generate(PROMPTS[:1] * 2, sampling, seeds=[1, 2])[0] == together[0]
    assert engine.generate(PROMPTS[:1], sampling, seeds=[3]) != together[:1]


def test_every_end_token_ends_and_is_kept(engine: HfEngine) -> None:
    samples = engine.generate(PROMPTS * 10, schema.Sampling(max_new_tokens=3), seeds=range(20))
    for sample in samples:
        ends = [token == 2 or token >= 200 for token in sample.token_ids]
        assert ends == [False] * (len(ends) - 1) + [sample.finished]
        assert len(sample.token_ids) == len(sample.logprobs) <= 3
    assert {sample.finished for sample in samples} == {True, False}


def test_no_end_before_the_shortest_length(engine: HfEngine) -> None:
    sampling = schema.Sampling(min_new_tokens=10, max_new_tokens=12)
    assert min(len(sample.token_ids) for sample in engine.generate(PROMPTS * 5, sampling, seeds=range(10))) >= 10


def test_stop_strings_end_the_text(engine: HfEngine) -> None:
    samples = engine.generate(PROMPTS * 10, schema.Sampling(max_new_tokens=12, stop=("a", "e")), seeds=range(20))
    stopped = [sample for sample in samples if sample.finished and sample.token_ids[-1] < 200]
    assert stopped
    assert all("a" not in sample.text and "e" not in sample.text for sample in samples)


def test_logprobs_of_samples_are_those_of_the_prompt_pass(engine: HfEngine) -> None:
    [sample] = engine.generate(PROMPTS[:1], schema.Sampling(max_new_tokens=8), seeds=[5])
    whole = engine.prompt_logprobs([[*PROMPTS[0], *sample.token_ids]])[0]
    assert whole[0] == 0.0
    assert whole[len(PROMPTS[0]) :] == pytest.approx(sample.logprobs, abs=1e-5)
