"""Load the results of runs, summarize them over seeds, and show them as tables, figures and a page."""
