"""Scores: no padding, no batch and no other row changes one; whatever a user's function does wrong has a name."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.distributed.place import Place
from rlhf_ray.errors import ConfigError, WorkerError
from rlhf_ray.workers.reward_functions import check_function
from rlhf_ray.workers.scorers import ClassifierScorer, FunctionScorer, ModelScorer, ReferenceScorer
from tests.tiny_models import make_classifier, make_gpt2, make_llama, make_reward_model

PLACE = Place(role="reward", rank=0, size=1)
PROMPTS = ["The film", "The movie by Anna was", "The story"]
RESPONSES = [" was wonderful. I loved it!", " long.", " by Chen made me cry, and the ending was terrible and long."]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("models")
    policy = make_llama(root / "policy")
    return SimpleNamespace(
        policy=policy,
        gpt2=make_gpt2(root / "gpt2"),
        classifier=make_classifier(root / "classifier"),
        same_tokens=make_reward_model(root / "same_tokens", tokenizer=policy),
        own_tokens=make_reward_model(root / "own_tokens"),
        two_logits=make_reward_model(root / "two_logits", labels=2),
    )


def make_rollouts(
    tokenizer_of: str | None = None,
    prompts: list[str] = PROMPTS,
    responses: list[str] = RESPONSES,
    finished: list[bool] | None = None,
) -> Rollouts:
    if tokenizer_of is None:
        ids = [[[1, 2], [3]] for _ in prompts]
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
        ids = [[tokenizer(p)["input_ids"], tokenizer(r)["input_ids"]] for p, r in zip(prompts, responses, strict=True)]
    sequences = make_sequences([row[0] for row in ids], [row[1] for row in ids])
    return Rollouts(
        sequences=sequences,
        generator_logprobs=torch.zeros(sequences.tokens.shape),
        finished=torch.tensor(finished or [False] * len(prompts)),
        prompts=prompts,
        responses=responses,
        answers=[str(index) for index in range(len(prompts))],
        prompt_ids=torch.arange(len(prompts)) + 70,
        policy_versions=one_version(sequences, 0),
    )


# Reference


@pytest.mark.parametrize("budget", [40, 512])
@pytest.mark.parametrize("name", ["policy", "gpt2"])
def test_reference_gives_the_log_softmax_of_the_scaled_logits(models: SimpleNamespace, name: str, budget: int) -> None:
    path = getattr(models, name)
    rollouts = make_rollouts(path)
    scorer = ReferenceScorer(PLACE, config=schema.Reference(micro_batch_tokens=budget), model=path)
    found = scorer.logprobs(rollouts.sequences, 0.5)

    network = AutoModelForCausalLM.from_pretrained(path).eval()
    mask = rollouts.sequences.response_mask
    for row, length in enumerate(rollouts.sequences.lengths().tolist()):
        tokens = rollouts.sequences.tokens[row, :length]
        with torch.no_grad():
            logprobs = torch.log_softmax(network(tokens[None]).logits[0] / 0.5, -1)
        expected = logprobs[torch.arange(length - 1), tokens[1:]]
        torch.testing.assert_close(found[row, 1:length][mask[row, 1:length]], expected[mask[row, 1:length]])
    assert found.dtype == torch.float32
    assert (found[~mask] == 0).all()


def test_an_answers_log_probability_is_the_same_bits_beside_any_other_pairs(models: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[int]:
        length = int(torch.randint(1, 40, (), generator=generator))
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    prompts = [draw() for _ in range(32)]
    sequences = make_sequences([prompts[row // 2] for row in range(64)], [draw() for _ in range(64)])
    scorer = ReferenceScorer(PLACE, config=schema.Reference(), model=models.policy)
    found = scorer.answer_logprobs(sequences)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scorer.logprobs(sequences, 1.0).sum(1), atol=1e-4, rtol=0)
    order = torch.randperm(32, generator=generator).tolist()
    for pairs in (order[:10], order[10:], order[:1], [3, 3, 30]):
        rows = [2 * pair + side for pair in pairs for side in (0, 1)]
        assert torch.equal(scorer.answer_logprobs(sequences.select(rows)), found[rows])


# Reward models


def last_logits(path: str, rows: list[list[int]]) -> torch.Tensor:
    """One logit for each row, each read alone, so that no padding exists."""
    network = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.stack(
            [network.score(network.model(torch.tensor([row])).last_hidden_state)[0, -1, 0] for row in rows]
        )


def model_scorer(models: SimpleNamespace, name: str, **settings: Any) -> ModelScorer:
    path = getattr(models, name)
    config = schema.ModelReward(kind="model", model=path, **settings)
    return ModelScorer(PLACE, config=config, model=path, policy_tokenizer=models.policy)


def test_a_model_with_the_policys_tokenizer_reads_the_token_ids(models: SimpleNamespace) -> None:
    rollouts = make_rollouts(models.policy)
    scorer = model_scorer(models, "same_tokens")
    lengths = rollouts.sequences.lengths().tolist()
    rows = [row[:n] for row, n in zip(rollouts.sequences.tokens.tolist(), lengths, strict=True)]
    assert not scorer.reads_text
    torch.testing.assert_close(scorer.score(rollouts), last_logits(models.same_tokens, rows))


def test_padding_ids_and_a_row_that_ends_in_the_pad_token_change_nothing(models: SimpleNamespace) -> None:
    pad = 0
    scorer = model_scorer(models, "same_tokens")
    rollouts = make_rollouts(models.policy)
    rollouts = Rollouts(
        **{**vars(rollouts), "sequences": make_sequences([[5, 9], [5, 9, 44, pad, 31, 8]], [[pad], [12, pad, pad]])}
    )
    expected = last_logits(models.same_tokens, [[5, 9, pad], [5, 9, 44, pad, 31, 8, 12, pad, pad]])
    torch.testing.assert_close(scorer.score(rollouts), expected)

    sequences = rollouts.sequences
    other_padding = sequences.tokens.masked_fill(~sequences.attention_mask, 7)
    repadded = Rollouts(
        **{**vars(rollouts), "sequences": type(sequences)(**{**vars(sequences), "tokens": other_padding})}
    )
    torch.testing.assert_close(scorer.score(repadded), expected)


def test_micro_batches_change_nothing(models: SimpleNamespace) -> None:
    rollouts = make_rollouts(models.policy)
    small = model_scorer(models, "own_tokens", micro_batch_tokens=1).score(rollouts)
    torch.testing.assert_close(small, model_scorer(models, "own_tokens").score(rollouts))


def test_a_model_with_its_own_tokenizer_reads_the_text(models: SimpleNamespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.own_tokens)
    rows = tokenizer([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])["input_ids"]
    scorer = model_scorer(models, "own_tokens")
    assert scorer.reads_text
    torch.testing.assert_close(
        scorer.score(make_rollouts(models.policy)), last_logits(models.own_tokens, rows), rtol=1e-4, atol=1e-5
    )


def test_text_that_had_ended_gets_the_models_own_end_token(models: SimpleNamespace) -> None:
    config = schema.ModelReward(kind="model", model=models.same_tokens)
    scorer = ModelScorer(PLACE, config=config, model=models.same_tokens, policy_tokenizer=models.gpt2)
    tokenizer = AutoTokenizer.from_pretrained(models.same_tokens)
    first, second, third = tokenizer([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])["input_ids"]
    expected = last_logits(models.same_tokens, [[*first, tokenizer.eos_token_id], second, third])
    scores = scorer.score(make_rollouts(models.gpt2, finished=[True, False, False]))
    torch.testing.assert_close(scores, expected)


def test_a_row_that_is_too_long_is_cut_on_the_left_and_counted(models: SimpleNamespace) -> None:
    scorer = model_scorer(models, "same_tokens")
    tokens = [[3 + index % 250 for index in range(300)], [4, 5]]
    rollouts = make_rollouts(models.policy, PROMPTS[:2], RESPONSES[:2])
    rollouts = Rollouts(**{**vars(rollouts), "sequences": make_sequences(tokens, [[9], [9]])})
    expected = last_logits(models.same_tokens, [[*tokens[0], 9][-256:], [4, 5, 9]])
    torch.testing.assert_close(scorer.score(rollouts), expected)
    assert scorer.counts() == {"truncated": 1}


def test_scores_are_normalised_by_what_the_model_says(models: SimpleNamespace, tmp_path: Path) -> None:
    rollouts = make_rollouts(models.policy)
    plain = model_scorer(models, "same_tokens").score(rollouts)
    folder = SimpleNamespace(policy=models.policy, judge=str(shutil.copytree(models.same_tokens, tmp_path / "judge")))
    with pytest.raises(ConfigError, match="got None and None"):
        model_scorer(folder, "judge", normalise=True)
    file = tmp_path / "judge" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_mean": 0.5, "score_std": 2.0}))
    torch.testing.assert_close(model_scorer(folder, "judge", normalise=True).score(rollouts), (plain - 0.5) / 2)
    torch.testing.assert_close(model_scorer(folder, "judge").score(rollouts), plain)


def test_a_model_with_two_logits_is_refused(models: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"two_logits.*1 output\(s\), got 2"):
        model_scorer(models, "two_logits")


# Classifiers


def classifier(models: SimpleNamespace, label: str = "POSITIVE", **settings: Any) -> ClassifierScorer:
    config = schema.ClassifierReward(kind="classifier", model=models.classifier, label=label, **settings)
    return ClassifierScorer(PLACE, config=config)


def classifier_logits(models: SimpleNamespace, texts: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(models.classifier)
    network = AutoModelForSequenceClassification.from_pretrained(models.classifier).eval()
    with torch.no_grad():
        return torch.cat([network(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_classifier_outputs(models: SimpleNamespace) -> None:
    rollouts = make_rollouts(models.policy)
    logits = classifier_logits(models, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(classifier(models).score(rollouts), logits[:, 1])
    torch.testing.assert_close(classifier(models, "NEGATIVE").score(rollouts), logits[:, 0])
    probability = classifier(models, output="probability").score(rollouts)
    torch.testing.assert_close(probability, logits.softmax(-1)[:, 1])
    torch.testing.assert_close(classifier(models, output="log_probability").score(rollouts), probability.log())


def test_classifier_reads_the_response_alone_when_asked(models: SimpleNamespace) -> None:
    found = classifier(models, text="response").score(make_rollouts(models.policy))
    torch.testing.assert_close(found, classifier_logits(models, RESPONSES)[:, 1])


def test_a_text_that_is_too_long_is_cut_on_the_left_and_counted(models: SimpleNamespace) -> None:
    scorer = classifier(models)
    rollouts = make_rollouts(models.policy, ["The film " * 60, "The film"], [" was long.", " was long."])
    scores = scorer.score(rollouts)
    # 64 positions: [CLS], 61 tokens of prompt, "was long ." cut to what fits, [SEP].
    tokenizer = AutoTokenizer.from_pretrained(models.classifier)
    tail = tokenizer("The film " * 60 + " was long.", add_special_tokens=False)["input_ids"][-62:]
    network = AutoModelForSequenceClassification.from_pretrained(models.classifier).eval()
    with torch.no_grad():
        expected = network(torch.tensor([[2, *tail, 3]])).logits[0, 1]
    torch.testing.assert_close(scores[0], expected)
    assert scorer.counts() == {"truncated": 1}


def test_a_label_that_the_classifier_has_not_is_named(models: SimpleNamespace) -> None:
    with pytest.raises(
        ConfigError, match=r"no label 'positive'; its labels are NEGATIVE, POSITIVE; did you mean 'POSI"
    ):
        classifier(models, "positive")


# Functions

FUNCTIONS = """
import asyncio, time, torch, numpy as np

def good(prompts, responses, answers):
    return [len(p) + 0.5 for p in prompts]

def as_tensor(prompts, responses, answers, *, scale):
    return torch.tensor([float(a) for a in answers], requires_grad=True) * scale

def as_array(prompts, responses, answers):
    return np.array([True, False, True])[: len(prompts)]

async def asynchronous(prompts, responses, answers):
    await asyncio.sleep(0.2)
    return [float(a) for a in answers]

def returns_coroutine(prompts, responses, answers):
    return asynchronous(prompts, responses, answers)

def raises(prompts, responses, answers):
    if "1" in answers:
        raise KeyError("no such thing")
    return [0.0] * len(prompts)

async def raises_later(prompts, responses, answers):
    await asyncio.sleep(0)
    return raises(prompts, responses, answers)

def fails_for_batches(prompts, responses, answers):
    if len(prompts) > 1:
        raise RuntimeError("too many")
    return [0.0]

def leaves(prompts, responses, answers):
    raise SystemExit(3)

def returns(prompts, responses, answers, *, value):
    return value

def hangs(prompts, responses, answers):
    time.sleep(60)

async def hangs_politely(prompts, responses, answers):
    await asyncio.sleep(60)

async def blocks_the_loop(prompts, responses, answers, *, marker):
    import pathlib
    if not pathlib.Path(marker).exists():
        pathlib.Path(marker).write_text("once")
        time.sleep(60)
    return [1.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    (path / "user_rewards.py").write_text(FUNCTIONS)
    (path / "broken.py").write_text("import json\n1 / 0\n")
    (path / "needs.py").write_text("import a_module_that_is_not_there\n")
    (path / "neighbour.py").write_text("VALUE = 4.0\n")
    (path / "uses_neighbour.py").write_text(
        "import neighbour\ndef four(prompts, responses, answers):\n    return [neighbour.VALUE] * len(prompts)\n"
    )
    (path / "json.py").write_text("def same(prompts, responses, answers):\n    return [7.0] * len(prompts)\n")
    return path


def function_scorer(folder: Path, name: str, *, timeout_s: float = 20.0, **settings: Any) -> FunctionScorer:
    config = schema.FunctionReward(kind="function", function=name, timeout_s=timeout_s, **settings)
    return FunctionScorer(PLACE, config=config, search_path=folder)


def score(folder: Path, name: str, **settings: Any) -> torch.Tensor:
    return function_scorer(folder, f"user_rewards:{name}", **settings).score(make_rollouts())


def test_function_results_in_several_chunks(folder: Path) -> None:
    # Prompts of 8, 21 and 9 letters, scored in chunks of two and one.
    assert score(folder, "good", batch_size=2).tolist() == [8.5, 21.5, 9.5]
    assert score(folder, "as_tensor", batch_size=2, arguments={"scale": 10}).tolist() == [0.0, 10.0, 20.0]
    assert score(folder, "as_array").tolist() == [1.0, 0.0, 1.0]
    assert score(folder, "returns_coroutine").tolist() == [0.0, 1.0, 2.0]
    assert score(folder, "good").dtype == torch.float32


def test_no_rows_no_call(folder: Path) -> None:
    assert function_scorer(folder, "user_rewards:raises").score(make_rollouts().select([])).tolist() == []


def test_asynchronous_chunks_run_together(folder: Path) -> None:
    start = time.monotonic()
    rollouts = make_rollouts(None, ["a"] * 20, ["b"] * 20)
    scores = function_scorer(folder, "user_rewards:asynchronous", batch_size=1).score(rollouts)
    assert scores.tolist() == list(range(20))
    assert time.monotonic() - start < 2.0, "20 chunks of 0.2 s ran one after the other"


@pytest.mark.parametrize("name", ["raises", "raises_later"])
def test_an_exception_names_the_sample(folder: Path, name: str) -> None:
    with pytest.raises(WorkerError, match=r"reward worker 0.*user_rewards:" + name) as caught:
        score(folder, name)
    assert "row 1 (prompt 71, response ' long.')" in str(caught.value)
    assert "KeyError: 'no such thing'" in str(caught.value)
    assert "user_rewards.py, line 2" in str(caught.value)


def test_an_exception_of_the_batch_alone_says_so(folder: Path) -> None:
    with pytest.raises(
        WorkerError, match=r"rows 0 to 2 \(prompts 70, 71, 72\) \(no single sample.*RuntimeError: too many"
    ):
        score(folder, "fails_for_batches")


def test_a_function_that_exits_is_an_error_like_any_other(folder: Path) -> None:
    with pytest.raises(WorkerError, match=r"row 0.*SystemExit: 3"):
        score(folder, "leaves")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, r"got float, wanted a list of 3 numbers for rows 0 to 2"),
        (None, r"got NoneType, wanted a list of 3 numbers"),
        ([1.0, 2.0], r"got 2 numbers, wanted 3 for rows 0 to 2 \(prompts 70, 71, 72\)"),
        ([1.0, None, 2.0], r"got None, wanted a number, for row 1 \(prompt 71"),
        ([1.0, 2.0, "3"], r"got '3', wanted a number, for row 2 \(prompt 72"),
        ([[1.0], [2.0], [3.0]], r"got \[1.0\], wanted a number, for row 0"),
        ([1.0, float("nan"), 2.0], r"got nan, wanted a finite number, for row 1 \(prompt 71"),
        ([1.0, 2.0, 1e300], r"got 1e\+300, wanted a finite number, for row 2"),
    ],
)
def test_a_wrong_result_names_the_sample(folder: Path, value: Any, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        score(folder, "returns", arguments={"value": value})


@pytest.mark.parametrize("name", ["hangs", "hangs_politely"])
def test_a_deadline_names_the_samples_and_the_worker_stays_usable(folder: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"no answer within 0.2 s for rows 0 to 1 \(prompts 70, 71\); raise timeout_s"
    ):
        score(folder, name, timeout_s=0.2, batch_size=2)
    assert time.monotonic() - start < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_a_function_that_blocks_the_event_loop_blocks_no_later_call(folder: Path, tmp_path: Path) -> None:
    scorer = function_scorer(
        folder, "user_rewards:blocks_the_loop", timeout_s=0.5, arguments={"marker": str(tmp_path / "marker")}
    )
    with pytest.raises(WorkerError, match=r"no answer within 0.5 s"):
        scorer.score(make_rollouts())
    assert scorer.score(make_rollouts()).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("user_rewards", {}, "wanted `module:function`"),
        (
            "no_such_module:f",
            {},
            r"no module 'no_such_module'; looked for .*no_such_module.py, then on the Python path",
        ),
        ("user_rewards:god", {}, r"has no function 'god'; did you mean 'good'\?"),
        ("neighbour:f", {}, r"has no function 'f'; it defines no function"),
        ("broken:f", {}, "importing 'broken' failed: ZeroDivisionError"),
        ("needs:f", {}, "No module named 'a_module_that_is_not_there'; install what it needs"),
        ("user_rewards:good", {"scale": 1}, r"keywords prompts, responses, answers, scale; its signature is \(prompts"),
        ("user_rewards:as_tensor", {}, "missing a required argument: 'scale'"),
        ("json:nothing", {}, r"has no function 'nothing'; did you mean|it defines same"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_once(
    folder: Path, function: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_function(function, folder, arguments)


def test_modules_import_their_neighbours_and_shadow_nothing(folder: Path) -> None:
    import json

    assert function_scorer(folder, "uses_neighbour:four").score(make_rollouts()).tolist() == [4.0] * 3
    assert function_scorer(folder, "json:same").score(make_rollouts()).tolist() == [7.0] * 3
    assert json.loads("[1]") == [1]


def test_a_function_on_the_python_path_is_found(folder: Path) -> None:
    check_function("types:SimpleNamespace", folder, {"scale": 1})
