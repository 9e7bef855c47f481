"""PPO by TRL 1.12, the last release that has it."""

from __future__ import annotations

import torch
from datasets import Dataset
from peer import Clock, arguments
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

PAD = "t4095"
"""No prompt has it; TRL tells padding by its token, so it may not be the end of a response."""


def main() -> None:
    """Trains policy and critic on samples of up to 128 tokens, scored by a reward model, against a reference."""
    work, clock = arguments(), Clock()
    dtype = torch.bfloat16 if work.dtype == "bfloat16" else torch.float32
    tokenizer = work.tokenizer()
    tokenizer.pad_token = PAD
    tokenizer.padding_side = "left"
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in work.rows("prompts")]
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(work.folder / "reward", num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype) for _ in range(2))
    settings = work.settings()
    del settings["max_steps"]
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings,
            total_episodes=work.batch * (work.warm + work.steps),
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
            local_rollout_forward_batch_size=work.batch,
            response_length=128,
            stop_token="eos",
            temperature=1.0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[clock],
    )
    trainer.train()
    for number, (units, _, _) in enumerate(clock.marks, start=1):
        units["samples"] = float(number * work.batch)
    clock.report(work)


if __name__ == "__main__":
    main()
