"""The error of both sides."""

from __future__ import annotations


class SecureAggregationError(ValueError):
    """A message or a round that is refused. The text names the node and the reason, and contains no secret."""
