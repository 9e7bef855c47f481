"""Weight sync with real transports and transformers engines, the groups' workers as threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, Sequences, make_sequences
from rlhf_ray.distributed import transports
from rlhf_ray.distributed.groups import Pending
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.transports import (
    Endpoint,
    ReceivedWeights,
    Sender,
    SentWeights,
    TransportSpec,
    open_store,
    send_buckets,
    this_endpoint,
)
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.lora import adapter_weights, add_adapter, named_weights
from rlhf_ray.trainers import weight_sync
from rlhf_ray.trainers.turns import GpuTurns
from rlhf_ray.trainers.weight_sync import ProbeLimits, WeightSync, check_arrivals, check_probe, probe_limits
from rlhf_ray.workers.generator import Generator, ProbeResult
from tests.tiny_models import make_gpt2, make_llama


class Running(Pending[Any]):
    def __init__(self, futures: list[Future[Any]], one: bool) -> None:
        self._futures = futures
        self._one = one

    def result(self) -> Any:
        found = [future.result() for future in self._futures]
        return found[0] if self._one else found


class ThreadGroup:
    """Workers of one role, each call a thread."""

    def __init__(self, role: str, workers: list[Any]) -> None:
        self.role = role
        self.workers = workers
        self.size = len(workers)
        self._pool = ThreadPoolExecutor()

    def _call(self, workers: list[Any], method: Callable[..., Any], arguments: Any, one: bool) -> Pending[Any]:
        args, kwargs = arguments
        calls = [self._pool.submit(getattr(worker, method.__name__), *args, **kwargs) for worker in workers]
        return Running(calls, one)

    def all(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Pending[Any]:
        return self._call(self.workers, method, (args, kwargs), False)

    def first(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Pending[Any]:
        return self._call(self.workers[:1], method, (args, kwargs), True)

    split = first


class SmallLearner:
    """What WeightSync asks of a learner, without DeepSpeed."""

    def __init__(self, model: str, rank: int = 0, lora: schema.Lora | None = None) -> None:
        self.model: Any = load_causal_lm(model)
        self.whole = named_weights(self.model)
        if lora is not None:
            add_adapter(self.model, lora, seed=1, where="policy.lora")
        self.weights = self.whole if lora is None else adapter_weights(self.model)
        self.rank = rank
        self.sender: Sender | None = None
        self.here = True

    def endpoint(self) -> Endpoint:
        return this_endpoint()

    def open_store(self, timeout_s: float) -> int:
        return open_store(timeout_s)

    def send_weights(self, spec: TransportSpec, version: int) -> SentWeights:
        if self.rank == 0:
            self.sender = Sender.renewed(self.sender, spec)
        return send_buckets(self.sender, version, [[item] for item in self.weights.items()])

    def model_bytes(self) -> int:
        return sum(weight.numel() * 4 for weight in self.whole.values())

    def offload(self, *, keep_weights: bool) -> None:
        self.here = keep_weights

    def reload(self) -> None:
        self.here = True

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float | None = None) -> Tensor:
        assert temperature == 1.0
        assert self.here, "the probe is judged while the weights are away"
        return token_logprobs(self.model(sequences.tokens, use_cache=False).logits, sequences.tokens)

    def nudge(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.05).add_(0.01)


LORA = schema.Lora(rank=2, alpha=8.0)


def make_generator(model: str, rank: int, config: schema.Generator, lora: schema.Lora | None = None) -> Generator:
    return Generator(
        Place("generator", rank, rank + 1),
        config=config,
        model=model,
        revision=None,
        tokenizer=model,
        max_model_len=64,
        seed=0,
        lora=lora,
    )


def start(
    model: str,
    generators: int = 1,
    learners: int = 1,
    lora: schema.Lora | None = None,
    turns: type[GpuTurns] | None = None,
    **settings: Any,
) -> tuple[WeightSync, SmallLearner, list[Generator]]:
    config = schema.Generator(engine="hf", workers=generators)
    policy = [SmallLearner(model, rank, lora) for rank in range(learners)]
    workers = [make_generator(model, rank, config, lora) for rank in range(generators)]
    placement = schema.Placement(call_timeout_s=20.0, bucket_mib=1, **settings)
    groups: Any = {"policy": ThreadGroup("policy", policy), "generator": ThreadGroup("generator", workers)}
    sync = WeightSync(
        groups["policy"],
        groups["generator"],
        settings=placement,
        generator_settings=config,
        learner_dtype="float32",
        turns=turns and turns(groups["generator"], [groups["policy"]]),
    )
    return sync, policy[0], workers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "llama", layers=1)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=1)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_every_generator_holds_the_weights_afterwards(llama: str, transport: str) -> None:
    sync, learner, generators = start(llama, generators=2, learners=2, transport=transport)
    for version in range(3):
        learner.nudge()
        metrics = sync.sync(version)
        for generator in generators:
            assert generator.version == version
            held = generator.engine._model.state_dict()  # type: ignore[attr-defined]
            assert all(torch.equal(held[name], tensor) for name, tensor in learner.model.state_dict().items())
    assert metrics["sync/probe_diff_max"] < 1e-5
    assert metrics["sync/bytes"] == sum(tensor.numel() * 4 for tensor in learner.model.state_dict().values())
    assert metrics["sync/share_of_model"] == 1.0
    assert metrics["sync/gib_per_s"] == pytest.approx(metrics["sync/bytes"] / 2**30 / metrics["sync/time_s"])
    assert set(metrics) == {
        "sync/time_s",
        "sync/gib_per_s",
        "sync/bytes",
        "sync/share_of_model",
        "sync/probe_time_s",
        "sync/probe_diff_mean",
        "sync/probe_diff_max",
    }


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_generators_that_come_and_go_are_met_by_the_next_sync(llama: str, transport: str) -> None:
    sync, learner, generators = start(llama, generators=2, transport=transport)
    sync.sync(0)
    for version, size in ((1, 3), (2, 1), (3, 2)):
        del generators[size:]
        missing = range(len(generators), size)
        generators += [make_generator(llama, rank, schema.Generator(engine="hf")) for rank in missing]
        sync.receivers_changed()
        learner.nudge()
        assert sync.sync(version)["sync/probe_diff_max"] < 1e-5
        assert [generator.version for generator in generators] == [version] * size


def test_tied_embeddings_travel_under_both_names(gpt2: str) -> None:
    sync, learner, _ = start(gpt2)
    learner.nudge()
    assert sync.sync(1)["sync/probe_diff_max"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_travels_alone(request: pytest.FixtureRequest, family: str) -> None:
    """The adapter's tensors and nothing else, digested and probed as a whole model is; the base is left as it was."""
    sync, learner, generators = start(request.getfixturevalue(family), generators=2, lora=LORA)
    base = {name: weight.clone() for name, weight in learner.whole.items()}
    probes = []
    for version in range(3):
        metrics = sync.sync(version)
        assert metrics["sync/probe_diff_max"] < 1e-5
        probes.append(generators[1].probe().logprobs)
        held = adapter_weights(generators[1].engine._model)  # type: ignore[attr-defined]
        assert all(torch.equal(held[name], weight) for name, weight in learner.weights.items())
        learner.nudge()
    assert not torch.equal(probes[0], probes[1])
    assert not torch.equal(probes[1], probes[2])
    assert all(torch.equal(base[name], weight) for name, weight in learner.whole.items())
    assert all(".lora_" in name for name in learner.weights)
    assert metrics["sync/bytes"] == sum(weight.numel() * 4 for weight in learner.weights.values())
    assert metrics["sync/share_of_model"] == metrics["sync/bytes"] / sum(base[name].numel() * 4 for name in base)
    assert metrics["sync/share_of_model"] < 0.05


FAULTS = {
    "policy:0:1:drop_tensor": "generator 0: tensor 'model.embed_tokens.weight' of version 1 did not arrive",
    "policy:0:1:swap_tensors": "of version 1 arrived with digest",
    "policy:0:1:corrupt": "tensor 'model.embed_tokens.weight' of version 1 arrived with digest",
    "policy:0:1:stale_version": "weights of version 0 arrived where version 1 was announced; they are stale",
    "generator:1:1:keep_old": "generator 1, version 1: it does not compute with the learner's weights",
}


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
@pytest.mark.parametrize("place", FAULTS)
def test_a_spoiled_sync_stops_and_the_next_one_heals(
    llama: str, place: str, lora: schema.Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, learner, _ = start(llama, generators=2, lora=lora)
    sync.sync(0)
    learner.nudge()
    monkeypatch.setenv("RLHF_RAY_FAULT", f"sync:{place}")
    with pytest.raises(WeightSyncError) as caught:
        sync.sync(1)
    expected = FAULTS[place]
    if lora is not None:
        expected = expected.replace("model.embed_tokens", "base_model.model.model.layers.0.self_attn.q_proj.lora_A")
    assert expected in str(caught.value)
    monkeypatch.delenv("RLHF_RAY_FAULT")
    assert sync.sync(1)["sync/probe_diff_max"] < 1e-5


@pytest.mark.parametrize("place", FAULTS)
def test_each_fault_is_missed_without_its_check(llama: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest, the version and the probe are each needed: with one of them gone its fault is not named as above."""
    gone: list[tuple[Any, str, Any]] = {
        "stale_version": [(transports, "check_version", lambda got, wanted: None)],
        "keep_old": [(weight_sync, "check_probe", lambda *args, **kwargs: (0.0, 0.0))],
    }.get(place.rpartition(":")[2], [(weight_sync, "check_arrivals", lambda sent, received: None)])
    for module, name, nothing in gone:
        monkeypatch.setattr(module, name, nothing)
    sync, learner, _ = start(llama, generators=2)
    sync.sync(0)
    learner.nudge()
    monkeypatch.setenv("RLHF_RAY_FAULT", f"sync:{place}")
    assert FAULTS[place] not in outcome(sync)


def outcome(sync: WeightSync) -> str:
    try:
        sync.sync(1)
    except WeightSyncError as error:
        return str(error)
    return "passed"


def probe_of(logprobs: list[list[float]]) -> ProbeResult:
    tokens = [[row * 10 + position for position in range(len(values))] for row, values in enumerate(logprobs)]
    sequences = make_sequences([row[:1] for row in tokens], [row[1:] for row in tokens])
    return ProbeResult(sequences=sequences, logprobs=torch.tensor(logprobs), version=3)


def test_probe_difference_by_hand() -> None:
    probe = probe_of([[0.0, -1.0, -2.0], [0.0, -3.0, -4.0]])
    expected = torch.tensor([[9.0, -1.5, -2.0], [9.0, -3.25, -4.25]])
    # 0.5, 0, 0.25, 0.25 over the four tokens that have one before them
    found = check_probe(probe, expected, version=3, rank=0, limits=ProbeLimits(mean=0.25, max=0.5))
    assert found == (0.25, 0.5)
    for limits in (ProbeLimits(mean=0.24, max=0.5), ProbeLimits(mean=0.25, max=0.49)):
        with pytest.raises(WeightSyncError) as caught:
            check_probe(probe, expected, version=3, rank=2, limits=limits)
        assert str(caught.value) == (
            "generator 2, version 3: it does not compute with the learner's weights. The probe batch differs by 0.25 "
            f"nats in the mean (limit {limits.mean:g}) and 0.5 at most (limit {limits.max:g}); worst is token 1 of row "
            "0, id 1: log-probability -1.0000, the learner's -1.5000"
        )


def test_a_difference_in_the_cached_token_alone_points_at_the_cache() -> None:
    probe = probe_of([[0.0, -1.0, -2.0]])
    with pytest.raises(WeightSyncError, match=r"its prefix cache is of earlier weights.*token 2 of row 0, id 2"):
        check_probe(probe, torch.tensor([[0.0, -1.0, -5.0]]), version=3, rank=0, limits=ProbeLimits(2.0, 0.5))


def test_a_probe_that_is_not_a_number_is_refused() -> None:
    probe = probe_of([[0.0, float("nan"), -2.0]])
    with pytest.raises(WeightSyncError, match=r"token 1 of row 0.*log-probability nan"):
        check_probe(probe, torch.tensor([[0.0, -1.0, -2.0]]), version=3, rank=0, limits=ProbeLimits(1.0, 1.0))


def test_limits_follow_the_coarser_type() -> None:
    assert probe_limits("float32", "float32") == ProbeLimits(mean=1e-4, max=1e-2)
    assert probe_limits("bfloat16", "float32") == probe_limits("float32", "bfloat16") == ProbeLimits(mean=3e-2, max=0.5)


def test_every_receiver_of_every_generator_is_compared() -> None:
    sent, good = SentWeights(1, {"a": 1}, 4), ReceivedWeights(1, {"a": 1}, 4)
    check_arrivals(sent, [[good, good], [good, good]])
    with pytest.raises(WeightSyncError, match="generator 1: tensor 'a'"):
        check_arrivals(sent, [[good, good], [good, ReceivedWeights(1, {"a": 2}, 4)]])


def test_some_generator_digests_every_tensor() -> None:
    sent = SentWeights(1, {"a": 1, "b": 2}, 8)
    first, second = ReceivedWeights(1, {"a": 1, "b": None}, 8), ReceivedWeights(1, {"a": None, "b": 2}, 8)
    check_arrivals(sent, [[first], [second]])
    with pytest.raises(WeightSyncError, match="tensor 'b' of version 1: no generator digested what arrived"):
        check_arrivals(sent, [[first], [first]])


def test_samples_are_compared_where_they_are_of_the_learners_weights() -> None:
    """Four response tokens, the first two of an earlier version: only the others must be the learner's."""
    group: Any = ThreadGroup("policy", [])
    settings: Any = schema.Placement(), schema.Generator()
    sync = WeightSync(group, group, settings=settings[0], generator_settings=settings[1], learner_dtype="float32")
    sequences = make_sequences([[1]], [[5, 6, 7, 8]])
    rollouts = Rollouts(
        sequences=sequences,
        generator_logprobs=torch.tensor([[0.0, -1, -1, -1, -1]]),
        finished=torch.tensor([True]),
        prompts=["p"],
        responses=["r"],
        answers=[None],
        prompt_ids=torch.tensor([4]),
        policy_versions=torch.tensor([[0, 6, 6, 7, 7]]),
    )
    logprobs = torch.tensor([[0.0, -1, -3, -1, -1]])
    assert sync.check_rollouts(rollouts, logprobs, version=7) == {"generator/attested_share": 0.5}
    assert sync.check_rollouts(rollouts, logprobs, version=8) == {"generator/attested_share": 0.0}
    with pytest.raises(WeightSyncError, match=r"version 6: .* 2 at most .* token 2 of row 0 \(prompt 4\), id 6"):
        sync.check_rollouts(rollouts, logprobs, version=6)


@pytest.mark.parametrize("lora", [None, LORA])
def test_weights_reach_engines_that_were_asleep(llama: str, lora: schema.Lora | None) -> None:
    """Their model's memory is really given back in between, on a CPU as on a GPU."""
    sync, learner, (worker,) = start(llama, lora=lora, turns=GpuTurns)
    engine: Any = worker.engine
    engine.moves_weights = True
    # On a CPU they are pages of the model's file, on a GPU memory of their own.
    for parameter in engine._model.parameters():
        parameter.data = parameter.data.clone()
    engine._weights = engine._model.state_dict() if lora is None else adapter_weights(engine._model)
    model = next(iter(engine._model.parameters())).untyped_storage()
    for version in (1, 2):
        sync._turns.learning()
        assert model.nbytes() == 0
        with pytest.raises(AssertionError, match=r"sleeps \(weights and cache\); `wake` comes first"):
            worker.probe()
        learner.nudge()
        sync.sync(version)
        assert model.nbytes() > 0
        assert worker.probe().version == version
        assert not learner.here
    worker.sleep(keep_weights=False)
    worker.wake()
    if lora is None:
        with pytest.raises(AssertionError, match=r"has given its weights up; `receive_weights` comes first"):
            worker.probe()
    else:
        worker.probe()
