"""The error that stops a federation."""


class FederationError(RuntimeError):
    """A federation that cannot continue. The message says what happened, where, and what to do."""
