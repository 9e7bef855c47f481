"""The reward functions that the shipped pipelines name, on texts scored by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture(scope="module")
def rewards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped_rewards", PIPELINES / "rewards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lexicon(tmp_path: Path) -> str:
    path = tmp_path / "lexicon.txt"
    path.write_text("happy\t2.7\t0.9\t[3, 2]\nsad\t-2.1\t0.9\t[-3, -2]\ndon't\t-1.0\t0.5\t[-1]\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Happy, happy!", 2.7),
        (" was happy and sad.", (2.7 - 2.1) / 4),
        ("I don't know", -1 / 3),
        ("I don\N{RIGHT SINGLE QUOTATION MARK}t know", -1 / 3),
        ("unhappy", 0.0),
        ("", 0.0),
        ("12 ... !", 0.0),
    ],
)
def test_lexicon_valence(rewards: ModuleType, lexicon: str, response: str, expected: float) -> None:
    found = rewards.lexicon_valence(prompts=["so happy"], responses=[response], answers=[None], lexicon=lexicon)
    assert found == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "3 + 4 = <<3+4=7>>7\n#### 7", 1.0),
        ("So the answer is 7.", "#### 7", 1.0),
        ("That makes $1,234.50", "#### 1234.5", 1.0),
        ("#### 8\nNo, wait: 7", "#### 7", 0.0),
        ("#### 8", "#### 7", 0.0),
        ("7 apples, of which 2 are red", "#### 7", 0.0),
        ("It is -3", "#### -3", 1.0),
        ("no number", "#### 7", 0.0),
        ("#### none", "#### 7", 0.0),
        ("", "7", 0.0),
        ("seventeen is 17", "17", 1.0),
    ],
)
def test_exact_answer(rewards: ModuleType, response: str, answer: str, expected: float) -> None:
    assert rewards.exact_answer(prompts=["?"], responses=[response], answers=[answer]) == [expected]


def test_an_expected_answer_without_a_number_is_an_error(rewards: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected answer 'yes' holds no number"):
        rewards.exact_answer(prompts=["?"], responses=["7"], answers=["yes"])


def test_review_sentiment_reads_prompt_and_response_together(rewards: ModuleType) -> None:
    from rlhf_ray.data.synthetic import judge, reviews

    rows = reviews("test", 4)
    prompts = [row["prompt"] for row in rows]
    responses = [row["text"].removeprefix(row["prompt"]) for row in rows]
    found = rewards.review_sentiment(prompts=prompts, responses=responses, answers=[None] * 4)
    assert found == [judge(row["text"]) for row in rows]
    assert [score > 0 for score in found] == [row["label"] == 1 for row in rows]
