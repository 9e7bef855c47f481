"""The networks that are trained: a language model, a critic, both on one trunk, or a reward model.

All of them are called alike: (tokens [R, N], position_ids [R, N], keep [K]) -> (logits [R, K, V] at the kept
positions, values [R, N] after each token), with None for what the network does not have.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.models.attention import rows_of

Head: TypeAlias = Literal["none", "value", "both", "score"]
NetworkOutput: TypeAlias = tuple[Tensor | None, Tensor | None]


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


class LanguageModel(nn.Module):
    """A causal language model by itself."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, tokens: Tensor, position_ids: Tensor, keep: Tensor) -> NetworkOutput:
        """Logits only."""
        # Packing needs exactly this: no attention mask and no cache, else rows of a pack see each other.
        output = self.language_model(
            input_ids=tokens,
            position_ids=position_ids,
            logits_to_keep=keep,
            use_cache=False,
            **rows_of(self.language_model, position_ids),
        )
        return output.logits, None


class ValueModel(nn.Module):
    """A critic: the trunk of a causal language model and a value head."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = language_model.base_model
        self.value_head = ValueHead(hidden_size(language_model), language_model.dtype)

    def forward(self, tokens: Tensor, position_ids: Tensor, keep: Tensor) -> NetworkOutput:
        """Values only."""
        output = self.trunk(
            input_ids=tokens, position_ids=position_ids, use_cache=False, **rows_of(self.trunk, position_ids)
        )
        return None, self.value_head(output.last_hidden_state)


class PolicyWithValueHead(nn.Module):
    """A causal language model whose trunk also carries the critic's value head."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.value_head = ValueHead(hidden_size(language_model), language_model.dtype)

    def forward(self, tokens: Tensor, position_ids: Tensor, keep: Tensor) -> NetworkOutput:
        """Logits and values."""
        output = self.language_model(
            input_ids=tokens,
            position_ids=position_ids,
            logits_to_keep=keep,
            use_cache=False,
            output_hidden_states=True,
            **rows_of(self.language_model, position_ids),
        )
        return output.logits, self.value_head(output.hidden_states[-1])


class RewardModel(nn.Module):
    """A sequence-classification model with one logit, which is read after every token."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, tokens: Tensor, position_ids: Tensor, keep: Tensor) -> NetworkOutput:
        """Values only: the score that a row would have if it ended with this token."""
        output = self.classifier.base_model(
            input_ids=tokens, position_ids=position_ids, use_cache=False, **rows_of(self.classifier, position_ids)
        )
        scores: Tensor = self.classifier.score(output.last_hidden_state).squeeze(-1)
        return None, scores.to(torch.promote_types(scores.dtype, torch.float32))


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
