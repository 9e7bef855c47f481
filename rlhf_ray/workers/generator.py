"""The worker that samples responses and holds a copy of the policy's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Batch, Prompts, Rollouts, Sequences, make_sequences
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.distributed.faults import fault
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.transports import Endpoint, ReceivedWeights, TransportSpec, this_endpoint
from rlhf_ray.engines.beam_search import Beam, beam_search
from rlhf_ray.engines.generation import EnginePart, GenerationEngine, Sample
from rlhf_ray.engines.hf_generation import HfEngine
from rlhf_ray.engines.vllm_generation import VllmEngine
from rlhf_ray.errors import ConfigError, WeightSyncError
from rlhf_ray.models.loading import load_eos_token_ids, load_tokenizer
from rlhf_ray.shapes import SequenceInt, TokenFloat

_PROBE_ROWS = 4
_GREEDY = schema.Sampling(temperature=0.0, max_new_tokens=1)


Interrupted = Literal["keep", "abandon", "refuse"]


@dataclass(frozen=True)
class Finished(Batch):
    """Responses that have ended while others of their iteration may still be generated.

    Args:
        rows: [C] places in the iteration's batch, in which siblings are adjacent.
        rollouts: the responses, in the same order.
    """

    rows: SequenceInt
    rollouts: Rollouts


@dataclass(frozen=True)
class _Started:
    """What was started for an iteration.

    Args:
        prompts: one for each response.
        rows: the place of each response that was not given yet, by its number in the engine.
    """

    prompts: Prompts
    rows: dict[int, int]


@dataclass(frozen=True)
class ProbeResult(Batch):
    """The fixed probe batch and what a generator makes of it.

    Args:
        sequences: random tokens, then the generator's most likely next one; all but the first are in response_mask.
        logprobs: [B, T] the generator's log-probability of each token at temperature 1; 0 at the first.
        version: of the weights that the generator holds.
    """

    sequences: Sequences
    logprobs: TokenFloat
    version: int


class Generator:
    """One worker of the role `generator`.

    Args:
        place: role, rank and number of workers.
        config: the generator's section of the pipeline file.
        model: directory or hub name of the model whose weights it starts with.
        revision: revision of a hub model.
        tokenizer: directory or hub name of the tokenizer.
        max_model_len: most tokens of a prompt and its response together.
        seed: the run's seed.
        lora: the policy's adapter, where it is synced alone; its engine holds the frozen rest.

    Raises:
        ConfigError: the engine cannot run this model or adapter, or the model's sequences are shorter than
            max_model_len.
    """

    def __init__(
        self,
        place: Place,
        *,
        config: schema.Generator,
        model: str,
        revision: str | None,
        tokenizer: str,
        max_model_len: int,
        seed: int,
        lora: schema.Lora | None = None,
    ) -> None:
        self.place = place
        self.seed = seed
        self._tokenizer = load_tokenizer(tokenizer)
        self._ends = load_eos_token_ids(model, revision, self._tokenizer)
        self.version = 0
        # By iteration and part of it.
        self._started: dict[tuple[int, int], _Started] = {}
        # Ended and not given yet, by the engine's numbers, in the order of ending.
        self._ended: dict[int, Sample] = {}
        engine = VllmEngine if config.engine == "vllm" else HfEngine
        self.engine: GenerationEngine = engine(
            config=config, model=model, revision=revision, tokenizer=tokenizer, max_model_len=max_model_len, lora=lora
        )
        self._adapter = lora is not None
        self._asleep: list[EnginePart] = []
        # Its weights were given up: what the engine computes before the next transfer means nothing.
        self._without_weights = False
        self._probe_prompts = probe_prompts(
            self.engine.vocab_size, block=self.engine.cache_block, max_model_len=self.engine.max_model_len
        )

    def generate(self, prompts: Prompts, sampling: schema.Sampling, *, iteration: int) -> Rollouts:
        """Responses to the prompts, in order, `samples_per_prompt` adjacent ones for each.

        The tokens depend on (run seed, iteration, prompt id, sample index), prompt, sampling and weights, not on the
        other prompts nor on which worker samples.

        Raises:
            ConfigError: a prompt is longer than the engine was made for.
        """
        fault("generate", role=self.place.role, rank=self.place.rank, iteration=iteration)
        each, seeds = self._requests(prompts, sampling, iteration)
        return self._rollouts(each, self.engine.generate(each.token_ids, sampling, seeds=seeds))

    def start(
        self,
        prompts: Prompts,
        sampling: schema.Sampling,
        *,
        iteration: int,
        part: int = 0,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Queues the same responses; `next_finished` generates them, beside those of other iterations.

        Args:
            prompts: what is sampled from.
            sampling: how.
            iteration: whose seeds the responses have.
            part: tells apart what one generator is given of an iteration at several times.
            rows: the places of those that are wanted among all responses to the prompts; None: all of them.

        Raises:
            ConfigError: a prompt is longer than the engine was made for.
        """
        fault("generate", role=self.place.role, rank=self.place.rank, iteration=iteration)
        assert (iteration, part) not in self._started, f"part {part} of iteration {iteration} is being generated"
        each, seeds = self._requests(prompts, sampling, iteration)
        wanted = list(range(len(seeds)) if rows is None else rows)
        numbers = self.engine.start(
            [each.token_ids[row] for row in wanted], sampling, seeds=[seeds[row] for row in wanted]
        )
        self._started[iteration, part] = _Started(each, dict(zip(numbers, wanted, strict=True)))

    def next_finished(self, iteration: int, count: int, part: int = 0) -> Finished:
        """The next `count` responses of the iteration in the order of ending, by row where several end in one step.

        All that are left where these are fewer; the part of the iteration is over when the last is given.
        """
        self._check_awake()
        started = self._under_way(iteration, part)
        wanted = min(count, len(started.rows))
        while len(ended := [number for number in self._ended if number in started.rows]) < wanted:
            self._ended.update(self.engine.step())
        numbers = ended[:wanted]
        rows = [started.rows.pop(number) for number in numbers]
        if not started.rows:
            del self._started[iteration, part]
        samples = [self._ended.pop(number) for number in numbers]
        return Finished(torch.tensor(rows, dtype=torch.long), self._rollouts(started.prompts.select(rows), samples))

    def unfinished(self, iteration: int, part: int = 0) -> list[int]:
        """The places of the responses that have not ended; no step is taken for it."""
        return [row for number, row in self._under_way(iteration, part).rows.items() if number not in self._ended]

    def _under_way(self, iteration: int, part: int) -> _Started:
        assert (iteration, part) in self._started, f"iteration {iteration} was not started, or is over"
        return self._started[iteration, part]

    def _requests(self, prompts: Prompts, sampling: schema.Sampling, iteration: int) -> tuple[Prompts, list[int]]:
        """Each response's prompt and seed."""
        self._check_awake()
        self._check_lengths(prompts, sampling.max_new_tokens)
        samples = sampling.samples_per_prompt
        each = prompts.select([row for row in range(len(prompts.ids)) for _ in range(samples)])
        return each, sample_seeds(self.seed, prompts, samples, iteration=iteration)

    def beam_search(
        self, prompts: Prompts, *, beams: int, samples_per_prompt: int, max_new_tokens: int, length_penalty: float
    ) -> Rollouts:
        """The best responses that beam search finds, `samples_per_prompt` adjacent ones for each prompt, best first.

        Args:
            beams: how many responses are followed at once, at least `samples_per_prompt`.
            max_new_tokens: longest response.
            length_penalty: a response's log-probability is divided by its length to this power.

        Raises:
            ConfigError: a prompt is longer than the engine was made for.
        """
        self._check_awake()
        self._check_lengths(prompts, max_new_tokens)
        found = beam_search(
            self.engine.next_tokens,
            prompts.token_ids,
            beams=beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            ends=self._ends,
        )
        samples = [
            self._sample(prompt, beam)
            for prompt, best in zip(prompts.token_ids, found, strict=True)
            for beam in best[:samples_per_prompt]
        ]
        return self._rollouts(
            prompts.select([row for row in range(len(prompts)) for _ in range(samples_per_prompt)]), samples
        )

    def _sample(self, prompt: list[int], beam: Beam) -> Sample:
        before = self._tokenizer.decode(prompt, skip_special_tokens=True)
        whole = self._tokenizer.decode([*prompt, *beam.token_ids], skip_special_tokens=True)
        return Sample(
            token_ids=beam.token_ids,
            logprobs=beam.logprobs,
            finished=beam.token_ids[-1] in self._ends,
            text=str(whole)[len(before) :],
            versions=[self.version] * len(beam.token_ids),
        )

    def _rollouts(self, prompts: Prompts, found: Sequence[Sample]) -> Rollouts:
        """The samples as rollouts, one for each prompt."""
        sequences = make_sequences(prompts.token_ids, [sample.token_ids for sample in found])
        logprobs = torch.zeros(sequences.tokens.shape)
        logprobs[sequences.response_mask] = torch.tensor([value for sample in found for value in sample.logprobs])
        versions = torch.zeros_like(sequences.tokens)
        versions[sequences.response_mask] = torch.tensor([value for sample in found for value in sample.versions])
        return Rollouts(
            sequences=sequences,
            generator_logprobs=logprobs,
            finished=torch.tensor([sample.finished for sample in found], dtype=torch.bool),
            prompts=prompts.texts,
            responses=[sample.text for sample in found],
            answers=prompts.answers,
            prompt_ids=torch.tensor(prompts.ids, dtype=torch.long),
            policy_versions=versions,
        )

    def _check_lengths(self, prompts: Prompts, max_new_tokens: int) -> None:
        room = self.engine.max_model_len - max_new_tokens
        for prompt_id, tokens in zip(prompts.ids, prompts.token_ids, strict=True):
            if not 1 <= len(tokens) <= room:
                raise ConfigError(
                    f"prompt {prompt_id} has {len(tokens)} tokens; wanted 1 to {room}, because the engine was made for "
                    f"{self.engine.max_model_len} and the response may take {max_new_tokens}"
                )

    def endpoint(self) -> Endpoint:
        """Where this worker stands."""
        # An adapter is small and goes through files, so its way need not begin on a GPU.
        return this_endpoint(gpus=0 if self._adapter else self.engine.receivers, receivers=self.engine.receivers)

    def receive_weights(
        self, spec: TransportSpec, version: int, interrupted: Interrupted = "refuse"
    ) -> list[ReceivedWeights]:
        """Takes the weights that a learner sends meanwhile; one result for each tensor-parallel worker.

        Args:
            interrupted: what becomes of responses that have not ended: they `keep` their tokens, and the further ones
                are those of the new weights alone; or they are `abandon`ed and begin anew with the same seeds.

        Raises:
            WeightSyncError: another version arrives, the sender fails, or a deadline passes; or responses have not
                ended and `interrupted` is "refuse".
        """
        assert "weights" not in self._asleep, "the generator sleeps; `wake` comes first"
        unfinished = self._unfinished()
        if unfinished and interrupted == "refuse":
            raise WeightSyncError(
                f"version {version} arrives while {unfinished} responses are being generated; wanted are weights after "
                "the last of them, or interrupted='keep' or 'abandon'"
            )
        action = fault("sync", role=self.place.role, rank=self.place.rank, iteration=version)
        first_rank = self.place.rank * self.engine.receivers
        received = self.engine.receive(spec, version, first_rank=first_rank, load=action != "keep_old")
        if interrupted == "abandon":
            self.engine.restart()
        if action != "skip_cache_reset":
            self.engine.reset_prefix_cache()
        self.version = version
        self._without_weights = False
        return received

    def _unfinished(self) -> int:
        return sum(len(started.rows) for started in self._started.values()) - len(self._ended)

    def sleep(self, *, keep_weights: bool) -> None:
        """Gives the GPU's memory back until `wake`; once more changes nothing. On a CPU nothing is moved.

        Args:
            keep_weights: they are there again after `wake`; else `receive_weights` comes before anything is sampled.
        """
        if self._asleep:
            return
        unfinished = self._unfinished()
        assert not unfinished, f"{unfinished} responses are being generated, so the generator cannot sleep"
        self.engine.sleep(keep_weights=keep_weights)
        self._asleep = ["weights", "cache"]
        self._without_weights = not keep_weights and not self._adapter

    def wake(self, *, weights_only: bool = False) -> None:
        """Takes memory for what is asleep again; the cache's later where room is needed to receive weights."""
        while self._asleep and not (weights_only and self._asleep[0] == "cache"):
            self.engine.wake(self._asleep.pop(0))

    def _check_awake(self) -> None:
        assert not self._asleep, f"the generator sleeps ({' and '.join(self._asleep)}); `wake` comes first"
        assert not self._without_weights, "the generator has given its weights up; `receive_weights` comes first"

    def fill_cache(self) -> None:
        """Puts a probe prompt into the prefix cache: the next `probe` sees it, should a reset be forgotten.

        A generator that sleeps has no cache, and does nothing.
        """
        if self._asleep:
            return
        self._next_tokens(self._probe_prompts[:1])

    def probe(self) -> ProbeResult:
        """The probe batch under the present weights: once through the prefix cache, once computed afresh."""
        following = self._next_tokens(self._probe_prompts)
        afresh = self.engine.prompt_logprobs(self._probe_prompts)
        whole = make_sequences(
            [prompt[:1] for prompt in self._probe_prompts],
            [[*prompt[1:], token] for prompt, (token, _) in zip(self._probe_prompts, following, strict=True)],
        )
        logprobs = [[*row, logprob] for row, (_, logprob) in zip(afresh, following, strict=True)]
        return ProbeResult(sequences=whole, logprobs=torch.tensor(logprobs), version=self.version)

    def _next_tokens(self, prompts: Sequence[list[int]]) -> list[tuple[int, float]]:
        self._check_awake()
        samples = self.engine.generate(prompts, _GREEDY, seeds=[0] * len(prompts))
        return [(sample.token_ids[0], sample.logprobs[0]) for sample in samples]

    def memory(self) -> float:
        """Peak memory of the worker in GiB: the GPU's where there is one, else the process's."""
        return self.engine.memory_gib()

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()


def sample_seeds(seed: int, prompts: Prompts, samples: int, *, iteration: int) -> list[int]:
    """The seed of each of the `samples` adjacent responses to each prompt, from the seed of the run."""
    return [
        derive_seed(seed, iteration, prompt_id, repeat * samples + sample)
        for prompt_id, repeat in zip(prompts.ids, prompts.repeats, strict=True)
        for sample in range(samples)
    ]


def probe_prompts(vocab_size: int, *, block: int, max_model_len: int) -> Sequence[list[int]]:
    """Random prompts of one length, longer than two blocks of the prefix cache where max_model_len allows it."""
    length = min(max(2 * block + block // 2, 48), max_model_len - 1)
    random = torch.Generator().manual_seed(derive_seed("probe"))
    return [torch.randint(vocab_size, (length,), generator=random).tolist() for _ in range(_PROBE_ROWS)]
