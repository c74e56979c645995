"""docs/explanations/findings.md says what the committed results say."""

from __future__ import annotations

from pathlib import Path

from experiments import findings

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "explanations" / "findings.md").read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 4
    assert findings.filled(page) == page, "run `python -m experiments.findings`"
    assert [file for file, _ in findings.images() if not (ROOT / "docs" / "images" / file).exists()] == []
