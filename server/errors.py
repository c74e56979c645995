"""The error that stops a federation."""

from __future__ import annotations

from copra_fl.wording import foreign

#: longest message, in characters: it may quote many clients
MAX_MESSAGE = 10_000


class FederationError(RuntimeError):
    """A federation that cannot continue. The message says what happened, where, and what to do.

    It may quote nodes, so it is cut and cleaned as their texts are.
    """

    def __init__(self, message: str) -> None:
        super().__init__(foreign(message, MAX_MESSAGE))
