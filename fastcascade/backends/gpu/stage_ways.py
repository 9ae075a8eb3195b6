"""Which way to run stages the environment asks for.

``FASTCASCADE_STAGES`` names one way for every stage of every cascade; what cannot be obeyed is an error.
"""

from __future__ import annotations

import os

from fastcascade.errors import BackendUnavailable, InvalidArgument

__all__ = ["VARIABLE", "WAYS", "cannot_obey", "forced_way"]

VARIABLE = "FASTCASCADE_STAGES"

WAYS = ("resident", "persistent", "layers", "torch")
"""One launch for the cascade; one for the stage; one for each layer; torch and cuDNN."""


def forced_way() -> str | None:
    """One of :data:`WAYS`, or None where the backend is to choose.

    Raises:
        InvalidArgument: the environment says something else.
    """
    way = os.environ.get(VARIABLE, "")
    if way not in ("", *WAYS):
        raise InvalidArgument(f"{VARIABLE} is {way!r}; expected one of {', '.join(WAYS)}")
    return way or None


def cannot_obey(way: str, stage: str, reason: str) -> BackendUnavailable:
    """The error for a stage that cannot run as the environment wants."""
    return BackendUnavailable(f"{VARIABLE}={way} cannot be obeyed by stage {stage!r}: {reason}")
