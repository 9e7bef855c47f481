"""How well scores agree with preferences: accuracy, margins, calibration, and whether the longer answer wins."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_ray.algorithms.preference_losses import BradleyTerryLoss, preferred
from rlhf_ray.data.batches import PreferencePairs
from rlhf_ray.shapes import SequenceFloat, SequenceInt
from rlhf_ray.trainers.durable import write_text

CONFIDENCE_BINS = 10
"""Equal parts of the confidences from 1/2 to 1 that predicted and observed preferences are compared in."""
MARGIN_BINS = 20
"""Equal parts of the range of the margins."""
LENGTH_BINS = 5
"""Parts with about equally many pairs that the length differences are cut into."""
_BAR = 24


@dataclass(frozen=True)
class MarginBin:
    """Pairs by the score of the chosen answer less that of the rejected one, `low` included."""

    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs by the confidence in the answer that scores higher, sigmoid(|margin|), `low` included.

    Args:
        predicted: mean confidence.
        observed: share of the pairs whose chosen answer scores higher; a tie counts half.
    """

    low: float
    high: float
    predicted: float
    observed: float
    pairs: int


@dataclass(frozen=True)
class LengthBin:
    """Pairs by the tokens of the chosen answer less those of the rejected one, both ends included."""

    low: int
    high: int
    accuracy: float
    margin: float
    pairs: int


@dataclass(frozen=True)
class PreferenceReport:
    """What the scores of some pairs say.

    Args:
        pairs: number of pairs.
        accuracy_interval: 95 % confidence interval of the accuracy.
        metrics: those of `judge_pairs`.
        margins: histogram of the margins, in order; no gaps between the bins.
        calibration: the bins that have a pair.
        by_length: from the pairs whose chosen answer is much shorter to those where it is much longer.
    """

    pairs: int
    accuracy_interval: tuple[float, float]
    metrics: dict[str, float]
    margins: list[MarginBin]
    calibration: list[CalibrationBin]
    by_length: list[LengthBin]

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


def write_report(path: Path, report: PreferenceReport) -> None:
    """Writes the report as JSON, whole or not at all."""
    write_text(path, report.to_json())


def report_pairs(chosen: SequenceFloat, rejected: SequenceFloat, pairs: PreferencePairs) -> PreferenceReport:
    """The report on the scores of pairs.

    Args:
        chosen: [B] scores of the preferred answers.
        rejected: [B] scores of the other answers.
        pairs: at least one.
    """
    longer = pairs.chosen.response_mask.sum(1) - pairs.rejected.response_mask.sum(1)
    metrics = judge_pairs(chosen, rejected, pairs.margins, longer=longer)
    return PreferenceReport(
        pairs=len(chosen),
        accuracy_interval=wilson_interval(metrics["accuracy"], len(chosen)),
        metrics=metrics,
        margins=margin_histogram(chosen - rejected),
        calibration=calibration_bins(chosen - rejected),
        by_length=length_bins(chosen - rejected, longer),
    )


def judge_pairs(
    chosen: SequenceFloat, rejected: SequenceFloat, margins: SequenceFloat, *, longer: SequenceInt
) -> dict[str, float]:
    """How well scores agree with preferences.

    Args:
        chosen: [B] scores of the preferred answers.
        rejected: [B] scores of the other answers.
        margins: [B] by how much the chosen answer is better; 0 where the data do not say.
        longer: [B] tokens of the preferred answer less those of the other one.

    Returns:
        `loss`; `accuracy` (an equal score counts half), the same of the pairs whose chosen answer is the longer or the
        shorter one, where there are such pairs; `margin`, the mean of chosen less rejected score; `calibration_error`.
    """
    correct = preferred(chosen, rejected)
    loss = BradleyTerryLoss()(chosen, rejected, margins)[0] / len(chosen)
    metrics = {
        "accuracy": float(correct.mean()),
        "loss": float(loss),
        "margin": float((chosen - rejected).mean()),
        "calibration_error": calibration_error(chosen - rejected),
    }
    for name, mask in (("longer", longer > 0), ("shorter", longer < 0)):
        if mask.any():
            metrics[f"accuracy_chosen_{name}"] = float(correct[mask].mean())
    return metrics


def calibration_error(differences: SequenceFloat) -> float:
    """Expected calibration error (arXiv:1706.04599, eq. 3) of the preferences that the scores predict.

    The mean over the pairs of |predicted - observed| of the pair's bin of `calibration_bins`.

    Args:
        differences: [B] score of the chosen answer less that of the rejected one.
    """
    gaps = [found.pairs * abs(found.predicted - found.observed) for found in calibration_bins(differences)]
    return sum(gaps) / len(differences)


def calibration_bins(differences: SequenceFloat) -> list[CalibrationBin]:
    """Predicted against observed preference, for each part of the confidences that has a pair.

    Args:
        differences: [B] score of the chosen answer less that of the rejected one.
    """
    confidence = torch.sigmoid(differences.abs().double())
    correct = preferred(differences, torch.zeros_like(differences)).double()
    numbers = ((confidence - 0.5) * 2 * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
    return [
        CalibrationBin(
            low=0.5 + number / (2 * CONFIDENCE_BINS),
            high=0.5 + (number + 1) / (2 * CONFIDENCE_BINS),
            predicted=float(confidence[numbers == number].mean()),
            observed=float(correct[numbers == number].mean()),
            pairs=int((numbers == number).sum()),
        )
        for number in sorted(set(numbers.tolist()))
    ]


def margin_histogram(differences: SequenceFloat) -> list[MarginBin]:
    """The margins in equal parts of their range, or in one part where they are all the same.

    Args:
        differences: [B] score of the chosen answer less that of the rejected one.
    """
    low, high = float(differences.min()), float(differences.max())
    if low == high:
        return [MarginBin(low, high, len(differences))]
    counts = torch.histc(differences.double(), bins=MARGIN_BINS, min=low, max=high).long().tolist()
    step = (high - low) / MARGIN_BINS
    return [MarginBin(low + i * step, low + (i + 1) * step, count) for i, count in enumerate(counts)]


def length_bins(differences: SequenceFloat, longer: SequenceInt) -> list[LengthBin]:
    """Accuracy and margin by the difference in length; pairs of one difference stay together.

    Args:
        differences: [B] score of the chosen answer less that of the rejected one.
        longer: tokens of the chosen answer less those of the rejected one.
    """
    _, value, counts = torch.unique(longer, return_inverse=True, return_counts=True)
    numbers = ((counts.cumsum(0) - counts) * LENGTH_BINS // len(longer))[value]
    correct = preferred(differences, torch.zeros_like(differences))
    return [
        LengthBin(
            low=int(longer[numbers == number].min()),
            high=int(longer[numbers == number].max()),
            accuracy=float(correct[numbers == number].mean()),
            margin=float(differences[numbers == number].mean()),
            pairs=int((numbers == number).sum()),
        )
        for number in sorted(set(numbers.tolist()))
    ]


def wilson_interval(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share of independent cases (E. B. Wilson, JASA 22, 1927); 95 % unless told.

    Args:
        share: the share observed.
        number: cases, at least 1.
        z: quantile of the normal distribution.
    """
    shrunk = 1 / (1 + z * z / number)
    middle = shrunk * (share + z * z / (2 * number))
    half = shrunk * z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def report_tables(report: PreferenceReport, *, histogram: bool) -> RenderableType:
    """The report for a terminal, with the histogram of the margins where that is asked for."""
    metrics, (low, high) = report.metrics, report.accuracy_interval
    head = Text.assemble(
        (f"accuracy {metrics['accuracy']:.3f}", "bold green"),
        f" (95 % interval {low:.3f} to {high:.3f}, {report.pairs} pairs)   loss {metrics['loss']:.4f}"
        f"   margin {metrics['margin']:z.3f}   calibration error {metrics['calibration_error']:.3f}",
    )
    length = _table("chosen longer by (tokens)", "pairs", "accuracy", "margin", "")
    for part in report.by_length:
        span = f"{part.low:+d}" if part.low == part.high else f"{part.low:+d} to {part.high:+d}"
        bar = "█" * round(_BAR * part.accuracy)
        length.add_row(span, str(part.pairs), f"{part.accuracy:.3f}", f"{part.margin:z.3f}", bar)
    calibration = _table("preference predicted", "observed", "pairs")
    for bin in report.calibration:
        calibration.add_row(f"{bin.predicted:.3f}", f"{bin.observed:.3f}", str(bin.pairs))
    if not histogram:
        return Group(head, length, calibration)
    margins = _table("margin from", "to", "pairs", "")
    most = max(bin.pairs for bin in report.margins)
    for margin in report.margins:
        bar = "█" * math.ceil(_BAR * margin.pairs / most)
        margins.add_row(f"{margin.low:z.2f}", f"{margin.high:z.2f}", str(margin.pairs), bar)
    return Group(head, length, calibration, margins)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", style=None if heading else "cyan")
    return table
