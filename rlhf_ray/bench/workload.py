"""The work that is measured: models of known sizes with random weights, prompts, and answers of natural lengths.

The models end a response with a chance of 1/64 at every token, so lengths are geometric, cut at `max_new_tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Size = Literal["s", "sm", "m", "l"]

END = "<end>"
_END_CHANCE = 1 / 64


@dataclass(frozen=True)
class Shape:
    """What decides a model's size; s has 9 M, sm 52 M, m 82 M and l 200 M parameters."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int


SHAPES: dict[Size, Shape] = {
    "s": Shape(hidden=256, layers=6, intermediate=1280, heads=4, key_value_heads=2),
    "sm": Shape(hidden=640, layers=10, intermediate=1792, heads=10, key_value_heads=5),
    "m": Shape(hidden=768, layers=12, intermediate=2048, heads=12, key_value_heads=6),
    "l": Shape(hidden=1024, layers=16, intermediate=3072, heads=16, key_value_heads=8),
}


def save_model(directory: Path, size: Size = "s", *, vocab_size: int = 4096, max_length: int = 1024) -> Path:
    """Writes a Llama model and a tokenizer whose words `t0`, `t1`, ... are one token each; gives the directory."""
    shape = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    _end_at_random(model)
    model.save_pretrained(directory)
    tokenizer(vocab_size).save_pretrained(directory)
    return directory


def tokenizer(vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Word t<i> is token i; token 0 ends a response."""
    words = {END: 0} | {f"t{number}": number for number in range(1, vocab_size)}
    base = Tokenizer(WordLevel(words, unk_token="t1"))
    base.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token=END, pad_token=END)


def text(tokens: list[int]) -> str:
    """The text that the tokenizer reads as these tokens."""
    return " ".join(f"t{token}" for token in tokens)


def prompts(
    count: int, *, shortest: int = 32, longest: int = 64, vocab_size: int = 4096, seed: int = 0
) -> list[list[int]]:
    """Random tokens, lengths uniform."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=random).tolist()
    return [_tokens(length, vocab_size, random) for length in lengths]


def responses(count: int, *, longest: int = 128, vocab_size: int = 4096, seed: int = 1) -> list[list[int]]:
    """Random tokens, lengths geometric with the chance of 1/64, cut at `longest`; those not cut end with token 0."""
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=random).double().tolist()
    found = []
    for draw in draws:
        length = 1 + int(math.log(1 - draw) / math.log(1 - _END_CHANCE))
        tokens = _tokens(min(length, longest), vocab_size, random)
        found.append([*tokens[:-1], 0] if length <= longest else tokens)
    return found


def pairs(count: int, *, vocab_size: int = 4096, seed: int = 2) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected): prompts of 16 to 64 tokens, answers log-normal (median 64, sigma 0.7), 8 to 384."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for prompt in prompts(count, shortest=16, longest=64, vocab_size=vocab_size, seed=seed + 1):
        lengths = torch.randn(2, generator=random).mul(0.7).add(math.log(64)).exp().clamp(8, 384).int().tolist()
        chosen, rejected = ([*_tokens(length - 1, vocab_size, random), 0] for length in lengths)
        found.append((prompt, chosen, rejected))
    return found


def _tokens(length: int, vocab_size: int, random: torch.Generator) -> list[int]:
    return [int(token) for token in torch.randint(1, vocab_size, (length,), generator=random)]


@torch.no_grad()
def _end_at_random(model: LlamaForCausalLM) -> None:
    """One hidden unit stays constant through all layers, and gives token 0 its constant chance."""
    body = model.model
    body.embed_tokens.weight[:, 0] = 1.0
    for layer in body.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    sample = torch.randint(1, model.config.vocab_size, (4, 64))
    states = body(input_ids=sample).last_hidden_state
    others = model.lm_head(states)[..., 1:].float().logsumexp(-1).mean()
    wanted = math.log(_END_CHANCE / (1 - _END_CHANCE)) + float(others)
    model.lm_head.weight[0] = 0.0
    model.lm_head.weight[0, 0] = wanted / float(states[..., 0].mean())
