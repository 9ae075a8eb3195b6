"""The command line: ``fastcascade train``, ``calibrate``, ``evaluate``, ``predict``, ``bench``, ``report``…

Results go to standard output, progress and messages to standard error. A :class:`FastCascadeError` or an
:class:`OSError` ends a command with one message and exit status 1, a malformed command line with status 2.
Commands import what they need when they run, so that ``--help`` is fast.
"""

from fastcascade.cli.application import app, main

__all__ = ["app", "main"]
