"""Adapters as plain data, tensor name -> tensor, and computations on them without a model."""
