"""The charts of a report, one file per subject.

Each public function turns a `Comparison` (in ``study.py`` a `StudyResults`) into a list of figures, empty if the runs
did not record the data for it.
"""
