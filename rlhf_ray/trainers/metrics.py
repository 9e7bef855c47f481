"""Metrics: computed from rollouts and experience, and written to metrics.jsonl, TensorBoard and Weights & Biases.

`<run_dir>/metrics.jsonl` has one object per iteration with `stage`, `iteration` and the metrics; iteration 0 is the
evaluation before the first one. Names are an interface: other tools read them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_ray.algorithms import kl
from rlhf_ray.algorithms.masked import explained_variance
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, Rollouts
from rlhf_ray.errors import InstallError
from rlhf_ray.shapes import SequenceFloat, TokenFloat
from rlhf_ray.trainers.durable import write_file
from rlhf_ray.trainers.metric_rows import FILE, metric_rows

Number = int | float
# Computing


def rollout_metrics(
    rollouts: Rollouts, scores: SequenceFloat, parts: Mapping[str, SequenceFloat] | None = None
) -> dict[str, float]:
    """Rewards and responses of a batch.

    Args:
        rollouts: B samples.
        scores: [B] sequence scores, before the KL term.
        parts: each scorer's own scores [B] by its name, before weighting.

    Returns:
        `reward/mean`, `reward/std` (population), `reward/min`, `reward/max`, `reward/<part>_mean`;
        `response/length_mean` and `response/length_max` in tokens, `response/finished_share` and
        `response/truncated_share` (ended by the length limit), `response/distinct_bigram_share`.
    """
    lengths = rollouts.sequences.response_mask.sum(1)
    finished = float(rollouts.finished.double().mean())
    values = scores.double()
    metrics = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std(correction=0)),
        "reward/min": float(values.min()),
        "reward/max": float(values.max()),
        "response/length_mean": float(lengths.double().mean()),
        "response/length_max": float(lengths.max()),
        "response/finished_share": finished,
        "response/truncated_share": 1.0 - finished,
        "response/distinct_bigram_share": distinct_bigram_share(rollouts.responses),
    }
    return metrics | {f"reward/{name}_mean": float(part.double().mean()) for name, part in (parts or {}).items()}


def experience_metrics(experience: Experience, rollouts: Rollouts, *, version: int) -> dict[str, float]:
    """Differences between the networks over a batch's response tokens.

    Args:
        version: of the learner's weights, before the update.

    Returns:
        `kl/per_sequence` in nats (k1 summed over a response, mean over sequences), `kl/k1`, `kl/k2`, `kl/k3` per token;
        `generator/logprob_diff_mean` and `_max`, the absolute difference between generator and learner, of the tokens
        that were sampled with the learner's weights, where there are any;
        `advantage/mean`, `advantage/std`; and, where there is a critic, `critic/explained_variance` and
        `critic/value_mean`.
    """
    mask = experience.sequences.response_mask
    tokens = max(int(mask.count_nonzero()), 1)

    def response(values: TokenFloat) -> Tensor:
        """The response tokens' values alone, in one row."""
        return values[mask].double()

    old, reference = response(experience.old_logprobs), response(experience.reference_logprobs)
    estimates = {name: kl.estimator(name)(old[None], reference[None]).sum() for name in ("k1", "k2", "k3")}
    advantages = response(experience.advantages)
    advantage_mean = float(advantages.sum() / tokens)
    metrics = {
        "kl/per_sequence": float(estimates["k1"] / len(mask)),
        **{f"kl/{name}": float(estimate / tokens) for name, estimate in estimates.items()},
        "advantage/mean": advantage_mean,
        "advantage/std": math.sqrt(float((advantages - advantage_mean).square().sum() / tokens)),
    }
    own = rollouts.policy_versions[mask] == version
    if bool(own.any()):
        difference = (old - response(rollouts.generator_logprobs)).abs()[own]
        metrics["generator/logprob_diff_mean"] = float(difference.mean())
        metrics["generator/logprob_diff_max"] = float(difference.max())
    values, returns = response(experience.values), response(experience.returns)
    if bool(returns.any()) or bool(values.any()):
        everything = torch.ones(1, len(values), dtype=torch.bool)
        metrics["critic/explained_variance"] = float(explained_variance(values[None], returns[None], everything))
        metrics["critic/value_mean"] = float(values.sum() / tokens)
    return metrics


def prefixed(role: str, stats: dict[str, float]) -> dict[str, float]:
    """Metric names with the role in front, where they have none."""
    return {name if "/" in name else f"{role}/{name}": value for name, value in stats.items()}


def distinct_bigram_share(texts: Sequence[str]) -> float:
    """Share of the texts' bigrams of words that are different from each other: 1 is all, near 0 one phrase repeated.

    Words are separated by white space; 0 where there is no bigram. Comparable only between equally many texts of like
    length.
    """
    count, different = 0, set[tuple[str, str]]()
    for text in texts:
        words = text.split()
        count += max(len(words) - 1, 0)
        different.update(itertools.pairwise(words))
    return len(different) / count if count else 0.0


# Writing


class Tracker(Protocol):
    """A place besides metrics.jsonl that metrics go to."""

    def write(self, iteration: int, metrics: Mapping[str, Number]) -> None:
        """Takes one iteration's metrics."""

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        """Takes the values that an iteration's histogram is made of."""

    def flush(self) -> None:
        """Hands on what is still buffered."""

    def close(self) -> None:
        """Flushes and lets go."""


class MetricLog:
    """One stage's metrics, written to metrics.jsonl and TensorBoard always, to Weights & Biases when asked.

    Args:
        run_dir: the run's folder.
        stage: name of the stage.
        tracking: where else metrics go.
        last_iteration: the iteration the stage resumes after; later rows of the stage are removed, so that the file has
            each iteration once. -1: the stage starts, and has no rows.
        settings: the stage's settings, for the trackers that show them.
        trackers: further places that metrics go to; the log closes them.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        tracking: schema.Tracking,
        *,
        last_iteration: int = -1,
        settings: Mapping[str, Any] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._stage = stage
        self._path = run_dir / FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self._path, stage, last_iteration)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._trackers: list[Tracker] = [_TensorBoard(run_dir / "tensorboard" / stage, last_iteration), *trackers]
        if tracking.wandb is not None:
            self._trackers.append(_Wandb(tracking.wandb, run_dir, stage, settings or {}))

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> dict[str, Number]:
        """Writes one iteration's metrics and returns them as numbers; NaN and infinity become null in the file."""
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        row = {"stage": self._stage, "iteration": iteration, **values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.write(iteration, numbers)
        return numbers

    def write_histogram(self, iteration: int, name: str, values: SequenceFloat) -> None:
        """Hands values to the trackers, which show their distribution; the metrics' file holds numbers only."""
        for tracker in self._trackers:
            tracker.write_histogram(iteration, name, values.tolist())

    def sync(self) -> None:
        """Waits until all rows are on disk; a checkpoint never knows an iteration that the file does not."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Ends the log; its trackers are flushed."""
        self.sync()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def as_number(name: str, value: Any) -> Number:
    """Python's int or float of a number, a 0-dimensional tensor or a NumPy scalar; else TypeError names the metric."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool):
        return int(number)
    if not isinstance(number, int | float):
        raise TypeError(f"metric {name}: got {type(value).__name__}, wanted one number")
    return number


def check_tracking(tracking: schema.Tracking) -> None:
    """InstallError where a tracker is asked for whose library is missing; to be called before anything is started."""
    if tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise _no_wandb()


def _no_wandb() -> InstallError:
    return InstallError(
        "tracking.wandb: Weights & Biases is not installed; install it with  pip install 'rlhf_ray[wandb]'  "
        "(or  pip install wandb ), or remove tracking.wandb"
    )


def _drop_rows_after(path: Path, stage: str, iteration: int) -> None:
    if not path.exists():
        return

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(
                line for line, row in metric_rows(path) if row["stage"] != stage or row["iteration"] <= iteration
            )

    write_file(path, write)


class _TensorBoard:
    """TensorBoard's event files; on resume, TensorBoard forgets the points after the resumed iteration."""

    def __init__(self, folder: Path, last_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = last_iteration + 1 if folder.exists() else None
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=10)

    def write(self, iteration: int, metrics: Mapping[str, Number]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=iteration)

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        self._writer.add_histogram(name, torch.tensor(values), global_step=iteration)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases: one run per stage, grouped by run; a resumed stage goes on in its run."""

    def __init__(self, settings: schema.Wandb, run_dir: Path, stage: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _no_wandb() from error
        self._wandb = wandb
        name = settings.name or run_dir.resolve().name
        identity = hashlib.sha256(f"{run_dir.resolve()}\n{stage}\n{_created(run_dir)}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=f"{name}-{stage}",
            group=name,
            id=identity,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        # Plotted over our iteration, because W&B's own step can never go back and a resumed run repeats iterations.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, metrics: Mapping[str, Number]) -> None:
        self._run.log({"iteration": iteration, **metrics})

    def write_histogram(self, iteration: int, name: str, values: Sequence[float]) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Histogram(values)})

    def flush(self) -> None:
        """W&B sends on its own."""

    def close(self) -> None:
        self._run.finish()


def _created(run_dir: Path) -> str:
    """What tells apart two runs that had the same folder one after the other."""
    config = run_dir / "config.yaml"
    return str(config.stat().st_mtime_ns) if config.exists() else ""
