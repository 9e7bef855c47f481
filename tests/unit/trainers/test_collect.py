"""What is kept of samples, worked by hand; and the loop on workers in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.data.arrow import open_table
from rlhf_ray.data.batches import Prompts, Rollouts, make_sequences, one_version
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.distributed.tracing import Recorder
from rlhf_ray.errors import CheckpointError, DataError
from rlhf_ray.trainers.collect import (
    CollectGroups,
    Origin,
    Selection,
    Tally,
    batch_of,
    batches,
    choose,
    collect,
    summary,
)
from rlhf_ray.trainers.metric_rows import read_metrics
from rlhf_ray.trainers.run import RunFolder
from rlhf_ray.workers.generator import sample_seeds
from tests.unit.data.tokenizers_for_tests import byte_tokenizer
from tests.unit.trainers.fake_workers import stage_run


def settings(**changes: Any) -> schema.Collect:
    values: dict[str, Any] = {
        "method": "collect",
        "policy": {"model": "org/base"},
        "reward": [{"kind": "function", "function": "a:b"}],
        "data": {"train": "x.jsonl"},
        "sampling": {"samples_per_prompt": 4},
        "prompts_per_batch": 2,
    }
    return schema.Collect.model_validate(values | changes)


def rollouts(texts: Sequence[str], *, unfinished: Sequence[int] = (), samples: int = 4) -> Rollouts:
    """Each text a sample, as many to a prompt as `samples`."""
    sequences = make_sequences([[9]] * len(texts), [list(text.encode()) or [1] for text in texts])
    prompts = [row // samples for row in range(len(texts))]
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.tensor([row not in unfinished for row in range(len(texts))]),
        prompts=[f"prompt {prompt}" for prompt in prompts],
        responses=list(texts),
        answers=[None] * len(texts),
        prompt_ids=torch.tensor(prompts),
        policy_versions=one_version(sequences, 0),
    )


def chosen(texts: Sequence[str], scores: Sequence[float], *, cut: Sequence[int] = (), **changes: Any) -> Selection:
    config = settings(**changes)
    samples = config.sampling.samples_per_prompt
    found = rollouts(texts, unfinished=cut, samples=samples)
    return choose(config, found, torch.tensor(scores), seeds=list(range(len(texts) // samples)))


def dropped(found: Selection) -> dict[str, int]:
    return {name.removeprefix("dropped_"): count for name, count in found.dropped.items() if count}


def test_the_best_and_the_worst_of_each_prompt() -> None:
    found = chosen("abcdefgh", [2.0, 1.0, 4.0, 3.0, 0.5, 0.5, 0.5, 0.0])
    # Of the three that share the highest score the first is taken.
    assert found.pairs == [(2, 1), (4, 7)]
    assert dropped(found) == {}
    assert found.metrics(torch.tensor([2.0, 1.0, 4.0, 3.0, 0.5, 0.5, 0.5, 0.0])) == {"collect/margin_mean": 1.75}


def test_pairs_by_threshold() -> None:
    scores = [2.0, 1.0, 4.0, 3.0]
    # Differences of 2 and more: 4-1, then 4-2 and 3-1.
    assert chosen("abcd", scores, keep="threshold", min_margin=2.0).pairs == [(2, 1), (2, 0), (3, 1)]
    assert chosen("abcd", scores, keep="threshold", min_margin=2.0, max_pairs=2).pairs == [(2, 1), (2, 0)]
    assert len(chosen("abcd", scores, keep="threshold", max_pairs=9).pairs) == 6


def test_why_responses_and_prompts_are_left_out() -> None:
    texts = ["a", " a ", "b", "c", "", "  ", "x", "y", "p", "q", "r", "s", "k", "l", "m", "n"]
    scores = [1.0, 9.0, 1.5, 9.0, 9.0, 9.0, 9.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.3]
    found = chosen(texts, scores, cut=[3, 6], min_margin=0.4)
    assert found.pairs == [(2, 0)]
    assert dropped(found) == {"unfinished": 2, "empty": 2, "equal": 1, "too_few": 1, "tied": 1, "margin": 1}


def test_unfinished_responses_can_be_kept() -> None:
    assert chosen("abcd", [1.0, 2.0, 3.0, 4.0], cut=[3]).pairs == [(2, 0)]
    assert chosen("abcd", [1.0, 2.0, 3.0, 4.0], cut=[3], unfinished="keep").pairs == [(3, 0)]


def test_the_best_of_n() -> None:
    texts = ["a", "b", "b", "c", "", "", "", "", "", "d", "e", "f"]
    scores = [1.0, 3.0, 3.0, 2.0] + [0.0] * 4 + [9.0, 1.0, 2.0, 0.0]
    found = chosen(texts, scores, keep="best_of_n")
    assert (found.rows, found.extra) == ([1, 10], {})
    assert dropped(found) == {"empty": 5, "too_few": 1}


def test_the_resample_has_its_weights() -> None:
    # Weights 1, 3, 0, 0 of 4 for the first prompt (the others' scores are far below); equal ones for the second.
    scores = [0.0, 2 * 1.0986122886681098, -200.0, -200.0, 1.0, 1.0, 1.0, 1.0]
    found = chosen(["a", "a", "b", "c", *"defg"], scores, keep="resample", beta=2.0, draws=400)
    assert found.effective == pytest.approx([16 / 10, 4.0])
    assert set(found.rows[:400]) == {0, 1}
    assert 0.65 < found.rows[:400].count(1) / 400 < 0.85
    assert set(found.rows[400:]) == {4, 5, 6, 7}
    assert found.extra["weight"] == pytest.approx([0.75 if row == 1 else 0.25 for row in found.rows])
    assert found.extra["ess"] == pytest.approx([1.6] * 400 + [4.0] * 400)
    assert found.metrics(torch.tensor(scores))["collect/effective_samples"] == pytest.approx(2.8)
    again = chosen(["a", "a", "b", "c", *"defg"], scores, keep="resample", beta=2.0, draws=400)
    assert again == found


def test_each_prompt_has_draws_of_its_own() -> None:
    found = chosen(["a", "b", "c", "d"] * 20, [0.0] * 80, keep="resample")
    assert len({row % 4 for row in found.rows}) == 4


def test_what_was_kept_in_words() -> None:
    counts = {f"dropped_{why}": 0 for why in ("unfinished", "empty", "equal", "too_few", "tied", "margin")}
    counts |= {"samples": 40, "kept": 6, "responses": 12, "changed": 0}
    assert summary(settings(), counts) == "kept 6 pairs of 40 responses"
    counts |= {"dropped_unfinished": 3, "dropped_equal": 1, "dropped_tied": 2, "changed": 5}
    assert summary(settings(), counts) == (
        "kept 6 pairs of 40 responses; dropped responses: 3 cut by the length limit, 1 equal to another one of the "
        "prompt; dropped prompts: 2 whose responses all score the same; 5 of 12 texts are not encoded to the tokens "
        "sampled"
    )


class Engine:
    """Responses of letters, as many as the sample's seed says; it notes the iterations."""

    def __init__(self, tokenizer: Any, seed: int, fails_at: int | None) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.fails_at = fails_at
        self.iterations: list[int] = []

    def generate(self, prompts: Prompts, sampling: schema.Sampling, *, iteration: int) -> Rollouts:
        self.iterations.append(iteration)
        if iteration == self.fails_at:
            raise RuntimeError(f"generate {iteration}")
        number = sampling.samples_per_prompt
        seeds = sample_seeds(self.seed, prompts, number, iteration=iteration)
        texts = ["".join("abcdefg"[(seed >> 3 * place) % 7] for place in range(1 + seed % 5)) for seed in seeds]
        heads = [ids for ids in prompts.token_ids for _ in range(number)]
        eos = self.tokenizer.eos_token_id
        sequences = make_sequences(heads, [[*self.tokenizer(text)["input_ids"], eos] for text in texts])
        return Rollouts(
            sequences=sequences,
            generator_logprobs=torch.zeros(sequences.tokens.shape),
            finished=torch.ones(len(texts), dtype=torch.bool),
            prompts=[text for text in prompts.texts for _ in range(number)],
            responses=texts,
            answers=[None] * len(texts),
            prompt_ids=torch.tensor([i for i in prompts.ids for _ in range(number)]),
            policy_versions=one_version(sequences, 0),
        )

    def memory(self) -> float:
        return 2.0


class Judge:
    """Letters of a response that are `a`, or one number for all."""

    def __init__(self, constant: float | None) -> None:
        self.constant = constant

    def score(self, found: Rollouts) -> Tensor:
        values = [text.count("a") if self.constant is None else self.constant for text in found.responses]
        return torch.tensor([float(value) for value in values])

    def memory(self) -> float:
        return 1.0

    def counts(self) -> dict[str, int]:
        return {"truncated": 2}


class Stage:
    """A collect stage on fakes; every session is a process's worth of it."""

    def __init__(self, folder: Path, *, constant: float | None = None, **changes: Any) -> None:
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(7)))
        self.config = settings(data={"train": str(file)}, **changes)
        self.run_dir = folder / "run"
        self.constant = constant
        self.tokenizer = byte_tokenizer()
        self.prompts = load_prompts(self.config.data, self.tokenizer, seed=5, sources="train")
        self.tally = Tally()

    @property
    def data(self) -> Path:
        return self.run_dir / "collect" / "data"

    def session(self, *, fails_at: int | None = None, seed: int = 5) -> list[int]:
        """Runs to the end, or to the failure; the iterations that were sampled."""
        engine = Engine(self.tokenizer, seed, fails_at)
        recorder = Recorder()

        def group(worker: Any, role: str) -> Any:
            return LocalGroup(worker, role=role, recorder=recorder)

        groups = CollectGroups(group(engine, "generator"), {"function": group(Judge(self.constant), "reward/function")})
        origin = Origin(Encoder.of(self.tokenizer), seed=seed, policy="org/base", policy_version=3)
        resume = self.run_dir.exists()
        self.tally = Tally()
        total = batches(self.config, self.prompts)
        with RunFolder.open(self.run_dir) if resume else RunFolder.create(self.run_dir, {"config.yaml": ""}) as folder:
            with stage_run(folder, self.config, total=total, recorder=recorder) as run:
                run.start_or_resume(self.tally)
                if fails_at is not None:
                    with pytest.raises(RuntimeError, match=f"generate {fails_at}"):
                        collect(self.config, groups, self.prompts, origin, self.tally, run)
                else:
                    collect(self.config, groups, self.prompts, origin, self.tally, run)
                    run.finish()
        return engine.iterations

    def rows(self) -> list[dict[str, Any]]:
        return [row for part in sorted(self.data.iterdir()) for row in pq.read_table(part).to_pylist()]


def test_a_whole_stage_writes_a_part_for_each_batch(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert stage.session() == [1, 2, 3, 4]
    assert [path.name for path in sorted(stage.data.iterdir())] == [f"part_{n:06}.parquet" for n in range(1, 5)]
    rows = stage.rows()
    assert [row["prompt_id"] for row in rows] == sorted({row["prompt_id"] for row in rows})
    assert {row["policy"] for row in rows} == {"org/base"}
    assert {row["policy_version"] for row in rows} == {3}
    for row in rows:
        assert row["chosen"].count("a") == row["chosen_score"] == row["chosen_score_function"]
        assert row["margin"] == row["chosen_score"] - row["rejected_score"] > 0
        assert row["prompt"] == f"prompt {row['prompt_id']}"
        journal = pq.read_table(stage.run_dir / f"collect/rollouts/iteration_{row['iteration']:06}.parquet").to_pylist()
        own = [sample for sample in journal if sample["prompt_id"] == row["prompt_id"]]
        assert [sample["score"] for sample in own].count(row["chosen_score"]) >= 1
        assert max(sample["score"] for sample in own) == row["chosen_score"]
        assert min(sample["score"] for sample in own) == row["rejected_score"]
    metrics = read_metrics(stage.run_dir)
    assert [row["iteration"] for row in metrics] == [1, 2, 3, 4]
    assert sum(row["collect/kept"] for row in metrics) == len(rows)
    assert [row["collect/samples"] for row in metrics] == [8, 8, 8, 4]
    assert metrics[0]["generator/peak_memory_gib"] == 2.0
    assert metrics[0]["reward/function_truncated"] == 2.0
    assert "generator/policy_version_lag" not in metrics[0]
    done = json.loads((stage.run_dir / "collect/done.json").read_text())
    assert (done["output"], done["iteration"]) == ("data", 4)
    assert not (stage.run_dir / "collect/model").exists()


def test_the_seed_of_a_row_is_that_of_its_sample(tmp_path: Path) -> None:
    stage = Stage(tmp_path, keep="best_of_n")
    stage.session()
    for row in stage.rows():
        batch = batch_of(stage.config, stage.prompts, row["iteration"])
        seeds = sample_seeds(5, batch, 4, iteration=row["iteration"])
        own = seeds[4 * batch.ids.index(row["prompt_id"]) :][:4]
        assert row["seed"] in own
        assert row["response"] == "".join("abcdefg"[(row["seed"] >> 3 * n) % 7] for n in range(1 + row["seed"] % 5))


def test_draws_depend_on_the_batch(tmp_path: Path) -> None:
    stage = Stage(tmp_path, constant=0.0, keep="resample", prompts=70, prompts_per_batch=7)
    stage.session()
    places = []
    for row in stage.rows():
        batch = batch_of(stage.config, stage.prompts, row["iteration"])
        seeds = sample_seeds(5, batch, 4, iteration=row["iteration"])
        places.append((row["prompt_id"], seeds[4 * batch.ids.index(row["prompt_id"]) :][:4].index(row["seed"])))
    assert all(len({place for prompt, place in places if prompt == number}) > 1 for number in range(7))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("keep", ["best_worst", "resample"])
def test_a_stopped_stage_goes_on_to_the_same_rows(tmp_path: Path, every: int, keep: str) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = Stage(tmp_path / "whole", keep=keep, checkpoints={"every": every})
    whole.session()
    stopped = Stage(tmp_path / "stopped", keep=keep, checkpoints={"every": every})
    assert stopped.session(fails_at=3) == [1, 2, 3]
    assert stopped.session() == ([3, 4] if every == 1 else [1, 2, 3, 4])
    assert stopped.rows() == whole.rows()
    assert stopped.tally == whole.tally
    assert stopped.tally.counts["samples"] == 28


def test_parts_of_a_course_that_was_given_up_are_removed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.session(fails_at=3)
    (stage.data / "part_000009.parquet").write_bytes(b"")
    stage.session()
    assert len(list(stage.data.iterdir())) == 4


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.session(fails_at=3)
    (stage.data / "part_000002.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"part_000002.parquet is gone; remove .*collect to collect anew"):
        stage.session()


def test_data_that_are_gone_are_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.session()
    (stage.data / "part_000004.parquet").unlink()
    with (
        RunFolder.open(stage.run_dir) as folder,
        pytest.raises(CheckpointError, match=r"data of stage collect are gone, wanted 4 parts; remove .*collect"),
    ):
        folder.result("collect")


def test_nothing_kept_says_why_and_what_to_change(tmp_path: Path) -> None:
    stage = Stage(tmp_path, constant=1.0)
    with pytest.raises(
        DataError, match=r"no pairs to write: kept 0 pairs of 28 .* 7 whose responses all score"
    ) as error:
        stage.session()
    assert "take a reward that tells them apart" in str(error.value)
    assert str(stage.run_dir / "collect") in str(error.value)
    assert not (stage.run_dir / "collect/done.json").exists()


def test_a_batch_of_which_nothing_is_kept_leaves_an_empty_part(tmp_path: Path) -> None:
    stage = Stage(tmp_path, min_margin=2.0)
    stage.session()
    counts = [pq.read_metadata(part).num_rows for part in sorted(stage.data.iterdir())]
    assert 0 in counts
    assert sum(counts) > 0
    table = open_table(schema.Source(path=str(stage.data)))
    assert len(list(table.rows(["prompt", "chosen", "rejected"]))) == sum(counts)


def test_batches_are_the_whole_data_once_or_so_many_of_the_stream(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert batches(stage.config, stage.prompts) == 4
    assert [batch_of(stage.config, stage.prompts, number).ids for number in (1, 4)] == [[0, 1], [6]]
    some = settings(prompts=5)
    assert batches(some, stage.prompts) == 3
    drawn = [i for number in (1, 2, 3) for i in batch_of(some, stage.prompts, number).ids]
    assert len(drawn) == len(set(drawn)) == 5
    assert drawn != sorted(drawn)
    many = settings(prompts=9)
    assert sum(len(batch_of(many, stage.prompts, number)) for number in range(1, 6)) == 9
