"""The list of backends, and the choice of the one that runs a plan.

A backend is a module with an object ``BACKEND`` that implements
:class:`fastcascade.backends.interface.Backend`. It is imported on first use. An import that fails is an
error; a missing device is a reason that the backend reports.
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
    "MODULES",
    "NAMES",
    "choose_backend",
    "load_backend",
]

MODULES = {
    "cuda": "fastcascade.backends.gpu.cuda",
    "triton": "fastcascade.backends.gpu.triton",
    "cpu": "fastcascade.backends.cpu",
    "reference": "fastcascade.backends.reference",
}
"""Every backend and its module, in the order in which "auto" tries them: fastest first, "reference" last."""

NAMES = tuple(MODULES)


def load_backend(name: str) -> Backend:
    """Import one backend.

    Raises:
        InvalidArgument: a name that is not in :data:`NAMES`.

    Example:
        >>> load_backend("reference").unavailable_reason() is None
        True
    """
    if name not in MODULES:
        raise InvalidArgument(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(MODULES)}")
    return cast(Backend, import_module(MODULES[name]).BACKEND)


def choose_backend(name: str, plan: Plan | None, *, precision: Precision, device: torch.device) -> Backend:
    """The backend to lower with.

    Args:
        name: one of :data:`NAMES`, or "auto". "auto" is the backend that the environment's
            FASTCASCADE_BACKEND names, or else the first that can run the plan. A named backend is never
            replaced by another.
        plan: None before there is one: then what could run no plan at all is refused.

    Raises:
        InvalidArgument: unknown backend or precision.
        BackendUnavailable: the named backend, or with "auto" every backend, cannot run the plan; quotes the
            reasons.
    """
    if precision not in get_args(Precision):
        raise InvalidArgument(f"unknown precision {precision!r}; expected one of {get_args(Precision)}")
    name = os.environ.get("FASTCASCADE_BACKEND", "auto") if name == "auto" else name
    reasons = []
    for candidate in MODULES if name == "auto" else (name,):
        backend = load_backend(candidate)
        reason = backend.unavailable_reason() or backend.unsupported_reason(
            plan, precision=precision, device=device
        )
        if reason is None:
            return backend
        reasons.append(f"backend {candidate!r} cannot run this plan at {precision} on {device}: {reason}")
    raise BackendUnavailable("; ".join(reasons))
