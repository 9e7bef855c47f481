"""The loss of supervised fine-tuning. As with PPO's losses, the learner divides the sum once."""

from rlhf_ray.algorithms.masked import masked_sum
from rlhf_ray.shapes import Scalar, TokenFloat, TokenMask


def negative_log_likelihood(logprobs: TokenFloat, mask: TokenMask) -> tuple[Scalar, dict[str, Scalar]]:
    """(-sum of the trained tokens' log-probabilities, no metrics); the unit is the token.

    Args:
        logprobs: log-probabilities of the tokens.
        mask: trained tokens.
    """
    return -masked_sum(logprobs, mask), {}
