"""Labels in front of lines."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from rlhf_ray.distributed.labels import Labelled, label_output


def test_each_line_has_one_label() -> None:
    stream = io.StringIO()
    labelled = Labelled(stream, "[policy 1]")
    assert labelled.write("one\ntwo") == 7
    labelled.write(" goes on\n\n")
    print("three", 4, file=labelled, flush=True)
    labelled.writelines(["five\n", "six"])
    assert stream.getvalue() == (
        "[policy 1] one\n[policy 1] two goes on\n\n[policy 1] three 4\n[policy 1] five\n[policy 1] six"
    )


def test_the_rest_is_the_stream_itself(capfd: pytest.CaptureFixture[str]) -> None:
    labelled = Labelled(sys.__stderr__, "[a 0]")
    assert labelled.fileno() == sys.__stderr__.fileno()
    assert labelled.encoding == sys.__stderr__.encoding


def test_a_later_label_reaches_streams_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    label_output("[generator 0]")
    handler = logging.StreamHandler(sys.stderr)
    label_output("[generator 1]")
    handler.emit(logging.LogRecord("a", logging.INFO, "a.py", 1, "loaded", None, None))
    print("hello")
    assert (out.getvalue(), err.getvalue()) == ("[generator 1] hello\n", "[generator 1] loaded\n")
