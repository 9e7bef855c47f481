"""Workers with invented numbers, for loops that run in this process. All of them note what they are asked."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts, Sequences, make_sequences, one_version
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.trainers.ppo import PpoGroups
from rlhf_ray.trainers.run import RunFolder, StageRun
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.scaling import Scaling
from rlhf_ray.trainers.view import PlainView
from rlhf_ray.workers.generator import Finished
from rlhf_ray.workers.learner import Values

Events = list[tuple[Any, ...]]


def ppo_settings(**changes: Any) -> schema.Ppo:
    """A stage with one function as its reward; `changes` are settings."""
    values: dict[str, Any] = {
        "method": "ppo",
        "iterations": 2,
        "prompts_per_iteration": 2,
        "policy": {"model": "org/base"},
        "reward": [{"kind": "function", "function": "a:b"}],
        "data": {"train": "x.jsonl"},
        "evaluation": {"every": 0},
        "checkpoints": {"every": 0},
    }
    return schema.Ppo.model_validate(values | changes)


def make_rollouts(
    lengths: Sequence[int],
    *,
    finished: Sequence[bool] | None = None,
    ids: Sequence[int] | None = None,
    version: int = 0,
) -> Rollouts:
    """One sample for each length, its response tokens from index 2 on; log-probabilities 0."""
    sequences = make_sequences([[1, 2]] * len(lengths), [[3] * length for length in lengths])
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.tensor(finished or [True] * len(lengths)),
        prompts=[f"prompt {number}" for number in ids or range(len(lengths))],
        responses=[f"a b {length}" for length in lengths],
        answers=[None] * len(lengths),
        prompt_ids=torch.tensor(ids or list(range(len(lengths)))),
        policy_versions=one_version(sequences, version),
    )


def answer_sums(sequences: Sequences) -> Tensor:
    """Minus the sum of each answer's tokens, in hundredths."""
    return -(sequences.tokens * sequences.response_mask).sum(1).float() / 100


class FakeLearner:
    """Log-probabilities of -1 and values of 0.5 everywhere; every update adds 1 to its weights.

    Args:
        events: where it notes what it is asked.
        name: how it calls itself there.
        fails_at: iteration whose update raises.
    """

    def __init__(self, events: Events, name: str = "policy", *, fails_at: int | None = None) -> None:
        self.events = events
        self.name = name
        self.fails_at = fails_at
        self.weights = 0
        self.batch: Any = None
        self.objective: Any = None

    def logprobs(self, sequences: Sequences, temperature: float | None = None) -> Tensor:
        self.events.append((f"{self.name} logprobs", temperature))
        return torch.where(sequences.response_mask, -1.0, 0.0)

    def reference_logprobs(self, sequences: Sequences, temperature: float | None = None) -> Tensor:
        self.events.append((f"{self.name} reference_logprobs", temperature))
        return torch.where(sequences.response_mask, -1.25, 0.0)

    def reference_answer_logprobs(self, sequences: Sequences) -> Tensor:
        self.events.append((f"{self.name} reference_answer_logprobs", len(sequences)))
        return answer_sums(sequences)

    def values(self, sequences: Sequences) -> Values:
        self.events.append((f"{self.name} values",))
        values = torch.where(sequences.response_mask, 0.5, 0.0)
        return Values(values, torch.arange(1.0, len(sequences) + 1))

    def update(self, batch: Any, objective: Any, *, epochs: int, mini_batches: int, iteration: int) -> dict[str, float]:
        if iteration == self.fails_at:
            raise RuntimeError(f"update {iteration}")
        self.events.append((f"{self.name} update", iteration, epochs, mini_batches))
        self.batch, self.objective = batch, objective
        self.weights += 1
        return {"loss": float(self.weights), "grad_norm": 2.0, "guard/skipped_steps": 1.0}

    def memory(self) -> float:
        return 1.5

    def evaluate_loss(self, sequences: Sequences) -> float:
        self.events.append((f"{self.name} evaluate_loss", len(sequences)))
        return 1.0 / (1 + self.weights)


class FakeReference:
    """Log-probabilities of -1.25; answers have those of `answer_sums`."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def logprobs(self, sequences: Sequences, temperature: float) -> Tensor:
        self.events.append(("reference logprobs", temperature))
        return torch.where(sequences.response_mask, -1.25, 0.0)

    def answer_logprobs(self, sequences: Sequences) -> Tensor:
        self.events.append(("reference", len(sequences)))
        return answer_sums(sequences)

    def memory(self) -> float:
        return 0.5


class FakeGenerator:
    """Two tokens for each sample, with log-probability -0.75, the last row first; `FakeSync` sets its version.

    A sample's last token is of the version at which it is given.
    """

    def __init__(self, events: Events) -> None:
        self.events = events
        self.version = -1
        self.sampling: schema.Sampling | None = None
        self.started: dict[int, tuple[list[int], Rollouts]] = {}

    def generate(self, prompts: Prompts, sampling: schema.Sampling, *, iteration: int) -> Rollouts:
        self.events.append(("generate", iteration, prompts.ids))
        self.sampling = sampling
        ids = [number for number in prompts.ids for _ in range(sampling.samples_per_prompt)]
        rollouts = make_rollouts([2] * len(ids), ids=ids, version=self.version)
        rollouts.generator_logprobs[rollouts.sequences.response_mask] = -0.75
        return rollouts

    def start(self, prompts: Prompts, sampling: schema.Sampling, *, iteration: int) -> None:
        rollouts = self.generate(prompts, sampling, iteration=iteration)
        self.started[iteration] = list(reversed(range(len(rollouts)))), rollouts

    def next_finished(self, iteration: int, count: int, part: int = 0) -> Finished:
        rows, rollouts = self.started[iteration]
        given, rows[:] = rows[:count], rows[count:]
        rollouts.policy_versions[given, -1] = self.version
        return Finished(torch.tensor(given), rollouts.select(given))

    def memory(self) -> float:
        return 2.5


class FakeScorer:
    """`first` for the first row, then one more for each row, plus 100 times the policy's version."""

    def __init__(self, first: float = 0.0) -> None:
        self.first = first

    def score(self, rollouts: Rollouts) -> Tensor:
        return self.first + torch.arange(float(len(rollouts))) + 100.0 * rollouts.oldest_versions()

    def memory(self) -> float:
        return 0.25

    def counts(self) -> dict[str, int]:
        return {"truncated": 3}


class FakeSync:
    """Gives the generator its version, and finds no fault with its samples."""

    def __init__(self, events: Events, generator: FakeGenerator) -> None:
        self.events = events
        self.generator = generator

    def sync(self, version: int, *, interrupted: str = "refuse") -> dict[str, float]:
        unfinished = sum(len(rows) for rows, _ in self.generator.started.values())
        assert not unfinished or interrupted != "refuse", f"{unfinished} responses are unfinished"
        self.events.append(("sync", version) if not unfinished else ("sync", version, interrupted, unfinished))
        self.generator.version = version
        return {"sync/bytes": 8.0}

    def check_rollouts(self, rollouts: Rollouts, logprobs: Tensor, *, version: int) -> dict[str, float]:
        found = int(rollouts.oldest_versions().min())
        self.events.append(("check rollouts", found, float(logprobs.min())))
        return {"generator/attested_share": float(found == version)}


class FakePrompts:
    """Batch i holds the prompts i * count, ...; all of them are 90, 91, 92."""

    def batch(self, iteration: int, count: int) -> Prompts:
        return self._prompts(range(iteration * count, (iteration + 1) * count))

    def all(self) -> Prompts:
        return self._prompts(range(90, 93))

    def _prompts(self, ids: range) -> Prompts:
        return Prompts([[1, 2]] * len(ids), [f"prompt {i}" for i in ids], [None] * len(ids), list(ids), [0] * len(ids))


class FakeParts:
    """Saves the weights of one learner and, where there are any, a KL controller's state and samples."""

    def __init__(self, learner: FakeLearner, kl: Any = None, samples: SampleStream | None = None) -> None:
        self.learner = learner
        self.kl = kl
        self.samples = samples

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()} if self.kl else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.kl:
            self.kl.load_state_dict(state["kl"])

    def save(self, folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps(self.learner.weights))
        if self.samples:
            self.samples.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.weights = json.loads((folder / "weights.json").read_text())
        if self.samples:
            self.samples.load(folder)

    def save_model(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"weights": self.learner.weights}))


def ppo_groups(
    events: Events,
    *,
    policy: FakeLearner | None = None,
    critic: FakeLearner | None = None,
    reference: bool = True,
    scores: Mapping[str, float] | None = None,
    recorder: Recorder | None = None,
) -> PpoGroups:
    """Groups of fakes; `scores` are the first scores of the scorers by name, one called `function` unless given."""
    learner = policy or FakeLearner(events)

    def group(worker: Any, role: str) -> Any:
        return LocalGroup(worker, role=role, recorder=recorder)

    of_policy = group(learner, "policy")
    return PpoGroups(
        policy=of_policy,
        critic=of_policy if critic is learner else group(critic, "critic") if critic else None,
        reference=group(FakeReference(events), "reference") if reference else None,
        generator=group(FakeGenerator(events), "generator"),
        rewards={
            name: group(FakeScorer(first), f"reward/{name}") for name, first in (scores or {"function": 0.0}).items()
        },
    )


def stage_run(folder: RunFolder, config: schema.Stage, *, total: int, recorder: Recorder | None = None) -> StageRun:
    """A run whose view writes into the void."""
    recorder = recorder or Recorder()
    unit = "iteration" if config.method == "ppo" else "step"
    view = PlainView(config.name, total, recorder, unit=unit, out=io.StringIO())  # type: ignore[arg-type]
    return StageRun(folder, config, total=total, seed=1, tracking=schema.Tracking(), recorder=recorder, view=view)


def no_wishes(run: StageRun, generator: Any) -> Scaling:
    """Scaling that nobody asks for, so that there is nowhere to place workers."""
    nowhere: Any = None
    return Scaling(run.folder, "ppo", generator, nowhere, message=run.message, done=run.iteration, total=run.total)
