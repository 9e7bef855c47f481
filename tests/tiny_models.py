"""Tiny random models with tokenizers, written as Hugging Face directories in milliseconds.

Every function returns its directory as a string and writes nothing where a model is there already,
so a directory of the test session (`tmp_path_factory`) works as a cache. Heads have 32 dimensions,
which vLLM's CPU attention can do.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = tuple(
    f"The {thing} by {name} was {verdict}. I {feeling} it, and the {part} made me {reaction}!"
    for thing, name, verdict, feeling, part, reaction in product(
        ("film", "movie", "story"),
        ("Anna", "Boris", "Chen"),
        ("wonderful", "terrible", "long"),
        ("loved", "hated"),
        ("ending", "music", "acting"),
        ("laugh", "cry", "sleep"),
    )
)
"""A corpus for tokenizers and training: 486 short texts."""


def make_llama(
    directory: str | Path, *, seed: int = 0, vocab_size: int = 300, tied: bool = True, layers: int = 2
) -> str:
    """A Llama of 2 heads of 32 with a byte-level BPE tokenizer of its own: bos <s>, eos </s>, pad <pad>."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        tokenizer = _byte_tokenizer(vocab_size, special=("<pad>", "<s>", "</s>"), bos="<s>", eos="</s>", pad="<pad>")
        torch.manual_seed(seed)
        _save(LlamaForCausalLM(_llama_config(tokenizer, vocab_size, tied, layers)), tokenizer, directory)
    return str(directory)


def make_gpt2(directory: str | Path, *, seed: int = 0, vocab_size: int = 300, layers: int = 2) -> str:
    """A GPT-2 of 2 heads of 32 with <|endoftext|> as bos and eos and, like GPT-2, no pad token; dropout 0.1."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        end = "<|endoftext|>"
        tokenizer = _byte_tokenizer(vocab_size, special=(end,), bos=end, eos=end, pad=None)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=64,
            n_layer=layers,
            n_head=2,
            n_positions=256,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(seed)
        _save(GPT2LMHeadModel(config), tokenizer, directory)
    return str(directory)


def make_classifier(
    directory: str | Path, *, seed: int = 0, vocab_size: int = 200, max_length: int = 64, labels: int = 2
) -> str:
    """A DistilBERT text classifier with a lower-case WordPiece tokenizer of its own.

    Its labels are NEGATIVE 0 and POSITIVE 1, or the first of them.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        tokenizer = _word_piece_tokenizer(vocab_size, max_length)
        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=max_length,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(["NEGATIVE", "POSITIVE"][:labels])),
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
        )
        torch.manual_seed(seed)
        _save(DistilBertForSequenceClassification(config), tokenizer, directory)
    return str(directory)


def make_reward_model(
    directory: str | Path, *, seed: int = 0, vocab_size: int = 300, tokenizer: str | None = None, labels: int = 1
) -> str:
    """A Llama with one logit (or `labels`); its tokenizer is that of another directory, or lower-case WordPiece."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        own = _word_piece_tokenizer(vocab_size, 256)
        if tokenizer is not None:
            own = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        config = _llama_config(own, max(vocab_size, len(own)), False, 2)
        config.num_labels = labels
        torch.manual_seed(seed)
        _save(LlamaForSequenceClassification(config), own, directory)
    return str(directory)


def _llama_config(tokenizer: PreTrainedTokenizerFast, vocab_size: int, tied: bool, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _byte_tokenizer(
    vocab_size: int, *, special: tuple[str, ...], bos: str, eos: str, pad: str | None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    extra = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, model_max_length=256, **extra
    )


def _word_piece_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    # Renamed when complete, so that a directory with config.json is a whole model.
    partial = directory.with_name(directory.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(directory)
