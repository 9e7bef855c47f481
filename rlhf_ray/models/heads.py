"""The networks that are trained: a language model, a critic, both on one trunk, or a reward model.

All of them are called alike: (tokens [R, N], position_ids [R, N], wanted [R, N], temperature, entropy) ->
(log-probabilities [M] of the wanted tokens in row order, their entropies [M], values [R, N] after each token), with
None for what was not asked for and what the network does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_ray.algorithms.logprobs import (
    Entropy,
    projected_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhf_ray.models.attention import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head: TypeAlias = Literal["none", "value", "both", "score"]
NetworkOutput: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class ValueHead(nn.Module):
    """A linear map from hidden states [R, N, H] to values [R, N]; it starts at zero, so the first values are 0."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, N] values in float32 or wider."""
        values: Tensor = self.linear(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


class OutputLayer(nn.Linear):
    """A model's output layer that, told which tokens are wanted, gives their log-probabilities instead of logits.

    They are computed inside the layer's call, around which ZeRO 3 gathers its weight.
    """

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        tokens: Tensor | None = None,
        wanted: Tensor | None = None,
        temperature: float = 1.0,
        entropy: Entropy = "off",
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits [R, N, V], or log-probabilities and entropies [M] of the wanted tokens."""
        if tokens is None or wanted is None:
            return super().forward(hidden)
        return projected_logprobs(
            hidden, self.weight, self.bias, tokens, wanted, temperature=temperature, entropy=entropy
        )


class LanguageModel(nn.Module):
    """A causal language model by itself.

    Attributes:
        projects: log-probabilities come from its output layer, a chunk at a time; else from all logits at once, which
            is for models that do more to their logits.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.projects = ends_in_projection(language_model)
        if self.projects:
            language_model.get_output_embeddings().__class__ = OutputLayer

    def forward(
        self, tokens: Tensor, position_ids: Tensor, wanted: Tensor, temperature: float, entropy: Entropy
    ) -> NetworkOutput:
        """Log-probabilities and entropies only."""
        return *self._judge(tokens, position_ids, wanted, temperature, entropy, with_states=False)[:2], None

    def _judge(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        wanted: Tensor,
        temperature: float,
        entropy: Entropy,
        *,
        with_states: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities, entropies, and the last hidden states [R, N, H]; None where nobody asks for them."""
        # Packing needs exactly this: no attention mask and no cache, else rows of a pack see each other.
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": position_ids, "use_cache": False}
        inputs |= rows_of(self.language_model, position_ids)
        if self.projects:
            hidden = self.language_model.base_model(**inputs).last_hidden_state
            output_layer = self.language_model.get_output_embeddings()
            return *output_layer(hidden, tokens, wanted, temperature, entropy), hidden
        keep = _predicting_positions(wanted)
        output = self.language_model(**inputs, logits_to_keep=keep, output_hidden_states=with_states)
        logits, tokens, wanted = output.logits, tokens[:, keep], wanted[:, keep]
        hidden = output.hidden_states[-1] if with_states else None
        if entropy == "off":
            return token_logprobs(logits, tokens, temperature=temperature)[wanted], None, hidden
        logprobs, entropies = token_logprobs_and_entropy(
            logits, tokens, temperature=temperature, entropy_gradient=entropy == "trained"
        )
        return logprobs[wanted], entropies[wanted], hidden


def _predicting_positions(wanted: Tensor) -> Tensor:
    """[K] positions that need logits: wanted tokens and the ones before them, so neighbours stay neighbours."""
    somewhere = wanted.any(0)
    needed = somewhere | pad(somewhere, (0, 1))[1:]
    needed[0] |= ~needed.any()
    return needed.nonzero().squeeze(1)


class ValueModel(nn.Module):
    """A critic: the trunk of a causal language model and a value head."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = language_model.base_model
        self.value_head = ValueHead(hidden_size(language_model), language_model.dtype)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, wanted: Tensor, temperature: float, entropy: Entropy
    ) -> NetworkOutput:
        """Values only."""
        output = self.trunk(
            input_ids=tokens, position_ids=position_ids, use_cache=False, **rows_of(self.trunk, position_ids)
        )
        return None, None, self.value_head(output.last_hidden_state)


class PolicyWithValueHead(LanguageModel):
    """A causal language model whose trunk also carries the critic's value head."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__(language_model)
        self.value_head = ValueHead(hidden_size(language_model), language_model.dtype)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, wanted: Tensor, temperature: float, entropy: Entropy
    ) -> NetworkOutput:
        """Log-probabilities, entropies and values."""
        logprobs, entropies, hidden = self._judge(tokens, position_ids, wanted, temperature, entropy, with_states=True)
        return logprobs, entropies, self.value_head(hidden)


class RewardModel(nn.Module):
    """A sequence-classification model with one logit, which is read after every token."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, tokens: Tensor, position_ids: Tensor, wanted: Tensor, temperature: float, entropy: Entropy
    ) -> NetworkOutput:
        """Values only: the score that a row would have if it ended with this token."""
        output = self.classifier.base_model(
            input_ids=tokens, position_ids=position_ids, use_cache=False, **rows_of(self.classifier, position_ids)
        )
        scores: Tensor = self.classifier.score(output.last_hidden_state).squeeze(-1)
        return None, None, scores.to(torch.promote_types(scores.dtype, torch.float32))


Network: TypeAlias = LanguageModel | ValueModel | PolicyWithValueHead | RewardModel


def build_network(model: PreTrainedModel, head: Head) -> Network:
    """The network of a learner around a language model: logits (`none`), values (`value`), or both.

    With `score` the model is one of `load_reward_model`.
    """
    match head:
        case "none":
            return LanguageModel(model)
        case "value":
            return ValueModel(model)
        case "both":
            return PolicyWithValueHead(model)
        case "score":
            return RewardModel(model)


@torch.no_grad()
def ends_in_projection(model: PreTrainedModel) -> bool:
    """Whether a model's logits are exactly what its output layer makes of its trunk's last hidden states.

    Tried out on a few tokens, with an output layer that gives marks: a model that scales or caps its logits, or the
    states before them, gives other logits or takes other states.
    """
    output_layer, trunk = model.get_output_embeddings(), model.base_model
    if type(output_layer) not in (nn.Linear, OutputLayer) or trunk is model:
        return False
    seen: dict[str, Tensor] = {}

    def mark(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["taken"] = inputs[0]
        seen["given"] = torch.linspace(-1e4, 1e4, output.numel(), device=output.device).view_as(output).to(output.dtype)
        return seen["given"]

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["states"] = output[0]

    hooks = [output_layer.register_forward_hook(mark), trunk.register_forward_hook(note)]
    tokens = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    except TypeError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    pairs = ((seen["given"].float(), logits.float()), (seen["taken"], seen["states"]))
    return len(seen) == 3 and all(one.shape == other.shape and bool((one == other).all()) for one, other in pairs)


def hidden_size(language_model: PreTrainedModel) -> int:
    """Width of the last hidden state."""
    return int(language_model.config.get_text_config().hidden_size)


def switch_off_dropout(network: nn.Module) -> None:
    """Sets every dropout probability of the network to 0; its configuration keeps what it says."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
