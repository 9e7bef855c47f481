"""Supervised fine-tuning by TRL. Variants: padded, grouped (rows of similar length together), packed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peer import Clock, arguments, counting
from trl import SFTConfig, SFTTrainer

PACK_TOKENS = 512


def main() -> None:
    """Trains on prompts and answers, the loss on the answers."""
    work, clock = arguments(), Clock()
    variants: dict[str, dict[str, Any]] = {
        "padded": {},
        "chunked": {"loss_type": "chunked_nll"},
        "grouped": {"train_sampling_strategy": "group_by_length"},
        "packed": {"packing": True, "max_length": PACK_TOKENS},
    }
    trainer = counting(SFTTrainer, clock, lambda inputs: {"tokens": _tokens(inputs)})(
        model=str(work.model),
        args=SFTConfig(model_init_kwargs=work.model_settings(), **work.settings(), **variants[work.variant]),
        train_dataset=Dataset.from_list(work.rows("sft")),
        processing_class=work.tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    clock.report(work)


def _tokens(inputs: dict[str, Any]) -> float:
    mask = inputs.get("attention_mask")
    return float(inputs["input_ids"].numel() if mask is None else mask.sum())


if __name__ == "__main__":
    main()
