"""CUDA C++ kernels for NVIDIA GPUs, compiled with NVRTC; tests run the same sources on CPU threads."""
