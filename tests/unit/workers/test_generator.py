"""The generator's bookkeeping, with the transformers engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.transports import TransportSpec
from rlhf_ray.engines.generation import Sample
from rlhf_ray.errors import ConfigError, WeightSyncError
from rlhf_ray.workers.generator import Generator, probe_prompts
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", layers=1)


def make_generator(model: str, rank: int = 0, seed: int = 1) -> Generator:
    return Generator(
        Place("generator", rank, 2),
        config=schema.Generator(engine="hf"),
        model=model,
        revision=None,
        tokenizer=model,
        max_model_len=40,
        seed=seed,
    )


def make_prompts() -> Prompts:
    return Prompts(
        token_ids=[[1, 50, 60, 70], [1, 80], [1, 90, 91]],
        texts=["first", "second", "third"],
        answers=["a", None, 3],
        ids=[7, 3, 12],
        repeats=[0, 0, 0],
    )


SAMPLING = schema.Sampling(max_new_tokens=6, samples_per_prompt=2)


def responses(rollouts: Rollouts) -> list[list[int]]:
    masks = rollouts.sequences.response_mask
    return [rollouts.sequences.tokens[row][mask].tolist() for row, mask in enumerate(masks)]


def test_siblings_are_adjacent_and_belong_to_their_prompt(llama: str) -> None:
    found = make_generator(llama).generate(make_prompts(), SAMPLING, iteration=4)
    assert found.prompts == ["first", "first", "second", "second", "third", "third"]
    assert found.answers == ["a", "a", None, None, 3, 3]
    assert found.prompt_ids.tolist() == [7, 7, 3, 3, 12, 12]
    assert not found.policy_versions.any()
    assert [row[:2] for row in found.sequences.tokens.tolist()] == [
        [1, 50],
        [1, 50],
        [1, 80],
        [1, 80],
        [1, 90],
        [1, 90],
    ]
    assert found.sequences.response_mask.sum(1).max() <= 6
    assert torch.equal(found.generator_logprobs != 0, found.sequences.response_mask)
    assert found.finished.dtype == torch.bool


def test_samples_depend_on_run_iteration_prompt_and_number_alone(llama: str) -> None:
    prompts = make_prompts()
    whole = responses(make_generator(llama).generate(prompts, SAMPLING, iteration=4))
    other_rank = make_generator(llama, rank=1)
    assert responses(other_rank.generate(prompts.select([2, 0]), SAMPLING, iteration=4)) == whole[4:] + whole[:2]
    assert len({tuple(row) for row in whole}) == 6
    assert responses(other_rank.generate(prompts, SAMPLING, iteration=5)) != whole
    assert responses(make_generator(llama, seed=2).generate(prompts, SAMPLING, iteration=4)) != whole


def test_a_prompt_that_comes_twice_gets_other_samples(llama: str) -> None:
    once = make_prompts().select([0])
    twice = Prompts.concat([once, replace(once, repeats=[1])])
    rows = responses(make_generator(llama).generate(twice, SAMPLING, iteration=4))
    assert rows[:2] == responses(make_generator(llama).generate(once, SAMPLING, iteration=4))
    assert len({tuple(row) for row in rows}) == 4


def test_finished_responses_come_in_parts_while_others_of_two_iterations_are_generated(llama: str) -> None:
    prompts, generator = make_prompts(), make_generator(llama)
    generator.start(prompts, SAMPLING, iteration=4)
    generator.start(prompts.select([1]), SAMPLING, iteration=5)
    fourth = [generator.next_finished(4, 4)]
    between = generator.generate(prompts, SAMPLING, iteration=6)
    fifth = generator.next_finished(5, 9)
    generator.probe()
    fourth.append(generator.next_finished(4, 4))
    # The transformers engine ends one response a step, the first row first.
    assert [part.rows.tolist() for part in fourth] == [[0, 1, 2, 3], [4, 5]]
    assert fifth.rows.tolist() == [0, 1]
    for iteration, rollouts in ((4, Rollouts.concat([part.rollouts for part in fourth])), (6, between)):
        whole = make_generator(llama).generate(prompts, SAMPLING, iteration=iteration)
        assert responses(rollouts) == responses(whole)
        assert (rollouts.prompts, rollouts.responses, rollouts.answers) == (
            whole.prompts,
            whole.responses,
            whole.answers,
        )
        assert torch.equal(rollouts.prompt_ids, whole.prompt_ids)
    assert responses(fifth.rollouts) == responses(
        make_generator(llama).generate(prompts.select([1]), SAMPLING, iteration=5)
    )
    with pytest.raises(AssertionError, match="iteration 4 was not started, or is over"):
        generator.next_finished(4, 1)


class SteppedEngine:
    """Ends the numbers that it is told, a list for each step."""

    cache_block, vocab_size, max_model_len = 0, 300, 40

    def __init__(self, steps: list[list[int]]) -> None:
        self.steps = steps
        self.taken = 0

    def start(self, prompts: list[list[int]], sampling: schema.Sampling, *, seeds: list[int]) -> list[int]:
        return list(range(len(prompts)))

    def step(self) -> list[tuple[int, Sample]]:
        self.taken += 1
        return [(number, Sample([number], [-1.0], True, "", [0])) for number in self.steps.pop(0)]


def test_parts_are_of_the_order_of_ending_and_no_step_is_taken_too_many(llama: str) -> None:
    generator = make_generator(llama)
    engine = SteppedEngine([[], [4], [1, 2, 5], [], [0, 3]])
    generator.engine = engine  # type: ignore[assignment]
    generator.start(make_prompts(), SAMPLING, iteration=1)
    parts = []
    for count, steps in ((2, 3), (1, 3), (1, 3), (5, 5)):
        parts.append(generator.next_finished(1, count))
        assert engine.taken == steps
    assert [part.rows.tolist() for part in parts] == [[4, 1], [2], [5], [0, 3]]
    assert [row for part in parts for [row] in responses(part.rollouts)] == [4, 1, 2, 5, 0, 3]


def test_what_has_not_ended_is_told_without_a_step_and_can_be_taken_over(llama: str) -> None:
    leaving, engine = make_generator(llama), SteppedEngine([[], [4], [1, 2, 5]])
    leaving.engine = engine  # type: ignore[assignment]
    leaving.start(make_prompts(), SAMPLING, iteration=1)
    leaving.next_finished(1, 2)
    assert leaving.unfinished(1) == [0, 3]
    assert leaving.next_finished(1, 2).rows.tolist() == [2, 5]
    assert engine.taken == 3

    other, whole = make_generator(llama, rank=1), make_generator(llama).generate(make_prompts(), SAMPLING, iteration=1)
    other.start(make_prompts(), SAMPLING, iteration=1)
    other.start(make_prompts(), SAMPLING, iteration=1, part=1, rows=[0, 3])
    taken_over = other.next_finished(1, 2, part=1)
    assert taken_over.rows.tolist() == [0, 3]
    assert responses(taken_over.rollouts) == [responses(whole)[row] for row in (0, 3)]
    assert responses(other.next_finished(1, 9).rollouts) == responses(whole)


def test_weights_are_refused_while_responses_are_generated(llama: str) -> None:
    generator = make_generator(llama)
    generator.start(make_prompts(), SAMPLING, iteration=1)
    generator.next_finished(1, 2)
    spec = TransportSpec(kind="gloo", address="", port=0, receivers=1, timeout_s=2)
    with pytest.raises(WeightSyncError, match=r"version 1 arrives while 4 responses are being generated; .*'keep'"):
        generator.receive_weights(spec, 1)


def test_nothing_is_asked_of_a_generator_that_sleeps(llama: str) -> None:
    generator = make_generator(llama)
    generator.start(make_prompts(), SAMPLING, iteration=1)
    with pytest.raises(AssertionError, match="6 responses are being generated, so the generator cannot sleep"):
        generator.sleep(keep_weights=True)
    generator.next_finished(1, 6)
    generator.sleep(keep_weights=True)
    # A second call gives up nothing that the first one kept.
    generator.sleep(keep_weights=False)
    generator.fill_cache()
    spec = TransportSpec(kind="gloo", address="", port=0, receivers=1, timeout_s=2)
    asked: list[Callable[[], object]] = [
        lambda: generator.generate(make_prompts(), SAMPLING, iteration=2),
        lambda: generator.start(make_prompts(), SAMPLING, iteration=2),
        lambda: generator.receive_weights(spec, 1),
        generator.probe,
    ]
    for ask in asked:
        with pytest.raises(AssertionError, match="`wake` comes first"):
            ask()
    generator.wake(weights_only=True)
    with pytest.raises(AssertionError, match="the generator sleeps \(cache\)"):
        generator.probe()
    generator.wake()
    generator.probe()


def test_a_prompt_that_is_too_long_is_named(llama: str) -> None:
    prompts = Prompts(token_ids=[[1], [1] * 35], texts=["", ""], answers=[None, None], ids=[0, 9], repeats=[0, 0])
    with pytest.raises(
        ConfigError, match=r"prompt 9 has 35 tokens; wanted 1 to 34, because the engine was made for 40"
    ):
        make_generator(llama).generate(prompts, SAMPLING, iteration=1)


def test_the_probe_is_longer_than_two_blocks_and_fixed() -> None:
    prompts = probe_prompts(300, block=32, max_model_len=200)
    assert [len(prompt) for prompt in prompts] == [80] * 4
    assert prompts == probe_prompts(300, block=32, max_model_len=200)
    assert max(max(prompt) for prompt in prompts) < 300
    assert len(probe_prompts(300, block=32, max_model_len=20)[0]) == 19


def test_probe_gives_the_prompts_tokens_and_the_likeliest_next_one(llama: str) -> None:
    generator = make_generator(llama)
    probe = generator.probe()
    assert probe.sequences.tokens.shape == (4, 40)
    assert torch.equal(probe.sequences.response_mask, torch.arange(40).expand(4, 40) > 0)
    again = torch.tensor(generator.engine.prompt_logprobs(probe.sequences.tokens.tolist()))
    assert torch.allclose(probe.logprobs, again, atol=1e-5)
