"""The tables of docs/findings.md equal those of the committed results."""

from __future__ import annotations

from experiments import findings


def test_tables_equal_those_of_the_committed_results() -> None:
    page = findings.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 4
    assert findings.filled(page) == page, "run `python -m experiments.findings`"
    assert [file for file, _ in findings.images() if not (findings.IMAGES / file).exists()] == []
