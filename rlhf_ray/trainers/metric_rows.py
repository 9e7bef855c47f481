"""Reading metrics.jsonl; apart from writing it, which needs torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
PLAN_FILE = "plan.json"
"""Beside it, what was planned for the run."""

_log = logging.getLogger(__name__)


def read_metrics(run_dir: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order, of one stage or of all; none where there is no file."""
    rows = (row for _, row in metric_rows(run_dir / FILE))
    return [row for row in rows if stage is None or row["stage"] == stage]


def metric_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its row; lines that are no row are skipped (a kill can tear the last one)."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                yield line.rstrip("\n") + "\n", {**row, "stage": str(row["stage"]), "iteration": int(row["iteration"])}
            except (ValueError, TypeError, KeyError):
                _log.warning("%s:%d: not a row of metrics, skipped", path, number)
