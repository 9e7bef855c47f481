"""The benchmarks for GPUs: their options, and that the first part works without a GPU and without Ray and DeepSpeed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.bench.results import read

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("learner", monkeypatch)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("whole", monkeypatch)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the folder, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.mark.parametrize("part", ["learner", "whole"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "got '0', wanted a number from 1"),
        (["--repeats", "few"], "got 'few', wanted a number from 1"),
        (["--json", "nowhere/f.json"], "nowhere is no folder"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--size", "9b", "--work", "9b"], "invalid choice: '9b'"),
    ],
)
def test_mistakes(
    part: str,
    arguments: list[str],
    words: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        request.getfixturevalue(part).parse(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_the_learner_is_measured_with_torch_alone(
    learner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learner.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert learner.main(["--repeats", "2", "--json", str(tmp_path / "f.json")]) == 0
    found = read(tmp_path / "f.json")
    names = [figure.name for figure in found.figures]
    assert names == ["gpu/matmul", "gpu/learn/packed", "gpu/score/packed", "gpu/learn/of_measured_peak"]
    assert all(figure.value > 0 for figure in found.figures)
    assert found.skipped == {"learner with DeepSpeed": "deepspeed and pydantic and httpx not installed"}
    assert "skipped, deepspeed" in capsys.readouterr().out


def test_the_whole_says_what_the_machine_lacks(
    whole: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whole.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    assert whole.main([]) == 0
    assert "whole: skipped, vllm not installed" in capsys.readouterr().out


def test_operations_of_a_token(learner: ModuleType) -> None:
    """Worked by hand: 2 layers of 64 with 1 of 2 key-value heads, intermediate 128, vocabulary 256, rows of 32."""
    size = learner.SIZES["tiny"]
    network = learner.model(size, torch.device("cpu"))
    assert isinstance(network, LlamaForCausalLM)
    matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 256 * 64
    norms = 2 * 2 * 64 + 64
    (figure,) = learner.utilisation(size, network, tokens_per_second=1e6, peak=1e12)
    operations = 6 * (matrices + norms) + 6 * 2 * 64 * 32
    assert figure.value == pytest.approx(operations * 1e6 / 1e12)
    assert figure.ratio == pytest.approx(operations * 1e6 / 1e12)


def test_rows_of_natural_lengths_hold_as_many_tokens(learner: ModuleType) -> None:
    size = learner.SIZES["tiny"]
    rows = learner.natural_rows(size, torch.Generator().manual_seed(0))
    total = sum(int(part.attention_mask.sum()) for part in rows)
    assert size.micro_batch * size.micro_batches <= total < size.micro_batch * size.micro_batches + 4 * size.row
    assert all(int(part.attention_mask.sum()) <= size.micro_batch for part in rows)
