"""Local training and evaluation of clients: one by one with plain PEFT, or a cohort stacked on one base."""
