"""Triton kernels for NVIDIA and AMD GPUs, and for the CPU through Triton's interpreter."""
