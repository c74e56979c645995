"""Federated data: encode examples once, hold out test and validation sets, partition the rest over clients."""
