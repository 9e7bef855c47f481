import re
from statistics import mean

import pytest

from rlhf_ray.data.synthetic import EFFECTS, FEELINGS, QUALITIES, judge, preferences, reviews, vocabulary


def test_rows_depend_on_split_and_number_only() -> None:
    rows = reviews("train", 50)
    assert reviews("train", 20) == rows[:20]
    assert reviews("train", 50, seed=1) != rows
    assert [row["prompt"] for row in reviews("train", 50, seed=1)] == [row["prompt"] for row in rows]
    assert set(rows[0]) == {"prompt", "response", "text", "label"}


def test_prompts_of_train_and_test_are_disjoint_and_distinct() -> None:
    train, test = ([row["prompt"] for row in reviews(split, rows)] for split, rows in (("train", 8000), ("test", 400)))
    assert len(set(train)) == 8000
    assert len(set(test)) == 400
    assert not set(train) & set(test)


def test_openings_are_neutral_and_continuations_one_half_positive() -> None:
    rows = reviews("train", 2000)
    assert all(judge(row["prompt"]) == 0 for row in rows)
    assert all((judge(row["text"]) > 0) == (row["label"] == 1) for row in rows)
    assert all(judge(row["text"]) != 0 for row in rows)
    assert mean(row["label"] for row in rows) == pytest.approx(0.5, abs=0.04)
    assert mean(abs(judge(row["text"])) < 1 for row in rows) == pytest.approx(0.4, abs=0.05)


def test_length_and_variety() -> None:
    rows = reviews("train", 4000)
    lengths = [len(row["response"].split()) for row in rows]
    assert min(lengths) >= 8
    assert max(lengths) <= 44
    assert all(row["text"] == row["prompt"] + row["response"] for row in rows)
    assert all(row["response"].startswith(" ") for row in rows)
    words = {word for row in rows for word in re.findall(r"[a-z]+", row["text"].lower())}
    assert words == set(vocabulary())
    assert 150 <= len(vocabulary()) <= 250
    assert len({row["response"] for row in rows}) > 3950


def test_judge_by_hand() -> None:
    assert judge("It was superb and warm.") == 1
    assert judge("It was DULL") == -1
    assert judge("superb, superb, dull") == pytest.approx(1 / 3)
    assert judge("superb but dull") == pytest.approx(-1 / 3)
    assert judge("dull but superb") == pytest.approx(1 / 3)
    assert judge("It runs for two hours.") == 0
    assert judge("superbly") == 0


def test_no_word_is_on_both_sides() -> None:
    sides = [{word for table in (QUALITIES, FEELINGS, EFFECTS) for word in table[label]} for label in (0, 1)]
    assert not sides[0] & sides[1]


def test_pairs_share_a_neutral_prompt_and_the_better_response_is_chosen() -> None:
    rows = preferences("train", 1000)
    assert preferences("train", 20) == rows[:20]
    assert preferences("train", 20, seed=1) != rows[:20]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in reviews("train", 1000)]
    same_side = 0
    for row in rows:
        chosen, rejected = judge(row["prompt"] + row["chosen"]), judge(row["prompt"] + row["rejected"])
        assert row["margin"] == pytest.approx(chosen - rejected)
        assert row["margin"] > 0
        same_side += chosen * rejected > 0
    assert same_side / len(rows) == pytest.approx(0.38, abs=0.05)


def test_neither_side_of_a_pair_is_longer() -> None:
    rows = preferences("train", 4000)
    difference = mean(len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows)
    assert difference == pytest.approx(0, abs=0.5)


def test_the_reviews_are_the_ones_they_were() -> None:
    first = reviews("train", 1)[0]
    assert first["label"] == 1
    assert first["text"] == (
        "This small mystery by Lucia Romero about a doctor seemed delightful but dreadful. One could call the pace "
        "fresh. It is based on a short book. The pace shines in the last act. For most of us it works."
    )
