"""`rlhf-ray generate` on the real stack, with transformers as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from rlhf_ray.cli import main
from rlhf_ray.distributed.placement import Cluster
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from tests.tiny_models import TEXTS, make_llama, make_reward_model

PROMPTS = [" ".join(text.split()[:number]) for number, text in zip((3, 5, 6), TEXTS[::100], strict=False)]
FUNCTION = "def length(prompts, responses, answers):\n    return [len(response) for response in responses]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of many ends, a reward model in their tokens, and a file of prompts."""
    root = tmp_path_factory.mktemp("inference")
    for name, seed in (("one", 2), ("two", 3)):
        make_llama(root / name, seed=seed)
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(240, 300)]}))
    make_reward_model(root / "reward", tokenizer=str(root / "one"))
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return root


def generated(folder: Path, *arguments: str) -> Any:
    """The table that the command writes."""
    output = folder / "responses.parquet"
    with pytest.raises(SystemExit) as done:
        main(["generate", *arguments, "--output", str(output), "--max-new-tokens", "12"])
    assert done.value.code == 0
    return pandas.read_parquet(output)


def test_beam_search_of_vllm_is_that_of_transformers(cluster: Cluster, folder: Path) -> None:
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    found = generated(
        folder, str(folder / "one"), *prompts, "--beams", "4", "--samples", "2", "--length-penalty", "0.5"
    )
    assert found["prompt"].tolist() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert found["sample"].tolist() == [0, 1] * 3
    oracle: Any = load_causal_lm(str(folder / "one"))
    tokenizer = load_tokenizer(str(folder / "one"))
    for number, prompt in enumerate(PROMPTS):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        settings = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
        expected = oracle.generate(tokens, num_beams=4, num_return_sequences=2, length_penalty=0.5, **settings)
        for row, beam, score in zip(
            found[2 * number : 2 * number + 2].itertuples(), expected.sequences, expected.sequences_scores, strict=True
        ):
            assert row.tokens.tolist() == beam[tokens.shape[1] : tokens.shape[1] + row.length].tolist()
            assert row.logprob / row.length**0.5 == pytest.approx(float(score), abs=1e-4)
        greedy = oracle.generate(tokens, **settings)
        logprob = oracle.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True).sum()
        best = found[2 * number : 2 * number + 2]["logprob"].max()
        assert best >= float(logprob) - 1e-4 or len(greedy.scores) < 12


def test_two_models_are_compared_on_the_same_prompts_and_seeds(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "my_lengths.py").write_text(FUNCTION)
    arguments = ["one", "--prompts", "prompts.jsonl", "--samples", "3", "--seed", "5"]
    found = generated(folder, *arguments, "--compare", "two", "--reward", "my_lengths:length")
    one, two = (found[found["model"] == name].reset_index() for name in ("one", "two"))
    assert one["prompt"].tolist() == two["prompt"].tolist() == [prompt for prompt in PROMPTS for _ in range(3)]
    assert one["response"].tolist() != two["response"].tolist()
    assert found["score"].tolist() == [len(response) for response in found["response"]]
    difference = (two["score"] - one["score"]).groupby(one["prompt_id"]).mean()
    screen = capsys.readouterr().out
    assert f"second less first {difference.mean():z.3f} ± {difference.sem():.3f}" in screen

    # The same seeds alone, scored by a reward model.
    again = generated(folder, *arguments, "--reward", "reward")
    assert again["response"].tolist() == one["response"].tolist()
    tokenizer, scorer = load_tokenizer("one"), make_scorer(folder)
    for row in again[:3].itertuples():
        tokens = [*tokenizer(row.prompt)["input_ids"], *row.tokens.tolist()]
        assert row.score == pytest.approx(scorer(tokens), abs=1e-5)


def make_scorer(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward")

    def score(tokens: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([tokens])).logits)

    return score
