"""Lines of a worker's output begin with its role and rank, whichever library writes them."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Labelled:
    """A text stream whose lines begin with a label, which may be changed; all else is the stream's own."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.label = label
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """Writes the text, and the label in front of each line that it begins."""
        parts = []
        for line in text.splitlines(keepends=True):
            parts.append(f"{self.label} {line}" if self._at_start and line.strip() else line)
            self._at_start = line.endswith("\n")
        self._stream.write("".join(parts))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes each of the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def label_output(label: str) -> None:
    """Puts the label before what this process prints and logs from now on; a later one takes its place."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Labelled):
            stream.label = label
        else:
            setattr(sys, name, Labelled(stream, label))
