"""Results of runs read back, summarized over seeds, and shown as tables, figures and a page."""
