"""How the Triton kernels are started."""

from __future__ import annotations

from typing import Any

from triton.runtime.errors import OutOfResources, TritonError

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Compile a kernel for these arguments if that has not happened yet, and start it.

    Raises:
        RuntimeError: it cannot be compiled, or needs more than the device has; the message names the kernel.

    Example:
        launch(pool_kernel, (programs,), x, out, count, KIND=constants, num_warps=4)
    """
    try:
        kernel[grid](*arguments, **constants)
    except OutOfResources as error:
        raise RuntimeError(
            f"the Triton kernel {kernel.fn.__name__} needs {error.required} of {error.name} and this device "
            f"has {error.limit}; precision='fp16' needs less, and another backend does without this kernel"
        ) from error
    except TritonError as error:
        raise RuntimeError(f"the Triton kernel {kernel.fn.__name__} failed: {error}") from error
