"""Where log-probabilities come from: the output layer itself, or all logits where a model does more to them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.models.forward import forward
from rlhf_ray.models.heads import LanguageModel, OutputLayer, build_network, ends_in_projection
from rlhf_ray.models.loading import load_causal_lm

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
MORE_THAN_A_PROJECTION = {
    "capped": Gemma2Config(**SIZES, final_logit_softcapping=30.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.0625),
    "divided": GraniteConfig(**SIZES, logits_scaling=8.0),
}
CPU = torch.device("cpu")


def sequences() -> Sequences:
    return make_sequences([[3, 4], [5]], [[6, 7, 8], [9]])


def fresh(config: PretrainedConfig, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_ends_in_its_output_layer(model_directory: Path, dtype: str) -> None:
    network = build_network(load_causal_lm(str(model_directory), None, dtype), "none")
    assert isinstance(network, LanguageModel)
    assert network.projects
    assert isinstance(network.language_model.get_output_embeddings(), OutputLayer)
    assert ends_in_projection(network.language_model)


@pytest.mark.parametrize("name", MORE_THAN_A_PROJECTION)
def test_logprobs_of_a_model_that_does_more_to_its_logits(name: str) -> None:
    model = fresh(MORE_THAN_A_PROJECTION[name])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    network = build_network(model, "none")
    assert isinstance(network, LanguageModel)
    assert not network.projects
    found = forward(network, sequences(), layout="padded", device=CPU, temperature=0.7, entropy="reported")
    logits = model(input_ids=sequences().tokens[:1], use_cache=False).logits[0] / 0.7
    expected = logits.log_softmax(-1)[[1, 2, 3], [6, 7, 8]]
    torch.testing.assert_close(found.logprobs[0, 2:5], expected, rtol=1e-5, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=logits[1:4]).entropy()
    torch.testing.assert_close(found.entropy[0, 2:5], entropy, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_more_to_its_last_states() -> None:
    model = fresh(LlamaConfig(**SIZES))
    assert ends_in_projection(model)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    assert not ends_in_projection(model)


def test_another_kind_of_output_layer_gives_all_logits() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = fresh(LlamaConfig(**SIZES))
    model.lm_head.__class__ = Doubled
    assert not ends_in_projection(model)


@pytest.mark.parametrize("head", ["none", "both"])
def test_both_ways_have_the_same_gradients(model_directory: Path, head: str) -> None:
    network = build_network(load_causal_lm(str(model_directory)), head).double().eval()  # type: ignore[arg-type]
    assert isinstance(network, LanguageModel)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        found = forward(network, sequences(), layout="padded", device=CPU, temperature=0.7, entropy="trained")
        (found.logprobs.square().sum() + found.entropy.square().sum() + found.values.sum()).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    ours = gradients()
    network.projects = False
    for one, other in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", ["none", "both"])
def test_an_output_layer_still_gives_logits(model_directory: Path, head: str) -> None:
    model = load_causal_lm(str(model_directory))
    tokens = torch.tensor([[3, 4, 5]])
    before = model(input_ids=tokens, use_cache=False).logits
    build_network(model, head)  # type: ignore[arg-type]
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)
