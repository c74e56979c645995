"""Local training and evaluation: clients one after the other with plain PEFT, or a cohort stacked on one base."""
