"""Which backends exist, and which one runs a plan.

A backend is a module that holds one object ``BACKEND`` with the methods of
:class:`fastcascade.backends.interface.Backend`. Modules are imported on first use. An import that fails is an
error; an absent device is not: the backend reports it as a reason.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import cast, get_args

import torch

from fastcascade.backends.interface import Backend, Precision
from fastcascade.errors import BackendUnavailable, InvalidArgument
from fastcascade.lowering.plan import Plan

__all__ = [
    "NAMES",
    "choose_backend",
    "load_backend",
]

_MODULES = {
    "cuda": "fastcascade.backends.gpu.cuda",
    "triton": "fastcascade.backends.gpu.triton",
    "cpu": "fastcascade.backends.cpu",
    "reference": "fastcascade.backends.reference",
}

NAMES = tuple(_MODULES)
"""Every backend, in the order in which "auto" tries them: the fastest first, "reference" last."""


def load_backend(name: str) -> Backend:
    """Import one backend.

    Raises:
        InvalidArgument: a name that is not in :data:`NAMES`.

    Example:
        >>> load_backend("reference").unavailable_reason() is None
        True
    """
    if name not in NAMES:
        raise InvalidArgument(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(NAMES)}")
    return cast(Backend, import_module(_MODULES[name]).BACKEND)


def choose_backend(name: str, plan: Plan, *, precision: Precision, device: torch.device) -> Backend:
    """The backend to lower with.

    Args:
        name: one of :data:`NAMES`, or "auto" for the environment's FASTCASCADE_BACKEND and, without that,
            the first backend that has no reason against it. A named backend is never replaced by another.

    Raises:
        InvalidArgument: unknown backend or precision.
        BackendUnavailable: the named backend, or every backend under "auto", has a reason; it is quoted.
    """
    if precision not in get_args(Precision):
        raise InvalidArgument(f"unknown precision {precision!r}; expected one of {get_args(Precision)}")
    name = os.environ.get("FASTCASCADE_BACKEND", "auto") if name == "auto" else name
    reasons = []
    for candidate in NAMES if name == "auto" else (name,):
        backend = load_backend(candidate)
        reason = backend.unavailable_reason() or backend.unsupported_reason(
            plan, precision=precision, device=device
        )
        if reason is None:
            return backend
        reasons.append(f"backend {candidate!r} cannot run this plan at {precision} on {device}: {reason}")
    raise BackendUnavailable("; ".join(reasons))
