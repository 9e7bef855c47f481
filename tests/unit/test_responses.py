"""Scores of two models' responses compared by hand; the table on disk and on the screen."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from rich.console import Console

from rlhf_ray.responses import Responses, compare, estimate, show_responses, show_scores, write_responses
from tests.unit.trainers.fake_workers import make_rollouts


def responses(scores: list[float] | None, *, model: str = "one") -> Responses:
    """Two responses of 1 and 3 tokens to each of two prompts; every second one is finished."""
    rollouts = make_rollouts([1, 3, 1, 3], ids=[7, 7, 8, 8], finished=[True, False, True, False])
    rollouts.generator_logprobs[rollouts.sequences.response_mask] = -0.5
    return Responses(model, 5, rollouts=rollouts, scores=None if scores is None else torch.tensor(scores))


def test_prompts_are_the_cases_of_a_standard_error() -> None:
    # Means of the prompts are 2 and 5: their spread is 3 / sqrt(2), the error of their mean 3 / 2.
    found = estimate(torch.tensor([1.0, 3.0, 5.0, 5.0]), per_prompt=2)
    assert (found.mean, found.error) == (3.5, pytest.approx(1.5))
    assert str(found) == "3.500 ± 1.500"


def test_with_one_prompt_its_responses_are_the_cases() -> None:
    found = estimate(torch.tensor([1.0, 3.0]), per_prompt=2)
    assert (found.mean, found.error) == (2.0, pytest.approx(1.0))
    alone = estimate(torch.tensor([1.0]), per_prompt=1)
    assert math.isnan(alone.error)
    assert str(alone) == "1.000"


def test_two_models_response_by_response() -> None:
    # Differences 1, 0, 2, -3: two wins, a tie, a loss; means of the prompts 0.5 and -0.5.
    found = compare(responses([0.0, 1.0, 0.0, 1.0]), responses([1.0, 1.0 + 1e-7, 2.0, -2.0], model="two"))
    assert found.wins == (1 + 0.5 + 1 + 0) / 4
    assert (found.difference.mean, found.difference.error) == (0.0, pytest.approx(0.5))


def test_a_row_for_each_response(tmp_path: Path) -> None:
    write_responses(tmp_path / "new" / "found.parquet", [responses(None), responses([4.0, 3.0, 2.0, 1.0], model="two")])
    table = pandas.read_parquet(tmp_path / "new" / "found.parquet")
    assert table["model"].tolist() == ["one"] * 4 + ["two"] * 4
    assert table["prompt"].tolist() == ["prompt 7", "prompt 7", "prompt 8", "prompt 8"] * 2
    assert table["sample"].tolist() == [0, 1] * 4
    assert table["score"].isna().tolist() == [True] * 4 + [False] * 4
    assert table["score"].tolist()[4:] == [4.0, 3.0, 2.0, 1.0]
    assert table["logprob"].tolist() == [-0.5, -1.5] * 4
    assert table["finished"].tolist() == [True, False] * 4
    assert [tokens.tolist() for tokens in table["tokens"][:2]] == [[3], [3, 3, 3]]
    assert table["length"].tolist() == [1, 3] * 4
    assert set(table["seed"]) == {5}


def shown(answered: list[Responses], prompts: int = 9) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=120, markup=True, force_terminal=False)
    console.print(show_responses(answered, prompts=prompts))
    console.print(show_scores(answered))
    return screen.getvalue()


def test_generated_text_is_shown_as_it_is_and_commands_no_terminal() -> None:
    one = responses(None)
    texts = ["[bold red]not markup[/]", "two\nlines", "\x1b[31mred\x1b[0m\x07", "[/nothing]"]
    screen = shown([replace(one, rollouts=replace(one.rollouts, responses=texts))])
    assert "[bold red]not markup[/]" in screen
    assert "two\nlines …" in screen
    assert "red" in screen
    assert "[/nothing]" in screen
    assert "\x1b" not in screen
    assert "\x07" not in screen


def test_two_models_side_by_side() -> None:
    screen = shown([responses([0.0, 1.0, 0.0, 1.0]), responses([1.0, 1.0, 2.0, -2.0], model="two")], prompts=1)
    assert "prompt 7" in screen
    assert "prompt 8" not in screen
    assert "+0.000  a b 1" in screen
    assert "second less first 0.000 ± 0.500; the second scores higher in 62% (a tie counts half)" in screen
