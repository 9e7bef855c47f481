"""A data-parallel replica of a network in training: policy, critic, both on one trunk, or reward model.

It knows no algorithm: what it minimises is an argument of `update`. However a mini-batch is cut into
workers and micro-batches, the gradient is that of one pass over all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_ray.algorithms.language_losses import negative_log_likelihood
from rlhf_ray.algorithms.logprobs import Entropy
from rlhf_ray.algorithms.masked import unit_count
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Batch, Sequences
from rlhf_ray.data.packing import balance, cut_mini_batches, learner_micro_batches, token_budget
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.distributed.faults import fault
from rlhf_ray.distributed.memory import peak_memory_gib
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.transports import (
    Endpoint,
    Sender,
    SentWeights,
    TransportSpec,
    open_store,
    send_buckets,
    this_endpoint,
)
from rlhf_ray.engines.deepspeed_training import TrainingEngine, join_process_group
from rlhf_ray.models.attention import attend_by_rows
from rlhf_ray.models.forward import (
    Layout,
    Outputs,
    answer_totals,
    forward,
    plan_answers,
)
from rlhf_ray.models.heads import (
    Head,
    LanguageModel,
    PolicyWithValueHead,
    RewardModel,
    build_network,
    switch_off_dropout,
)
from rlhf_ray.models.loading import check_vocabulary, load_causal_lm, load_reward_model, load_tokenizer
from rlhf_ray.models.lora import (
    adapter_config,
    adapter_off,
    adapter_weights,
    add_adapter,
    check_four_bits,
    keeps_weights_transposed,
    merged,
    named_weights,
)
from rlhf_ray.models.pairs import forward_pairs, pair_lengths
from rlhf_ray.models.saving import ModelWriter, write_adapter
from rlhf_ray.shapes import SequenceFloat, SequenceInt, TokenFloat
from rlhf_ray.workers.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

B = TypeVar("B", bound=Batch)

_SAVE_BUCKET_BYTES = 2 << 30


@dataclass(frozen=True)
class Values(Batch):
    """The critic's values.

    Args:
        values: [B, T] value before each token but the first; 0 at padding.
        final: [B] value after the last token.
    """

    values: TokenFloat
    final: SequenceFloat


class Learner:
    """One worker of a group that trains a network with DeepSpeed.

    Args:
        place: role, rank and number of workers; more than one meet at MASTER_ADDR and MASTER_PORT.
        config: the network's section of the pipeline file; its `model` is not read.
        model: directory or hub name of the initial model.
        revision: revision of a hub model.
        head: `none` for logits, `value` for a critic, `both` for a value head on the policy's trunk, `score` for a
            reward model.
        seed: the run's seed.
        total_steps: optimizer steps of the whole stage, for the learning rate's schedule.
        temperature: sampling temperature that log-probabilities speak of.
        tokenizer: directory or hub name of the tokenizer that is saved beside the model; None: the model's own.
        dropout: keep the model's dropout while training.
        packing: rows end to end where the architecture allows it; off: rows of similar length side by side.
        timeout_s: deadline of a collective operation.
    """

    def __init__(
        self,
        place: Place,
        *,
        config: schema.Learner,
        model: str,
        revision: str | None,
        head: Head,
        seed: int,
        total_steps: int,
        temperature: float = 1.0,
        tokenizer: str | None = None,
        dropout: bool = False,
        packing: bool | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.place = place
        self.config = config
        self.seed = seed
        self.temperature = temperature
        self._base = (model, revision)
        self._sender: Sender | None = None
        self.tokenizer = load_tokenizer(model, revision) if tokenizer is None else load_tokenizer(tokenizer)
        in_4_bits = config.lora is not None and config.lora.quantise == "nf4"
        if in_4_bits:
            check_four_bits(f"{place.role}.lora.quantise")
        if head == "score":
            loaded = load_reward_model(model, revision, config.dtype, self.tokenizer, in_4_bits=in_4_bits)
        else:
            loaded = load_causal_lm(model, revision, config.dtype, in_4_bits=in_4_bits)
        check_vocabulary(model, loaded.config, self.tokenizer)
        self.device = join_process_group(rank=place.rank, size=place.size, timeout_s=timeout_s)
        by_rows = attend_by_rows(loaded)
        self.layout: Layout = "packed" if by_rows and packing is not False else "padded"
        self._joins_answers = by_rows and self.device.type == "cpu"
        if config.activation_checkpointing:
            loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not dropout:
            switch_off_dropout(loaded)
        if config.lora is not None:
            add_adapter(
                loaded,
                config.lora,
                seed=derive_seed(seed, "lora", place.role),
                where=f"{place.role}.lora",
                trained=("score",) if head == "score" else (),
            )
        torch.manual_seed(derive_seed(seed, place.role, place.rank))
        network = build_network(loaded, head)
        self.engine = TrainingEngine(network, settings=config, device=self.device, total_steps=total_steps)

    # ------------------------------------------------------------------------------- judging

    def logprobs(self, sequences: Sequences, temperature: float | None = None) -> TokenFloat:
        """[B, T] log-probability of each token of response_mask, 0 elsewhere; at the run's temperature unless told."""
        found = torch.zeros(sequences.tokens.shape)
        for rows, outputs in self._judge(sequences, temperature):
            found[rows] = outputs.logprobs.float().cpu()
        return found

    def reference_logprobs(self, sequences: Sequences, temperature: float | None = None) -> TokenFloat:
        """As `logprobs`, of the network with its adapter switched off: of the model that training started from."""
        assert self.config.lora is not None, "a network without an adapter has no reference in itself"
        with adapter_off(self.engine.module):
            return self.logprobs(sequences, temperature)

    def reference_answer_logprobs(self, sequences: Sequences) -> SequenceFloat:
        """[B] log-probability of each row's response at temperature 1, with the adapter switched off.

        Of the same bits as those that a ReferenceScorer gives with the same weights on a CPU.

        Args:
            sequences: the answers of one pair are adjacent.
        """
        assert self.config.lora is not None, "a network without an adapter has no reference in itself"
        budget = token_budget(self.config.micro_batch_tokens, self.device)
        plan = plan_answers(
            sequences.lengths().tolist(),
            max_tokens=budget,
            layout=self.layout,
            device=self.device,
            joined=self._joins_answers,
        )
        with adapter_off(self.engine.module):
            judged = self._judge(sequences, 1.0, plan, joined=self._joins_answers)
            return answer_totals(judged, sequences.response_mask)

    def values(self, sequences: Sequences) -> Values:
        """The critic's values of rows that it may never have seen."""
        values, final = torch.zeros(sequences.tokens.shape), torch.zeros(len(sequences))
        for rows, outputs in self._judge(sequences, None):
            values[rows] = outputs.values.float().cpu()
            final[rows] = outputs.final_values.float().cpu()
        return Values(values, final)

    def scores(self, sequences: Sequences) -> SequenceFloat:
        """[B] the reward model's score of each row, read at its last token."""
        return self.values(sequences).final

    def evaluate_loss(self, sequences: Sequences) -> float:
        """Mean negative log-likelihood in nats per trained token over all rows, shared out over the workers."""
        share = sequences.select(self._share(sequences.lengths()))
        total = 0.0
        for rows, outputs in self._judge(share, 1.0):
            mask = share.response_mask[rows].to(self.device)
            total += float(negative_log_likelihood(outputs.logprobs.double(), mask)[0])
        return self._summed([total])[0] / max(1, unit_count(sequences.response_mask, "token"))

    @torch.no_grad()
    def _judge(
        self,
        sequences: Sequences,
        temperature: float | None,
        plan: list[list[int]] | None = None,
        *,
        joined: bool = False,
    ) -> Iterator[tuple[list[int], Outputs]]:
        self.engine.train(False)
        plan = self._micro_batches(sequences.lengths()) if plan is None else plan
        # At ZeRO 3 a forward pass gathers shards from all ranks, so all ranks make the same number of them.
        fillers = self._most(len(plan)) - len(plan) if self.engine.stage == 3 else 0
        for rows in plan:
            chosen = sequences.select(rows)
            yield rows, self._forward(chosen, "off", temperature, joined=joined)
        for _ in range(fillers):
            self._forward(_filler(), "off", temperature)

    # ------------------------------------------------------------------------------ learning

    def update(
        self, batch: B, objective: Objective[B], *, epochs: int, mini_batches: int, iteration: int
    ) -> dict[str, float]:
        """Optimizer steps over a batch that every worker holds whole -> metrics, the same on every worker.

        Each epoch shuffles the rows by (seed, iteration, epoch) and cuts them into `mini_batches` steps. The metrics
        are the objective's, as means over the mini-batches' units, and `loss`, `grad_norm`, `learning_rate`, and
        `guard/skipped_steps`, the steps skipped because their gradient was not finite.

        Args:
            batch: rows; the objective says where their sequences are.
            objective: what is minimised.
            epochs: passes over the batch.
            mini_batches: optimizer steps in each pass; fewer where the batch has fewer rows.
            iteration: number of this iteration, for seeds.
        """
        poison = fault("update", role=self.place.role, rank=self.place.rank, iteration=iteration) == "nan"
        self.engine.train(True)
        skipped_before = self.engine.skipped_steps
        steps: list[dict[str, float]] = []
        for epoch in range(epochs):
            torch.manual_seed(derive_seed(self.seed, "dropout", self.place.role, self.place.rank, iteration, epoch))
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "mini_batch", iteration, epoch))
            order = torch.randperm(len(batch), generator=generator)
            for rows in cut_mini_batches(order, mini_batches):
                steps.append(self._step(batch.select(sorted(rows.tolist())), objective, poison=poison))
        applied = [step for step in steps if math.isfinite(step["grad_norm"])] or steps
        metrics = {name: sum(step[name] for step in applied) / len(applied) for name in applied[0]}
        metrics["learning_rate"] = steps[-1]["learning_rate"]
        metrics["guard/skipped_steps"] = float(self.engine.skipped_steps - skipped_before)
        return metrics

    def _step(self, batch: B, objective: Objective[B], *, poison: bool) -> dict[str, float]:
        sequences = objective.sequences(batch)
        units = max(1, unit_count(sequences.response_mask, objective.unit))
        # Rows of the batch that bring several sequences stay whole: the two of a pair in one row of the network's,
        # or side by side, where they are as long as the longest.
        together = len(sequences) // len(batch)
        joined = together == 2 and self.layout == "packed"
        costs = pair_lengths(sequences) if joined else together * sequences.lengths().view(together, -1).amax(0)
        share = self._share(costs)
        plan = [[share[i] for i in rows] for rows in self._micro_batches(costs[share], together)]
        # Gradients are exchanged in every backward pass, so all ranks make the same number of them.
        fillers = [[0]] * (self._most(len(plan)) - len(plan))
        sums: dict[str, float] = {}
        for number, rows in enumerate(plan + fillers):
            counts = number < len(plan)
            part = batch.select(rows).to(self.device)
            outputs = self._forward(objective.sequences(part), objective.entropy, None, joined=joined)
            loss, metrics = objective(outputs, part)
            # DeepSpeed averages gradients over the ranks; the sum over them is wanted.
            weight = self.place.size / units if counts else 0.0
            # A head that the objective leaves out gets a gradient of zero; without one ZeRO 3 uses its last one again.
            unused = 0.0 * (outputs.logprobs.sum() + outputs.values.sum())
            self.engine.backward(loss * (math.nan if poison else weight) + unused)
            for name, value in ({"loss": loss.detach()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + (float(value) if counts else 0.0)
        norm, rate = self.engine.step()
        names = sorted(sums)
        means = [total / units for total in self._summed([sums[name] for name in names])]
        return dict(zip(names, means, strict=True)) | {"grad_norm": norm, "learning_rate": rate}

    def _forward(
        self, sequences: Sequences, entropy: Entropy, temperature: float | None, *, joined: bool = False
    ) -> Outputs:
        """The outputs of rows, which are all first and then all second answers of pairs where they are `joined`."""
        temperature = self.temperature if temperature is None else temperature
        if joined:
            return forward_pairs(self.engine.forward, sequences, device=self.device, temperature=temperature)
        return forward(
            self.engine.forward,
            sequences,
            layout=self.layout,
            device=self.device,
            temperature=temperature,
            entropy=entropy,
        )

    def _share(self, costs: SequenceInt) -> list[int]:
        return balance(costs.tolist(), self.place.size)[self.place.rank]

    def _micro_batches(self, costs: SequenceInt, together: int = 1) -> list[list[int]]:
        """Rows of `together` sequences each, cut by their tokens."""
        return learner_micro_batches(
            self.config, costs.tolist(), device=self.device, padded=self.layout == "padded", together=together
        )

    def _most(self, number: int) -> int:
        if self.place.size == 1:
            return number
        most = torch.tensor([number])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.place.size > 1:
            dist.all_reduce(total)
        return [float(number) for number in total]

    # ------------------------------------------------------------------------------- weights

    def weights(self, *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """The model's weights by their Hugging Face names, or its adapter's by those of peft's adapter files.

        Every worker must iterate to the end.
        """
        model = self._hugging_face_model()
        owned = named_weights(model) if self.config.lora is None else adapter_weights(model)
        return self.engine.buckets(owned, bucket_bytes=bucket_bytes)

    def _hugging_face_model(self) -> PreTrainedModel:
        network = self.engine.module
        if isinstance(network, RewardModel):
            return network.classifier
        assert isinstance(network, LanguageModel | PolicyWithValueHead), "a critic has no model to give away"
        return network.language_model

    def endpoint(self) -> Endpoint:
        """Where this worker stands."""
        return this_endpoint()

    def open_store(self, timeout_s: float) -> int:
        """Opens the store that transfers are arranged through, in this process; its port."""
        return open_store(timeout_s)

    def send_weights(self, spec: TransportSpec, version: int) -> SentWeights:
        """Sends the language model's `weights` to the generators; every worker calls it, the first one sends.

        Raises:
            WeightSyncError: a receiver failed, or a deadline passed.
        """
        if self.place.rank == 0:
            self._sender = Sender.renewed(self._sender, spec)
        return send_buckets(self._sender, version, self.weights(bucket_bytes=spec.bucket_bytes), role=self.place.role)

    def model_bytes(self) -> int:
        """Bytes of the whole model, as a sync without an adapter sends it."""
        return self.engine.nbytes(named_weights(self._hugging_face_model()))

    def save_model(self, path: Path, notes: Mapping[str, float] | None = None) -> None:
        """Writes a Hugging Face directory, or a peft adapter directory; every worker calls it, the first one writes.

        Args:
            path: the directory.
            notes: what its config.json says besides; beside an adapter, what notes.json says.
        """
        lora = self.config.lora
        if lora is not None and lora.result == "adapter":
            self._save_adapter(Path(path), lora, notes or {})
        else:
            self._save_whole(Path(path), notes or {})
        self._most(0)

    def _save_whole(self, path: Path, notes: Mapping[str, float]) -> None:
        model = self._hugging_face_model()
        adapter = {} if self.config.lora is None else self._collected()
        writer = ModelWriter(path, model) if self.place.rank == 0 else None
        for bucket in self.engine.buckets(named_weights(model), bucket_bytes=_SAVE_BUCKET_BYTES):
            if writer:
                writer.add(merged(model, bucket, adapter))
        if writer:
            writer.finish(self.tokenizer, notes=notes)

    def _save_adapter(self, path: Path, lora: schema.Lora, notes: Mapping[str, float]) -> None:
        model = self._hugging_face_model()
        weights = self._collected()
        if self.place.rank == 0:
            config = adapter_config(
                lora,
                weights,
                base=self._base[0],
                revision=self._base[1],
                task="SEQ_CLS" if isinstance(self.engine.module, RewardModel) else "CAUSAL_LM",
                transposed=keeps_weights_transposed(model),
            )
            write_adapter(path, weights, config, self.tokenizer, notes=notes)

    def _collected(self) -> dict[str, Tensor]:
        """The whole adapter; empty on all workers but the first."""
        kept: dict[str, Tensor] = {}
        for bucket in self.weights(bucket_bytes=_SAVE_BUCKET_BYTES):
            if self.place.rank == 0:
                kept |= {name: tensor.clone() for name, tensor in bucket}
        return kept

    def save(self, directory: Path) -> None:
        """Writes weights, optimizer and schedule to a directory that all workers share; every worker calls it."""
        self.engine.save(Path(directory))

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            CheckpointError: nothing there, or written by another number of workers or ZeRO stage.
        """
        self.engine.load(Path(directory))

    def offload(self, *, keep_weights: bool = False) -> None:
        """Leaves the GPU to others: gradients and optimizer states go to host memory, and the weights unless kept.

        On a CPU nothing is moved. Until `reload` nothing can be learnt, saved or loaded; without the weights nothing
        can be judged or sent either.
        """
        self.engine.offload(keep_weights=keep_weights)

    def reload(self) -> None:
        """Comes back to the GPU with every bit as it was; without an `offload` before, nothing happens."""
        self.engine.reload()

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        return peak_memory_gib()

    def close(self) -> None:
        """Frees what the engine holds."""
        if self._sender is not None:
            self._sender.close()
        self.engine.close()


def _filler() -> Sequences:
    """A row of one untrained token."""
    one = torch.ones(1, 1, dtype=torch.bool)
    return Sequences(tokens=torch.zeros(1, 1, dtype=torch.long), attention_mask=one, response_mask=~one)
