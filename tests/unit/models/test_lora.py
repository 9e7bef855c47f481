"""Adapters in a model: against peft's own loading, merging and switching off."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_ray.config import schema
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_causal_lm, load_reward_model, load_tokenizer
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
from rlhf_ray.models.saving import write_adapter

TOKENS = torch.tensor([[5, 17, 80, 200, 9, 33, 250, 4]])


def adapted(directory: Path, *, seed: int = 1, **settings: Any) -> tuple[PreTrainedModel, schema.Lora]:
    """A model with an adapter whose B is not zero."""
    model = load_causal_lm(str(directory))
    lora = schema.Lora(**({"rank": 4, "alpha": 6.0} | settings))
    add_adapter(model, lora, seed=seed, where="policy.lora")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapter_weights(model).items():
        if ".lora_B." in name:
            weight.data.normal_(std=0.1, generator=generator)
    return model, lora


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_a_fresh_adapter_changes_nothing_and_is_the_same_for_the_same_seed(model_directory: Path) -> None:
    base = load_causal_lm(str(model_directory))
    made = []
    for seed in (1, 1, 2):
        model = load_causal_lm(str(model_directory))
        torch.manual_seed(len(made))
        wanted = torch.rand(2)
        torch.manual_seed(len(made))
        add_adapter(model, schema.Lora(rank=4), seed=seed, where="policy.lora")
        assert torch.equal(torch.rand(2), wanted)
        assert torch.equal(logits(model), logits(base))
        made.append(adapter_weights(model))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not any(torch.equal(made[0][name], made[2][name]) for name in made[0] if ".lora_A." in name)
    assert not any(weight.any() for name, weight in made[0].items() if ".lora_B." in name)


def test_the_adapter_alone_is_trained(model_directory: Path) -> None:
    model, _ = adapted(model_directory)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == len(adapter_weights(model))
    assert all(".lora_" in name for name in trained)
    model(TOKENS).logits.sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


def test_switched_off_it_is_the_base_bit_for_bit(model_directory: Path) -> None:
    model, _ = adapted(model_directory)
    with_adapter = logits(model)
    trained = [weight.requires_grad for weight in model.parameters()]
    with adapter_off(model):
        assert torch.equal(logits(model), logits(load_causal_lm(str(model_directory))))
    assert torch.equal(logits(model), with_adapter)
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert (with_adapter - logits(load_causal_lm(str(model_directory)))).abs().max() > 1e-2
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(logits(model), with_adapter)


def test_a_model_in_evaluation_mode_stays_in_it(llama_directory: Path) -> None:
    model, _ = adapted(llama_directory, dropout=0.5)
    assert torch.equal(logits(model), logits(model))


def test_names_are_those_of_peft_and_of_the_base(model_directory: Path) -> None:
    model, _ = adapted(model_directory)
    wanted = get_peft_model_state_dict(model)
    found = adapter_weights(model)
    assert {name.removeprefix("base_model.model.") for name in found} == set(wanted)
    assert all(torch.equal(weight, wanted[name.removeprefix("base_model.model.")]) for name, weight in found.items())
    base = load_causal_lm(str(model_directory)).state_dict()
    assert list(named_weights(model)) == list(base)
    assert all(torch.equal(weight, base[name]) for name, weight in named_weights(model).items())


def test_unset_target_modules_are_all_linear_layers_but_the_output(llama_directory: Path, gpt2_directory: Path) -> None:
    names = {name.split(".")[-3] for name in adapter_weights(adapted(llama_directory)[0])}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = {name.split(".")[-3] for name in adapter_weights(adapted(gpt2_directory)[0])}
    assert names == {"c_attn", "c_proj", "c_fc"}


def test_target_modules_by_name_or_path(llama_directory: Path) -> None:
    model, _ = adapted(llama_directory, target_modules=("v_proj", "layers.1.mlp.up_proj"))
    names = [name.removeprefix("base_model.model.model.layers.") for name in adapter_weights(model)]
    assert [name for name in names if ".lora_A." in name] == [
        "0.self_attn.v_proj.lora_A.weight",
        "1.self_attn.v_proj.lora_A.weight",
        "1.mlp.up_proj.lora_A.weight",
        "2.self_attn.v_proj.lora_A.weight",
        "3.self_attn.v_proj.lora_A.weight",
    ]


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "embed_tokens", "proj"])
def test_a_target_module_that_is_no_linear_layer(llama_directory: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy.lora.target_modules: got {name}, wanted .* q_proj, .*down_proj$"):
        adapted(llama_directory, target_modules=("v_proj", name))


def test_merged_weights_compute_what_base_and_adapter_do(model_directory: Path) -> None:
    model, _ = adapted(model_directory)
    whole = load_causal_lm(str(model_directory))
    weights = dict(merged(model, list(named_weights(model).items()), adapter_weights(model)))
    whole.load_state_dict(weights)
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-6 * float(logits(model).abs().max()), rtol=0)
    assert (logits(whole) - logits(load_causal_lm(str(model_directory)))).abs().max() > 1e-2


def test_one_merged_weight_by_hand(llama_directory: Path) -> None:
    model, _ = adapted(llama_directory, rank=1, alpha=3.0, target_modules=("q_proj",))
    name, key = "model.layers.0.self_attn.q_proj.weight", "base_model.model.model.layers.0.self_attn.q_proj"
    a = torch.zeros(1, 128)
    a[0, 5] = 2.0
    b = torch.zeros(128, 1)
    b[7, 0] = 0.5
    ((_, found),) = merged(
        model, [(name, torch.ones(128, 128))], {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    )
    assert found[7, 5] == 4.0
    assert found.sum() == 128 * 128 + 3


def test_peft_loads_what_is_written(model_directory: Path, tmp_path: Path) -> None:
    model, lora = adapted(model_directory, alpha=5.5)
    weights = adapter_weights(model)
    config = adapter_config(
        lora, weights, base=str(model_directory), transposed=keeps_weights_transposed(model), revision=None
    )
    write_adapter(tmp_path, weights, config, load_tokenizer(str(model_directory)), notes={})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_directory), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    # transformers finds the base by itself.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path)("joy")["input_ids"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] == (
        model_directory.name == "gpt2"
    )
    assert not (tmp_path / "notes.json").exists()


def test_the_head_of_a_reward_model_is_trained_whole(llama_directory: Path) -> None:
    model = load_reward_model(str(llama_directory), None, "float32", load_tokenizer(str(llama_directory)))
    lora = schema.Lora(rank=2, target_modules=("q_proj",))
    add_adapter(model, lora, seed=1, where="policy.lora", trained=("score",))
    names = list(adapter_weights(model))
    assert names[-1] == "base_model.model.score.weight"
    assert len(names) == 4 * 2 + 1
    config = adapter_config(lora, names, base="b", task="SEQ_CLS")
    assert config["modules_to_save"] == ["score"]
    assert config["target_modules"] == ["q_proj"]


def test_four_bits_need_bitsandbytes_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"policy.lora.quantise: got nf4, but bitsandbytes is not installed"):
        check_four_bits("policy.lora.quantise")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="no GPU"):
        check_four_bits("policy.lora.quantise")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_four_bits("policy.lora.quantise")


def test_a_model_without_an_adapter_does_not_import_peft(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(str(model_directory))
    monkeypatch.delitem(sys.modules, "peft.tuners.lora")
    assert set(named_weights(model)) >= {name for name, _ in model.named_parameters()}
    assert "peft.tuners.lora" not in sys.modules
