"""Work beside the loop: its result, its errors, and no process that waits for it at the end."""

from __future__ import annotations

import threading

import pytest

from rlhf_ray.distributed.background import in_background


def test_the_result_comes_from_another_thread() -> None:
    thread = in_background(threading.current_thread).result(timeout=60)
    assert thread is not threading.current_thread()
    assert thread.daemon


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_whatever_ends_the_work_is_its_error(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("enough")

    with pytest.raises(kind, match="enough"):
        in_background(fail).result(timeout=60)
