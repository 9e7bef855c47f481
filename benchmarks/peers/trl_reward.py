"""A reward model by TRL."""

from __future__ import annotations

from datasets import Dataset
from peer import Clock, arguments, counting
from trl import RewardConfig, RewardTrainer


def main() -> None:
    """Trains on the pairs."""
    work, clock = arguments(), Clock()
    trainer = counting(
        RewardTrainer,
        clock,
        lambda inputs: {"pairs": len(inputs["input_ids"]) / 2, "tokens": float(inputs["attention_mask"].sum())},
    )(
        model=str(work.model),
        args=RewardConfig(model_init_kwargs=work.model_settings() | {"num_labels": 1}, **work.settings()),
        train_dataset=Dataset.from_list(work.rows("pairs")),
        processing_class=work.tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    clock.report(work)


if __name__ == "__main__":
    main()
