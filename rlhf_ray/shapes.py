"""Shapes in signatures.

B: rows of a batch. T: positions of the longest row, prompt and response together. V: vocabulary.
H: hidden size. M: tokens that are asked for.
Rows are right-padded and index t speaks of token t: its log-probability, the value before it,
its reward, its advantage. Position 0 is never a trained token.
"""

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

TokenIds: TypeAlias = Int[Tensor, "B T"]
TokenFloat: TypeAlias = Float[Tensor, "B T"]
TokenMask: TypeAlias = Bool[Tensor, "B T"]
TokenLogits: TypeAlias = Float[Tensor, "B T V"]
LastHidden: TypeAlias = Float[Tensor, "B T H"]
WantedFloat: TypeAlias = Float[Tensor, " M"]
SequenceFloat: TypeAlias = Float[Tensor, " B"]
SequenceInt: TypeAlias = Int[Tensor, " B"]
SequenceMask: TypeAlias = Bool[Tensor, " B"]
Scalar: TypeAlias = Float[Tensor, ""]
