"""Models and tokenizers: from a directory, from the hub, or fresh.

Whatever goes wrong becomes a ConfigError in plain words. Code that a model brings along is never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import httpx
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rlhf_ray.config.paths import ADAPTER_CONFIG
from rlhf_ray.config.schema import NewModel
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

DTypeName: TypeAlias = Literal["float32", "bfloat16"]

# As byte-level vocabularies write it, and as SentencePiece with byte fallback does.
_BYTE_FF = ("ÿ", "<0xFF>")
_WIDTHS = {"tiny": (128, 4, 4, 352), "mini": (256, 6, 4, 704), "small": (384, 8, 6, 1024)}


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub name; where it has no pad token, eos (else unk) serves, without resizing.

    Rows are masked by position and never by id, so a pad token that is also eos does no harm.

    Raises:
        ConfigError: no such directory, no tokenizer in it, the hub cannot be reached or refuses.
    """
    import transformers

    with _plain_words(name, revision, "tokenizer"):
        tokenizer = cast(
            "PreTrainedTokenizerBase",
            transformers.AutoTokenizer.from_pretrained(
                _local(name), **_source(name, revision), trust_remote_code=False
            ),
        )
    if len(tokenizer) == 0:
        raise ConfigError(f"{name}: no tokenizer found; give a tokenizer's directory or hub name under `tokenizer`")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration (config.json) of a directory or hub name.

    Raises:
        ConfigError: no such directory, no config.json in it, the hub cannot be reached or refuses.
    """
    import transformers

    with _plain_words(name, revision, "model"):
        return cast(
            "PretrainedConfig",
            transformers.AutoConfig.from_pretrained(_local(name), **_source(name, revision), trust_remote_code=False),
        )


def merges_weights(config: PretrainedConfig) -> bool:
    """Whether transformers holds several tensors of such a model's files as one, as it does with experts."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    kinds = {config.model_type, config.get_text_config().model_type}
    steps = [step for kind in kinds for step in get_checkpoint_conversion_mapping(kind) or ()]
    return any(isinstance(step, WeightConverter) for step in steps)


def load_causal_lm(
    name: str, revision: str | None = None, dtype: DTypeName = "float32", *, in_4_bits: bool = False
) -> PreTrainedModel:
    """A causal language model in evaluation mode on the CPU; every weight must come from the files.

    Args:
        dtype: type of the weights; of the computation, where they are in 4 bits.
        in_4_bits: linear layers but the output's in 4 bits (nf4), on the GPU; needs bitsandbytes.

    Raises:
        ConfigError: as `load_config`; or the model is of another kind, or weights are missing.
    """
    import transformers

    return _load(transformers.AutoModelForCausalLM, name, revision, dtype, "causal language model", in_4_bits=in_4_bits)


def load_classifier(
    name: str,
    revision: str | None = None,
    dtype: DTypeName = "float32",
    num_labels: int | None = None,
    *,
    in_4_bits: bool = False,
) -> PreTrainedModel:
    """A sequence-classification model in evaluation mode on the CPU; every weight must come from the files.

    Args:
        num_labels: number of outputs that it must have (1 for a reward model); None takes any.
        in_4_bits: as for `load_causal_lm`.

    Raises:
        ConfigError: as `load_config`; or the model is of another kind, weights are missing, or num_labels differs.
    """
    import transformers

    config = load_config(name, revision)
    if num_labels is not None and config.num_labels != num_labels:
        raise ConfigError(f"{name}: wanted a classifier with {num_labels} output(s), got {config.num_labels}")
    kind = "sequence-classification model"
    return _load(transformers.AutoModelForSequenceClassification, name, revision, dtype, kind, in_4_bits=in_4_bits)


def load_reward_model(
    name: str, revision: str | None, dtype: DTypeName, tokenizer: PreTrainedTokenizerBase, *, in_4_bits: bool = False
) -> PreTrainedModel:
    """A sequence-classification model with one logit, to be trained; from a causal language model its head is zero.

    Model and tokenizer get what transformers needs to find the last token of a row in a batch: a pad token that ends no
    text (`separate_padding`); where there is none it takes one row at a time.

    Args:
        dtype: type of the weights.
        tokenizer: the one that rows are encoded with.
        in_4_bits: as for `load_causal_lm`; the head stays as it is.

    Raises:
        ConfigError: as `load_config`; or the model has several outputs, or its scores are not read at the last token.
    """
    import transformers

    config = load_config(name, revision)
    if any("ForSequenceClassification" in architecture for architecture in config.architectures or ()):
        model = load_classifier(name, revision, dtype, num_labels=1, in_4_bits=in_4_bits)
    else:
        config.num_labels = 1
        model = _load(
            transformers.AutoModelForSequenceClassification,
            name,
            revision,
            dtype,
            "language model",
            config,
            fresh=("score.weight",),
            in_4_bits=in_4_bits,
        )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(
            f"{name}: got {type(model).__name__}, wanted a model that reads from left to right and scores the last "
            "token, such as Llama, Qwen or GPT-2"
        )
    ends = eos_token_ids(tokenizer, model.config)
    separate_padding(tokenizer, ends)
    padding = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = None if padding in ends else padding
    model.config.architectures = [type(model).__name__]
    return model


def separate_padding(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    """Gives a tokenizer that pads with an end-of-sequence token another pad token, where its vocabulary has one.

    The token of the byte 0xFF serves: no text in UTF-8 has that byte, and every byte-level vocabulary has its token.

    Args:
        ends: every id that ends a sequence.
    """
    if tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    for piece in _BYTE_FF:
        if piece in vocabulary and tokenizer.decode([vocabulary[piece]]) == "\ufffd":
            # The letter of the same name stays a letter, unless it stands alone as a word.
            tokenizer.add_tokens([AddedToken(piece, single_word=True, normalized=False)], special_tokens=True)
            tokenizer.pad_token = piece
            return


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None = None,
    generation: GenerationConfig | None = None,
) -> tuple[int, ...]:
    """Every id that ends a sequence, sorted: the tokenizer's, config.json's and generation_config.json's."""
    found: set[int] = set()
    for value in (
        tokenizer.eos_token_id,
        getattr(config, "eos_token_id", None),
        getattr(generation, "eos_token_id", None),
    ):
        found |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return tuple(sorted(found))


def load_eos_token_ids(name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a sequence of the model at `name`, sorted; its files are read, its weights are not."""
    import transformers

    config = load_config(name, revision)
    try:
        generation = transformers.GenerationConfig.from_pretrained(_local(name), **_source(name, revision))
    except OSError:
        generation = None
    return eos_token_ids(tokenizer, config, generation)


def check_vocabulary(name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the tokenizer has ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ConfigError(
            f"{name}: the tokenizer's ids go up to {highest}, the model has {config.vocab_size} embeddings; "
            "give the tokenizer that belongs to the model"
        )


def torch_dtype(name: DTypeName) -> torch.dtype:
    """torch's type for a name in a pipeline file."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def new_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts; it puts `<s>` in front of every text and knows any string."""
    import transformers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_value_elements(config: PretrainedConfig) -> int:
    """Elements of keys and values that one token has in an engine's cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim(config))


def new_config(spec: NewModel, **special_ids: int | None) -> PretrainedConfig:
    """The configuration of a fresh model."""
    import transformers

    hidden, layers, heads, intermediate = _WIDTHS[spec.size]
    common: dict[str, Any] = {"vocab_size": spec.vocab_size, **special_ids}
    if spec.family == "llama":
        return transformers.LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=spec.max_length,
            tie_word_embeddings=False,
            **common,
        )
    return transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=spec.max_length, **common)


def new_model(spec: NewModel, texts: Iterable[str], *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A randomly initialised model and the tokenizer trained on `texts`: the same for the same arguments."""
    import transformers

    tokenizer = new_tokenizer(texts, vocab_size=spec.vocab_size, max_length=spec.max_length)
    config = new_config(
        spec,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "new_model"))
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval(), tokenizer


def save_new_model(directory: Path, spec: NewModel, texts: Iterable[str], *, seed: int) -> None:
    """Writes `new_model` as a Hugging Face directory."""
    quiet_transformers()
    model, tokenizer = new_model(spec, texts, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def quiet_transformers() -> None:
    """No progress bars, and only errors in the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _load(
    auto: Any,
    name: str,
    revision: str | None,
    dtype: DTypeName,
    kind: str,
    config: PretrainedConfig | None = None,
    *,
    fresh: Sequence[str] = (),
    in_4_bits: bool = False,
) -> PreTrainedModel:
    """A model whose weights all come from the files, but for those in `fresh`, which are zero where they do not."""
    quiet_transformers()
    config = config or load_config(name, revision)
    with _plain_words(name, revision, "model"):
        try:
            model, report = auto.from_pretrained(
                _local(name),
                **_source(name, revision),
                config=config,
                dtype=torch_dtype(dtype),
                attn_implementation="sdpa",
                **(_four_bits(dtype) if in_4_bits else {}),
                trust_remote_code=False,
                output_loading_info=True,
            )
        except ValueError as error:
            raise ConfigError(f"{name}: wanted a {kind}, got something else: {_first_line(error)}") from error
    missing = set(report["missing_keys"])
    for weight in missing.intersection(fresh):
        torch.nn.init.zeros_(model.get_parameter(weight))
    absent = sorted(missing.difference(fresh) | {entry[0] for entry in report["mismatched_keys"]})
    if absent:
        architecture = ", ".join(model.config.architectures or ["unknown"])
        raise ConfigError(
            f"{name}: wanted a {kind}, got {architecture} without the weights {', '.join(absent[:3])}"
            f"{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}"
        )
    return cast("PreTrainedModel", model.eval())


def _four_bits(dtype: DTypeName) -> dict[str, Any]:
    """What lets from_pretrained quantise as QLoRA does (arXiv:2305.14314), which it does on the GPU."""
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(dtype),
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def _local(name: str) -> str:
    return os.path.expanduser(name)


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """What says to from_pretrained where to look; without a hub only in directories and in the cache."""
    offline = not Path(_local(name)).is_dir() and not _hub_answers()
    return {"revision": revision, "local_files_only": offline}


@cache
def _hub_answers() -> bool:
    """Whether the hub can be reached; asked once, because its own client retries every file for 20 seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=10.0)
    except httpx.TransportError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _plain_words(name: str, revision: str | None, what: str) -> Iterator[None]:
    """Checks a local path, and turns the hub's errors into ConfigErrors."""
    path = Path(_local(name))
    if name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1:
        if not path.is_dir():
            raise ConfigError(f"{name}: no such directory; wanted a Hugging Face {what} directory or a hub name")
        if what == "model" and (path / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{name}: a peft adapter directory; wanted a whole model: merge it into its base "
                "(`lora.result: merged` where a stage made it)"
            )
        if what == "model" and not (path / "config.json").is_file():
            raise ConfigError(f"{name}: no config.json in this directory; wanted a Hugging Face model directory")
    try:
        yield
    except (OSError, ValueError, hub_errors.HfHubHTTPError) as error:
        raise ConfigError(_explain(name, revision, what, path.is_dir(), error)) from error


def _explain(name: str, revision: str | None, what: str, local: bool, error: Exception) -> str:
    if local:
        return f"{name}: the {what} in this directory cannot be read: {_first_line(error)}"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if met(hub_errors.GatedRepoError):
        return f"{name}: this {what} is gated; accept its terms on its hub page, then set HF_TOKEN to your access token"
    if met(hub_errors.RevisionNotFoundError):
        return f"{name}: the hub has no revision {revision!r} of this {what}"
    if met(hub_errors.RepositoryNotFoundError):
        return f"{name}: the hub has no {what} of this name, or it is private; check the spelling, or set HF_TOKEN"
    if met(hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        "connect" in str(link).lower() for link in chain
    ):
        return (
            f"{name}: not a directory here, and the Hugging Face hub cannot be reached; "
            "give a local directory, or check the network and HF_ENDPOINT, HF_HUB_OFFLINE"
        )
    return f"{name}: the {what} cannot be loaded: {_first_line(error)}"
