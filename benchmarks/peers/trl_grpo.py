"""GRPO by TRL, sampling with transformers: its vLLM modes need a GPU."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peer import Clock, arguments
from trl import GRPOConfig, GRPOTrainer

SAMPLES_PER_PROMPT = 8


def main() -> None:
    """Trains on samples of up to 128 tokens; the reward is their length."""
    work, clock = arguments(), Clock()

    def length(completions: list[str], **_: Any) -> list[float]:
        clock.add(samples=len(completions))
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(
        model=str(work.model),
        reward_funcs=length,
        args=GRPOConfig(
            model_init_kwargs=work.model_settings(),
            num_generations=SAMPLES_PER_PROMPT,
            max_completion_length=128,
            beta=0.001,
            **work.settings(),
        ),
        train_dataset=Dataset.from_list(work.rows("prompts")),
        processing_class=work.tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    clock.report(work)


if __name__ == "__main__":
    main()
