"""The charts of a report, a file a subject.

Each public function turns a `Comparison` into a list of figures, empty where the runs did not record what it shows.
"""
