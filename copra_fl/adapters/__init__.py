"""Adapters as plain data: name -> tensor. What is computed on them alone, without a model."""
