"""Exceptions and warnings. A message states what was given, what is expected, and the fix."""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CalibrationError",
    "CostWarning",
    "DataError",
    "FastCascadeError",
    "FileFormatError",
    "InvalidArgument",
    "LoweringError",
    "Overloaded",
    "RequestTimeout",
    "SaveError",
    "ScaleWarning",
]


class FastCascadeError(Exception):
    """Base class of the library's errors."""


class InvalidArgument(FastCascadeError, ValueError):
    """An argument has the wrong shape, dtype, device, range or name."""


class DataError(FastCascadeError):
    """A data set is missing, truncated or corrupt, or does not fit the cascade."""


class FileFormatError(FastCascadeError):
    """A saved cascade or plan is missing, corrupt, or written by a newer version."""


class CalibrationError(FastCascadeError):
    """The target cannot be met, or must not be calibrated on these data."""


class BackendUnavailable(FastCascadeError):
    """The requested backend cannot run on this machine or cannot run this plan."""


class LoweringError(FastCascadeError):
    """A stage cannot be lowered to plan operations, which this call requires."""


class SaveError(FastCascadeError, OSError):
    """Writing failed: full disk, missing permission, or a device error."""


class Overloaded(FastCascadeError):
    """A batcher has no room for a request."""


class RequestTimeout(FastCascadeError, TimeoutError):
    """A request waited longer than its timeout and was not run."""


class CostWarning(UserWarning):
    """An operating point costs more than the last network alone."""


class ScaleWarning(UserWarning):
    """Float images do not have the range that the cascade's normalisation gives."""
