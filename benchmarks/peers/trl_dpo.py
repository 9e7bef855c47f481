"""DPO by TRL. Variants: plain, precomputed (the reference's log-probabilities, whose cost is not counted)."""

from __future__ import annotations

from datasets import Dataset
from peer import Clock, arguments, counting
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Trains on the pairs."""
    work, clock = arguments(), Clock()
    trainer = counting(
        DPOTrainer,
        clock,
        lambda inputs: {"pairs": len(inputs["input_ids"]) / 2, "tokens": float(inputs["attention_mask"].sum())},
    )(
        model=str(work.model),
        args=DPOConfig(
            model_init_kwargs=work.model_settings(),
            precompute_ref_log_probs=work.variant == "precomputed",
            **work.settings(),
        ),
        train_dataset=Dataset.from_list(work.rows("pairs")),
        processing_class=work.tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    clock.report(work)


if __name__ == "__main__":
    main()
