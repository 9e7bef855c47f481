"""Scoring workers: the reference's log-probabilities, and the scores of models, classifiers and functions."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.config import schema
from rlhf_ray.data.batches import Rollouts, Sequences, make_sequences, pad_rows
from rlhf_ray.data.packing import pack, plan_micro_batches, token_budget
from rlhf_ray.distributed.memory import peak_memory_gib
from rlhf_ray.distributed.place import Place
from rlhf_ray.errors import ConfigError, WorkerError
from rlhf_ray.models.attention import attend_by_rows, rows_of
from rlhf_ray.models.forward import Layout, Outputs, answer_totals, forward, plan_answers
from rlhf_ray.models.heads import LanguageModel
from rlhf_ray.models.loading import load_causal_lm, load_classifier, load_tokenizer
from rlhf_ray.models.pairs import forward_pairs
from rlhf_ray.shapes import SequenceFloat, TokenFloat
from rlhf_ray.workers.reward_functions import load_function

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class RewardScorer(Protocol):
    """A worker that judges responses."""

    def score(self, rollouts: Rollouts) -> SequenceFloat:
        """[B] float32 scores, one for each row; every one is finite."""
        ...

    def counts(self) -> dict[str, int]:
        """Events since the start, such as `truncated`: texts that were cut to the model's maximum length."""
        ...

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        ...


class ReferenceScorer:
    """The frozen network that the KL term is measured against."""

    def __init__(self, place: Place, *, config: schema.Reference, model: str, revision: str | None = None) -> None:
        """Loads the model.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        self.place = place
        self._device = _device()
        network = load_causal_lm(model, revision, config.dtype).to(self._device)
        by_rows = attend_by_rows(network)
        self._layout: Layout = "packed" if by_rows else "padded"
        self._joins_answers = by_rows and self._device.type == "cpu"
        self._network = LanguageModel(network)
        self._max_tokens = token_budget(config.micro_batch_tokens, self._device)

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float) -> TokenFloat:
        """[B, T] float32 log-probability of each response token at this temperature; 0 outside response_mask."""
        result = torch.zeros(sequences.tokens.shape)
        lengths = sequences.lengths().tolist()
        plan = plan_micro_batches(lengths, max_tokens=self._max_tokens, padded=self._layout == "padded")
        for rows, outputs in self._judge(sequences, plan, temperature):
            result[rows] = outputs.logprobs.float().cpu()
        return result

    @torch.no_grad()
    def answer_logprobs(self, sequences: Sequences) -> SequenceFloat:
        """[B] float32 log-probability of each row's response at temperature 1; on a CPU see `plan_answers`.

        Args:
            sequences: the answers of one pair are adjacent.
        """
        plan = plan_answers(
            sequences.lengths().tolist(),
            max_tokens=self._max_tokens,
            layout=self._layout,
            device=self._device,
            joined=self._joins_answers,
        )
        judged = self._judge(sequences, plan, 1.0, joined=self._joins_answers)
        return answer_totals(judged, sequences.response_mask)

    def _judge(
        self, sequences: Sequences, plan: list[list[int]], temperature: float, *, joined: bool = False
    ) -> Iterator[tuple[list[int], Outputs]]:
        for rows in plan:
            chosen = sequences.select(rows)
            if joined:
                yield rows, forward_pairs(self._network, chosen, device=self._device, temperature=temperature)
            else:
                yield (
                    rows,
                    forward(self._network, chosen, layout=self._layout, device=self._device, temperature=temperature),
                )

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        return peak_memory_gib()


class ModelScorer:
    """A reward model: a sequence-classification network with one logit, read at the last token of each row.

    Where its tokenizer is not the policy's, the text is tokenised anew (with its own end-of-sequence token where the
    response had ended); else the policy's token ids are used as they are.
    """

    def __init__(
        self,
        place: Place,
        *,
        config: schema.ModelReward,
        model: str,
        policy_tokenizer: str,
        policy_revision: str | None = None,
    ) -> None:
        """Loads the model and its tokenizer.

        Args:
            model: directory or hub name; `config.model` with an earlier stage's name resolved.
            policy_tokenizer: directory or hub name of the tokenizer that the rollouts are in.

        Raises:
            ConfigError: the model cannot be loaded, has not exactly one logit, or does not say what to normalise by.
        """
        self.place = place
        tokenizer = load_tokenizer(model, config.revision)
        network = load_classifier(model, config.revision, config.dtype, num_labels=1)
        self._reader = _Reader(network, tokenizer, config.micro_batch_tokens)
        self._mean, self._spread = _score_statistics(model, network.config) if config.normalise else (0.0, 1.0)
        self.reads_text = tokenizer.get_vocab() != load_tokenizer(policy_tokenizer, policy_revision).get_vocab()

    def score(self, rollouts: Rollouts) -> SequenceFloat:
        """[B] the logit of each prompt and response, normalised where that is asked for."""
        if self.reads_text:
            texts = [prompt + response for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)]
            rows = self._reader.tokenise(texts, ended=rollouts.finished.tolist())
        else:
            sequences = rollouts.sequences
            lengths = sequences.lengths().tolist()
            rows = self._reader.cut([row[:n] for row, n in zip(sequences.tokens.tolist(), lengths, strict=True)])
        return _finite((self._reader.logits(rows)[:, 0] - self._mean) / self._spread, rollouts, self.place)

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        return peak_memory_gib()

    def counts(self) -> dict[str, int]:
        """`truncated`: rows cut on the left to the model's maximum length."""
        return {"truncated": self._reader.truncated}


class ClassifierScorer:
    """A Hugging Face text classifier: the score of one label."""

    def __init__(self, place: Place, *, config: schema.ClassifierReward) -> None:
        """Loads the classifier and its tokenizer.

        Raises:
            ConfigError: the model cannot be loaded, or it has no such label.
        """
        self.place = place
        self._config = config
        network = load_classifier(config.model, config.revision, config.dtype)
        self._label = _label_index(config, network)
        self._reader = _Reader(network, load_tokenizer(config.model, config.revision), config.micro_batch_tokens)
        multi_label = getattr(network.config, "problem_type", None) == "multi_label_classification"
        self._independent = multi_label or network.config.num_labels == 1

    def score(self, rollouts: Rollouts) -> SequenceFloat:
        """[B] logit, probability or log-probability of the label for each text."""
        texts = rollouts.responses
        if self._config.text == "prompt_and_response":
            texts = [prompt + response for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)]
        logits = self._reader.logits(self._reader.tokenise(texts))
        if self._config.output != "logit":
            logits = logsigmoid(logits) if self._independent else logits.log_softmax(-1)
        scores = logits[:, self._label]
        return _finite(scores.exp() if self._config.output == "probability" else scores, rollouts, self.place)

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        return peak_memory_gib()

    def counts(self) -> dict[str, int]:
        """`truncated`: texts cut on the left to the model's maximum length."""
        return {"truncated": self._reader.truncated}


class FunctionScorer:
    """A Python function of the user's, called in chunks, each call with a deadline; async chunks run together."""

    def __init__(self, place: Place, *, config: schema.FunctionReward, search_path: str | Path) -> None:
        """Loads the function.

        Args:
            search_path: folder of the pipeline file.

        Raises:
            ConfigError: no such module or function, or its signature does not fit.
        """
        self.place = place
        self._config = config
        self._function = load_function(config.function, search_path, config.arguments)
        self._is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(
            getattr(self._function, "__call__", None)  # noqa: B004
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, rollouts: Rollouts) -> SequenceFloat:
        """[B] what the function returned for each row.

        Raises:
            WorkerError: a call raised, missed its deadline, or returned something else than one finite number a sample;
                the message names the sample.
        """
        size = self._config.batch_size
        chunks = [range(start, min(start + size, len(rollouts))) for start in range(0, len(rollouts), size)]
        if not self._is_async:
            return torch.cat([torch.zeros(0), *(self._finish(self._start(rollouts, rows)) for rows in chunks)])
        calls = [self._start(rollouts, rows) for rows in chunks]
        try:
            return torch.cat([torch.zeros(0), *(self._finish(call) for call in calls)])
        finally:
            for call in calls:
                call.answer.cancel()

    def memory(self) -> float:
        """Peak memory in GiB: of the GPU where there is one, else of the process."""
        return peak_memory_gib()

    def counts(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def _start(self, rollouts: Rollouts, rows: Sequence[int]) -> _Call:
        def call() -> Any:
            return self._function(
                prompts=[rollouts.prompts[row] for row in rows],
                responses=[rollouts.responses[row] for row in rows],
                answers=[rollouts.answers[row] for row in rows],
                **self._config.arguments,
            )

        if self._is_async:
            answer = asyncio.run_coroutine_threadsafe(_as_coroutine(call), self._running_loop())
        else:
            answer = _in_thread(call)
        return _Call(rollouts, rows, answer, deadline=time.monotonic() + self._config.timeout_s)

    def _finish(self, call: _Call) -> SequenceFloat:
        try:
            result = self._wait(call)
        except _UserCodeError as raised:
            raise self._blame(call, raised.error) from raised.error
        return self._numbers(result, call)

    def _wait(self, call: _Call) -> Any:
        answer = call.answer
        wait([answer], timeout=max(call.deadline - time.monotonic(), 0))
        if not answer.done():
            answer.cancel()
            # A loop that the function blocks would hold up later calls, so the next one gets a new loop.
            self._loop = None
            raise WorkerError(
                f"{self._where()}: no answer within {self._config.timeout_s:g} s for {_name_rows(call)}; "
                "raise timeout_s or lower batch_size"
            )
        error = CancelledError("the call was cancelled") if answer.cancelled() else answer.exception()
        if error is not None:
            raise _UserCodeError(error) from error
        return answer.result()

    def _blame(self, call: _Call, error: BaseException) -> WorkerError:
        """Calls the function again for one sample at a time, to say which one it fails for."""
        deadline = time.monotonic() + self._config.timeout_s
        for row in call.rows if len(call.rows) > 1 else ():
            alone = self._start(call.rollouts, [row])
            try:
                self._wait(_Call(alone.rollouts, alone.rows, alone.answer, deadline))
            except _UserCodeError as raised:
                return WorkerError(f"{self._where()} failed for {_name_rows(alone)}: {_describe(raised.error)}")
            except WorkerError:
                break
        extra = "" if len(call.rows) == 1 else " (no single sample of them was found to cause it)"
        return WorkerError(f"{self._where()} failed for {_name_rows(call)}{extra}: {_describe(error)}")

    def _numbers(self, result: Any, call: _Call) -> SequenceFloat:
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise WorkerError(
                f"{self._where()}: got {type(result).__name__}, wanted a list of {len(call.rows)} numbers "
                f"for {_name_rows(call)}"
            )
        if len(values) != len(call.rows):
            raise WorkerError(
                f"{self._where()}: got {len(values)} numbers, wanted {len(call.rows)} for {_name_rows(call)}"
            )
        for row, value in zip(call.rows, values, strict=True):
            if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
                name = _name_row(call.rollouts, row)
                raise WorkerError(f"{self._where()}: got {value!r}, wanted a number, for {name}")
        scores = torch.tensor([float(value) for value in values], dtype=torch.float32)
        for row, value, score in zip(call.rows, values, scores, strict=True):
            if not torch.isfinite(score):
                raise WorkerError(
                    f"{self._where()}: got {value!r}, wanted a finite number, for {_name_row(call.rollouts, row)}"
                )
        return scores

    def _where(self) -> str:
        return f"{self.place.role} worker {self.place.rank}: reward function {self._config.function!r}"

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="reward function", daemon=True).start()
        return self._loop


class _Call:
    """A call of the user's function for some rows, and its answer to come."""

    def __init__(self, rollouts: Rollouts, rows: Sequence[int], answer: Future[Any], deadline: float) -> None:
        self.rollouts = rollouts
        self.rows = rows
        self.answer = answer
        self.deadline = deadline


class _UserCodeError(Exception):
    """The user's function raised `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


async def _as_coroutine(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await call()


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs the call in a daemon thread, which a call that never returns cannot keep alive at exit."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            result = call()
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
        except BaseException as error:
            _settle(answer, error=error)
        else:
            _settle(answer, result=result)

    threading.Thread(target=run, name="reward function", daemon=True).start()
    return answer


async def _await(result: Any) -> Any:
    return await result


def _settle(answer: Future[Any], *, result: Any = None, error: BaseException | None = None) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def _describe(error: BaseException) -> str:
    """Type, message and the place in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _name_rows(call: _Call) -> str:
    if len(call.rows) == 1:
        return _name_row(call.rollouts, call.rows[0])
    ids = list(dict.fromkeys(int(call.rollouts.prompt_ids[row]) for row in call.rows))
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"rows {call.rows[0]} to {call.rows[-1]} (prompts {shown})"


def _name_row(rollouts: Rollouts, row: int) -> str:
    response = rollouts.responses[row]
    shown = response if len(response) <= 60 else response[:57] + "..."
    return f"row {row} (prompt {int(rollouts.prompt_ids[row])}, response {shown!r})"


def _finite(scores: Tensor, rollouts: Rollouts, place: Place) -> SequenceFloat:
    for row in torch.nonzero(~torch.isfinite(scores)).flatten().tolist():
        raise WorkerError(
            f"{place.role} worker {place.rank}: got the score {float(scores[row])}, wanted a finite number, "
            f"for {_name_row(rollouts, row)}; try dtype: float32"
        )
    return scores


def _score_statistics(model: str, config: PretrainedConfig) -> tuple[float, float]:
    """Mean and spread of the scores on the training data, as a reward_model stage wrote them."""
    mean, spread = getattr(config, "score_mean", None), getattr(config, "score_std", None)
    if mean is None or not spread:
        raise ConfigError(
            f"{model}: normalise wants score_mean and a score_std above 0 in config.json, which a reward_model stage "
            f"writes; got {mean} and {spread}"
        )
    return float(mean), float(spread)


def _label_index(config: schema.ClassifierReward, network: PreTrainedModel) -> int:
    labels = {int(index): str(label) for index, label in network.config.id2label.items()}
    for index, label in labels.items():
        if label == config.label:
            return index
    close = get_close_matches(config.label.lower(), [label.lower() for label in labels.values()], n=1)
    guess = next((label for label in labels.values() if close and label.lower() == close[0]), None)
    raise ConfigError(
        f"{config.model}: no label {config.label!r}; its labels are {', '.join(labels.values())}"
        + (f"; did you mean {guess!r}?" if guess else "")
    )


class _Reader:
    """A sequence-classification network that reads rows of token ids of any length."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> None:
        self._device = _device()
        self._network = network.to(self._device)
        # The logit is read from the states of a row's last token; a classifier without such a head reads it otherwise.
        self._packs = hasattr(network, "score") and attend_by_rows(network)
        self._tokenizer = tokenizer
        # The response stands on the right: what does not fit is cut on the left.
        tokenizer.truncation_side = "left"
        self._max_tokens = token_budget(max_tokens, self._device)
        positions = getattr(network.config, "max_position_embeddings", None)
        self._max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        self.truncated = 0

    def tokenise(self, texts: Sequence[str], *, ended: Sequence[bool] | None = None) -> list[list[int]]:
        """Token ids of each text with the tokenizer's special tokens, and its end token behind texts that had ended."""
        end, start = self._tokenizer.eos_token_id, self._tokenizer.bos_token_id
        rows: list[list[int]] = self._tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        for index, row in enumerate(rows):
            if start is not None and row[:2] == [start, start]:
                row = row[1:]
            closes = ended is not None and ended[index] and end is not None and row[-1:] != [end]
            if len(row) + closes > self._max_length:
                self.truncated += 1
                limit = self._max_length - closes
                row = self._tokenizer(texts[index], truncation=True, max_length=limit)["input_ids"]
            row = [*row, end] if closes else row
            # Some tokenizers make nothing of an empty text; a network needs one token at least.
            rows[index] = row or [next(i for i in (end, start, self._tokenizer.pad_token_id) if i is not None)]
        return rows

    def cut(self, rows: list[list[int]]) -> list[list[int]]:
        """Rows of token ids, cut on the left to the model's maximum length."""
        self.truncated += sum(len(row) > self._max_length for row in rows)
        return [row[-self._max_length :] for row in rows]

    @torch.inference_mode()
    def logits(self, rows: list[list[int]]) -> Tensor:
        """[B, labels] float32; the other rows of a micro-batch and the padding change nothing."""
        result = torch.zeros(len(rows), self._network.config.num_labels)
        plan = plan_micro_batches([len(row) for row in rows], max_tokens=self._max_tokens, padded=not self._packs)
        for group in plan:
            read = self._read_packed if self._packs else self._read_padded
            result[group] = read([rows[row] for row in group]).float().cpu()
        return result

    def _read_packed(self, rows: list[list[int]]) -> Tensor:
        packed = pack(make_sequences(rows, [[]] * len(rows)), range(len(rows)))
        positions = packed.position_ids.to(self._device)
        hidden = self._network.base_model(
            input_ids=packed.tokens.to(self._device),
            position_ids=positions,
            use_cache=False,
            **rows_of(self._network, positions),
        ).last_hidden_state[0]
        ends = torch.tensor([len(row) for row in rows], device=self._device).cumsum(0)
        read: Tensor = self._network.score(hidden[ends - 1])
        return read

    def _read_padded(self, rows: list[list[int]]) -> Tensor:
        ends = torch.tensor([len(row) for row in rows])
        tokens = pad_rows(rows, value=self._tokenizer.pad_token_id)
        mask = (torch.arange(tokens.shape[1])[None] < ends[:, None]).long().to(self._device)
        tokens = tokens.to(self._device)
        head = getattr(self._network, "score", None)
        if head is None:
            logits: Tensor = self._network(input_ids=tokens, attention_mask=mask).logits
            return logits
        # transformers finds the last token by its id, which fails where the pad token is a real one.
        hidden = self._network.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        last: Tensor = head(hidden[torch.arange(len(rows), device=self._device), ends.to(self._device) - 1])
        return last


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
