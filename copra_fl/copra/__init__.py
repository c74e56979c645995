"""CopRA itself: the schedule of gates, the gates of a model, and a callback for Transformers' Trainer."""
