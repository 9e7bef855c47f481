"""Loading and making models and tokenizers, and the words for what goes wrong."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForSequenceClassification

from rlhf_ray.config.schema import NewModel
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import loading
from rlhf_ray.models.loading import (
    check_vocabulary,
    eos_token_ids,
    load_causal_lm,
    load_classifier,
    load_config,
    load_eos_token_ids,
    load_reward_model,
    load_tokenizer,
    new_model,
    new_tokenizer,
)
from tests.tiny_models import make_classifier, make_gpt2, make_reward_model

TEXTS = ["The film was a joy.", "A dull film; nobody laughed."]


def test_new_model_depends_on_its_arguments_alone() -> None:
    first, first_tokenizer = new_model(NewModel(vocab_size=300), TEXTS, seed=1)
    torch.rand(7)
    again, again_tokenizer = new_model(NewModel(vocab_size=300), TEXTS, seed=1)
    other, _ = new_model(NewModel(vocab_size=300), TEXTS, seed=2)
    assert first_tokenizer.get_vocab() == again_tokenizer.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_new_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    new_model(NewModel(vocab_size=300), TEXTS, seed=1)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.9), ("mini", 5.1), ("small", 14.5)])
def test_sizes(size: Any, millions: float) -> None:
    model, _ = new_model(NewModel(size=size), TEXTS, seed=1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
    assert model.config.head_dim in (32, 64)


def test_new_tokenizer_starts_every_text_and_round_trips_any_string() -> None:
    tokenizer = new_tokenizer(TEXTS, vocab_size=300, max_length=64)
    text = "  Zoë's naïve   film\n\t日本 🎬 "
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_saved_tokenizer_is_the_same(model_directory: Path) -> None:
    tokenizer = load_tokenizer(str(model_directory))
    made = new_tokenizer(TEXTS, vocab_size=300, max_length=64)
    assert tokenizer.bos_token_id == made.bos_token_id
    assert tokenizer("The film")["input_ids"][0] == tokenizer.bos_token_id


def test_pad_token_is_found_without_growing(model_directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == len(tokenizer)


def test_several_eos_ids_are_joined(llama_directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama_directory))
    assert tokenizer.eos_token_id == 2
    config = LlamaConfig(eos_token_id=[2, 7])
    assert eos_token_ids(tokenizer, config, GenerationConfig(eos_token_id=9)) == (2, 7, 9)
    shutil.copytree(llama_directory, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5, 2]}))
    assert load_eos_token_ids(str(tmp_path / "model"), None, tokenizer) == (2, 5)
    path.unlink()
    assert load_eos_token_ids(str(tmp_path / "model"), None, tokenizer) == (2,)


def test_missing_directory_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\./nowhere: no such directory"):
        load_causal_lm("./nowhere")


def test_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_config(str(tmp_path))


def test_directory_without_a_tokenizer_is_named(llama_directory: Path, tmp_path: Path) -> None:
    shutil.copy(llama_directory / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_directory_without_weights_is_named(llama_directory: Path, tmp_path: Path) -> None:
    shutil.copy(llama_directory / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_causal_lm(str(tmp_path))


def test_classifier_is_not_a_language_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), num_labels=1).config.num_labels == 1
    with pytest.raises(ConfigError, match=r"wanted a causal language model.*lm_head\.weight"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(ConfigError, match=r"2 output\(s\), got 1"):
        load_classifier(str(tmp_path), num_labels=2)


def test_language_model_is_not_a_classifier(llama_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"wanted a sequence-classification model.*score\.weight"):
        load_classifier(str(llama_directory))


def test_tokenizer_of_another_model_is_refused(llama_directory: Path) -> None:
    larger = new_tokenizer(TEXTS * 50, vocab_size=310, max_length=64)
    larger.add_tokens([f"extra{i}" for i in range(20)])
    with pytest.raises(ConfigError, match="300 embeddings"):
        check_vocabulary("model", load_config(str(llama_directory)), larger)


def test_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.constants, "ENDPOINT", "http://127.0.0.1:9")
    loading._hub_answers.cache_clear()
    start = time.monotonic()
    try:
        with pytest.raises(ConfigError, match="hub cannot be reached"):
            load_causal_lm("someone/some-model")
        with pytest.raises(ConfigError, match="hub cannot be reached"):
            load_tokenizer("someone/some-model")
    finally:
        loading._hub_answers.cache_clear()
    assert time.monotonic() - start < 5


def _response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (hub_errors.GatedRepoError("403", response=_response(403)), "gated.*HF_TOKEN"),
        (hub_errors.RepositoryNotFoundError("404", response=_response(404)), "no model of this name"),
        (hub_errors.RevisionNotFoundError("404", response=_response(404)), "no revision 'main2'"),
        (hub_errors.LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (ConnectionError("refused"), "hub cannot be reached"),
    ],
)
def test_hub_errors_become_plain_words(monkeypatch: pytest.MonkeyPatch, cause: Exception, words: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("many lines of advice") from cause

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=words):
        load_config("someone/some-model", "main2")


def test_a_reward_model_starts_from_a_language_model_with_a_head_of_zero(llama_directory: Path) -> None:
    model = load_reward_model(str(llama_directory), None, "float32", load_tokenizer(str(llama_directory)))
    trunk = load_causal_lm(str(llama_directory)).base_model
    assert model.score.weight.shape[0] == 1
    assert not model.score.weight.any()
    assert torch.equal(model.model.embed_tokens.weight, trunk.embed_tokens.weight)
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.config.pad_token_id == 0


def test_padding_that_is_also_the_end_gives_way_to_a_token_that_ends_no_text(tmp_path: Path) -> None:
    """transformers would take the end of a row for padding, and read the score before it."""
    name = make_gpt2(tmp_path / "gpt2")
    tokenizer = load_tokenizer(name)
    before = tokenizer.get_vocab()
    texts = ["Haÿ-les-Roses", "ÿÿ", "The film"]
    ids = tokenizer(texts)["input_ids"]
    model = load_reward_model(name, None, "float32", tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == tokenizer.pad_token_id

    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert saved.pad_token_id == tokenizer.pad_token_id
    assert saved.get_vocab() == before
    assert saved(texts)["input_ids"] == ids
    assert tokenizer.pad_token_id not in {token for row in ids for token in row}


def test_a_vocabulary_without_a_spare_token_names_no_padding(tmp_path: Path) -> None:
    name = make_gpt2(tmp_path / "gpt2")
    tokenizer = load_tokenizer(make_classifier(tmp_path / "words", labels=1))
    tokenizer.eos_token = tokenizer.pad_token = "[SEP]"
    assert load_reward_model(name, None, "float32", tokenizer).config.pad_token_id is None


def test_a_reward_model_starts_from_a_reward_model(tmp_path: Path) -> None:
    name = make_reward_model(tmp_path / "one")
    model = load_reward_model(name, None, "float32", load_tokenizer(name))
    assert torch.equal(model.score.weight, load_classifier(name).score.weight)


def test_what_cannot_become_a_reward_model(tmp_path: Path) -> None:
    two = make_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match=r"wanted a classifier with 1 output\(s\), got 2"):
        load_reward_model(two, None, "float32", load_tokenizer(two))
    both_ways = make_classifier(tmp_path / "bert", labels=1)
    with pytest.raises(ConfigError, match="reads from left to right"):
        load_reward_model(both_ways, None, "float32", load_tokenizer(both_ways))
