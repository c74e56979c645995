"""docs/findings.md says what the committed results say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_committed_results() -> None:
    findings = runpy.run_path(str(ROOT / "experiments" / "findings.py"))
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 4
    assert findings["filled"](page) == page, "run `python experiments/findings.py`"
    assert [file for file, _ in findings["images"]() if not (ROOT / "docs" / "images" / file).exists()] == []
