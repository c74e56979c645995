"""Federated data: encode a data set once, hold out test and validation sets, partition the rest over clients."""
