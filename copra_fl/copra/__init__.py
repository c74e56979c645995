"""CopRA: the schedule of gates, the gates of a model, and a callback for the Trainer of Transformers."""
