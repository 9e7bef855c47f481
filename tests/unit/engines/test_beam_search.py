"""Beam search by hand on a small chain of words, and against transformers on a tiny Llama."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.engines.beam_search import Beam, beam_search
from rlhf_ray.engines.hf_generation import HfEngine
from tests.tiny_models import make_llama

END = 9
# From each token the next ones: a garden path whose first step is likely and whose second one is not.
CHAIN = {0: {1: 0.6, 2: 0.4}, 1: {3: 0.5, END: 0.3, 4: 0.2}, 2: {END: 0.9, 3: 0.1}, 3: {END: 1.0}, 4: {END: 1.0}}


def next_tokens(sequences: list[list[int]], count: int) -> list[list[tuple[int, float]]]:
    rows = (sorted(CHAIN[sequence[-1]].items(), key=lambda item: -item[1]) for sequence in sequences)
    return [[(token, log(share)) for token, share in row][:count] for row in rows]


def search(*, beams: int, length_penalty: float = 0.0, max_new_tokens: int = 5) -> list[list[int]]:
    (found,) = beam_search(
        next_tokens, [[0]], beams=beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty, ends={END}
    )
    return [beam.token_ids for beam in found]


def test_two_beams_leave_the_path_that_one_follows() -> None:
    # One beam: 0.6 * 0.5 * 1; two beams: 0.4 * 0.9.
    assert search(beams=1) == [[1, 3, END]]
    assert search(beams=2) == [[2, END], [1, 3, END]]


def test_a_length_penalty_prefers_longer_ones() -> None:
    # log 0.36 / 2 is below log 0.3 / 3.
    assert search(beams=2, length_penalty=1.0) == [[1, 3, END], [2, END]]


def test_the_length_limit_ends_a_response() -> None:
    assert search(beams=2, max_new_tokens=1) == [[1], [2]]


def test_prompts_are_searched_apart_and_logprobs_are_the_tokens_own() -> None:
    first, second = beam_search(next_tokens, [[0], [5, 2]], beams=2, max_new_tokens=5, length_penalty=0.0, ends={END})
    assert first[0] == Beam([2, END], [pytest.approx(log(0.4)), pytest.approx(log(0.9))])
    assert [beam.token_ids for beam in second] == [[END], [3, END]]


@pytest.mark.parametrize(("beams", "length_penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (5, 2.0)])
def test_against_transformers(beams: int, length_penalty: float, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    ends = [2, *range(240, 300)]
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    engine = HfEngine(config=schema.Generator(), model=model, revision=None, tokenizer=model, max_model_len=60)
    prompts = [[1, 50, 60, 70], [1, 80], [1, 90, 91, 92, 93]]
    found = beam_search(
        engine.next_tokens, prompts, beams=beams, max_new_tokens=12, length_penalty=length_penalty, ends=ends
    )
    for prompt, best in zip(prompts, found, strict=True):
        output = engine._model.generate(
            torch.tensor([prompt]),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            max_new_tokens=12,
            length_penalty=length_penalty,
            early_stopping=False,
            eos_token_id=ends,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        # What follows an end is filling.
        assert [beam.token_ids for beam in best] == [
            row[len(prompt) : len(prompt) + len(beam.token_ids)].tolist()
            for row, beam in zip(output.sequences, best, strict=True)
        ]
        assert all(beam.token_ids[-1] in ends or len(beam.token_ids) == 12 for beam in best)
        if beams > 1:
            scores = [beam.score(length_penalty) for beam in best]
            assert scores == pytest.approx(output.sequences_scores.tolist(), abs=1e-5)
    if length_penalty < 2:
        assert any(len(beam.token_ids) < 12 for best in found for beam in best)
