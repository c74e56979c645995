"""Python API: what the commands `simulate` and `compare` do, for scripts and notebooks.

runs.py       simulate and compare
inputs.py     tables, models and LoRA configurations in memory: files in the cache, and settings
words.py      errors in Python's words

Results are `reporting.results.Run` and `Comparison`. `copra_fl` exports all names that users need.
"""
