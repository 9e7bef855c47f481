"""A report in a real browser: several runs, and texts that would like to be more than text."""

from pathlib import Path

import pytest
from PIL import Image

from rlhf_ray.report.page import write_report
from tests.browser import PROGRAMS, find_browser, show
from tests.unit.report.runs_for_tests import HOSTILE, write_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"none of {', '.join(PROGRAMS)} is on the PATH")


def test_hostile_texts_are_shown_and_never_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", response=HOSTILE), write_run(tmp_path / "<b>two", response=HOSTILE)]
    write_report(runs, tmp_path / "report.html")
    shown = show(tmp_path / "report.html", tmp_path / "report.png", width=900, height=1200, dark=True)
    assert shown.console == []
    assert "<title>one and &lt;b&gt;two · rlhf_ray</title>" in shown.document
    text = shown.document.split('<script type="application/json"')[0]
    assert 'data-theme="dark"' in text
    assert 'data-drawn="true"' in text
    assert "<b>" not in text
    assert text.count("&lt;script&gt;document.title") == 4
    with Image.open(tmp_path / "report.png") as picture:
        colors = {color for count, color in picture.convert("RGB").getcolors(1 << 20) or () if count > 300}
    # The dark ground and cards, and the colours of the two runs.
    assert {(14, 17, 23), (22, 27, 36), (91, 108, 240), (224, 122, 63)} <= colors
