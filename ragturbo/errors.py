"""The exceptions that ragturbo raises on purpose.

A message states the problem, the value that caused it, and what to do.
"""

from __future__ import annotations


class RagTurboError(Exception):
    """Base class of all exceptions below."""


class InvalidRequest(RagTurboError, ValueError):
    """An argument is invalid. Later requests are not affected.

    Args:
        option: the name of the argument, where there is one.
    """

    def __init__(self, message: str = "", *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class UnknownOption(InvalidRequest, TypeError):
    """An argument that does not exist. The message suggests the nearest name, or what to use instead."""


class ModelError(RagTurboError):
    """A model folder, checkpoint or adapter cannot be used."""


class DatabaseError(RagTurboError):
    """A retrieval database cannot be used."""


class DatabaseCorrupt(DatabaseError):
    """A file does not match its manifest. The message names the file and the record."""


class DatabaseMismatch(DatabaseError):
    """The database was built with another encoder, layout or key than the model's. The message names both."""


class GenerationError(RagTurboError):
    """A valid request failed while it ran."""


class NonFiniteOutput(GenerationError):
    """The model produced NaN or infinity, which would decode to a black image."""


class OutOfDeviceMemory(GenerationError):
    """The request did not fit in device memory; smaller batches may."""


class DeviceLost(GenerationError):
    """The device failed (illegal access, reset). The Generator cannot be used again; restart the process."""


class Overloaded(RagTurboError):
    """The request was refused because of load.

    Args:
        reason: "queue_full", or "deadline" if the estimated wait exceeds the request's timeout.
        retry_after: seconds after which there is likely to be room.
    """

    def __init__(self, message: str, *, reason: str = "queue_full", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


class DeadlineExceeded(RagTurboError, TimeoutError):
    """The request's timeout passed before its result was ready."""
