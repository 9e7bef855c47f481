"""`evaluate` and `generate`: what they hand over, and the mistakes that are found before a model is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlhf_ray import inference
from rlhf_ray.cli import main
from rlhf_ray.config import schema
from rlhf_ray.data.batches import Prompts, Rollouts
from rlhf_ray.distributed.groups import LocalGroup
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.inference import Generation, evaluate, find_model, generate
from rlhf_ray.models.lora import merge_adapter
from rlhf_ray.responses import Responses
from rlhf_ray.trainers.preference_report import report_pairs
from tests.tiny_models import make_classifier, make_gpt2, make_llama, make_reward_model
from tests.unit.trainers.fake_workers import make_rollouts
from tests.unit.trainers.test_reward_model import FakePairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "How?", "chosen": " So.", "rejected": " No."}\n')
    (tmp_path / "prompts.jsonl").write_text('{"question": "How?"}\n')
    (tmp_path / "rewards.py").write_text("def length(prompts, responses, answers):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class FakeInference:
    """Stands for rlhf_ray.inference: notes what it is asked, and fails as told."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: Exception | None = None

    def evaluate(self, model: str, data: Any, *, scorer: Any, address: str | None) -> Any:
        self.asked.append((model, data, scorer, address))
        if self.error:
            raise self.error
        return report_pairs(torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3), FakePairs([]).all())

    def generate(self, asked: Generation, *, address: str | None) -> list[Responses]:
        self.asked.append((asked, address))
        return [
            Responses(name, asked.seed, rollouts=make_rollouts([2] * 5, ids=list(range(5))), scores=None)
            for name in asked.models
        ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeInference:
    found, module = FakeInference(), ModuleType("rlhf_ray.inference")
    module.__dict__.update(evaluate=found.evaluate, generate=found.generate, Generation=Generation)
    monkeypatch.setitem(sys.modules, "rlhf_ray.inference", module)
    return found


def code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_evaluate_prints_and_writes_its_report(
    folder: Path, fake: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rows", "7", "--columns", "prompt=question, chosen=better", "--max-length", "9", "--workers", "2"]
    assert code("evaluate", "org/model", "pairs.jsonl", "--json", "found.json", "--unusable", "drop", *options) == 0
    ((model, data, scorer, address),) = fake.asked
    assert (model, address, scorer.workers) == ("org/model", None, 2)
    assert data.train == (schema.Source(path="pairs.jsonl", rows=7),)
    assert (data.columns.prompt, data.columns.chosen, data.columns.rejected) == ("question", "better", "rejected")
    assert (data.max_length, data.unusable, data.too_long) == (9, "drop", "cut_left")
    assert "accuracy 0.833 (95 % interval" in capsys.readouterr().out
    assert json.loads((folder / "found.json").read_text())["pairs"] == 3


def test_generate_hands_over_what_is_asked(
    folder: Path, fake: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "0.5", "--top-k", "9", "--samples", "2", "--stop", "x", "--stop", "y", "--seed", "4"]
    assert code("generate", "org/a", "--prompt", "How?", "--prompt", "Why?", "--compare", "org/b", *options) == 0
    ((asked, _),) = fake.asked
    assert (asked.models, asked.prompts, asked.seed, asked.beams) == (("org/a", "org/b"), ("How?", "Why?"), 4, None)
    assert asked.sampling == schema.Sampling(temperature=0.5, top_k=9, samples_per_prompt=2, stop=("x", "y"))
    assert asked.reward is None
    assert "prompt 4" in capsys.readouterr().out


def test_with_a_file_only_the_first_responses_are_printed(
    folder: Path, fake: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", "prompts.jsonl", "--columns", "prompt=question", "--output", "found.parquet"]
    assert code("generate", "org/a", *arguments, "--reward", "rewards:length", "--beams", "3", "--chat") == 0
    ((asked, _),) = fake.asked
    assert asked.prompts.columns.prompt == "question"
    assert asked.prompts.chat_template is True
    assert (asked.beams, asked.length_penalty) == (3, 1.0)
    assert asked.reward == schema.FunctionReward(kind="function", function="rewards:length")
    screen = capsys.readouterr().out
    assert "prompt 2" in screen
    assert "prompt 3" not in screen
    assert (folder / "found.parquet").exists()


PROMPT = ("generate", "org/model", "--prompt", "x")
FILE = ("generate", "org/model", "--prompts", "prompts.jsonl")
PAIRS = ("evaluate", "org/model", "pairs.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "org/model"), "got neither of --prompt TEXT and --prompts FILE"),
        ((*PROMPT, "--prompts", "prompts.jsonl"), "got both of --prompt TEXT"),
        (("generate", "org/model", "--prompt", " "), "--prompt: got an empty text"),
        ((*PROMPT, "--rows", "3"), "--rows: has no effect without --prompts"),
        ((*PROMPT, "--length-penalty", "0"), "--length-penalty: has no effect without --beams"),
        ((*PROMPT, "--beams", "2", "--temperature", "0"), "--temperature: has no effect with --beams"),
        ((*PROMPT, "--beams", "2", "--samples", "3"), "--samples: got 3, wanted at most --beams, 2"),
        ((*PROMPT, "--temperature", "0", "--samples", "3"), "at temperature 0 they are all the same"),
        ((*PROMPT, "--top-p", "2"), "--top-p: got 2.0; input should be less than or equal to 1"),
        ((*PROMPT, "--engine", "llm"), "--engine: got 'llm'; input should be 'vllm' or 'hf'"),
        ((*PROMPT, "--reward", "rewards:lenght"), "did you mean 'length'"),
        ((*PROMPT, "--output", "found.csv"), "wanted a file that ends in .parquet"),
        ((*PROMPT, "--output", "nowhere/found.parquet"), "in a folder that does not exist"),
        (("generate", "org/model", "--prompts", "promts.jsonl"), "did you mean `prompts.jsonl`"),
        ((*FILE, "--columns", "promt=question"), "did you mean `prompt`"),
        ((*PAIRS, "--columns", "question"), "wanted NAME=COLUMN"),
        ((*PAIRS, "--too-long", "cut"), "--too-long: got 'cut'"),
        ((*PAIRS, "--json", "."), "--json: got '.', which is a folder"),
        ((*PAIRS, "--rows", "0"), "--rows"),
    ],
)
def test_wrong_options_exit_2(
    arguments: tuple[str, ...], words: str, folder: Path, fake: FakeInference, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(*arguments) == 2
    assert words in capsys.readouterr().err
    assert fake.asked == []


def test_messages_speak_of_options(folder: Path, fake: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = DataError("my.data.jsonl:3: too long (data.max_length); or set data.too_long to drop")
    assert code(*PAIRS) == 2
    assert capsys.readouterr().err == "my.data.jsonl:3: too long (--max-length); or set --too-long to drop\n"


# What is known only with the model's files at hand, still before its weights are loaded


def evaluated(model: str, **settings: Any) -> None:
    data = schema.PreferenceData.model_validate({"train": "pairs.jsonl"} | settings)
    evaluate(model, data, scorer=schema.ModelReward(kind="model", model=model), address="nowhere:1")


def answered(model: str, prompts: Any = ("How?",), **changes: Any) -> None:
    settings: dict[str, Any] = {
        "models": (model,),
        "prompts": prompts,
        "chat": False,
        "sampling": schema.Sampling(),
        "beams": None,
        "length_penalty": 1.0,
        "seed": 1,
        "generator": schema.Generator(),
        "reward": None,
    }
    generate(Generation(**settings | changes), address="nowhere:1")


def test_models_and_data_that_are_wrong_for_evaluate(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        evaluated("./nowhere")
    with pytest.raises(ConfigError, match="got LlamaForCausalLM with 2 outputs, wanted a reward model"):
        evaluated(make_llama(folder / "llama"))
    with pytest.raises(ConfigError, match="DistilBertForSequenceClassification with 2 outputs"):
        evaluated(make_classifier(folder / "classifier"))
    reward = make_reward_model(folder / "reward", tokenizer=str(folder / "llama"))
    (folder / "pairs.jsonl").write_text('{"prompt": "How?", "chosen": " So.", "rejected": " So."}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:1: .*the same answer"):
        evaluated(reward)


@pytest.mark.parametrize("limits", [{"tokens": 20, "positions": 30}, {"tokens": 30, "positions": 20}])
def test_no_pair_is_longer_than_the_reward_model_or_its_tokenizer_takes(folder: Path, limits: dict[str, int]) -> None:
    reward = make_reward_model(folder / "reward", tokenizer=make_llama(folder / "llama"))
    change_json(folder / "reward/tokenizer_config.json", model_max_length=limits["tokens"])
    change_json(folder / "reward/config.json", max_position_embeddings=limits["positions"])
    row = {"prompt": "?" * 40, "chosen": " So.", "rejected": " No."}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="tokens, wanted at most 20"):
        evaluated(reward, too_long="error")


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class CuttingScorer:
    """Cuts every text but one."""

    def score(self, rollouts: Rollouts) -> torch.Tensor:
        self.truncated = len(rollouts) - 1
        return torch.zeros(len(rollouts))

    def counts(self) -> dict[str, int]:
        return {"truncated": self.truncated}


def test_texts_that_the_scorer_cut_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    scores = inference._score(LocalGroup(CuttingScorer()), make_rollouts([2] * 3, ids=[0, 1, 2]))
    assert scores.tolist() == [0, 0, 0]
    assert "2 of 3 texts were cut on the left" in " ".join(capsys.readouterr().err.split())


def test_models_and_prompts_that_are_wrong_for_generate(folder: Path) -> None:
    llama = make_llama(folder / "llama")
    reward = make_reward_model(folder / "reward", tokenizer=llama)
    with pytest.raises(ConfigError, match="got a reward model or classifier, wanted a language model"):
        answered(reward)
    with pytest.raises(ConfigError, match=r"prompt 2: got 151 tokens, wanted at most 128: .* takes 256"):
        answered(llama, ("How?", "?" * 150 + "\t"))
    with pytest.raises(ConfigError, match="--max-new-tokens: got 256, wanted less than 256"):
        answered(llama, sampling=schema.Sampling(max_new_tokens=256))
    with pytest.raises(DataError, match="prompt 1: chat messages need a chat template"):
        answered(llama, chat=True)
    with pytest.raises(ConfigError, match="got LlamaForCausalLM with 2 outputs, wanted a reward model"):
        answered(llama, reward=schema.ModelReward(kind="model", model=llama))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """The prompts that each model is to answer, in place of its answers."""
    found: list[Prompts] = []

    @contextmanager
    def no_cluster(address: str | None) -> Iterator[None]:
        yield

    def answer(cluster: None, asked: Generation, model: str, prompts: Prompts) -> Rollouts:
        found.append(prompts)
        return make_rollouts([2] * len(prompts.ids), ids=prompts.ids)

    monkeypatch.setattr(inference, "_cluster", no_cluster)
    monkeypatch.setattr(inference, "_generate", answer)
    return found


@pytest.mark.parametrize(
    ("too_long", "other", "ids", "words"),
    [
        ("drop", "short", [0, 2], "1 of 3 prompts left out"),
        ("cut_left", "short", [0, 2], "1 of 3 prompts left out"),
        ("cut_left", "as_short", [0, 1, 2], ""),
        ("drop", "as_short", [0, 2], ""),
    ],
)
def test_models_are_compared_on_what_they_read_alike(
    too_long: str,
    other: str,
    ids: list[int],
    words: str,
    folder: Path,
    written: list[Prompts],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("long", "short", "as_short"):
        make_llama(folder / name)
    for name in ("short", "as_short"):
        change_json(folder / name / "config.json", max_position_embeddings=140)
    rows = [{"prompt": prompt} for prompt in ("How?", "?!" * 30, "Why?")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = schema.PromptData.model_validate({"train": "prompts.jsonl", "too_long": too_long})
    answered("short", data, models=("long" if other == "short" else other, "short"))
    assert [prompts.ids for prompts in written] == [ids, ids]
    assert written[0].token_ids == written[1].token_ids
    screen = " ".join(capsys.readouterr().err.split())
    assert words in screen
    assert bool(words) == ("read them alike" in screen)


def test_nothing_that_two_models_read_alike(folder: Path, written: list[Prompts]) -> None:
    for name in ("long", "short"):
        make_llama(folder / name)
    change_json(folder / "short/config.json", max_position_embeddings=140)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "?!" * 30}) + "\n")
    data = schema.PromptData.model_validate({"train": "prompts.jsonl", "too_long": "cut_right"})
    with pytest.raises(ConfigError, match="--compare: the models read no prompt alike"):
        answered("", data, models=("long", "short"))
    assert written == []


def test_a_model_is_found_in_the_folder_of_its_stage_or_run(folder: Path) -> None:
    make_llama(folder / "run/sft/model")
    make_reward_model(folder / "run/reward_model/model")
    assert find_model("run", scores=False) == "run/sft/model"
    assert find_model("run", scores=True) == "run/reward_model/model"
    assert find_model("run/sft", scores=False) == "run/sft/model"
    assert find_model("org/name", scores=False) == "org/name"
    with pytest.raises(ConfigError, match="got a directory without a language model; wanted a Hugging Face model"):
        find_model(str(folder), scores=False)


def test_the_last_stage_of_a_run_gives_the_model(folder: Path) -> None:
    for number, stage in enumerate(("second", "first")):
        make_llama(folder / "run" / stage / "model")
        os.utime(folder / "run" / stage / "model", (number, number))
    assert find_model("run", scores=False) == "run/first/model"
    stages = "".join(f"- {{name: {name}, method: sft}}\n" for name in ("first", "second", "to_come"))
    (folder / "run/config.yaml").write_text(f"run_dir: run\nstages:\n{stages}")
    assert find_model("run", scores=False) == "run/second/model"


def test_an_adapter_becomes_a_whole_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_gpt2(folder / "gpt2")
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    adapted.save_pretrained(folder / "adapter")
    tokens = torch.tensor([[5, 6, 7]])
    expected = adapted(tokens).logits
    merged = merge_adapter(str(folder / "adapter"), folder / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged).eval()(tokens).logits
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits).abs().max()) > 1e-2
    assert (folder / "merged" / "tokenizer_config.json").exists()
    # Prompts are checked with the base's files, before the weights are merged.
    with monkeypatch.context() as patched:
        patched.setattr(inference, "merge_adapter", None)
        with pytest.raises(ConfigError, match=r"prompt 1: got .* adapter takes 256"):
            answered("adapter", ("?!" * 150,))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "./nowhere"})
    )
    with pytest.raises(ConfigError, match=r"base cannot be loaded: ./nowhere: no such directory"):
        merge_adapter(str(folder / "adapter"), folder / "again")
    with pytest.raises(ConfigError, match="got a peft adapter, wanted a whole reward model"):
        evaluated("adapter")
