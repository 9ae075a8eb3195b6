"""Triton kernels: NVIDIA and AMD GPUs, and the CPU through Triton's interpreter."""
