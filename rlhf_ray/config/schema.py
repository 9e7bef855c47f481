"""Every setting of rlhf_ray: its name, type, default and meaning. A default exists once, here.

This module imports neither torch nor Ray, so that a wrong file is reported at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_not_boolean)]
Count = Annotated[StrictInt, Field(ge=1)]
CountOrZero = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
DecayRate = Annotated[Number, Field(ge=0, lt=1)]
DType = Literal["float32", "bfloat16"]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""How the bundles of a placement group lie on the nodes."""
STAGE = "stage:"
"""What stands before a stage's name where its result is meant."""


class Section(BaseModel):
    """One section of a pipeline file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


# ---------------------------------------------------------------------------------------- roles


class Workers(Section):
    """How many workers a role has and what each of them gets."""

    workers: Count = 1
    """Number of data-parallel workers, each a Ray actor."""
    cpus: Positive | None = None
    """CPUs per worker; unset: one each, or an equal share where the machine has fewer cores than workers."""
    gpus: NonNegative | None = None
    """GPUs per worker, fractions allowed; unset: one each where the cluster has GPUs, else none."""
    colocate_with: str | None = None
    """A role (policy, critic, reference, generator, reward/NAME) whose i-th worker this role's i-th worker shares the
    GPU with, in equal parts; on a machine without GPUs they share a bundle of cores. Unset: each worker has its own."""
    whole_gpus: StrictBool = False
    """Where `gpus` is unset and there are fewer GPUs than workers: too few is an error, and no GPU is shared."""
    strategy: Strategy | None = None
    """How this role's workers lie on the nodes, in a placement group of their own: PACK on few of them, SPREAD over
    many, STRICT_ where nothing else will do. Unset: with the other roles, by placement.strategy."""
    node_labels: dict[str, str] = {}
    """Labels of the nodes that this role's workers may be on, such as {ray.io/accelerator-type: H100}; a value may be
    !VALUE, in(VALUE, VALUE) or !in(VALUE, VALUE)."""


class NewModel(Section):
    """A fresh, randomly initialised model with a tokenizer trained on the stage's training data."""

    family: Literal["llama", "gpt2"] = "llama"
    """Architecture."""
    size: Literal["tiny", "mini", "small"] = "tiny"
    """tiny: about 1 M parameters; mini: about 5 M; small: about 15 M."""
    vocab_size: Annotated[StrictInt, Field(ge=300, le=65536)] = 512
    """Number of tokens of the byte-level BPE tokenizer that is trained on the data."""
    max_length: Count = 512
    """Longest sequence in tokens."""


class Optimizer(Section):
    """AdamW, its schedule and its gradient clipping."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only."""
    gradient_clip: NonNegative = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises from 0 to its peak."""
    final_ratio: Fraction = 0.0
    """Learning rate at the last step as a share of the peak, for linear and cosine."""


class HeadOptimizer(Optimizer):
    """As Optimizer, with the learning rate of a network whose head is new."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""


class Lora(Section):
    """A low-rank adapter (arXiv:2106.09685) that is trained instead of the whole network."""

    rank: Count = 16
    """Rank of the adapter's matrices."""
    alpha: Positive = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: DecayRate = 0.0
    """Dropout on the adapter's input while training; of every method, also where `dropout` is off."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; unset: all but the output layer."""
    quantise: Literal["none", "nf4"] = "none"
    """nf4: the base's weights in 4 bits (QLoRA), for methods without a generator; needs a GPU, bitsandbytes, ZeRO 0 to
    2 and `result: adapter`, which belongs to the base in 4 bits."""
    result: Literal["merged", "adapter"] = "merged"
    """What the stage leaves in `model/`: a whole model, or a peft adapter directory, which no later stage can start
    from."""


class Learner(Workers):
    """A network trained by DeepSpeed."""

    model: str | NewModel | None = None
    """Hugging Face directory, hub name, `stage:NAME` for the result of an earlier stage, or a fresh model."""
    revision: str | None = None
    """Revision of a hub model: branch, tag or commit."""
    dtype: DType = "float32"
    """Type of the weights in forward and backward passes; bfloat16 keeps float32 master weights."""
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_not_boolean)] = 0
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 gradients as well, 3 parameters as well.
    With bfloat16 it is 2 at least."""
    cpu_offload: StrictBool = False
    """Keep optimizer states in host memory (ZeRO 1 to 3)."""
    offload: StrictBool = False
    """Keep weights, gradients and optimizer states in host memory while the generators sample; wants staleness 0. On a
    CPU nothing is moved: host memory is all there is."""
    activation_checkpointing: StrictBool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: Count | None = None
    """Most tokens in one forward pass; gradients accumulate over the micro-batches of a mini-batch. Unset: 2048 on CPU,
    16384 on GPU."""
    micro_batch_sequences: Count | None = None
    """Most sequences in one forward pass; unset: the token budget alone decides."""
    lora: Lora | None = None
    """Train an adapter on the frozen network; unset: train the whole network."""
    optimizer: Optimizer = Optimizer()
    """Optimizer of this network."""


class Policy(Learner):
    """The network that is trained to follow the reward."""

    model: str | NewModel
    """Hugging Face directory, hub name, `stage:NAME` for the result of an earlier stage, or a fresh model."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; unset: the model's own."""

    @property
    def tokenizer_revision(self) -> str | None:
        """The tokenizer's revision: the model's, where it is the model's own."""
        return None if self.tokenizer else self.revision


class RewardNetwork(Policy):
    """The network that becomes a reward model."""

    optimizer: HeadOptimizer = HeadOptimizer()
    """Optimizer of this network."""


class SampledPolicy(Section):
    """The network that responses are sampled from."""

    model: str
    """Hugging Face directory, hub name, or `stage:NAME` for the result of an earlier stage."""
    revision: str | None = None
    """Revision of a hub model: branch, tag or commit."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; unset: the model's own."""

    @property
    def tokenizer_revision(self) -> str | None:
        """The tokenizer's revision: the model's, where it is the model's own."""
        return None if self.tokenizer else self.revision


class Critic(Learner):
    """The value function of PPO."""

    kind: Literal["network", "value_head"] = "network"
    """A network of its own, or a value head on the policy's trunk (then the settings of a network have no effect)."""
    optimizer: HeadOptimizer = HeadOptimizer()
    """Optimizer of this network."""
    warmup_iterations: CountOrZero = 0
    """First iterations in which only the critic is trained."""


class Generator(Workers):
    """vLLM engines that sample responses."""

    engine: Literal["vllm", "hf"] = "vllm"
    """vLLM, or Hugging Face generate where vLLM has no build (slow)."""
    tensor_parallel: Count = 1
    """GPUs that share one engine's weights."""
    dtype: DType = "float32"
    """Type of the engine's weights."""
    kv_cache_gib: Positive | None = None
    """Memory for the key-value cache; unset: sized for max_sequences on CPU, the rest of memory_share on GPU."""
    memory_share: Annotated[Number, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that the engine may use: of its own part of the GPU, with `sleep` or `colocate_with` of
    the whole."""
    sleep: StrictBool = False
    """Give the GPU's memory back while the learners train; wants staleness 0. On a CPU nothing is moved: host memory is
    all there is."""
    max_sequences: Count = 128
    """Most sequences decoded at once by one engine."""
    prefix_caching: StrictBool = True
    """Keep the keys and values of prompts seen under the present weights: samples of one prompt compute it once."""
    compile: StrictBool = False
    """Compile the model and capture CUDA graphs: slower start, faster decoding on a GPU."""


class Reference(Workers):
    """The frozen network that the KL term is measured against."""

    model: str | None = None
    """Unset: the policy's initial model."""
    revision: str | None = None
    """Revision of a hub model."""
    adapter_off: StrictBool | None = None
    """With policy.lora: the reference is the policy's own network with the adapter switched off, and no weights are
    held for it. Unset: so where the policy has an adapter and `model` is unset."""
    dtype: DType = "float32"
    """Type of the weights."""
    micro_batch_tokens: Count | None = None
    """Most tokens in one forward pass. Unset: 2048 on CPU, 16384 on GPU."""


class _Reward(Workers):
    name: str | None = None
    """Name in the metrics (`reward/<name>_mean`); unset: the kind."""
    weight: Number = 1.0
    """Factor of this score in the sum; 0: the score is reported only."""


class ModelReward(_Reward):
    """A sequence-classification model with one logit; it may have another tokenizer than the policy."""

    kind: Literal["model"]
    """A reward model."""
    model: str
    """Hugging Face directory, hub name, or `stage:NAME` for the result of a reward_model stage."""
    normalise: StrictBool = False
    """Shift and scale scores to mean 0 and spread 1 on the data that a reward_model stage trained it on."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: DType = "float32"
    """Type of the weights."""
    micro_batch_tokens: Count | None = None
    """Most tokens in one forward pass. Unset: 2048 on CPU, 16384 on GPU."""


class ClassifierReward(_Reward):
    """A Hugging Face text-classification model: the score of one label."""

    kind: Literal["classifier"]
    """A text classifier."""
    model: str
    """Hugging Face directory or hub name."""
    label: str
    """The label whose score is the reward, as in the model's id2label."""
    output: Literal["logit", "probability", "log_probability"] = "logit"
    """What is read of that label."""
    text: Literal["prompt_and_response", "response"] = "prompt_and_response"
    """What the classifier reads."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: DType = "float32"
    """Type of the weights."""
    micro_batch_tokens: Count | None = None
    """Most tokens in one forward pass. Unset: 2048 on CPU, 16384 on GPU."""


class FunctionReward(_Reward):
    """The user's function, sync or async: `function(prompts, responses, answers, **arguments) -> list of floats`."""

    kind: Literal["function"]
    """A Python function."""
    function: str
    """`module:function`, found beside the pipeline file or on the Python path."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments for the function."""
    timeout_s: Positive = 60.0
    """Deadline of one call."""
    batch_size: Count = 64
    """Most samples in one call."""


Reward = Annotated[ModelReward | ClassifierReward | FunctionReward, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------- data


class Source(Section):
    """One data set."""

    path: str
    """JSONL, JSONL.gz, Parquet or CSV file, a `datasets` directory, a hub name, `synthetic:reviews` or
    `synthetic:preferences`, or `stage:NAME` for what an earlier collect stage wrote."""
    split: str = "train"
    """Split of a hub name, a `datasets` directory or a synthetic corpus."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""
    rows: Count | None = None
    """Use only the first rows."""
    weight: Positive = 1.0
    """Share of this source when several are mixed: samples are drawn in proportion to the weights."""

    @property
    def stage(self) -> str | None:
        """Name of the collect stage that writes it; None where it is there already."""
        return self.path.removeprefix(STAGE) if self.path.startswith(STAGE) else None


def _as_sources(value: object) -> object:
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in values]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]


class LengthRange(Section):
    """A range of token counts, both ends included."""

    min: Count
    """Shortest."""
    max: Count
    """Longest."""


class PromptColumns(Section):
    """Names of the columns in the data files."""

    prompt: str = "prompt"
    """Prompt: a string, or chat messages (a list of {role, content})."""
    answer: str | None = None
    """Expected answer, handed to reward functions."""


class PromptData(Section):
    """Prompts to sample responses for."""

    train: Sources
    """One source or a list of them; a string is a path."""
    evaluation: Sources | None = None
    """Held-out prompts."""
    columns: PromptColumns = PromptColumns()
    """Names of the columns."""
    chat_template: StrictBool | None = None
    """Put strings into the tokenizer's chat template as a user's message; unset: only rows that are messages."""
    prompt_length: LengthRange | None = None
    """The prompt is the first n tokens of the text, n drawn per sample from this range (the classic IMDB task)."""
    max_prompt_tokens: Count = 512
    """Longest prompt."""
    too_long: Literal["error", "drop", "cut_left", "cut_right"] = "error"
    """What becomes of longer prompts; drops and cuts are counted and reported."""
    shuffle: StrictBool = True
    """Draw prompts in an order shuffled by the seed, anew in every pass over the data."""


class TextColumns(Section):
    """Names of the columns; the ones present decide the form: messages, prompt and response, or text."""

    prompt: str = "prompt"
    """Prompt, not trained on."""
    response: str = "response"
    """Response, trained on."""
    messages: str = "messages"
    """Chat messages; the assistant's are trained on."""
    text: str = "text"
    """Plain text, trained on as a whole."""


class TextData(Section):
    """Texts for supervised fine-tuning."""

    train: Sources
    """One source or a list of them; a string is a path."""
    evaluation: Sources | None = None
    """Held-out texts for the validation loss."""
    columns: TextColumns = TextColumns()
    """Names of the columns."""
    max_length: Count = 512
    """Longest sequence in tokens."""
    too_long: Literal["error", "drop", "cut_left", "cut_right"] = "cut_right"
    """What becomes of longer rows; drops and cuts are counted and reported."""
    train_on_prompt: StrictBool = False
    """Train on prompt tokens as well."""
    shuffle: StrictBool = True
    """Shuffle rows by the seed, anew in every epoch."""


class PreferenceColumns(Section):
    """Names of the columns; without a prompt column chosen and rejected hold whole dialogues."""

    prompt: str = "prompt"
    """Prompt: a string, or chat messages (a list of {role, content})."""
    chosen: str = "chosen"
    """Preferred answer: a string, or chat messages with or without the prompt's in front."""
    rejected: str = "rejected"
    """The other answer, in the same form."""
    margin: str | None = None
    """By how much the chosen answer is better, a number."""


class PreferenceData(Section):
    """Pairs of answers to the same prompt, one preferred to the other."""

    train: Sources
    """One source or a list of them; a string is a path."""
    evaluation: Sources | None = None
    """Held-out pairs."""
    columns: PreferenceColumns = PreferenceColumns()
    """Names of the columns."""
    answer_marker: Annotated[str, Field(min_length=1)] = "\n\nAssistant:"
    """Where there is no prompt column: the last of these in a dialogue stands before the answer."""
    chat_template: StrictBool | None = None
    """Put strings into the tokenizer's chat template as a user's and an assistant's message; unset: only rows that are
    messages."""
    max_length: Count = 512
    """Longest prompt and answer together, in tokens."""
    too_long: Literal["error", "drop", "cut_left", "cut_right"] = "cut_left"
    """What becomes of longer pairs; cut_left cuts the prompt, alike for both answers, cut_right the answers; drops and
    cuts are counted and reported."""
    unusable: Literal["error", "drop"] = "error"
    """What becomes of pairs whose answers are equal or whose prompts differ; drops are counted and reported."""
    shuffle: StrictBool = True
    """Shuffle pairs by the seed, anew in every epoch."""


class Sampling(Section):
    """How responses are sampled."""

    temperature: NonNegative = 1.0
    """Softmax temperature; 0 is greedy and allowed in evaluation only."""
    top_k: CountOrZero = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this probability mass."""
    min_p: Fraction = 0.0
    """Keep tokens with at least this share of the most likely token's probability."""
    repetition_penalty: Positive = 1.0
    """Above 1 makes tokens that have occurred less likely."""
    min_new_tokens: CountOrZero = 0
    """No end of sequence before this many response tokens."""
    max_new_tokens: Count = 128
    """Longest response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    samples_per_prompt: Count = 1
    """Responses for each prompt."""


class CollectSampling(Sampling):
    """As Sampling, with responses to choose from."""

    samples_per_prompt: Count = 4
    """Responses for each prompt."""


# -------------------------------------------------------------------------------------- methods


class Checkpoints(Section):
    """What is kept to resume from."""

    every: CountOrZero = 10
    """Iterations between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    best: str | None = None
    """Metric of the evaluation whose best model is kept in `best/`, such as `evaluation/reward_mean`; a name with
    `loss`, `perplexity` or `error` is minimised."""


class CollectCheckpoints(Checkpoints):
    """As Checkpoints, which are small here: the data themselves lie in `data/`."""

    every: CountOrZero = 1
    """Batches between checkpoints; 0: only at the end."""


class PromptEvaluation(Section):
    """Evaluation on held-out prompts; always before the first and after the last iteration."""

    every: CountOrZero = 10
    """Iterations between evaluations; 0: only first and last."""
    temperature: NonNegative = 0.0
    """Softmax temperature; 0 is greedy."""
    samples_per_prompt: Count = 1
    """Responses for each prompt."""
    max_new_tokens: Count | None = None
    """Longest response; unset: as in training."""


class TextEvaluation(Section):
    """Validation loss on held-out texts; always after the last step."""

    every: CountOrZero = 50
    """Optimizer steps between evaluations; 0: only at the end."""


class PreferenceEvaluation(Section):
    """Accuracy, loss and calibration on held-out pairs; always before the first and after the last step."""

    every: CountOrZero = 50
    """Optimizer steps between evaluations; 0: only first and last."""


class DpoEvaluation(PreferenceEvaluation):
    """Evaluation on held-out pairs, and of samples where there is a generator."""

    prompts: Count = 128
    """Prompts of the held-out pairs that responses are sampled for."""
    temperature: NonNegative = 0.0
    """Softmax temperature of those samples; 0 is greedy. Their KL to the reference is unbiased above 0 only."""
    max_new_tokens: Count = 128
    """Longest response."""


class PreferenceLoss(Section):
    """The loss of DPO and its relatives."""

    kind: Literal["sigmoid", "ipo", "simpo", "orpo"] = "sigmoid"
    """sigmoid (DPO) and ipo hold the policy to a reference; simpo and orpo have none."""
    beta: Positive = 0.1
    """Strength of the reference (sigmoid, ipo), or scale of the rewards (simpo)."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """Share of the preferences taken to be the wrong way round (sigmoid)."""
    gamma: NonNegative = 0.5
    """By how much the chosen reward is to be above the rejected one (simpo)."""
    odds_coefficient: Positive = 0.1
    """Weight of the odds ratio beside the chosen answers' likelihood (orpo)."""
    nll_coefficient: NonNegative = 0.0
    """Weight of the chosen answers' negative log-likelihood per token, added to the loss."""


class PairScoring(Section):
    """What the reward actors' scores do to the training pairs."""

    min_margin: NonNegative | None = None
    """Drop pairs whose chosen answer scores less than this above the rejected one."""
    relabel: StrictBool = False
    """Exchange chosen and rejected where the rejected answer scores higher; before min_margin."""


class Advantages(Section):
    """How advantages are estimated."""

    estimator: Literal["gae", "group_relative", "leave_one_out", "reinforce_baseline"] = "gae"
    """gae needs a critic; the others compare the samples of one prompt and have none."""
    gamma: Fraction = 1.0
    """Discount per token (gae)."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    bootstrap_truncated: StrictBool = False
    """Take the value after the last token of responses cut by the length limit, instead of treating them as ended
    (gae)."""
    divide_by_std: StrictBool = True
    """Divide by the group's standard deviation (group_relative; off: Dr. GRPO)."""
    whiten: StrictBool | None = None
    """Whiten advantages over the batch; unset: on for gae and reinforce_baseline."""


class Kl(Section):
    """The KL term that holds the policy near the reference."""

    place: Literal["reward", "loss", "off"] | None = None
    """In the token rewards, as a term of the loss, or off (no reference is started); unset: reward, but loss for
    reinforce_baseline."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """Per-token estimator; unset: k1 in the reward, k2 in the loss."""
    coefficient: NonNegative = 0.01
    """Weight of the term; the initial weight under the adaptive controller."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive moves the coefficient so that KL per sequence stays near the target."""
    target: Positive | None = None
    """Target of the adaptive controller, nats per sequence."""
    horizon: Positive = 10000.0
    """Samples over which the adaptive controller reacts."""


class PolicyLoss(Section):
    """The clipped surrogate objective."""

    clip_low: Fraction = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[Number, Field(gt=1)] | None = None
    """Bound on the loss of negative advantages, such as 3."""
    entropy_coefficient: NonNegative = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over the mini-batch's tokens, or mean over sequences of each one's mean."""


class ValueLoss(Section):
    """The critic's loss."""

    clip: NonNegative = 0.2
    """New values are clipped to this distance from the old ones; 0 turns it off."""
    coefficient: Positive = 0.1
    """Weight beside the policy loss (value_head only)."""


class Correction(Section):
    """Truncated importance sampling between generator and learner."""

    mode: Literal["auto", "on", "off"] = "auto"
    """auto: on when the engine runs in bfloat16, or with staleness."""
    cap: Positive = 2.0
    """Largest weight of a token."""


class Scores(Section):
    """What happens to a sequence's score before it becomes a reward."""

    clip: NonNegative = 10.0
    """Scores are clipped to plus and minus this; 0 turns it off."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted where a response was cut by the length limit."""


class Sft(Section):
    """Supervised fine-tuning."""

    name: str = "sft"
    """Name of the stage and of its folder."""
    method: Literal["sft"]
    """Supervised fine-tuning."""
    policy: Policy
    """The network that is trained."""
    data: TextData
    """Texts."""
    epochs: Positive | None = None
    """Passes over the data; 1 where neither epochs nor steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 32
    """Sequences per optimizer step, over all workers."""
    packing: StrictBool | None = None
    """Put several sequences in one row, without attention between them; off: rows of similar length side by side.
    Unset: on where the architecture allows it."""
    dropout: StrictBool = False
    """Keep the model's dropout switched on while training."""
    evaluation: TextEvaluation = TextEvaluation()
    """Validation."""
    checkpoints: Checkpoints = Checkpoints()
    """Checkpoints."""


class RewardModel(Section):
    """A reward model, trained on preferences by the Bradley-Terry loss."""

    name: str = "reward_model"
    """Name of the stage and of its folder."""
    method: Literal["reward_model"]
    """A reward model."""
    policy: RewardNetwork
    """The network that is trained: a causal language model, which gets a new head, or a reward model. It becomes a
    sequence-classification model with one logit, which reads a score at a text's last token."""
    data: PreferenceData
    """Preferences."""
    epochs: Positive | None = None
    """Passes over the data; 1 where neither epochs nor steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 32
    """Pairs per optimizer step, over all workers."""
    dropout: StrictBool = False
    """Keep the model's dropout switched on while training."""
    evaluation: PreferenceEvaluation = PreferenceEvaluation()
    """Evaluation."""
    checkpoints: Checkpoints = Checkpoints()
    """Checkpoints."""


class Ppo(Section):
    """Proximal policy optimization, and its relatives without a critic."""

    name: str = "ppo"
    """Name of the stage and of its folder."""
    method: Literal["ppo"]
    """Reinforcement learning from a reward."""
    iterations: Count
    """Outer steps: sample, score, learn, sync."""
    prompts_per_iteration: Count = 64
    """Prompts sampled in each iteration; times samples_per_prompt is the batch."""
    epochs: Count = 1
    """Passes over an iteration's experience."""
    mini_batches: Count = 1
    """Optimizer steps in each epoch."""
    policy: Policy
    """The network that is trained."""
    critic: Critic | None = None
    """The value function; unset: a network started from the policy's model where the estimator is gae."""
    reference: Reference = Reference()
    """The frozen network of the KL term."""
    generator: Generator = Generator()
    """The engines that sample."""
    reward: Annotated[tuple[Reward, ...], Field(min_length=1)]
    """One or more scorers; a sequence's score is their weighted sum."""
    data: PromptData
    """Prompts."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    old_logprobs: Literal["learner", "generator"] = "learner"
    """Recompute the samples' log-probabilities before the update, or take the generator's own (one forward pass
    fewer)."""
    staleness: Annotated[StrictInt, Field(ge=0)] = 0
    """Iterations that sampling runs ahead: 0, each batch is sampled with the weights that then learn from it; 1, the
    next batch is sampled while this one is scored and learnt, with weights that are one update older."""
    interrupted: Literal["wait", "keep", "abandon"] = "wait"
    """Responses that are unfinished when the weights change: wait, the change waits for them; keep, it waits for three
    quarters of the batch, and the others go on with the new weights; abandon, the others begin anew with them. Runs
    are repeatable, but with keep and abandon only where the same checkpoints are written: a checkpoint waits."""
    chunk_samples: Count | None = None
    """Samples of a generator that are scored together while others are still sampled; unset: a quarter of each
    generator's, at least 16, and beyond four generators so many of them together that there are 16 such parts."""
    scores: Scores = Scores()
    """Clipping and penalties of scores."""
    advantages: Advantages = Advantages()
    """Advantage estimation."""
    kl: Kl = Kl()
    """The KL term."""
    policy_loss: PolicyLoss = PolicyLoss()
    """The policy's loss."""
    value_loss: ValueLoss = ValueLoss()
    """The critic's loss."""
    correction: Correction = Correction()
    """Correction for the difference between generator and learner."""
    evaluation: PromptEvaluation = PromptEvaluation()
    """Evaluation on held-out prompts."""
    checkpoints: Checkpoints = Checkpoints()
    """Checkpoints."""

    @property
    def adapter_is_off_in_reference(self) -> bool:
        """Whether the policy's own network with its adapter off is the reference, the default resolved."""
        return _adapter_off(self.policy, self.reference)

    @property
    def kl_place(self) -> Literal["reward", "loss", "off"]:
        """Where the KL term stands, the default resolved."""
        return self.kl.place or ("loss" if self.advantages.estimator == "reinforce_baseline" else "reward")

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        """The per-token estimator, the default resolved."""
        return self.kl.estimator or ("k2" if self.kl_place == "loss" else "k1")

    @property
    def whiten(self) -> bool:
        """Whether advantages are whitened, the default resolved."""
        chosen = self.advantages.whiten
        return self.advantages.estimator in ("gae", "reinforce_baseline") if chosen is None else chosen

    @property
    def corrects_generator(self) -> bool:
        """Whether truncated importance sampling is on, the default resolved."""
        if self.old_logprobs == "generator" or self.correction.mode == "off":
            return False
        return self.correction.mode == "on" or self.generator.dtype == "bfloat16" or self.staleness > 0

    @property
    def attests_rollouts(self) -> bool:
        """Whether samples must have the learner's log-probabilities: no filter is on, and the learner has its own."""
        sampling = self.sampling
        filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 or sampling.repetition_penalty != 1
        return not filtered and sampling.min_new_tokens == 0 and self.old_logprobs == "learner"

    @property
    def critic_role(self) -> Critic | None:
        """The critic's settings, the default resolved; None where the estimator has no critic."""
        if self.advantages.estimator != "gae":
            return None
        return self.critic or Critic()


class Dpo(Section):
    """Direct preference optimization, and its relatives."""

    name: str = "dpo"
    """Name of the stage and of its folder."""
    method: Literal["dpo"]
    """Learning from preferences without a reward model."""
    policy: Policy
    """The network that is trained."""
    data: PreferenceData
    """Preferences."""
    epochs: Positive | None = None
    """Passes over the data; 1 where neither epochs nor steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count = 32
    """Pairs per optimizer step, over all workers."""
    packing: StrictBool | None = None
    """Put several answers in one row, without attention between them; off: rows of similar length side by side.
    Unset: on where the architecture allows it."""
    dropout: StrictBool = False
    """Keep the model's dropout switched on while training."""
    loss: PreferenceLoss = PreferenceLoss()
    """The loss."""
    reference: Reference = Reference()
    """The frozen network of the loss."""
    cache: StrictBool = True
    """Keep the reference's log-probabilities on disk, so that another pass, run or beta finds them."""
    cache_dir: str | None = None
    """Folder of that cache; unset: $RLHF_RAY_CACHE, else ~/.cache/rlhf_ray."""
    reward: tuple[Reward, ...] = ()
    """Scorers of the training pairs (see `pairs`) and of the evaluation's samples; none is needed."""
    pairs: PairScoring = PairScoring()
    """What the scores do to the training pairs."""
    generator: Generator | None = None
    """Engines that sample responses to held-out prompts in each evaluation; unset: nothing is sampled."""
    evaluation: DpoEvaluation = DpoEvaluation()
    """Evaluation."""
    checkpoints: Checkpoints = Checkpoints()
    """Checkpoints."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads a reference."""
        return self.loss.kind in ("sigmoid", "ipo")

    @property
    def scores_pairs(self) -> bool:
        """Whether training pairs are scored before the first step."""
        return self.pairs.relabel or self.pairs.min_margin is not None

    @property
    def adapter_is_off_in_reference(self) -> bool:
        """Whether the policy's own network with its adapter off is the reference, the default resolved."""
        return _adapter_off(self.policy, self.reference)


class Collect(Section):
    """Preferences or texts sampled from a policy and chosen by their scores."""

    name: str = "collect"
    """Name of the stage and of its folder."""
    method: Literal["collect"]
    """Samples responses, scores them, and writes pairs or texts as Parquet."""
    policy: SampledPolicy
    """The network that is sampled."""
    generator: Generator = Generator()
    """The engines that sample."""
    reward: Annotated[tuple[Reward, ...], Field(min_length=1)]
    """One or more scorers; a response's score is their weighted sum."""
    data: PromptData
    """Prompts."""
    sampling: CollectSampling = CollectSampling()
    """How responses are sampled."""
    prompts: Count | None = None
    """Prompts to sample responses for; unset: each one of the data once, in their order."""
    prompts_per_batch: Count = 64
    """Prompts sampled and written at a time; what is written is not sampled again after a stop."""
    keep: Literal["best_worst", "threshold", "best_of_n", "resample"] = "best_worst"
    """Pairs for reward_model and dpo: best_worst, each prompt's best and worst response; threshold, every pair of its
    responses that differs by min_margin. Texts for sft: best_of_n, the best response; resample, responses drawn with
    weights exp(score / beta)."""
    min_margin: NonNegative = 0.0
    """Smallest difference of the scores in a pair; pairs of equal scores are never kept (best_worst, threshold)."""
    max_pairs: Count = 4
    """Most pairs of one prompt, those that differ most (threshold)."""
    beta: Positive = 1.0
    """Temperature of the weights: the coefficient of the KL-regularised objective (resample)."""
    draws: Count = 1
    """Texts drawn for each prompt, with replacement (resample)."""
    unfinished: Literal["drop", "keep"] = "drop"
    """What becomes of responses that the length limit cut."""
    checkpoints: CollectCheckpoints = CollectCheckpoints()
    """Checkpoints."""

    @property
    def writes(self) -> Literal["pairs", "texts"]:
        """What the rows of its data are."""
        return "pairs" if self.keep in ("best_worst", "threshold") else "texts"


def _adapter_off(policy: Policy, reference: Reference) -> bool:
    if reference.adapter_off is not None:
        return reference.adapter_off
    return policy.lora is not None and reference.model is None


Stage = Annotated[Sft | RewardModel | Ppo | Dpo | Collect, Field(discriminator="method")]


# ------------------------------------------------------------------------------------- pipeline


class Placement(Section):
    """Where the actors run, and how long anything may take."""

    address: str | None = None
    """Address of a Ray cluster (`auto`, HOST:PORT); unset: RAY_ADDRESS where set, else a new local Ray."""
    layout: Literal["separate", "colocated", "shared_scorers"] | None = None
    """Stands for settings of the roles, which `plan` prints. separate: each role has whole GPUs of its own; colocated:
    all roles are on the policy's GPUs, and the generator sleeps while the learners train; shared_scorers: reference and
    reward models share the critic's GPUs, or where there is none each other's. Unset: as the roles say."""
    strategy: Strategy = "PACK"
    """Placement group strategy for the workers of roles that have none of their own."""
    transport: Literal["auto", "shared_memory", "gloo", "nccl", "cuda_ipc"] = "auto"
    """How weights travel from learner to generators; auto: shared_memory on one CPU node, gloo across nodes, cuda_ipc
    on one GPU, nccl across GPUs."""
    bucket_mib: Count = 64
    """Size of the buckets that weights travel in; shared memory holds all weights at once where four times as much is
    free there."""
    start_timeout_s: Positive = 300.0
    """Deadline for reserving resources and starting workers."""
    call_timeout_s: Positive = 3600.0
    """Deadline of every call to a worker."""
    sync_timeout_s: Positive = 300.0
    """Deadline of every wait within a transfer of weights."""


class Wandb(Section):
    """Weights & Biases; the key comes from the environment (WANDB_API_KEY)."""

    project: str
    """Project."""
    entity: str | None = None
    """Team or user."""
    name: str | None = None
    """Name of the run; unset: the run folder's name."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl and TensorBoard."""

    wandb: Wandb | None = None
    """Report to Weights & Biases."""


class Pipeline(Section):
    """A pipeline file: stages in order."""

    run_dir: str
    """Folder of this run: config, metrics, rollouts, checkpoints, models."""
    seed: CountOrZero = 1
    """Root of every random number in the run."""
    placement: Placement = Placement()
    """Cluster and deadlines."""
    tracking: Tracking = Tracking()
    """Experiment trackers."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """Methods in order; a file with one method may have its settings at the top instead."""
