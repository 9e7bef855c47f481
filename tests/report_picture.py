"""Takes the README's picture of a report, from a run's folder, by a browser.

python -m tests.report_picture runs/quickstart pipelines/report.png
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from rlhf_ray.report.page import write_report
from tests.browser import show

WIDTH, HEIGHT = 1280, 1338
COLORS = 128


def take(run_dir: Path, picture: Path) -> None:
    """The upper part of the run's report, as a PNG of few colours."""
    with tempfile.TemporaryDirectory() as folder:
        page, full = Path(folder) / "report.html", Path(folder) / "full.png"
        write_report([run_dir], page)
        shown = show(page, full, width=WIDTH, height=HEIGHT)
        assert not shown.console, shown.console
        with Image.open(full) as image:
            image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    take(*map(Path, sys.argv[1:]))
