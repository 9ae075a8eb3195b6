"""Launch of a Triton kernel, with errors that name the kernel."""

from __future__ import annotations

from typing import Any

from triton.runtime.errors import OutOfResources, TritonError

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, compiled for these arguments on the first use.

    Raises:
        RuntimeError: the kernel does not compile, or needs more than the device has; names the kernel.

    Example:
        launch(pool_kernel, (programs,), x, out, count, KIND=constants, num_warps=4)
    """
    try:
        kernel[grid](*arguments, **constants)
    except OutOfResources as error:
        raise RuntimeError(
            f"the Triton kernel {kernel.fn.__name__} needs {error.required} of {error.name} and this device "
            f"has {error.limit}; try precision='fp16' or another backend"
        ) from error
    except TritonError as error:
        raise RuntimeError(f"the Triton kernel {kernel.fn.__name__} failed: {error}") from error
