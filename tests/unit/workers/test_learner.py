"""A learner by itself: one worker, no Ray. Several workers are in tests/integration/test_learner.py."""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.algorithms.policy_losses import ClippedPolicyLoss, KlLoss, ValueLoss
from rlhf_ray.algorithms.preference_losses import ChosenLoss, DpoLoss, IpoLoss, OrpoLoss, SimpoLoss
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Experience, PreferencePairs, ReferencedPairs, Rollouts, Sequences, make_sequences
from rlhf_ray.distributed.place import Place
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.forward import Outputs, forward
from rlhf_ray.models.heads import LanguageModel
from rlhf_ray.models.lora import named_weights
from rlhf_ray.workers import learner as learner_module
from rlhf_ray.workers.learner import Learner
from rlhf_ray.workers.objectives import (
    BradleyTerryObjective,
    JointObjective,
    LanguageObjective,
    PolicyObjective,
    PreferenceObjective,
    ValueObjective,
)
from rlhf_ray.workers.scorers import ModelScorer, ReferenceScorer

SGD_LIKE = schema.Optimizer(learning_rate=1e-2, betas=(0.0, 0.0), eps=1.0)
MakeLearner = Callable[..., Learner]


@pytest.fixture
def make(llama_directory: Path) -> Iterator[MakeLearner]:
    """Makes learners, and closes them."""
    made: list[Learner] = []

    def build(*, head: Any = "none", model: Path = llama_directory, packing: bool = False, **settings: Any) -> Learner:
        learner = Learner(
            Place("policy", 0, 1),
            config=schema.Learner(**({"optimizer": SGD_LIKE} | settings)),
            model=str(model),
            revision=None,
            head=head,
            seed=1,
            total_steps=10,
            packing=packing,
        )
        made.append(learner)
        return learner

    yield build
    for learner in made:
        learner.close()


@pytest.fixture
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    return make_sequences([draw(n) for n in (2, 5, 1, 3, 7)], [draw(n) for n in (9, 1, 12, 4, 6)])


@pytest.fixture
def experience(sequences: Sequences) -> Experience:
    generator = torch.Generator().manual_seed(2)
    shape = sequences.tokens.shape

    def noise(mean: float, scale: float) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator)

    return Experience(
        sequences=sequences,
        old_logprobs=noise(-5.7, 0.3),
        reference_logprobs=noise(-5.7, 0.3),
        values=noise(0.0, 0.2),
        advantages=noise(0.0, 1.0),
        returns=noise(0.5, 1.0),
        correction=noise(1.0, 0.1),
    )


def weights_of(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in learner.engine.module.parameters()])


def policy_objective(aggregation: Any) -> PolicyObjective:
    loss = ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.01, aggregation=aggregation
    )
    return PolicyObjective(loss, KlLoss("k2", 0.1, aggregation))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_an_update_does_not_depend_on_micro_batches_or_layout(
    make: MakeLearner, experience: Experience, aggregation: Any
) -> None:
    objective = JointObjective(policy_objective(aggregation), ValueObjective(ValueLoss(0.2, aggregation)), 0.5)
    runs = []
    for settings in (
        {},
        {"packing": True},
        {"micro_batch_tokens": 20},
        {"micro_batch_tokens": 20, "packing": True},
        {"micro_batch_sequences": 1},
        {"activation_checkpointing": True},
    ):
        learner = make(head="both", **settings)
        before = weights_of(learner)
        metrics = [learner.update(experience, objective, epochs=2, mini_batches=2, iteration=1) for _ in range(2)][1]
        runs.append((metrics, weights_of(learner) - before))
    wanted_metrics, wanted_change = runs[0]
    assert wanted_change.norm() > 1e-3
    assert {"loss", "entropy", "approx_kl", "critic/loss", "kl_loss", "grad_norm"} <= set(wanted_metrics)
    for metrics, change in runs[1:]:
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(change, wanted_change, atol=1e-6, rtol=1e-4)


def test_one_step_equals_torch(make: MakeLearner, llama_directory: Path, sequences: Sequences) -> None:
    optimizer = schema.Optimizer(learning_rate=1e-2, weight_decay=0.1, gradient_clip=0.5)
    learner = make(optimizer=optimizer)
    metrics = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)

    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    total = torch.zeros(())
    for row, length in enumerate(sequences.lengths().tolist()):
        labels = sequences.tokens[row].masked_fill(~sequences.response_mask[row], -100)[:length]
        logits = model(sequences.tokens[row, :length][None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    loss = total / sequences.response_mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8).step()
    assert norm > 0.5
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    # Adam's first step is nearly the gradient's sign: where that is tiny, rounding shows.
    changed = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights_of(learner) - changed).abs().mean() < 1e-6


def test_dropping_rows_of_zero_weight_changes_nothing(make: MakeLearner, sequences: Sequences) -> None:
    untrained = make_sequences([[4, 5, 6, 7]], [[]])
    padded = Sequences.concat([sequences, untrained])
    first, second = make(), make()
    one = first.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    two = second.update(padded, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    assert one == pytest.approx(two, rel=1e-5)


def test_logprobs_and_loss_of_the_learner(make: MakeLearner, llama_directory: Path, sequences: Sequences) -> None:
    learner = make(micro_batch_tokens=16)
    found = learner.logprobs(sequences)
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    length = int(sequences.lengths()[2])
    expected = model(sequences.tokens[2:3, :length]).logits[0].log_softmax(-1)
    for t in range(1, length):
        assert found[2, t].item() == pytest.approx(expected[t - 1, sequences.tokens[2, t]].item(), abs=1e-5)
    assert not found[~sequences.response_mask].any()
    mean = -found[sequences.response_mask].mean().item()
    assert learner.evaluate_loss(sequences) == pytest.approx(mean, rel=1e-5)
    warmer = learner.logprobs(sequences, 2.0)
    assert not torch.allclose(found, warmer, atol=1e-3)


def test_a_critic_learns_its_returns(make: MakeLearner, experience: Experience) -> None:
    critic = make(head="value", optimizer=schema.Optimizer(learning_rate=3e-3))
    first = critic.values(experience.sequences)
    assert not first.values.any()
    assert first.final.shape == (5,)
    target = dataclasses.replace(
        experience, returns=torch.full_like(experience.returns, 2.0), values=torch.zeros_like(experience.values)
    )
    objective = ValueObjective(ValueLoss(0.0, "token_mean"))
    losses = [critic.update(target, objective, epochs=1, mini_batches=1, iteration=i)["loss"] for i in range(15)]
    assert losses[0] == pytest.approx(2.0, abs=1e-5)
    assert losses[-1] < 0.1
    mask = experience.sequences.response_mask
    assert (critic.values(experience.sequences).values[mask] - 2).abs().max() < 0.6


class _Recording(LanguageObjective):
    """Remembers the rows that it saw, by their first token."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def __call__(self, outputs: Outputs, rows: Sequences) -> Any:
        self.seen.append(sorted(rows.tokens[:, 0].tolist()))  # type: ignore[attr-defined]
        return super().__call__(outputs, rows)


def test_every_epoch_sees_every_row_once_in_a_new_order(make: MakeLearner) -> None:
    rows = make_sequences([[token] for token in range(10, 18)], [[5, 6]] * 8)
    learner = make()
    first, again, other = _Recording(), _Recording(), _Recording()
    learner.update(rows, first, epochs=2, mini_batches=4, iteration=1)
    learner.update(rows, again, epochs=2, mini_batches=4, iteration=1)
    learner.update(rows, other, epochs=2, mini_batches=4, iteration=2)
    seen: list[list[int]] = first.seen  # type: ignore[attr-defined]
    assert [len(part) for part in seen] == [2] * 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(row for part in epoch for row in part) == list(range(10, 18))
    assert seen[:4] != seen[4:]
    assert seen == again.seen  # type: ignore[attr-defined]
    assert seen != other.seen  # type: ignore[attr-defined]


def test_fewer_rows_than_mini_batches(make: MakeLearner, sequences: Sequences) -> None:
    recording = _Recording()
    make().update(sequences.select([0, 1]), recording, epochs=1, mini_batches=5, iteration=1)
    assert len(recording.seen) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("zero", [0, 2])
def test_a_gradient_that_is_not_finite_is_skipped(
    make: MakeLearner, sequences: Sequences, zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(zero=zero)
    before = weights_of(learner)
    monkeypatch.setenv("RLHF_RAY_FAULT", "update:policy:0:1:nan")
    metrics = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=2, iteration=1)
    assert metrics["guard/skipped_steps"] == 2
    assert torch.equal(weights_of(learner), before)
    after = learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=2)
    assert after["guard/skipped_steps"] == 0
    assert after["grad_norm"] > 0
    assert not torch.equal(weights_of(learner), before)


def test_learning_rate_follows_the_schedule(make: MakeLearner, sequences: Sequences) -> None:
    learner = make(optimizer=schema.Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=1))
    found = [
        learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=i)["learning_rate"]
        for i in range(10)
    ]
    assert found == pytest.approx([0.5e-3, *(1e-3 * (1 - k / 8) for k in range(9))])


@pytest.mark.parametrize("head", ["none", "both"])
def test_saved_model_has_the_same_logits(
    make: MakeLearner, model_directory: Path, sequences: Sequences, tmp_path: Path, head: str
) -> None:
    learner = make(model=model_directory, head=head)
    learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    learner.save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = make(model=tmp_path / "model").logprobs(sequences)
    assert torch.equal(learner.logprobs(sequences), expected)
    assert model.config.tie_word_embeddings == (model_directory.name == "gpt2")
    # A tied weight is written once, under the name of the embeddings, which is the one that vLLM reads.
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("joy")["input_ids"] == learner.tokenizer("joy")["input_ids"]
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors*")) == ["model.safetensors"]


def test_saved_model_in_shards(
    make: MakeLearner, gpt2_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: Sequences
) -> None:
    monkeypatch.setattr(learner_module, "_SAVE_BUCKET_BYTES", 1 << 20)
    learner = make(model=gpt2_directory)
    learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=1, iteration=1)
    learner.save_model(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(make(model=tmp_path).logprobs(sequences), learner.logprobs(sequences))


def test_weights_carry_tied_embeddings_and_no_value_head(make: MakeLearner, gpt2_directory: Path) -> None:
    learner = make(model=gpt2_directory, head="both")
    buckets = list(learner.weights(bucket_bytes=1 << 20))
    names = [name for bucket in buckets for name, _ in bucket]
    model = AutoModelForCausalLM.from_pretrained(gpt2_directory)
    assert names == list(model.state_dict())
    assert "lm_head.weight" in names
    assert len(buckets) > 2
    for name, tensor in (pair for bucket in buckets for pair in bucket):
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.fixture
def pairs(sequences: Sequences) -> PreferencePairs:
    rejected = make_sequences([[5, 6], [7], [8, 9, 10], [11], [12]], [[13], [14] * 9, [15, 16], [17] * 4, [18]])
    return PreferencePairs(sequences, rejected, ids=list(range(5)), margins=torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0]))


@pytest.fixture
def referenced() -> ReferencedPairs:
    """Eight pairs, and a reference that is not the policy."""
    generator = torch.Generator().manual_seed(4)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    prompts = [draw(1, 9) for _ in range(8)]
    chosen, rejected = (make_sequences(prompts, [draw(1, 12) for _ in prompts]) for _ in range(2))
    pairs = PreferencePairs(chosen, rejected, ids=list(range(8)), margins=torch.zeros(8))
    reference = [-5.7 * side.response_mask.sum(1) + torch.randn(8, generator=generator) for side in (chosen, rejected)]
    return ReferencedPairs(pairs, *reference)


PREFERENCE_OBJECTIVES = [
    PreferenceObjective(DpoLoss(0.3, 0.1), ChosenLoss(0.2)),
    PreferenceObjective(IpoLoss(0.3), None),
    PreferenceObjective(SimpoLoss(2.0, 0.5), None),
    PreferenceObjective(OrpoLoss(0.5), None),
]


def test_a_preference_loss_does_not_depend_on_micro_batches_or_packing(
    make: MakeLearner, referenced: ReferencedPairs
) -> None:
    objective = PREFERENCE_OBJECTIVES[0]
    # One step of this Adam moves a weight by -g / (|g| + 1), from which the gradient g is read.
    plain = schema.Optimizer(learning_rate=1.0, betas=(0.0, 0.0), eps=1.0, gradient_clip=0.0)
    runs = []
    for pairs_at_once in (8, 3, 1):
        for packing in (False, True):
            learner = make(packing=packing, micro_batch_sequences=2 * pairs_at_once, optimizer=plain)
            before = weights_of(learner).double()
            metrics = learner.update(referenced, objective, epochs=1, mini_batches=1, iteration=1)
            moved = before - weights_of(learner).double()
            runs.append((metrics, moved / (1 - moved.abs())))
    wanted, gradient = runs[0]
    assert gradient.norm() == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert gradient.norm() > 0.1
    for metrics, found in runs[1:]:
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", PREFERENCE_OBJECTIVES, ids=lambda objective: type(objective.loss).__name__)
def test_preference_losses_are_invariant_in_float64(
    llama_directory: Path, referenced: ReferencedPairs, objective: PreferenceObjective
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory, dtype=torch.float64)
    reference = [x.double() for x in (referenced.reference_chosen, referenced.reference_rejected)]
    whole = ReferencedPairs(referenced.pairs, *reference)

    def run(pairs_at_once: int, layout: Any) -> tuple[float, Tensor]:
        model.zero_grad()
        total = 0.0
        for rows in torch.arange(8).split(pairs_at_once):
            part = whole.select(rows.tolist())
            outputs = forward(
                LanguageModel(model), objective.sequences(part), layout=layout, device=torch.device("cpu")
            )
            loss, _ = objective(outputs, part)
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient = run(8, "padded")
    for pairs_at_once in (1, 3, 8):
        for layout in ("packed", "padded"):
            other, found = run(pairs_at_once, layout)
            assert other == pytest.approx(loss, abs=1e-10)
            torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)


def test_a_reward_model_does_not_depend_on_micro_batches(make: MakeLearner, pairs: PreferencePairs) -> None:
    runs = []
    for settings in ({}, {"micro_batch_tokens": 30}, {"micro_batch_sequences": 1}, {"micro_batch_sequences": 5}):
        learner = make(head="score", **settings)
        assert learner.scores(pairs.chosen).tolist() == [0.0] * 5
        steps = [learner.update(pairs, BradleyTerryObjective(), epochs=1, mini_batches=2, iteration=i) for i in (1, 2)]
        runs.append((steps, weights_of(learner)))
    for steps, weights in runs[1:]:
        for step, expected in zip(steps, runs[0][0], strict=True):
            assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-5, atol=1e-6)
    # All scores are 0 before the first step of the first update: log 2 without a margin.
    assert runs[0][0][1]["loss"] < runs[0][0][0]["loss"]


def test_a_saved_reward_model_gives_the_same_scores_everywhere(
    make: MakeLearner, model_directory: Path, pairs: PreferencePairs, tmp_path: Path
) -> None:
    learner = make(head="score", model=model_directory, optimizer=schema.Optimizer(learning_rate=1e-2))
    learner.update(pairs, BradleyTerryObjective(), epochs=3, mini_batches=1, iteration=1)
    learner.save_model(tmp_path, {"score_mean": 0.25})
    scores = learner.scores(pairs.chosen)
    assert scores.unique().numel() == 5

    lengths = pairs.chosen.lengths().tolist()
    rows = [row[:length] for row, length in zip(pairs.chosen.tokens.tolist(), lengths, strict=True)]
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert network.config.num_labels == 1
    assert network.config.score_mean == 0.25
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        alone = torch.cat([network(torch.tensor([row])).logits[:, 0] for row in rows])
        beside = network(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(beside, scores, atol=1e-5, rtol=0)

    config = schema.ModelReward(kind="model", model=str(tmp_path))
    scorer = ModelScorer(Place("reward", 0, 1), config=config, model=str(tmp_path), policy_tokenizer=str(tmp_path))
    shape = pairs.chosen.tokens.shape
    texts = [""] * 5
    rollouts = Rollouts(
        pairs.chosen, torch.zeros(shape), torch.ones(5).bool(), texts, texts, [None] * 5, torch.arange(5), 0
    )
    torch.testing.assert_close(scorer.score(rollouts), scores, atol=1e-5, rtol=0)
    assert torch.equal(make(head="score", model=tmp_path).scores(pairs.chosen), scores)


def test_a_critic_has_no_model_to_give(make: MakeLearner, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="critic"):
        make(head="value").save_model(tmp_path)


def test_state_is_restored(make: MakeLearner, sequences: Sequences, tmp_path: Path) -> None:
    first = make(optimizer=schema.Optimizer(learning_rate=1e-3, schedule="cosine"))
    first.update(sequences, LanguageObjective(), epochs=2, mini_batches=2, iteration=1)
    first.save(tmp_path)
    wanted = first.update(sequences, LanguageObjective(), epochs=1, mini_batches=2, iteration=2)
    second = make(optimizer=schema.Optimizer(learning_rate=1e-3, schedule="cosine"))
    second.load(tmp_path)
    assert second.update(sequences, LanguageObjective(), epochs=1, mini_batches=2, iteration=2) == wanted
    assert torch.equal(weights_of(first), weights_of(second))


def test_no_state_to_restore(make: MakeLearner, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no learner state"):
        make().load(tmp_path)


def test_state_of_another_architecture_is_refused(make: MakeLearner, gpt2_directory: Path, tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        make(model=gpt2_directory).load(tmp_path)


class _Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_run(make: MakeLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    learner = make()
    learner.save(tmp_path)
    file = next((tmp_path / "state").glob("*model_states.pt"))
    torch.save({"module": _Payload()}, file, pickle_module=pickle)
    with pytest.raises(CheckpointError):
        learner.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_tokenizer_that_does_not_fit_is_refused(llama_directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    tokenizer.add_tokens([f"extra{i}" for i in range(60)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="300 embeddings"):
        Learner(
            Place("policy", 0, 1),
            config=schema.Learner(),
            model=str(llama_directory),
            revision=None,
            head="none",
            seed=1,
            total_steps=1,
            tokenizer=str(tmp_path),
        )


def test_memory_is_reported_in_gib(make: MakeLearner) -> None:
    assert 0.1 < make().memory() < 64


LORA = {"rank": 4, "alpha": 8.0}


def trained_weights(learner: Learner) -> dict[str, Tensor]:
    found = learner.engine.module.named_parameters()
    return {name: weight.detach().clone() for name, weight in found if weight.requires_grad}


def learn_adapter(learner: Learner, sequences: Sequences, *, steps: int = 1, iteration: int = 1) -> dict[str, float]:
    return learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=steps, iteration=iteration)


def test_an_adapter_learns_and_the_base_stays(make: MakeLearner, model_directory: Path, sequences: Sequences) -> None:
    base = make(model=model_directory)
    learner = make(model=model_directory, lora=LORA, optimizer=schema.Optimizer(learning_rate=1e-2))
    wanted = base.logprobs(sequences)
    assert torch.equal(learner.logprobs(sequences), wanted)
    before = weights_of(base)
    losses = [learn_adapter(learner, sequences, iteration=i)["loss"] for i in range(8)]
    assert losses[-1] < losses[0] - 0.5
    assert not torch.allclose(learner.logprobs(sequences), wanted, atol=1e-2)
    # Bit for bit, at any temperature, and as often as one likes.
    assert torch.equal(learner.reference_logprobs(sequences), wanted)
    assert torch.equal(learner.reference_logprobs(sequences, 2.0), base.logprobs(sequences, 2.0))
    assert torch.equal(named(learner), before)


@pytest.mark.parametrize(("zero", "dtype"), [(0, "float32"), (3, "bfloat16")])
def test_the_references_answers_are_those_of_a_reference_scorer(
    make: MakeLearner, model_directory: Path, sequences: Sequences, zero: int, dtype: Any
) -> None:
    """Bit for bit on a CPU, however the rows are laid out for training and whatever pairs stand beside them."""
    sequences = sequences.select([0, 1, 2, 3, 4, 1])
    reference = ReferenceScorer(
        Place("reference", 0, 1), config=schema.Reference(dtype=dtype), model=str(model_directory)
    )
    wanted = reference.answer_logprobs(sequences)
    for packing in (False, True):
        learner = make(model=model_directory, lora=LORA, zero=zero, dtype=dtype, packing=packing)
        assert torch.equal(learner.reference_answer_logprobs(sequences), wanted)
        learn_adapter(learner, sequences, steps=2)
        assert torch.equal(learner.reference_answer_logprobs(sequences), wanted)
        assert torch.equal(learner.reference_answer_logprobs(sequences.select([4, 5])), wanted[[4, 5]])
        learnt = learner.logprobs(sequences, 1.0).sum(1)
        assert not torch.allclose(learnt, wanted, atol=1e-2)


def named(learner: Learner) -> Tensor:
    """The base's weights, flat."""
    model = learner._hugging_face_model()
    owned = {id(weight): weight for weight in named_weights(model).values()}
    return torch.cat([weight.detach().flatten() for weight in owned.values()])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_reference_in_between_changes_no_update(make: MakeLearner, sequences: Sequences, zero: int) -> None:
    runs = []
    for asks in (False, True):
        learner = make(lora=LORA | {"dropout": 0.2}, zero=zero, activation_checkpointing=True)
        for iteration in (1, 2, 3):
            if asks:
                learner.reference_logprobs(sequences)
            learn_adapter(learner, sequences, steps=2, iteration=iteration)
        runs.append(dict(pair for bucket in learner.weights(bucket_bytes=1 << 20) for pair in bucket))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_adapters_dropout_is_on_while_training_only(make: MakeLearner, sequences: Sequences) -> None:
    plain, dropped = (make(lora=LORA | {"dropout": rate}) for rate in (0.0, 0.5))
    for learner in (plain, dropped):
        for name, weight in learner.engine.module.named_parameters():
            if ".lora_B." in name:
                weight.data.fill_(0.01)
    assert torch.equal(plain.logprobs(sequences), dropped.logprobs(sequences))
    losses = [learn_adapter(learner, sequences)["loss"] for learner in (plain, dropped)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)
    assert {module.p for module in dropped.engine.module.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}


def test_weights_are_the_adapters_alone(make: MakeLearner, gpt2_directory: Path) -> None:
    learner = make(model=gpt2_directory, head="both", lora=LORA)
    found = dict(pair for bucket in learner.weights(bucket_bytes=10_000) for pair in bucket)
    assert list(found)[:2] == [f"base_model.model.transformer.h.0.attn.c_attn.lora_{side}.weight" for side in "AB"]
    assert len(found) == 4 * 4 * 2
    trained = trained_weights(learner)
    assert len(trained) == len(found) + 2
    assert {name for name in trained if "lora" not in name} == {"value_head.linear.weight", "value_head.linear.bias"}


def test_merged_result_has_the_same_logits_and_configuration(
    make: MakeLearner, model_directory: Path, sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "_SAVE_BUCKET_BYTES", 1 << 20)
    learner = make(model=model_directory, lora=LORA)
    learn_adapter(learner, sequences, steps=5)
    learner.save_model(tmp_path / "merged")
    make(model=model_directory).save_model(tmp_path / "whole")
    found, wanted = ((tmp_path / name / "config.json").read_text() for name in ("merged", "whole"))
    assert found == wanted
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    saved = make(model=tmp_path / "merged").logprobs(sequences)
    torch.testing.assert_close(saved, learner.logprobs(sequences), atol=1e-5, rtol=0)
    assert not torch.allclose(saved, learner.reference_logprobs(sequences), atol=1e-2)


def test_adapter_result_is_a_peft_directory(
    make: MakeLearner, model_directory: Path, sequences: Sequences, tmp_path: Path
) -> None:
    learner = make(model=model_directory, lora=LORA | {"result": "adapter"})
    learn_adapter(learner, sequences, steps=5)
    learner.save_model(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert not (tmp_path / "config.json").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    length = int(sequences.lengths()[2])
    expected = model(sequences.tokens[2:3, :length]).logits[0].log_softmax(-1)
    found = learner.logprobs(sequences)[2]
    for t in range(1, length):
        assert found[t].item() == pytest.approx(expected[t - 1, sequences.tokens[2, t]].item(), abs=1e-5)
    with pytest.raises(ConfigError, match="peft adapter"):
        make(model=tmp_path)


@pytest.mark.parametrize("result", ["merged", "adapter"])
def test_a_reward_models_adapter(
    make: MakeLearner, model_directory: Path, pairs: PreferencePairs, tmp_path: Path, result: str
) -> None:
    optimizer = schema.Optimizer(learning_rate=1e-2)
    learner = make(head="score", model=model_directory, lora=LORA | {"result": result}, optimizer=optimizer)
    assert learner.scores(pairs.chosen).tolist() == [0.0] * 5
    learner.update(pairs, BradleyTerryObjective(), epochs=5, mini_batches=1, iteration=1)
    scores = learner.scores(pairs.chosen)
    assert scores.unique().numel() == 5
    learner.save_model(tmp_path, {"score_mean": 0.25})
    if result == "merged":
        network = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert network.config.score_mean == 0.25
    else:
        base = AutoModelForSequenceClassification.from_pretrained(model_directory, num_labels=1)
        network = PeftModel.from_pretrained(base, tmp_path)
        assert network.peft_config["default"].task_type == "SEQ_CLS"
        assert json.loads((tmp_path / "notes.json").read_text()) == {"score_mean": 0.25}
    lengths = pairs.chosen.lengths().tolist()
    with torch.no_grad():
        rows = [row[:n] for row, n in zip(pairs.chosen.tokens, lengths, strict=True)]
        alone = torch.cat([network(row[None]).logits[:, 0] for row in rows])
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=0)


def test_a_critic_with_an_adapter_learns_its_returns(make: MakeLearner, experience: Experience) -> None:
    critic = make(head="value", lora=LORA, optimizer=schema.Optimizer(learning_rate=1e-2))
    assert not critic.values(experience.sequences).values.any()
    target = dataclasses.replace(
        experience, returns=torch.full_like(experience.returns, 2.0), values=torch.zeros_like(experience.values)
    )
    objective = ValueObjective(ValueLoss(0.0, "token_mean"))
    losses = [critic.update(target, objective, epochs=1, mini_batches=1, iteration=i)["loss"] for i in range(15)]
    assert losses[0] == pytest.approx(2.0, abs=1e-5)
    assert losses[-1] < 0.2


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_adapters_state_is_small_and_restored_bit_for_bit(
    make: MakeLearner, gpt2_directory: Path, sequences: Sequences, tmp_path: Path, zero: int
) -> None:
    settings: dict[str, Any] = {"model": gpt2_directory, "head": "both", "lora": LORA | {"dropout": 0.1}, "zero": zero}
    first = make(**settings)
    learn_adapter(first, sequences, steps=2)
    first.save(tmp_path)
    wanted = learn_adapter(first, sequences, iteration=2)
    # The first worker's weights, their float32 copies and two moments of each; the base is ten times as large.
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in first.engine.module.parameters() if p.requires_grad)
    assert sum(file.stat().st_size for file in (tmp_path / "state").iterdir()) < 4 * 4 * trained + 300_000
    for file in (tmp_path / "state").glob("*model_states.pt"):
        names = torch.load(file, weights_only=True)["module"]
        assert all(".lora_" in name or "value_head" in name for name in names)
    second = make(**settings)
    second.load(tmp_path)
    assert learn_adapter(second, sequences, iteration=2) == wanted
    assert torch.equal(second.logprobs(sequences), first.logprobs(sequences))


def test_state_of_another_adapter_is_refused(make: MakeLearner, tmp_path: Path) -> None:
    make(lora=LORA | {"target_modules": ["q_proj"]}).save(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        make(lora=LORA | {"target_modules": ["k_proj"]}).load(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        make().load(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 2, "dtype": "bfloat16"}, {"lora": {}}]
)
def test_a_learner_that_was_away_learns_the_same_bits(
    make: MakeLearner, sequences: Sequences, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings | {"optimizer": schema.Optimizer(learning_rate=1e-2)}

    def step(learner: Learner, iteration: int) -> dict[str, float]:
        return learner.update(sequences, LanguageObjective(), epochs=1, mini_batches=2, iteration=iteration)

    def weights(learner: Learner) -> list[tuple[str, Tensor]]:
        return [(name, tensor.clone()) for bucket in learner.weights(bucket_bytes=1 << 16) for name, tensor in bucket]

    stayed = make(**settings)
    wanted = [step(stayed, iteration) for iteration in (1, 2, 3)], stayed.logprobs(sequences), weights(stayed)
    learner = make(**settings)
    learner.engine.moves_states = True
    metrics = []
    for iteration in (1, 2, 3):
        metrics.append(step(learner, iteration))
        before = learner.logprobs(sequences)
        learner.offload(keep_weights=True)
        assert torch.equal(learner.logprobs(sequences), before)
        with pytest.raises(AssertionError, match=r"states are in host memory; `reload` comes first"):
            learner.save(tmp_path)
        learner.offload()
        with pytest.raises(AssertionError, match=r"weights are in host memory"):
            learner.logprobs(sequences)
        large = [tensor for tensor in learner.engine.module.parameters() if tensor.untyped_storage().resizable()]
        assert sum(tensor.untyped_storage().nbytes() for tensor in large) == 0
        learner.reload()
    assert metrics == wanted[0]
    assert torch.equal(learner.logprobs(sequences), wanted[1])
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(weights(learner), wanted[2], strict=True))
