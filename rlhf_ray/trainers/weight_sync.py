"""From the policy's learners to every generator: the weights, or the adapter's alone, and the proof that they arrived.

Three things are compared: the version, a digest of each tensor, and the log-probabilities of a fixed probe batch,
which also sees weights that arrived and were not loaded, and a prefix cache of the weights before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, Sequences
from rlhf_ray.distributed.groups import WorkerGroup, gather
from rlhf_ray.distributed.transports import (
    ReceivedWeights,
    SentWeights,
    TransportSpec,
    check_same,
    choose_kind,
    sender_address,
)
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.shapes import TokenFloat
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.workers.generator import Generator, Interrupted, ProbeResult
from rlhf_ray.workers.learner import Learner


@dataclass(frozen=True)
class ProbeLimits:
    """Largest mean and largest single absolute difference of log-probabilities in nats."""

    mean: float
    max: float


def probe_limits(*dtypes: schema.DType) -> ProbeLimits:
    """The limits for a generator and a learner of these types: the coarser one decides."""
    return ProbeLimits(3e-2, 0.5) if "bfloat16" in dtypes else ProbeLimits(1e-4, 1e-2)


class WeightSync:
    """Keeps the generators on the policy's weights.

    Args:
        policy: the learners; rank 0 sends.
        generator: the generators.
        settings: transport, size of the buckets and deadline.
        generator_settings: type of the generators' weights.
        learner_dtype: type of the learners' weights.
        turns: on GPUs that they share; after a sync it is the generators' turn.
    """

    def __init__(
        self,
        policy: WorkerGroup[Learner],
        generator: WorkerGroup[Generator],
        *,
        settings: schema.Placement,
        generator_settings: schema.Generator,
        learner_dtype: schema.DType,
        turns: GpuTurns | None = None,
    ) -> None:
        self._policy = policy
        self._turns = turns or GpuTurns()
        self._generator = generator
        self._settings = settings
        self._limits = probe_limits(generator_settings.dtype, learner_dtype)
        self._spec: TransportSpec | None = None
        self._session = 0
        self._model_bytes = 0

    def sync(self, version: int, *, interrupted: Interrupted = "refuse") -> dict[str, float]:
        """Afterwards every generator holds and attests this version of the weights; metrics of the transfer.

        Args:
            interrupted: what becomes of responses that are not finished, see `Generator.receive_weights`.

        Raises:
            WeightSyncError: a tensor is missing, was not sent, or differs; the version is another one; or the probe
                batch is too far from the learner's. Names the generator and the worst tensor or token.
        """
        start = time.perf_counter()
        self._generator.all(Generator.fill_cache).result()
        self._turns.receiving()
        filled = time.perf_counter()
        sent = self.transfer(version, interrupted=interrupted)
        arrived = time.perf_counter()
        self._turns.proving(self._policy)
        mean, largest = self._attest(version)
        self._turns.sampling()
        seconds = arrived - filled
        return {
            "sync/time_s": seconds,
            "sync/gib_per_s": sent.nbytes / 2**30 / seconds,
            "sync/bytes": float(sent.nbytes),
            "sync/share_of_model": sent.nbytes / self._model_bytes,
            "sync/probe_time_s": time.perf_counter() - start - seconds,
            "sync/probe_diff_mean": mean,
            "sync/probe_diff_max": largest,
        }

    def transfer(self, version: int, *, interrupted: Interrupted = "refuse") -> SentWeights:
        """Afterwards every generator has loaded this version, and each tensor's digest was compared; what was sent.

        Args:
            interrupted: what becomes of responses that are not finished, see `Generator.receive_weights`.

        Raises:
            WeightSyncError: a tensor is missing, was not sent, or differs; or the version is another one.
        """
        # A transport that failed is not used again: only after success is it kept.
        spec = dataclasses.replace(self._spec or self._new_spec(), session=self._session)
        self._spec, self._session = None, self._session + 1
        sent, received = gather(
            self._policy.all(Learner.send_weights, spec, version),
            self._generator.all(Generator.receive_weights, spec, version, interrupted),
        )
        check_arrivals(sent[0], received)
        self._spec = spec
        return sent[0]

    def receivers_changed(self) -> None:
        """To be told when the group of generators has others than before; the next sync meets them all."""
        self._spec = None

    def check_rollouts(self, rollouts: Rollouts, logprobs: TokenFloat, *, version: int) -> dict[str, float]:
        """Compares the samples' log-probabilities with the learner's [B, T] of `version` of the weights.

        Only tokens that were sampled with that version say something; their share is `generator/attested_share`.

        Raises:
            WeightSyncError: they are not the learner's; names the worst token.
        """
        response = rollouts.sequences.response_mask
        mask = response & (rollouts.policy_versions == version)
        share = {"generator/attested_share": float(mask.count_nonzero() / response.count_nonzero().clamp(min=1))}
        difference = ((rollouts.generator_logprobs - logprobs).abs() * mask).nan_to_num(nan=torch.inf)
        mean, largest = float(difference.sum() / mask.count_nonzero().clamp(min=1)), float(difference.max())
        if mean <= self._limits.mean and largest <= self._limits.max:
            return share
        row, position = divmod(int(difference.argmax()), difference.shape[1])
        raise WeightSyncError(
            f"samples of version {version}: generator and learner differ by {mean:.2g} nats in the "
            f"mean (limit {self._limits.mean:g}) and {largest:.2g} at most (limit {self._limits.max:g}); worst is "
            f"token {position} of row {row} (prompt {int(rollouts.prompt_ids[row])}), id "
            f"{int(rollouts.sequences.tokens[row, position])}: log-probability "
            f"{float(rollouts.generator_logprobs[row, position]):.4f}, the learner's "
            f"{float(logprobs[row, position]):.4f}"
        )

    def _new_spec(self) -> TransportSpec:
        sender, port, self._model_bytes, receivers = gather(
            self._policy.first(Learner.endpoint),
            self._policy.first(Learner.open_store, self._settings.sync_timeout_s),
            self._policy.first(Learner.model_bytes),
            self._generator.all(Generator.endpoint),
        )
        wanted = self._settings.transport
        return TransportSpec(
            kind=choose_kind(sender, receivers) if wanted == "auto" else wanted,
            address=sender_address(sender, receivers),
            port=port,
            receivers=sum(endpoint.receivers for endpoint in receivers),
            timeout_s=self._settings.sync_timeout_s,
            bucket_bytes=self._settings.bucket_mib << 20,
            expected_bytes=self._model_bytes,
        )

    def _attest(self, version: int) -> tuple[float, float]:
        """Mean and largest difference of the probe batch, of the generator that is farthest from the learner."""
        probes = self._generator.all(Generator.probe).result()
        judged: list[tuple[Sequences, Tensor]] = []
        means, maxima = [], []
        for rank, probe in enumerate(probes):
            expected = next((found for rows, found in judged if torch.equal(rows.tokens, probe.sequences.tokens)), None)
            if expected is None:
                expected = self._policy.split(Learner.logprobs, probe.sequences, temperature=1.0).result()
                judged.append((probe.sequences, expected))
            mean, largest = check_probe(probe, expected, version=version, rank=rank, limits=self._limits)
            means.append(mean)
            maxima.append(largest)
        return max(means), max(maxima)


def check_arrivals(sent: SentWeights, received: Sequence[Sequence[ReceivedWeights]]) -> None:
    """Raises WeightSyncError naming the generator and the first tensor in which it differs from the sender.

    Of generators that read the same memory one digests each tensor: there must be none that nobody did.
    """
    digested: set[str] = set()
    for rank, receivers in enumerate(received):
        for arrival in receivers:
            check_same(sent, arrival, who=f"generator {rank}")
            digested.update(name for name, value in arrival.digests.items() if value is not None)
    for name in sent.digests:
        if name not in digested:
            raise WeightSyncError(f"tensor {name!r} of version {sent.version}: no generator digested what arrived")


def check_probe(
    probe: ProbeResult, expected: Tensor, *, version: int, rank: int, limits: ProbeLimits
) -> tuple[float, float]:
    """Mean and largest absolute difference between a generator's log-probabilities [B, T] and the learner's.

    Raises:
        WeightSyncError: either is beyond its limit, or not a number; names the worst token.
    """
    mask = probe.sequences.response_mask
    difference = ((probe.logprobs - expected).abs() * mask).nan_to_num(nan=torch.inf)
    mean = float(difference.sum() / mask.sum())
    largest = float(difference.max())
    if mean <= limits.mean and largest <= limits.max:
        return mean, largest
    row, position = divmod(int(difference.argmax()), difference.shape[1])
    # The last token alone was computed through the prefix cache.
    stale = difference[:, :-1].max() <= limits.max < difference[:, -1].max()
    cause = "its prefix cache is of earlier weights" if stale else "it does not compute with the learner's weights"
    raise WeightSyncError(
        f"generator {rank}, version {version}: {cause}. The probe batch differs by {mean:.2g} nats in the mean "
        f"(limit {limits.mean:g}) and {largest:.2g} at most (limit {limits.max:g}); worst is token {position} of row "
        f"{row}, id {int(probe.sequences.tokens[row, position])}: log-probability "
        f"{float(probe.logprobs[row, position]):.4f}, the learner's {float(expected[row, position]):.4f}"
    )
