"""Freed memory goes back to the system."""

import os
import platform
import subprocess
import sys

import numpy as np
import psutil
import pytest

from rlhf_ray.distributed.memory import return_free_memory

PIECES = 3000
PIECE_BYTES = 50_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_lies_between_pieces_in_use_goes_back() -> None:
    pieces = [np.ones(PIECE_BYTES, dtype=np.uint8) for _ in range(PIECES)]
    kept = pieces[::100]
    before = psutil.Process().memory_info().rss
    del pieces
    return_free_memory()
    assert before - psutil.Process().memory_info().rss > PIECES * PIECE_BYTES / 2
    assert all(piece.all() for piece in kept)


THREADS = 4
SCRIPT = f"""
import sys
import threading
import numpy as np
import psutil
from rlhf_ray.distributed.memory import return_free_memory, share_one_arena

if sys.argv[1] == "one":
    share_one_arena()
np.ones(30 << 20, dtype=np.uint8)  # What is freed at its size or below stays in an arena from now on.
before = psutil.Process().memory_info().rss
freed, done = threading.Barrier({THREADS} + 1), threading.Event()

def work():
    pieces = [np.ones({PIECE_BYTES}, dtype=np.uint8) for _ in range(800)]
    pieces.clear()
    freed.wait(60)
    done.wait(60)

threads = [threading.Thread(target=work) for _ in range({THREADS})]
for thread in threads:
    thread.start()
freed.wait(60)
return_free_memory()
print(psutil.Process().memory_info().rss - before)
done.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("arenas", ["one", "many"])
def test_what_threads_have_freed_goes_back_where_they_share_an_arena(arenas: str) -> None:
    """40 MB in each of four threads; with an arena for each they stay, which is why there is one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", SCRIPT, arenas]
    kept = int(subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120).stdout)
    everything = THREADS * 800 * PIECE_BYTES
    assert kept < everything / 10 if arenas == "one" else kept > everything / 4
