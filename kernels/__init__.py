"""Kernels of the GPU backends and the plain-torch twins of all of them.

Imports torch, numpy, triton and cupy only, and each of the latter two only in its own subpackage.
"""

if __name__ != "fastcascade.kernels":
    raise ImportError(
        f"import this package as fastcascade.kernels, not as {__name__}, or every kernel exists twice"
    )
