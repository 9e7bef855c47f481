"""Adapters in the stages with one role, on the real stack; PPO's are with the tests of PPO, resume and weight sync."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import schema
from rlhf_ray.distributed.placement import Cluster
from tests.integration.test_reward_model import reward_stage
from tests.integration.tiny_runs import run, tiny_ppo
from tests.tiny_models import TEXTS, make_llama

LORA = {"rank": 8, "alpha": 32}


def test_sft_and_a_reward_model_learn_adapters(tmp_path: Path, cluster: Cluster) -> None:
    model = make_llama(tmp_path / "llama")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sft = {
        "method": "sft",
        "policy": {"model": model, "lora": LORA, "zero": 2, "workers": 2, "optimizer": {"learning_rate": 1e-2}},
        "data": {"train": str(texts), "evaluation": {"path": str(texts), "rows": 20}},
        "steps": 20,
        "batch_size": 16,
        "evaluation": {"every": 10},
        "checkpoints": {"every": 10},
    }
    judge = reward_stage(tmp_path, "stage:sft", policy={"lora": LORA | {"result": "adapter"}})
    settings = tiny_ppo(tmp_path).model_dump() | {"stages": [sft, judge]}
    rows = run(schema.Pipeline.model_validate(settings), tmp_path)

    losses = [row["policy/loss"] for row in rows if row["stage"] == "sft" and "policy/loss" in row]
    assert losses[0] > 5
    assert losses[-1] < 3
    # The merged result is a plain model of the base's architecture, and holds what was learnt.
    tuned, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run/sft/model", model))
    assert tuned.state_dict().keys() == base.state_dict().keys()
    ids = AutoTokenizer.from_pretrained(model)(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert tuned(ids, labels=ids).loss < 3.2 < base(ids, labels=ids).loss

    learnt = [row for row in rows if row["stage"] == "reward_model"]
    assert learnt[-1]["evaluation/accuracy"] > 0.9
    folder = tmp_path / "run/reward_model/model"
    assert (folder / "adapter_model.safetensors").stat().st_size < (tmp_path / "llama/model.safetensors").stat().st_size
    assert json.loads((folder / "notes.json").read_text())["score_std"] > 0
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/sft/model", num_labels=1)
    scorer = PeftModel.from_pretrained(head, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    good, bad = ("The film by Anna was long. I loved it,", "The film by Anna was long. I hated it,")
    with torch.no_grad():
        scores = [float(scorer(**tokenizer(text, return_tensors="pt")).logits) for text in (good, bad)]
    assert scores[0] > scores[1]
    saved = [path.stat().st_size for path in (tmp_path / "run/sft/checkpoints").rglob("*model_states.pt")]
    assert saved
    assert max(saved) < (tmp_path / "llama/model.safetensors").stat().st_size / 2
