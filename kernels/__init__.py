"""GPU kernels in Triton and CUDA C++, and the plain-torch twin of every kernel."""

if __name__ != "fastcascade.kernels":
    raise ImportError(
        f"import this package as fastcascade.kernels, not as {__name__}, or every kernel exists twice"
    )
