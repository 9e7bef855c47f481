"""Weights loaded into a running vLLM again and again, in place where we know each layer, against vLLM's own reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.config import schema
from rlhf_ray.distributed.groups import WorkerGroup
from rlhf_ray.distributed.place import Place
from rlhf_ray.distributed.placement import Cluster, RoleRequest
from rlhf_ray.engines.vllm_generation import engine_environment
from rlhf_ray.errors import WorkerError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.workers.generator import Generator
from tests.tiny_models import make_gpt2, make_llama

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = list(range(5, 45))
Found = tuple[list[list[float]], dict[str, Tensor]]


class LoadingGenerator(Generator):
    """A generator whose weights come from a file instead of a learner."""

    def __init__(self, place: Place, *, model: str, **settings: Any) -> None:
        super().__init__(place, model=model, **settings)
        weights = load_file(Path(model) / "model.safetensors")
        # Tied weights come under both names, as a learner sends them.
        tied = next(
            tensor
            for name, tensor in weights.items()
            if name in ("model.embed_tokens.weight", "transformer.wte.weight")
        )
        self.checkpoint = {"lm_head.weight": tied, **weights}

    def load(self, scale: float, *, ours: bool, fail_after: int | None = None, without: str = "") -> Found:
        """Loads `scale` times the file's weights; a prompt's log-probabilities then, and all parameters."""
        weights = [(name, tensor * scale) for name, tensor in self.checkpoint.items() if name != without]
        engine: Any = self.engine
        engine._llm.collective_rpc(load_ours if ours else load_vllm, args=(arriving(weights, fail_after),))
        engine.reset_prefix_cache()
        return engine.prompt_logprobs([PROMPT]), engine._llm.collective_rpc(parameters)[0]

    def in_place(self) -> bool:
        """Whether the next weights are loaded in place."""
        engine: Any = self.engine
        return bool(engine._llm.collective_rpc(loads_in_place)[0])

    def embedded(self) -> tuple[Tensor, Tensor]:
        """A row times the embeddings: as vLLM multiplies by them, should it ever, and by what is looked up."""
        engine: Any = self.engine
        found: tuple[Tensor, Tensor] = engine._llm.collective_rpc(times_embeddings)[0]
        return found


def arriving(weights: list[tuple[str, Tensor]], fail_after: int | None) -> Iterator[tuple[str, Tensor]]:
    for number, pair in enumerate(weights):
        if number == fail_after:
            raise RuntimeError("the sender is gone")
        yield pair


def load_ours(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    from rlhf_ray.engines.vllm_loading import WeightLoader

    worker.rlhf_loader = worker.rlhf_loader or WeightLoader(worker)
    worker.rlhf_loader.load(weights)


def load_vllm(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    worker.reload_weights(weights_iterator=weights)


def loads_in_place(worker: Any) -> bool:
    return worker.rlhf_loader is not None and worker.rlhf_loader._layers is not None


def parameters(worker: Any) -> dict[str, Tensor]:
    model = worker.model_runner.get_model()
    return {name: tensor.data.clone() for name, tensor in model.named_parameters(remove_duplicate=False)}


def times_embeddings(worker: Any) -> tuple[Tensor, Tensor]:
    embeddings = worker.model_runner.get_model().model.embed_tokens
    row = torch.ones(1, embeddings.weight.shape[1])
    return embeddings.quant_method.apply(embeddings, row), torch.nn.functional.linear(row, embeddings.weight)


def make_qwen2(directory: Path) -> str:
    """Its attention has biases."""
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    model.save_pretrained(directory)
    load_tokenizer(make_llama(directory / "llama")).save_pretrained(directory)
    return str(directory)


def make_mixtral(directory: Path) -> str:
    """A mixture of experts, whose layers we do not know."""
    torch.manual_seed(4)
    MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)).save_pretrained(directory)
    load_tokenizer(make_llama(directory / "llama")).save_pretrained(directory)
    return str(directory)


MODELS: dict[str, Callable[[Path], str]] = {
    "llama": lambda folder: make_llama(folder, tied=False),
    "tied llama": make_llama,
    "gpt2": make_gpt2,
    "qwen2": make_qwen2,
    "mixtral": make_mixtral,
}


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., WorkerGroup[LoadingGenerator]]]:
    """Starts a generator, in the process of the one before."""
    config = schema.Generator(max_sequences=4)
    request = RoleRequest("generator", env=engine_environment(config, gpu=False), reuse="generator")
    with cluster.reserve([request]) as placement:

        def one(name: str, dtype: schema.DType) -> WorkerGroup[LoadingGenerator]:
            model = MODELS[name](tmp_path / "model")
            group = placement.start(
                "generator",
                LoadingGenerator,
                config=config.model_copy(update={"dtype": dtype}),
                model=model,
                revision=None,
                tokenizer=model,
                max_model_len=64,
                seed=1,
            )
            group.ready.result()
            return group

        yield one


def same(one: Found, other: Found) -> bool:
    """Bit for bit."""
    (logprobs, ours), (expected, theirs) = one, other
    return logprobs == expected and ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in MODELS), ("qwen2", "bfloat16")])
def test_weights_are_those_that_vllm_loads(
    start: Callable[..., WorkerGroup[LoadingGenerator]], name: str, dtype: schema.DType
) -> None:
    """Also after vLLM has loaded others in between; a model of unknown layers is loaded in vLLM's way every time."""
    generator = start(name, dtype)

    def load(scale: float, *, ours: bool) -> Found:
        return generator.first(LoadingGenerator.load, scale, ours=ours).result()

    expected = {scale: load(scale, ours=False) for scale in (1.0, 1.5, 0.75)}
    assert not same(expected[1.0], expected[1.5])
    for scale in (1.5, 1.0, 0.75, 1.5):
        assert same(load(scale, ours=True), expected[scale])
    assert generator.first(LoadingGenerator.in_place).result() == (name != "mixtral")
    assert same(load(1.0, ours=False), expected[1.0])
    assert same(load(0.75, ours=True), expected[0.75])


def test_embeddings_that_are_not_packed_again_are_never_those_of_before(
    start: Callable[..., WorkerGroup[LoadingGenerator]],
) -> None:
    generator = start("llama", "float32")
    for scale in (1.0, 1.5, 0.75):
        generator.first(LoadingGenerator.load, scale, ours=True).result()
        packed, looked_up = generator.first(LoadingGenerator.embedded).result()
        torch.testing.assert_close(packed, looked_up)


def test_a_transfer_that_breaks_off_leaves_a_whole_model(start: Callable[..., WorkerGroup[LoadingGenerator]]) -> None:
    """In vLLM's way, which is the first time's, and in place; the next one is as if nothing had been."""
    generator = start("llama", "float32")
    expected = generator.first(LoadingGenerator.load, 1.5, ours=False).result()
    for in_place in (False, True):
        for fail_after in (0, 3, 9, 20):
            assert generator.first(LoadingGenerator.in_place).result() == in_place
            with pytest.raises(WorkerError, match="the sender is gone"):
                generator.first(LoadingGenerator.load, 0.5, ours=True, fail_after=fail_after).result()
            assert not generator.first(LoadingGenerator.in_place).result()
            if in_place:
                assert same(generator.first(LoadingGenerator.load, 1.5, ours=True).result(), expected)
        assert same(generator.first(LoadingGenerator.load, 1.5, ours=True).result(), expected)


def test_what_was_incomplete_is_mended_by_the_second_transfer_after_it(
    start: Callable[..., WorkerGroup[LoadingGenerator]],
) -> None:
    """A layer that lacked a part is processed too early by the next one, which the sync's probe sees."""
    generator = start("llama", "float32")
    expected = generator.first(LoadingGenerator.load, 1.5, ours=False).result()
    lacking = "model.layers.1.self_attn.k_proj.weight"
    generator.first(LoadingGenerator.load, 1.0, ours=True, without=lacking).result()
    for in_place in (False, True, True):
        found = generator.first(LoadingGenerator.load, 1.5, ours=True).result()
        assert generator.first(LoadingGenerator.in_place).result() == in_place
        assert same(found, expected) == in_place
