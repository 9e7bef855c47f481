"""Learners on one and two ranks, every ZeRO stage, real DeepSpeed over gloo: the same result everywhere."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_ray.config import schema
from rlhf_ray.distributed.place import Place
from rlhf_ray.workers.scorers import ReferenceScorer
from tests.integration.learner_ranks import LORA_RUNS, RUNS, draw_sequences

FLOAT32 = [name for name in RUNS if "bfloat16" not in name]
LORA_FLOAT32 = [name for name in LORA_RUNS if "bfloat16" not in name]


def _run(size: int, names: list[str], model: Path, output: Path) -> list[dict[str, Any]]:
    """Results of each rank, by the run's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("learner_ranks.py"))
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = os.environ | place | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, script, str(model), str(output), ",".join(names)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(errors)
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave their files."""
    return tmp_path_factory.mktemp("learners")


@pytest.fixture(scope="module")
def alone_on_one_rank(gpt2_directory: Path, folder: Path) -> dict[str, Any]:
    """Results of one rank at ZeRO 0, by the run's name."""
    (folder / "alone").mkdir()
    return _run(1, ["zero0", "lora_zero0"], gpt2_directory, folder / "alone")[0]


@pytest.fixture(scope="module")
def alone(alone_on_one_rank: dict[str, Any]) -> dict[str, Any]:
    """Results of one rank at ZeRO 0."""
    return alone_on_one_rank["zero0"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pair(gpt2_directory: Path, folder: Path) -> list[dict[str, Any]]:
    """Results of two ranks, in every setting."""
    (folder / "pair").mkdir()
    return _run(2, [*RUNS, *LORA_RUNS], gpt2_directory, folder / "pair")


@pytest.mark.parametrize("name", FLOAT32)
def test_two_ranks_learn_what_one_learns(
    alone: dict[str, Any], pair: list[dict[str, Any]], folder: Path, name: str
) -> None:
    for rank in pair:
        for step, (wanted, found) in enumerate(zip(alone["metrics"], rank[name]["metrics"], strict=True)):
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), f"step {step}"
    wanted_weights = load_file(folder / "alone" / "zero0.safetensors")
    found_weights = load_file(folder / "pair" / f"{name}.safetensors")
    assert found_weights.keys() == wanted_weights.keys()
    for key, wanted_tensor in wanted_weights.items():
        torch.testing.assert_close(
            found_weights[key], wanted_tensor, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", FLOAT32)
def test_two_ranks_learn_to_judge_pairs_as_one_does(
    alone: dict[str, Any], pair: list[dict[str, Any]], name: str
) -> None:
    for wanted, found in zip(alone["judged"], pair[0][name]["judged"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", list(RUNS))
def test_all_ranks_report_the_same(pair: list[dict[str, Any]], name: str) -> None:
    assert pair[0][name] == pair[1][name]


@pytest.mark.parametrize("name", list(RUNS))
def test_resume_is_equality(pair: list[dict[str, Any]], name: str) -> None:
    assert pair[0][name]["resumed_equal"]


@pytest.mark.parametrize("name", list(RUNS))
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(pair: list[dict[str, Any]], name: str) -> None:
    assert [rank[name]["skipped"] for rank in pair] == [1, 1]


@pytest.mark.parametrize("name", FLOAT32)
def test_a_mini_batch_smaller_than_the_group(alone: dict[str, Any], pair: list[dict[str, Any]], name: str) -> None:
    assert pair[0][name]["one_row"] == pytest.approx(alone["one_row"], rel=1e-5, abs=1e-5)
    assert pair[0][name]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-5)


@pytest.mark.parametrize("name", list(RUNS))
def test_saved_model_is_the_trained_one(pair: list[dict[str, Any]], folder: Path, name: str) -> None:
    weights = load_file(folder / "pair" / f"{name}.safetensors")
    logprobs = weights.pop("logprobs")
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "pair" / name / "model", dtype=dtype)
    assert "lm_head.weight" in weights
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    sequences = draw_sequences(7)
    length = int(sequences.lengths()[0])
    expected = model(sequences.tokens[:1, :length]).logits[0].float().log_softmax(-1)
    position = int(sequences.response_mask[0].nonzero()[-1])
    token = sequences.tokens[0, position]
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    assert logprobs[0, position].item() == pytest.approx(expected[position - 1, token].item(), abs=tolerance)


def test_bfloat16_stays_near_float32(pair: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    found = [metrics["loss"] for metrics in pair[0]["zero3_bfloat16"]["metrics"]]
    assert found == pytest.approx([metrics["loss"] for metrics in alone["metrics"]], abs=0.05)


@pytest.mark.parametrize("name", LORA_FLOAT32)
def test_two_ranks_learn_the_adapter_that_one_learns(
    alone_on_one_rank: dict[str, Any], pair: list[dict[str, Any]], folder: Path, name: str
) -> None:
    for rank in pair:
        wanted_metrics = alone_on_one_rank["lora_zero0"]["metrics"]
        for step, (wanted, found) in enumerate(zip(wanted_metrics, rank[name]["metrics"], strict=True)):
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), f"step {step}"
    wanted_weights = load_file(folder / "alone" / "lora_zero0.safetensors")
    found_weights = load_file(folder / "pair" / f"{name}.safetensors")
    assert found_weights.keys() == wanted_weights.keys()
    for key, wanted_tensor in wanted_weights.items():
        torch.testing.assert_close(
            found_weights[key], wanted_tensor, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", list(LORA_RUNS))
def test_adapters_resume_bit_for_bit_and_switch_off_to_the_base(
    pair: list[dict[str, Any]], gpt2_directory: Path, name: str
) -> None:
    assert [rank[name]["resumed_equal"] for rank in pair] == [True, True]
    assert [rank[name]["reference_equal"] for rank in pair] == [True, True]
    base = sum(file.stat().st_size for file in gpt2_directory.glob("*.safetensors"))
    assert pair[0][name]["saved_bytes"] < base / 2


@pytest.mark.parametrize("name", list(LORA_RUNS))
def test_the_references_answers_are_those_of_a_reference_scorer(
    pair: list[dict[str, Any]], gpt2_directory: Path, name: str
) -> None:
    """Bit for bit, also where ranks without a row take part in gathering shards."""
    config = schema.Reference(dtype="bfloat16" if "bfloat16" in name else "float32")
    scorer = ReferenceScorer(Place("reference", 0, 1), config=config, model=str(gpt2_directory))
    assert pair[0][name]["answers"] == scorer.answer_logprobs(draw_sequences(7).select(range(6))).tolist()
    assert pair[1][name]["answers"] == []


@pytest.mark.parametrize("name", list(LORA_RUNS))
def test_the_merged_model_is_the_trained_one(pair: list[dict[str, Any]], folder: Path, name: str) -> None:
    logprobs = load_file(folder / "pair" / f"{name}.safetensors")["logprobs"]
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "pair" / name / "model", dtype=dtype)
    sequences = draw_sequences(7)
    length = int(sequences.lengths()[0])
    expected = model(sequences.tokens[:1, :length]).logits[0].float().log_softmax(-1)
    for position in sequences.response_mask[0].nonzero().flatten().tolist():
        token = sequences.tokens[0, position]
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        assert logprobs[0, position].item() == pytest.approx(expected[position - 1, token].item(), abs=tolerance)
