"""Every exception ragturbo raises on purpose, as one tree.

A message says what was wrong, with the value, and what to do about it.
"""

from __future__ import annotations


class RagTurboError(Exception):
    """The root: `except ragturbo.errors.RagTurboError` catches everything the library means to raise."""


class InvalidRequest(RagTurboError, ValueError):
    """The caller asked for something that makes no sense; the next request is unaffected."""


class ModelError(RagTurboError):
    """A model folder, checkpoint or adapter cannot be used."""


class DatabaseError(RagTurboError):
    """A retrieval database cannot be used."""


class DatabaseCorrupt(DatabaseError):
    """Bytes on disk are not what the manifest promises; names the file and the record."""


class DatabaseMismatch(DatabaseError):
    """The database was built with another encoder, layout or key; names both sides."""


class GenerationError(RagTurboError):
    """A well-formed request failed while it ran."""


class NonFiniteOutput(GenerationError):
    """The model produced NaN or infinity. Raised in place of returning a black image."""


class OutOfDeviceMemory(GenerationError):
    """The device could not hold the request; smaller batches may still run."""


class DeviceLost(GenerationError):
    """The device is gone (illegal access, reset). The Generator is dead; restart the process."""


class Overloaded(RagTurboError):
    """The queue is full, or too long for the request's deadline; the request was refused at once."""

    def __init__(self, message: str, *, reason: str = "queue_full", retry_after: float = 0.0) -> None:
        """reason: "queue_full" or "deadline"; retry_after: seconds after which there should be room."""
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


class DeadlineExceeded(RagTurboError, TimeoutError):
    """The request's own timeout passed before its result was ready."""
