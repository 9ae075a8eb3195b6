"""The way to run stages that the environment forces.

``FASTCASCADE_STAGES`` names one way for all stages. A stage that cannot run in this way is an error.
"""

from __future__ import annotations

import os

from fastcascade.errors import BackendUnavailable, InvalidArgument

__all__ = ["VARIABLE", "WAYS", "forced_way", "impossible_way"]

VARIABLE = "FASTCASCADE_STAGES"

WAYS = ("resident", "persistent", "layers", "torch")
"""One launch for the cascade; one per stage; one per layer; torch and cuDNN."""


def forced_way() -> str | None:
    """One of :data:`WAYS`, or None if the backend chooses.

    Raises:
        InvalidArgument: the environment names something else.
    """
    way = os.environ.get(VARIABLE, "")
    if way not in ("", *WAYS):
        raise InvalidArgument(f"{VARIABLE} is {way!r}; expected one of {', '.join(WAYS)}")
    return way or None


def impossible_way(way: str, stage: str, reason: str) -> BackendUnavailable:
    """The error for a stage that cannot run in the forced way."""
    return BackendUnavailable(f"{VARIABLE}={way} is impossible for stage {stage!r}: {reason}")
