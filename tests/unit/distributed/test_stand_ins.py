"""Values that travel as bytes through processes that do not know them."""

import pickle
import subprocess
import sys

import torch

from rlhf_ray.data.batches import Sequences, make_sequences
from rlhf_ray.distributed.stand_ins import Sealed

ROWS = make_sequences([[1, 2], [3]], [[4], [5, 6]])


def same(found: Sequences, wanted: Sequences) -> bool:
    return torch.equal(found.tokens, wanted.tokens) and torch.equal(found.response_mask, wanted.response_mask)


def test_a_sealed_value_travels_and_opens() -> None:
    buffers: list[pickle.PickleBuffer] = []
    sealed = Sealed.of(ROWS)
    data = pickle.dumps(sealed, protocol=5, buffer_callback=buffers.append)
    # Tokens and two masks are not in the pickle.
    assert len(buffers) == 3
    assert same(pickle.loads(data, buffers=buffers).copy().open(), ROWS)


def test_numbers_within_are_multiplied() -> None:
    sealed = Sealed.of(ROWS, ROWS.tokens.numpy())
    assert sealed.times(3).open().tokens.tolist() == [[3, 6, 12], [9, 15, 18]]
    assert sealed.times(3).copy().open().tokens.tolist() == [[3, 6, 12], [9, 15, 18]]
    assert same(sealed.open(), ROWS)
    assert same(Sealed.of(ROWS).times(3).open(), ROWS)


def test_the_processes_of_stand_ins_need_no_torch() -> None:
    code = "import sys; import rlhf_ray.distributed.stand_ins; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
