"""A peft adapter and its base model as one whole model."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_tokenizer

ADAPTER = "adapter_config.json"


def merge_adapter(directory: str, target: Path) -> str:
    """Writes an adapter's language model, merged with its base, as a Hugging Face directory; that directory.

    Args:
        directory: peft adapter directory; its config names the base.
        target: the directory to write.

    Raises:
        ConfigError: the base or the adapter cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig

    try:
        base = PeftConfig.from_pretrained(directory).base_model_name_or_path
        whole = AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"{directory}: the peft adapter cannot be merged with its base: {lines[0] if lines else error}"
        ) from error
    whole.save_pretrained(target)
    has_tokenizer = (Path(directory) / "tokenizer_config.json").is_file()
    load_tokenizer(directory if has_tokenizer else base).save_pretrained(target)
    return str(target)
