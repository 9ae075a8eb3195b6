"""Work in a forked child that may kill itself, and never goes on with the tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def exit_code_of(work: Callable[[], object]) -> int:
    """How a child ends that does this work: 0, 1 for an exception, its own code, or minus a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
