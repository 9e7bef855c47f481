"""Rows that lie end to end are attended to one by one: as if each were alone, whatever the architecture."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from rlhf_ray.models import attention
from rlhf_ray.models.attention import attend_by_rows, rows_of
from rlhf_ray.models.loading import load_causal_lm

LENGTHS = (7, 1, 12, 4)
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def mistral(window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window, attn_implementation="eager"))
    return model.double().eval()


def pack() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return tokens, torch.cat([torch.arange(length) for length in LENGTHS])[None]


def alone(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    rows = (model(input_ids=row, use_cache=False).logits[0] for row in tokens.split(list(LENGTHS), 1))
    return torch.cat(list(rows))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_pack_gives_what_its_rows_give_alone_with_eager_attention(window: int | None) -> None:
    """With 4 heads of queries on 2 of keys and values; eager attention has its softmax in float32."""
    model = mistral(window)
    tokens, positions = pack()
    wanted = alone(model, tokens)
    if window == 3:
        assert not torch.allclose(wanted, alone(mistral(None), tokens))
    assert attend_by_rows(model)
    found = model(input_ids=tokens, position_ids=positions, use_cache=False, **rows_of(model, positions)).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_attends_in_float32_on_a_cpu() -> None:
    random = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads, 20, 8, generator=random).bfloat16() for heads in (4, 2, 2))
    rows = attention.Rows((13, 7), torch.tensor([0, 13, 20], dtype=torch.int32))
    module = torch.nn.Module()
    found, _ = attention._attention(module, query, key, value, None, rows=rows)
    wanted, _ = attention._attention(module, query.float(), key.float(), value.float(), None, rows=rows)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


def test_rows_are_found_where_positions_start_again(llama_directory: Path) -> None:
    model = load_causal_lm(str(llama_directory))
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert rows_of(model, positions) == {}
    assert attend_by_rows(model)
    rows = rows_of(model, positions)["rows"]
    assert rows.lengths == (3, 1, 2)
    assert rows.ends.tolist() == [0, 3, 4, 6]
    assert rows_of(model, torch.arange(3).expand(2, 3)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_found_to_work_and_is_not_written_down(model_directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_causal_lm(str(model_directory)).to(dtype)
    assert attend_by_rows(model)
    model.save_pretrained(tmp_path)
    assert "rlhf_ray" not in (tmp_path / "config.json").read_text()


def test_attention_that_rows_would_see_through_is_left_alone(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(str(model_directory))
    before = model.config._attn_implementation
    original = type(model.base_model).forward

    def forgetful(self: PreTrainedModel, rows: object = None, **inputs: Tensor) -> object:
        return original(self, **inputs)

    monkeypatch.setattr(type(model.base_model), "forward", forgetful)
    assert not attend_by_rows(model)
    assert model.config._attn_implementation == before


def test_attention_with_caps_or_chunks_is_left_alone() -> None:
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=50.0))
    before = capped.config._attn_implementation
    assert not attend_by_rows(capped)
    assert capped.config._attn_implementation == before
    chunked = mistral(None)
    chunked.config.attention_chunk_size = 8
    assert not attend_by_rows(chunked)
