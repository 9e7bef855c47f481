"""What scores say about preferences, by hand."""

from __future__ import annotations

import io
import json
from math import exp, log, sqrt
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from rlhf_ray.config.rules import PREFERENCE_METRICS
from rlhf_ray.data.batches import PreferencePairs, make_sequences
from rlhf_ray.trainers.preference_report import (
    CalibrationBin,
    LengthBin,
    MarginBin,
    calibration_bins,
    calibration_error,
    judge_pairs,
    length_bins,
    margin_histogram,
    report_pairs,
    report_tables,
    wilson_interval,
    write_report,
)


def test_metrics_by_hand() -> None:
    metrics = judge_pairs(
        torch.tensor([1.0, 0.0, -1.0, 2.0]),
        torch.tensor([0.0, 0.0, 1.0, 1.0]),
        torch.zeros(4),
        longer=torch.tensor([2, 1, -1, 0]),
    )
    assert set(metrics) == set(PREFERENCE_METRICS)
    # Right, a tie, wrong, right.
    assert metrics["accuracy"] == pytest.approx(2.5 / 4)
    assert metrics["accuracy_chosen_longer"] == pytest.approx(0.75)
    assert metrics["accuracy_chosen_shorter"] == 0
    assert metrics["margin"] == pytest.approx((1 + 0 - 2 + 1) / 4)
    assert metrics["loss"] == pytest.approx((2 * log(1 + exp(-1)) + log(2) + log(1 + exp(2))) / 4)


def test_a_margin_raises_the_loss_and_nothing_else() -> None:
    scores, same = (torch.tensor([2.0]), torch.tensor([1.0])), torch.tensor([0])
    plain, wider = (judge_pairs(*scores, torch.tensor([margin]), longer=same) for margin in (0.0, 3.0))
    assert wider.pop("loss") == pytest.approx(log(1 + exp(2)))
    assert plain.pop("loss") == pytest.approx(log(1 + exp(-1)))
    assert plain == wider
    assert "accuracy_chosen_longer" not in plain


@pytest.mark.parametrize(
    ("differences", "error"),
    [
        # Three preferences held with 3/4, two of them right, and a tie held with 1/2: |2.25 - 2| / 4.
        ([log(3), log(3), -log(3), 0.0], 0.0625),
        # Certain, and right; certain, and wrong.
        ([100.0], 0.0),
        ([-100.0], 1.0),
        # Two bins whose gaps do not cancel: 0.9 held and wrong, 0.6 held and right.
        ([-log(9), log(1.5)], (0.9 + 0.4) / 2),
    ],
)
def test_calibration_error_by_hand(differences: list[float], error: float) -> None:
    assert calibration_error(torch.tensor(differences)) == pytest.approx(error, abs=1e-6)


def test_predicted_against_observed_preference() -> None:
    tie, sure = calibration_bins(torch.tensor([log(3), log(3), -log(3), 0.0]))
    assert tie == CalibrationBin(low=0.5, high=0.55, predicted=0.5, observed=0.5, pairs=1)
    # 3/4 opens the sixth of the ten bins, or a rounding before it ends the fifth.
    assert sure.low in (0.7, 0.75)
    assert (sure.predicted, sure.observed, sure.pairs) == (pytest.approx(0.75), pytest.approx(2 / 3), 3)


def test_a_histogram_has_every_margin_once() -> None:
    bins = margin_histogram(torch.tensor([-1.0, -1.0, 0.05, 1.0]))
    assert [bin.pairs for bin in bins] == [2, *[0] * 9, 1, *[0] * 8, 1]
    assert (bins[0].low, bins[-1].high) == (-1.0, pytest.approx(1.0))
    assert [bin.high for bin in bins[:-1]] == [bin.low for bin in bins[1:]]
    assert margin_histogram(torch.zeros(3)) == [MarginBin(0.0, 0.0, 3)]


def test_accuracy_by_length_shows_a_model_that_likes_long_answers() -> None:
    longer = torch.tensor([3, -5, 1, -1, 8, -2, 2, 6, -4, 4])
    bins = length_bins(longer.float(), longer)
    assert bins == [
        LengthBin(low=-5, high=-4, accuracy=0.0, margin=-4.5, pairs=2),
        LengthBin(low=-2, high=-1, accuracy=0.0, margin=-1.5, pairs=2),
        LengthBin(low=1, high=2, accuracy=1.0, margin=1.5, pairs=2),
        LengthBin(low=3, high=4, accuracy=1.0, margin=3.5, pairs=2),
        LengthBin(low=6, high=8, accuracy=1.0, margin=7.0, pairs=2),
    ]


def test_pairs_of_one_length_stay_together() -> None:
    longer = torch.tensor([0, 0, 0, 0, 0, 0, 7])
    bins = length_bins(torch.tensor([1.0, 1, 1, -1, 0, 1, -2]), longer)
    assert [(bin.low, bin.high, bin.pairs) for bin in bins] == [(0, 0, 6), (7, 7, 1)]
    assert bins[0].accuracy == pytest.approx(4.5 / 6)


def test_wilson_interval_by_hand_and_against_scipy() -> None:
    # z = 2, one half of four: middle 1/2, half (1/2) * 2 * sqrt(1/16 + 1/16).
    assert wilson_interval(0.5, 4, z=2.0) == pytest.approx((0.5 - sqrt(1 / 8), 0.5 + sqrt(1 / 8)))
    for right, number in ((0, 5), (5, 5), (61, 100)):
        expected = binomtest(right, number).proportion_ci(0.95, method="wilson")
        assert wilson_interval(right / number, number) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_report_of_a_few_pairs_on_disk_and_on_the_screen(tmp_path: Path) -> None:
    chosen, rejected = make_sequences([[1]] * 3, [[2, 2], [2], [2]]), make_sequences([[1]] * 3, [[2], [2], [2, 2, 2]])
    pairs = PreferencePairs(chosen, rejected, [0, 1, 2], torch.zeros(3))
    report = report_pairs(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]), pairs)
    write_report(tmp_path / "evaluation" / "report.json", report)
    read = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert read["pairs"] == 3
    assert read["metrics"]["accuracy"] == 0.5
    assert [bin["low"] for bin in read["by_length"]] == [-2, 0, 1]
    assert sum(bin["pairs"] for bin in read["margins"]) == sum(bin["pairs"] for bin in read["calibration"]) == 3
    screen = io.StringIO()
    Console(file=screen, width=100).print(report_tables(report, histogram=True))
    assert "accuracy 0.500 (95 % interval" in screen.getvalue()
    assert "-2" in screen.getvalue()
