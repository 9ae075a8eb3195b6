"""The one family of exceptions. Every message says what came, what was expected and what to do."""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CalibrationError",
    "DataError",
    "FastCascadeError",
    "FileFormatError",
    "InvalidArgument",
    "LoweringError",
    "SaveError",
    "ScaleWarning",
]


class FastCascadeError(Exception):
    """Base of every error that this library raises on purpose."""


class InvalidArgument(FastCascadeError, ValueError):
    """An argument has the wrong shape, dtype, device, range or name."""


class DataError(FastCascadeError):
    """A data set is missing, truncated, corrupt or does not fit the cascade."""


class FileFormatError(FastCascadeError):
    """A saved cascade or plan is missing, corrupt, or written by a newer version."""


class CalibrationError(FastCascadeError):
    """The requested operating point cannot be met or may not be calibrated on these data."""


class BackendUnavailable(FastCascadeError):
    """The backend asked for by name cannot run here, or cannot run this plan."""


class LoweringError(FastCascadeError):
    """A stage cannot be expressed as plan operations where that is required."""


class SaveError(FastCascadeError, OSError):
    """The operating system refused to write: disk full, no permission, a failing device."""


class ScaleWarning(UserWarning):
    """Float images do not have the range that the cascade's normalisation gives."""
