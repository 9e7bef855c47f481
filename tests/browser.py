"""A real browser, without a window, that shows a page."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_LIMIT_S = 120


@dataclass(frozen=True)
class Shown:
    """What a browser made of a page: its document after the scripts ran, and what its console said."""

    document: str
    console: list[str]


def find_browser() -> str | None:
    """The path of a browser; None where there is none."""
    return next((path for program in PROGRAMS if (path := shutil.which(program))), None)


def show(page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> Shown:
    """Opens a local page and writes a PNG of its upper part, width by height pixels."""
    browser = find_browser()
    assert browser is not None, f"none of {', '.join(PROGRAMS)} is on the PATH"
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            "--dump-dom",
        ]
        options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run(
            [browser, *options, page.resolve().as_uri()], capture_output=True, text=True, timeout=_LIMIT_S
        )
    assert done.returncode == 0, done.stderr
    return Shown(done.stdout, re.findall(r".*:CONSOLE.*", done.stderr))
