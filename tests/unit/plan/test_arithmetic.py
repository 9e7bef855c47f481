"""The plan's batches and steps are those that the code of a run cuts, for random configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config import schema
from rlhf_ray.config.load import load_pipeline
from rlhf_ray.data.batches import PreferencePairs, Sequences, make_sequences
from rlhf_ray.data.streams import Stream
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.place import Place
from rlhf_ray.plan.arithmetic import StageArithmetic, arithmetic, known_rows
from rlhf_ray.trainers.collect import batch_of
from rlhf_ray.trainers.dpo import DpoGroups, References, train_dpo
from rlhf_ray.trainers.ppo import update
from rlhf_ray.trainers.reward_model import train_reward_model
from rlhf_ray.trainers.sampling import SampleStream
from rlhf_ray.trainers.sft import total_steps, train_sft
from rlhf_ray.workers.learner import Learner

REWARD: list[dict[str, Any]] = [{"kind": "function", "function": "rewards:length"}]


def stage_of(pipeline_settings: dict[str, Any]) -> Any:
    return schema.Pipeline(run_dir="r", stages=[pipeline_settings]).stages[0]


def counts(sizes: list[int]) -> dict[int, int]:
    return dict(Counter(sizes))


class RecordingLearner(Learner):
    """A learner whose optimizer steps only note the rows that they get."""

    def __init__(self, config: schema.Learner, *, rank: int = 0, layout: str = "packed") -> None:
        self.config, self.place, self.seed = config, Place("policy", rank, config.workers), 3
        self.engine: Any = SimpleNamespace(train=lambda mode: None, skipped_steps=0)
        self.device, self.layout = torch.device("cpu"), layout  # type: ignore[assignment]
        self.rows: list[int] = []

    def memory(self) -> float:
        return 0.0

    def _step(self, batch: Any, objective: Any, *, poison: bool) -> dict[str, float]:
        self.rows.append(len(batch))
        return {"grad_norm": 1.0, "learning_rate": 0.0}


learner_settings = st.fixed_dictionaries(
    {"model": st.just("m"), "workers": st.integers(1, 4), "micro_batch_tokens": st.integers(1, 200)},
    optional={"micro_batch_sequences": st.integers(1, 5)},
)


@st.composite
def ppo_stages(draw: st.DrawFn) -> schema.Ppo:
    prompts, each = draw(st.integers(4, 40)), draw(st.integers(1, 4))
    critic = draw(st.sampled_from([{}, {"warmup_iterations": 1}, {"kind": "value_head"}]))
    estimator = draw(st.sampled_from(["gae", "group_relative"] if each > 1 else ["gae"]))
    made: dict[str, Any] = {
        "method": "ppo",
        "iterations": draw(st.integers(1, 6)),
        "prompts_per_iteration": prompts,
        "epochs": draw(st.integers(1, 3)),
        "mini_batches": draw(st.integers(1, prompts * each)),
        "policy": draw(learner_settings),
        "generator": {"workers": draw(st.integers(1, 5))},
        "reward": REWARD,
        "data": {"train": "p", "max_prompt_tokens": draw(st.integers(1, 40))},
        "sampling": {"samples_per_prompt": each, "max_new_tokens": draw(st.integers(1, 40))},
        "advantages": {"estimator": estimator},
        "staleness": draw(st.integers(0, 1)),
        "interrupted": draw(st.sampled_from(["wait", "keep"])),
    }
    if estimator == "gae":
        made["critic"] = critic
    stage: schema.Ppo = stage_of(made)
    return stage


@settings(max_examples=50)
@given(stage=ppo_stages(), rows=st.integers(1, 200))
def test_ppo_is_what_the_learners_and_generators_cut(stage: schema.Ppo, rows: int) -> None:
    found = arithmetic(stage, rows, gpus=0.0)
    batch: Any = make_sequences([[1]] * found.samples, [[2]] * found.samples)
    critic = stage.critic_role
    learners = {"policy": RecordingLearner(stage.policy)}
    if critic and critic.kind == "network":
        learners["critic"] = RecordingLearner(critic)
    groups = {role: LocalGroup[Learner](learner, role=role) for role, learner in learners.items()}
    both = SimpleNamespace(policy=groups["policy"], critic=groups.get("critic"))
    for iteration in range(1, stage.iterations + 1):
        update(stage, both, batch, 0.1, iteration)  # type: ignore[arg-type]
    assert {role: each.steps for role, each in found.learners.items()} == {
        role: len(learner.rows) for role, learner in learners.items()
    }
    in_an_iteration = counts(learners["policy"].rows[: found.steps])
    if learners["policy"].rows:
        assert {size: stage.epochs * number for size, number in found.mini_batches.items()} == in_an_iteration
    for role, learner in learners.items():
        costs = [stage.data.max_prompt_tokens + stage.sampling.max_new_tokens] * max(found.mini_batches)
        assert passes(learner.config, costs) == found.learners[role].micro_batches

    group = SimpleNamespace(size=stage.generator.workers, split=lambda *a, **k: None)
    prompts = SimpleNamespace(batch=lambda number, count: range(count))
    stream: Any = SampleStream(stage, group, prompts)  # type: ignore[arg-type]
    assert found.chunks == counts([chunk.count for chunk in stream._start(1).left])
    assert sum(size * number for size, number in found.chunks.items()) == found.samples


def passes(config: schema.Learner, costs: list[int], *, together: int = 1, layout: str = "packed") -> int:
    """Forward passes of the worker that makes most of them over rows of so many tokens."""
    each = []
    for rank in range(config.workers):
        learner = RecordingLearner(config, rank=rank, layout=layout)
        own = torch.tensor(costs)[learner._share(torch.tensor(costs))]
        each.append(len(learner._micro_batches(own, together)))
    return max(each)


class Run:
    """The part of a stage's run that a loop asks for its steps."""

    def __init__(self, total: int) -> None:
        self.iteration, self.total = 0, total
        self.evaluating = nullcontext

    def remaining(self) -> Iterator[int]:
        while self.iteration < self.total:
            yield self.iteration + 1

    def evaluation_due(self, iteration: int, *, every: int) -> bool:
        return False

    def record(self, metrics: Any) -> None: ...

    def finish_iteration(self, metrics: Any) -> None:
        self.iteration += 1


class Drawn:
    """Data whose batches have the rows that a stream deals out."""

    def __init__(self, stream: Stream, make: Any) -> None:
        self.stream, self.make = stream, make

    def batch(self, step: int, size: int) -> Any:
        return self.make(len(self.stream.batch(step, size)))


def answers(rows: int) -> Sequences:
    return make_sequences([[1]] * rows, [[2]] * rows)


def pairs(rows: int) -> PreferencePairs:
    return PreferencePairs(answers(rows), answers(rows), list(range(rows)), torch.zeros(rows))


def trained(stage: Any, stream: Stream) -> list[int]:
    """Rows of each optimizer step that the stage's loop takes."""
    learner = RecordingLearner(stage.policy)
    policy, run = LocalGroup[Learner](learner, role="policy"), Run(total_steps(stage, stream))
    drawn: Any = Drawn(stream, answers if stage.method == "sft" else pairs)
    any_run: Any = run
    match stage:
        case schema.Sft():
            train_sft(stage, policy, drawn, None, any_run)
        case schema.RewardModel():
            train_reward_model(stage, policy, drawn, None, any_run)
        case _:
            groups = DpoGroups(policy, None, {})
            train_dpo(stage, groups, drawn, None, References(groups, None, needed=False), None, any_run)
    return learner.rows


@st.composite
def supervised_stages(draw: st.DrawFn) -> Any:
    method = draw(st.sampled_from(["sft", "reward_model", "dpo"]))
    length: dict[str, Any] = draw(
        st.sampled_from([{}, {"steps": draw(st.integers(1, 30))}, {"epochs": draw(st.integers(1, 12)) / 4}])
    )
    made: dict[str, Any] = {
        "method": method,
        "policy": draw(learner_settings),
        "data": {"train": "d", "max_length": 50},
    }
    return stage_of(made | length | {"batch_size": draw(st.integers(4, 40))})


@settings(max_examples=160)
@given(stage=supervised_stages(), rows=st.integers(1, 120))
def test_supervised_stages_and_dpo_are_what_their_loops_take(stage: Any, rows: int) -> None:
    found = arithmetic(stage, rows, gpus=0.0)
    taken = trained(stage, Stream(sizes=[rows], weights=[1.0], seed=7, shuffle=True))
    assert found.iterations == found.learners["policy"].steps == len(taken)
    full = len(taken) - sum(found.last_batches.values())
    assert {found.batch: full} | found.last_batches == counts(taken)
    assert found.passes == pytest.approx(sum(taken) / rows)


@settings(max_examples=50)
@given(
    rows=st.integers(1, 90),
    prompts=st.one_of(st.none(), st.integers(1, 200)),
    size=st.integers(1, 40),
)
def test_collect_is_what_is_sampled(rows: int, prompts: int | None, size: int) -> None:
    made = {"method": "collect", "policy": {"model": "m"}, "reward": REWARD, "data": {"train": "p"}}
    stage = stage_of(made | {"prompts": prompts, "prompts_per_batch": size})
    found = arithmetic(stage, rows, gpus=0.0)

    class Taken:
        """Prompts that give the numbers that are asked for."""

        def __len__(self) -> int:
            return rows

        def rows(self, start: int, count: int) -> range:
            return range(start, min(start + count, rows))

        def take(self, start: int, count: int) -> range:
            return range(start, start + count)

    assert found.iterations is not None
    taken: list[Any] = [batch_of(stage, Taken(), number + 1) for number in range(found.iterations)]  # type: ignore[arg-type]
    assert [place for batch in taken for place in batch] == list(range(prompts or rows))
    sizes = [len(batch) for batch in taken]
    assert min(sizes) > 0
    assert counts(sizes) == {found.batch: len(sizes) - sum(found.last_batches.values())} | found.last_batches


@settings(max_examples=50)
@given(
    stage=supervised_stages(),
    lengths=st.lists(st.integers(1, 50), min_size=4, max_size=40),
    layout=st.sampled_from(["packed", "padded"]),
)
def test_micro_batches_are_those_of_the_longest_rows(stage: Any, lengths: list[int], layout: str) -> None:
    found = arithmetic(stage, len(lengths), gpus=0.0).learners["policy"]
    together = 1 if stage.method == "sft" else 2
    assert found.row_tokens == 50 * together

    rows = min(stage.batch_size, len(lengths))
    assert passes(stage.policy, [50 * together] * rows, together=together, layout=layout) == found.micro_batches
    if stage.policy.workers == 1:
        costs = [length * together for length in lengths[:rows]]
        assert passes(stage.policy, costs, together=together, layout=layout) <= found.micro_batches


def test_by_hand() -> None:
    stage = stage_of(
        {
            "method": "ppo",
            "iterations": 5,
            "prompts_per_iteration": 10,
            "epochs": 2,
            "mini_batches": 3,
            "policy": {"model": "m", "workers": 2, "micro_batch_tokens": 250},
            "critic": {"warmup_iterations": 2},
            "generator": {"workers": 3},
            "reward": REWARD,
            "data": {"train": "p", "max_prompt_tokens": 60},
            "sampling": {"samples_per_prompt": 2, "max_new_tokens": 40},
        }
    )
    found = arithmetic(stage, 40, gpus=0.0)
    # 20 samples in steps of 7, 7 and 6; 7 rows of 100 tokens are 4 for one worker, and 2 of them fill 250 tokens.
    assert (found.samples, found.mini_batches, found.steps) == (20, {7: 2, 6: 1}, 6)
    assert (found.learners["policy"].steps, found.learners["critic"].steps) == (18, 30)
    assert found.learners["policy"].micro_batches == 2
    # Without a setting 2048 tokens on a CPU, 16384 on a GPU: all rows of the critic's worker at once.
    assert found.learners["critic"].micro_batches == 1
    assert found.passes == 1.25
    assert found.chunks == {8: 1, 6: 2}


def test_data_that_is_not_there_yet() -> None:
    made = {"method": "sft", "policy": {"model": "m"}, "data": {"train": "stage:best"}}
    stage = stage_of(made)
    assert known_rows(stage, {"train": 0}) is None
    found = arithmetic(stage, None, gpus=0.0)
    assert (found.iterations, found.passes, found.learners["policy"].steps) == (None, None, None)
    assert arithmetic(stage_of(made | {"steps": 7}), None, gpus=0.0).iterations == 7


def test_scores_may_leave_fewer_pairs() -> None:
    made = {"method": "dpo", "policy": {"model": "m"}, "data": {"train": "d"}, "reward": REWARD}
    assert known_rows(stage_of(made), {"train": 9}) == 9
    assert known_rows(stage_of(made | {"pairs": {"min_margin": 0.5}}), {"train": 9}) is None


@pytest.mark.parametrize("file", ["quickstart", "online_dpo", "grpo_gsm8k"])
def test_shipped_pipelines_have_a_plan(file: str) -> None:
    for stage in load_pipeline(f"pipelines/{file}.yaml").stages:
        found: StageArithmetic = arithmetic(stage, 100, gpus=8.0)
        assert found.iterations
